"""What an error says, for the one line in which another error names its cause."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""How a script ends that only writes pages: a line for each file, or one line about what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def say_written(write: Callable[[], Sequence[Path]]) -> int:
    """Call ``write`` and name the files that it made; exit code 0, or 2 after one line about bad input."""
    try:
        paths = write()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"wrote {os.path.relpath(path)}")
    return 0

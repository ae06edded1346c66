"""The one text of a value and the hash of a text, of which every identity here is made."""

from __future__ import annotations

import hashlib
import json


def canonical(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN; what every hash here is taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_sha256(text: str) -> str:
    """sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()

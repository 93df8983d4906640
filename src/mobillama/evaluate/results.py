"""The record of an evaluation, as others read it; :mod:`mobillama.evaluate.run` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobillama.errors import CorruptDataError
from mobillama.record.files import read_json

FORMAT = "mobillama-evaluation-1"
RESULT_FILE = "result.json"


def read_result(directory: Path) -> dict[str, Any] | None:
    """Return the result of an evaluation; None if there is none, or one that is damaged or cut short."""
    try:
        result = read_json(directory / RESULT_FILE)
    except CorruptDataError:
        return None
    return result if result.get("format") == FORMAT and "status" in result else None

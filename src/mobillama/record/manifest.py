"""Manifests: a JSON file, written last, that names every file of a directory with its size and sha256.

A directory without a whole manifest does not count as written; a directory whose files differ from it is corrupt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.files import sha256_file, write_json

MANIFEST_NAME = "manifest.json"


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"bytes": size, "sha256": digest}}`` of all files below ``directory``, sorted by path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }


def write_manifest(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Describe all files of ``directory`` and commit ``facts`` with them as ``manifest.json``; return what was written."""
    manifest = {**facts, "files": describe_files(directory)}
    write_json(directory / MANIFEST_NAME, manifest)
    return manifest


def read_manifest(directory: Path, expected_format: str) -> dict[str, Any]:
    """Return the manifest of ``directory``.

    Raises:
        UsageError: there is no manifest, or it describes something else than ``expected_format``.
        CorruptDataError: it is not JSON.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{directory}: no {MANIFEST_NAME} there, so this is no finished {expected_format}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptDataError(f"{path}: not valid JSON ({error}); restore it from a copy") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != expected_format:
        raise UsageError(f"{path}: describes {found!r}, not {expected_format!r}; point to the right directory")
    return dict(manifest)


def find_damage(directory: Path, manifest: dict[str, Any]) -> str | None:
    """Return a line that names the first file that differs from the manifest and how, or None when all are whole."""
    for name, fact in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
        if size != fact["bytes"]:
            return f"{path}: {size} bytes, its manifest says {fact['bytes']}"
        if sha256_file(path) != fact["sha256"]:
            return f"{path}: sha256 differs from its manifest"
    return None


def verify_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Hash every file that the manifest names.

    Raises:
        CorruptDataError: a file is missing, truncated or changed; the message names it.
    """
    damage = find_damage(directory, manifest)
    if damage:
        raise CorruptDataError(f"{damage}; restore it from a copy or make {directory} again")

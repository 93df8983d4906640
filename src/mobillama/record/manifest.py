"""Manifests: a JSON file, written last, that names every file of a directory with its size and sha256.

A directory without a whole manifest does not count as written; a directory whose files differ from it is corrupt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.files import read_json, sha256_file, write_json

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
        CorruptDataError: it is not JSON, or lists no files.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(f"{directory}: no {MANIFEST_NAME} there, so this is no finished {expected_format}")
    manifest = read_json(path)
    if manifest.get("format") != expected_format:
        found = manifest.get("format")
        raise UsageError(f"{path}: describes {found!r}, not {expected_format!r}; point to the right directory")
    if not isinstance(manifest.get("files"), dict):
        raise CorruptDataError(f"{path}: lists no files; restore it from a copy")
    return manifest


def find_damage(directory: Path, manifest: dict[str, Any], prefix: str = "") -> str | None:
    """Return a line on the first file (whose name starts with ``prefix``) that differs from the manifest, or None."""
    for name, fact in manifest["files"].items():
        if not name.startswith(prefix):
            continue
        path = directory / name
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
        if size != fact["bytes"]:
            return f"{path}: {size} bytes, its manifest says {fact['bytes']}"
        if sha256_file(path) != fact["sha256"]:
            return f"{path}: sha256 differs from its manifest"
    return None


def verify_manifest(directory: Path, manifest: dict[str, Any], prefix: str = "") -> None:
    """Hash every file that the manifest names (or those whose names start with ``prefix``).

    Raises:
        CorruptDataError: a file is missing, truncated or changed; the message names it.
    """
    damage = find_damage(directory, manifest, prefix)
    if damage:
        raise CorruptDataError(f"{damage}; restore it from a copy or make {directory} again")

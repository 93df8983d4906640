"""Manifests: a JSON file, written last, that names every file of a directory with its size and sha256.

A directory without a whole manifest does not count as written; a directory whose files differ from it is corrupt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.files import read_json, sha256_file, sha256_json, write_json

MANIFEST_NAME = "manifest.json"


def describe_files(directory: Path, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"bytes": size, "sha256": digest}}`` of all files below ``directory``, sorted by path.

    Files in ``known`` were described as they were written and are not read again.
    """
    described = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME):
        name = path.relative_to(directory).as_posix()
        described[name] = (known or {}).get(name) or {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return described


def write_manifest(
    directory: Path, facts: dict[str, Any], known: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Describe all files of ``directory`` and commit ``facts`` with them as ``manifest.json``; return what was written.

    The manifest ends in ``digest``, the sha256 of all else in it.
    """
    manifest = {**facts, "files": describe_files(directory, known)}
    manifest["digest"] = sha256_json(manifest)
    write_json(directory / MANIFEST_NAME, manifest)
    return manifest


def read_manifest(directory: Path, expected_format: str) -> dict[str, Any]:
    """Return the manifest of ``directory``.

    Raises:
        UsageError: there is no manifest, or it describes something else than ``expected_format``.
        CorruptDataError: it is not JSON, or not what was written.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(f"{directory}: no {MANIFEST_NAME} there, so this is no finished {expected_format}")
    manifest = read_json(path)
    found, stated = manifest.get("format"), manifest.pop("digest", None)
    intact = stated == sha256_json(manifest) and isinstance(manifest.get("files"), dict)
    if found != expected_format and (intact or stated is None):
        raise UsageError(f"{path}: describes {found!r}, not {expected_format!r}; point to the right directory")
    if not intact:
        raise CorruptDataError(f"{path}: was changed after it was written; restore it from a copy")
    manifest["digest"] = stated
    return manifest


def find_damage(directory: Path, manifest: dict[str, Any], prefix: str = "", hashed: bool = True) -> str | None:
    """Return a line on the first file (whose name starts with ``prefix``) that differs from the manifest, or None.

    Unless ``hashed``, files are not read: one that is missing or has another size is found, one with other bytes is not.
    """
    for name, fact in manifest["files"].items():
        if not name.startswith(prefix):
            continue
        path = directory / name
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
        if size != fact["bytes"]:
            return f"{path}: {size} bytes, its manifest says {fact['bytes']}"
        if hashed and sha256_file(path) != fact["sha256"]:
            return f"{path}: sha256 differs from its manifest"
    return None


def verify_manifest(directory: Path, manifest: dict[str, Any], prefix: str = "", hashed: bool = True) -> None:
    """Check every file that the manifest names (or those whose names start with ``prefix``), as :func:`find_damage` does.

    Raises:
        CorruptDataError: a file is missing, truncated or changed; the message names it.
    """
    damage = find_damage(directory, manifest, prefix, hashed)
    if damage:
        raise CorruptDataError(f"{damage}; restore it from a copy or make {directory} again")

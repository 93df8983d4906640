"""Verification: hash a data set again, recompute what its manifest says, and make sequences anew from raw documents.

Hashes show that the files are those that the manifest names. Roots and counts, computed again, show that the manifest was
not written later for other files. Only making sequences anew shows that
they are what the raw documents give (:mod:`mobillama.data.rederive`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mobillama.data.dataset import INDEX_NAME, PREPARATION_NAME, dataset_manifest
from mobillama.data.ledger import DOCUMENT, DUPLICATE, EXACT_DUPLICATE, KEPT, NEAR_DUPLICATE
from mobillama.data.store import leaves_path
from mobillama.data.tokenizer import JSON_FILE, MODEL_FILE, id_type, load_tokenizer, tokenizer_digest
from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError, VerificationError
from mobillama.record.manifest import MANIFEST_NAME, find_damage
from mobillama.record.merkle import leaf_digest, merkle_root

if TYPE_CHECKING:
    from mobillama.data.prepare.stages import Progress

_BLOCK_BYTES = 1 << 20
_BYTES_PER_PROCESS = 64 << 20  # hashed before another process would have started
_ROWS_AT_ONCE = 1 << 20
_LISTED = 20
_DUPLICATES = "documents/duplicates.npy"


@dataclass
class Findings:
    """What is wrong: files whose bytes are not the manifest's, and what the manifest says that is not so; a line each."""

    damaged: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Check:
    """The check of a file, to be run in any process, and how many bytes it reads."""

    bytes: int
    run: Callable[[], Findings]


def verify(path: Path, workers: int, progress: Progress) -> dict[str, Any]:
    """Hash all files of a data set again and recompute its roots and counts; all that is wrong is found, then raised.

    Each file is read front to back in blocks by one process. (Threads that hash rows of a few kilobytes hand Python's
    lock to each other at every row, and together are slower than one.)

    Args:
        path: a prepared or imported data directory.
        workers: files read at a time.
        progress: told (stage, bytes done, all bytes).

    Returns:
        ``files``, ``bytes``, ``sequences`` (held-out ones included), ``root``, and ``notes``: lines on files that the
        manifest does not name, except preparation.json and what trace keeps, which are no part of the data.

    Raises:
        UsageError: there is no data set at ``path``; or the system killed a process.
        CorruptDataError: files are missing, truncated or changed; a line for each, 20 at most.
        VerificationError: the files are those of the manifest, but its roots, counts or tokenizer are not theirs.
    """
    manifest = _read_manifest(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    findings = _run(_checks(path, manifest), workers, progress)
    if not findings.damaged:  # else these would fail over what is damaged
        findings.wrong += [*_wrong_tokenizers(path, manifest), *_wrong_duplicates(path, manifest)]
    lines = [*findings.damaged, *_wrong_counts(path, manifest), *findings.wrong]
    listed = "".join(f"\n  {line}" for line in lines[:_LISTED])
    if len(lines) > _LISTED:
        listed += f"\n  … and {len(lines) - _LISTED} more"
    if findings.damaged:
        said = f"{len(findings.damaged)} of {len(files)} files damaged; restore them from a copy or make the data again"
        raise CorruptDataError(f"{path}: {said}{listed}")
    if lines:
        said = "what the manifest says is not so; restore the directory from a copy or make the data again"
        raise VerificationError(f"{path}: {said}{listed}")
    return {
        "files": len(files),
        "bytes": sum(fact["bytes"] for fact in files.values()),
        "sequences": manifest["train_sequences"] + sum(entry["rows"] for entry in manifest["holdout"]),
        "root": manifest["root"],
        "notes": _notes(path, files),
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest, which must be as it was written to the byte: its digest passes over white space and 1E-5."""
    manifest = dataset_manifest(path)
    file = path / MANIFEST_NAME
    if file.read_bytes() != (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode():
        raise CorruptDataError(f"{file}: was changed after it was written; restore it from a copy")
    return manifest


def _notes(path: Path, files: dict[str, Any]) -> list[str]:
    """Return a line for each file that the manifest does not name, or for a whole directory of them."""
    folders = {name.split("/")[0] for name in files if "/" in name}
    unnamed: Counter[str] = Counter()
    for file in sorted(file for file in path.rglob("*") if not file.is_dir()):
        name = file.relative_to(path).as_posix()
        ours = name in (MANIFEST_NAME, PREPARATION_NAME) or name.startswith(f"{INDEX_NAME}/")
        if name not in files and not ours:
            folder, slash, _ = name.partition("/")
            unnamed[name if not slash or folder in folders else folder + slash] += 1
    return [
        f"{path}/{name}: {f'{count} files' if name.endswith('/') else 'a file'} that the manifest does not name"
        for name, count in unnamed.items()
    ]


def _checks(path: Path, manifest: dict[str, Any]) -> list[_Check]:
    """Return the check of every file, in the manifest's order."""
    files = manifest["files"]
    runs: dict[str, Callable[..., Findings]] = {}
    length, dtype = manifest["inputs"]["sequence_length"], manifest["dtype"]
    for entry in [*manifest["chunks"], *manifest["holdout"]]:
        runs[entry["file"]] = functools.partial(
            _check_sequences, shape=(entry["rows"], length), dtype=dtype, root=entry["root"]
        )
        if "labels" in entry:
            rows = [entry["rows_of_source"].get(source["name"], 0) for source in manifest["sources"]]
            runs[entry["labels"]] = functools.partial(_check_labels, rows=rows)
    for source, read in zip(manifest["sources"], manifest["inputs"]["sources"], strict=False):
        runs[f"documents/{source['name']}.npy"] = functools.partial(
            _check_table, source=source, files=len(read["files"]), verdicts=manifest["verdicts"]
        )
    return [
        _Check(fact["bytes"], functools.partial(runs.get(name, _check_file), path, name, fact))
        for name, fact in files.items()
    ]


def _run(checks: list[_Check], workers: int, progress: Progress) -> Findings:
    """Run the checks, in processes where there is enough to do; what they find comes in the order of the checks."""
    total, done = sum(check.bytes for check in checks), 0
    found: dict[int, Findings] = {}

    def finish(number: int, findings: Findings) -> None:
        nonlocal done
        found[number] = findings
        done += checks[number].bytes
        progress("verify files", done, total)

    processes = min(workers, len(checks), 1 + total // _BYTES_PER_PROCESS)
    if processes <= 1:
        for number, check in enumerate(checks):
            finish(number, check.run())
    else:
        # Spawned, for a fork would copy the locks of a progress bar's thread.
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _die_at_interrupt)
        try:
            greatest = sorted(range(len(checks)), key=lambda number: -checks[number].bytes)
            futures = {pool.submit(checks[number].run): number for number in greatest}
            for future in as_completed(futures):
                finish(futures[future], future.result())
        except BrokenProcessPool:
            raise UsageError("the system killed a process of this verification; use fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)
    in_order = [found[number] for number in range(len(checks))]
    return Findings([line for f in in_order for line in f.damaged], [line for f in in_order for line in f.wrong])


def _die_at_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _check_file(path: Path, name: str, fact: dict[str, Any]) -> Findings:
    """Check size and sha256."""
    try:
        damage = find_damage(path, {"files": {name: fact}})
    except OSError as error:
        damage = f"{path / name}: cannot be read ({error.strerror})"
    return Findings([damage] if damage else [])


def _check_array(path: Path, name: str, fact: dict[str, Any], dtype: DTypeLike, shape: tuple[int, ...]) -> Findings:
    """Check size and sha256, and that the file is the array that it should be."""
    findings = _check_file(path, name, fact)
    if not findings.damaged:
        findings.wrong += _wrong_array(path / name, dtype, shape)
    return findings


def _wrong_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> list[str]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy lets through whatever parsing a changed header raises
        return [f"{path}: is no array ({error})"]
    if (array.dtype, array.shape, array.flags.c_contiguous) != (np.dtype(dtype), shape, True):
        return [f"{path}: holds {array.shape} of {array.dtype}, not {shape} of {np.dtype(dtype)}"]
    return []


def _check_sequences(
    path: Path, name: str, fact: dict[str, Any], shape: tuple[int, int], dtype: str, root: str
) -> Findings:
    """Check a sequence file in one pass: sha256, its leaves against the file beside it, and their Merkle root."""
    file, (rows, length) = path / name, shape
    row_bytes = length * np.dtype(dtype).itemsize
    if not file.is_file() or file.stat().st_size != fact["bytes"]:
        return _check_file(path, name, fact)
    if fact["bytes"] < rows * row_bytes:
        return Findings([], [f"{file}: holds fewer than {rows} sequences of {length}"])
    try:
        sha256, computed, differing = _hash_rows(file, fact["bytes"] - rows * row_bytes, row_bytes)
    except OSError as error:
        return Findings([f"{file}: cannot be read ({error.strerror})"])
    if sha256 != fact["sha256"]:
        said = f"{file}: sha256 differs from its manifest"
        if differing:
            said += f"; {len(differing)} of its sequences, the first is {differing[0]}, are not those of its leaves"
        return Findings([said])
    wrong = _wrong_array(file, dtype, shape)
    if differing:
        wrong.append(
            f"{leaves_path(file)}: {len(differing)} leaves, the first is {differing[0]}, are of other sequences"
        )
    if computed.hex() != root:
        wrong.append(f"{file}: the Merkle root of its sequences is not the manifest's")
    return Findings([], wrong)


def _hash_rows(file: Path, header_bytes: int, row_bytes: int) -> tuple[str, bytes, list[int]]:
    """Return a sequence file's sha256, the Merkle root of its rows, and the rows that do not fit the leaves beside it."""
    # Blocks of 2**n rows are whole subtrees, so that the root over their roots is the root over all rows.
    at_once = 1 << max(0, (_BLOCK_BYTES // row_bytes).bit_length() - 1)
    known = _known_leaves(leaves_path(file), (file.stat().st_size - header_bytes) // row_bytes)
    roots: list[bytes] = []
    differing: list[int] = []
    with open(file, "rb") as stored:
        digest = hashlib.sha256(stored.read(header_bytes))
        while block := stored.read(at_once * row_bytes):
            digest.update(block)
            view = memoryview(block)
            leaves = [leaf_digest(view[start : start + row_bytes]) for start in range(0, len(block), row_bytes)]
            first = len(roots) * at_once
            if known and known[32 * first : 32 * (first + len(leaves))] != b"".join(leaves):
                beside = (known[32 * row : 32 * row + 32] for row in range(first, first + len(leaves)))
                pairs = enumerate(zip(leaves, beside, strict=True), first)
                differing += [row for row, (leaf, stands) in pairs if leaf != stands]
            roots.append(merkle_root(leaves))
    return digest.hexdigest(), merkle_root(roots), differing


def _known_leaves(path: Path, rows: int) -> bytes:
    """Return the leaves that a file holds, or nothing where it is missing or too short, which its own check finds."""
    if not path.is_file() or path.stat().st_size < 32 * rows:
        return b""
    with open(path, "rb") as file:
        file.seek(-32 * rows, 2)
        return file.read()


def _check_labels(path: Path, name: str, fact: dict[str, Any], rows: list[int]) -> Findings:
    """Check the labels of an imported chunk: ``rows`` of them for each source."""
    findings = _check_array(path, name, fact, "u1", (sum(rows),))
    if not findings.damaged and not findings.wrong:
        found = np.bincount(np.load(path / name, allow_pickle=False), minlength=len(rows)).tolist()
        if found != rows:
            findings.wrong.append(f"{path / name}: labels {found} rows of the sources, the manifest says {rows}")
    return findings


def _check_table(
    path: Path, name: str, fact: dict[str, Any], source: dict[str, Any], files: int, verdicts: list[str]
) -> Findings:
    """Check a source's table of documents against the manifest's counts of the source."""
    findings = _check_array(path, name, fact, DOCUMENT, (source["documents"],))
    if findings.damaged or findings.wrong:
        return findings
    table = np.load(path / name, mmap_mode="r", allow_pickle=False)
    counts, last = np.zeros(256, np.int64), 0
    for first in range(0, len(table), _ROWS_AT_ONCE):
        part = table[first : first + _ROWS_AT_ONCE]
        ends = part["end"].astype(np.int64)
        lengths = np.diff(ends, prepend=last)
        last = int(ends[-1])
        counts += np.bincount(part["verdict"], minlength=256)
        # A kept document has its end mark at least, another one nothing.
        bad = (lengths < 0) | ((lengths > 0) != (part["verdict"] == 0)) | (part["file"] >= files)
        if bad.any():
            findings.wrong.append(f"{path / name}: document {first + int(bad.argmax())} has an impossible entry")
            return findings
    named = [*verdicts, *(f"unknown verdict {code}" for code in range(len(verdicts), 256))]
    found = {named[code]: int(counts[code]) for code in np.flatnonzero(counts).tolist()}
    for what, stands, stated in (
        ("verdicts", found, {KEPT: source["kept_documents"], **source["verdicts"]}),
        ("tokens", last, source["tokens"]),
    ):
        if stands != stated:
            findings.wrong.append(f"{path / name}: its {what} are {stands}, the manifest says {stated}")
    return findings


def _wrong_counts(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield what the manifest says that contradicts itself."""
    inputs, sources, files = manifest["inputs"], manifest["sources"], manifest["files"]
    chunks, holdout = manifest["chunks"], manifest["holdout"]
    names = [source["name"] for source in sources]
    tables = [files.get(f"documents/{name}.npy", {"sha256": ""})["sha256"] for name in names]
    expected: list[tuple[str, Any, Any]] = [
        ("dtype", id_type(inputs["vocab_size"]).str, manifest["dtype"]),
        ("sources' names", [source["name"] for source in inputs["sources"]], names),
        ("number of chunks", inputs["chunks"], len(chunks)),
        (
            "chunks' files",
            [f"train/chunk-{number:05d}.npy" for number in range(len(chunks))],
            [c["file"] for c in chunks],
        ),
        ("hold-out's sources", names, [entry["source"] for entry in holdout]),
        ("hold-out's files", [f"holdout/{name}.npy" for name in names], [entry["file"] for entry in holdout]),
        ("hold-out's rows", [source["holdout_sequences"] for source in sources], [entry["rows"] for entry in holdout]),
        ("train_sequences", sum(chunk["rows"] for chunk in chunks), manifest["train_sequences"]),
        ("train_sequences", sum(source["dealt_sequences"] for source in sources), manifest["train_sequences"]),
        ("root", merkle_root([bytes.fromhex(chunk["root"]) for chunk in chunks]).hex(), manifest["root"]),
        ("corpus_root", merkle_root([bytes.fromhex(table) for table in tables]).hex(), manifest["corpus_root"]),
    ]
    for source, read in zip(sources, inputs["sources"], strict=False):
        name = source["name"]
        trainable = source["sequences"] - source["holdout_sequences"]
        sequences, left = divmod(source["tokens"], inputs["sequence_length"])
        expected += [
            (f"documents of {name}", source["kept_documents"] + sum(source["verdicts"].values()), source["documents"]),
            (f"sequences of {name}", sequences, source["sequences"]),
            (f"dropped_tokens of {name}", left, source["dropped_tokens"]),
            (f"dealt_sequences of {name}", round(read["weight"] * trainable), source["dealt_sequences"]),
        ]
    needed = [entry["file"] for entry in [*chunks, *holdout]] + [f"documents/{name}.npy" for name in names]
    needed += [leaves_path(Path(entry["file"])).as_posix() for entry in [*chunks, *holdout]]
    expected += [(f"description of {name}", True, False) for name in needed if name not in files]
    for what, found, stated in expected:
        if found != stated:
            yield f"{path / MANIFEST_NAME}: states {what} as {stated}, but it comes out as {found}"


def _wrong_tokenizers(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield how a tokenizer file, which must be whole, differs from the one that the inputs describe."""
    inputs, files = manifest["inputs"], manifest["files"]
    present = [f"tokenizer/{name}" for name in (MODEL_FILE, JSON_FILE) if f"tokenizer/{name}" in files]
    if not present or files[present[0]]["sha256"] != inputs["tokenizer_file"]:
        yield f"{path / 'tokenizer'}: does not hold the file that tokenised the documents"
    for name in present:
        try:
            tokenizer = load_tokenizer(path / name)
            facts = (tokenizer_digest(tokenizer), tokenizer.vocab_size, tokenizer.eos_id)
        except MobiLlamaError as error:
            yield str(error)
            continue
        if facts != (inputs["tokenizer"], inputs["vocab_size"], inputs["eos_id"]):
            yield f"{path / name}: its ids mean something else than those of the tokenizer that the inputs name"


def _wrong_duplicates(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with the table of duplicates, whose tables of documents must be whole."""
    names, verdicts = [source["name"] for source in manifest["sources"]], manifest["verdicts"]
    kinds = (EXACT_DUPLICATE, NEAR_DUPLICATE)
    count = sum(source["verdicts"].get(kind, 0) for source in manifest["sources"] for kind in kinds)
    if _DUPLICATES not in manifest["files"] and not count:  # imported data have none
        return []
    file = path / _DUPLICATES
    wrong = _wrong_array(file, DUPLICATE, (count,))
    for name, source in zip(names, manifest["sources"], strict=True):
        wrong += _wrong_array(path / f"documents/{name}.npy", DOCUMENT, (source["documents"],))
    if wrong:
        return wrong
    tables = [np.load(path / f"documents/{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]
    codes = [verdicts.index(kind) for kind in kinds if kind in verdicts]
    table = np.load(file, mmap_mode="r", allow_pickle=False)
    before = -1
    for first in range(0, count, _ROWS_AT_ONCE):
        part = table[first : first + _ROWS_AT_ONCE]
        places = part["source"].astype(np.int64) << 48 | part["document"].astype(np.int64)
        dropped = _verdicts_of(tables, part["source"], part["document"])
        kept = _verdicts_of(tables, part["of_source"], part["of_document"])
        if not (np.isin(dropped, codes).all() and (kept == 0).all() and (np.diff(places, prepend=before) > 0).all()):
            return [f"{file}: does not fit the verdicts of the documents that it names"]
        before = int(places[-1])
    return []


def _verdicts_of(
    tables: list[NDArray[np.void]], source: NDArray[np.integer], document: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return the verdicts of documents, -1 where there is none such."""
    out = np.full(len(source), -1, np.int64)
    for number, table in enumerate(tables):
        chosen = np.flatnonzero((source == number) & (document < len(table)))
        out[chosen] = table["verdict"][document[chosen]]
    return out

"""Looking after a prepared corpus: what it holds, whether it is whole, and other forms of it."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobillama.console import note, progress, table
from mobillama.data.dataset import Dataset
from mobillama.data.documents import passed_over
from mobillama.data.ledger import EXACT_DUPLICATE, NEAR_DUPLICATE
from mobillama.errors import UsageError
from mobillama.recipe import PrepareRecipe
from mobillama.record.files import replaced_file

# Billions of tokens of each source in Amber, the paper's Table 2.
PAPER_TABLE_2 = {
    "arxiv": 30.00,
    "book": 28.86,
    "c4": 197.67,
    "refinedweb": 665.01,
    "starcoderdata": 291.92,
    "stackexchange": 21.75,
    "wikipedia": 23.90,
}


def show_preparation(out: Path, manifest: dict[str, Any], known: bool = False) -> None:
    """Print what a preparation made: a row per source."""
    if known:
        note(f"{out}: already prepared from these inputs; nothing was done")
    rows = []
    total = sum(source["tokens"] for source in manifest["sources"])
    for source in manifest["sources"]:
        rows.append(
            (
                source["name"],
                f"{source['documents']:,}",
                f"{source['kept_documents']:,}",
                f"{source['bytes'] / 1e6:.2f}",
                f"{source['tokens']:,}",
                f"{source['tokens'] / total:.1%}",
                f"{source['bytes'] / source['tokens']:.2f}",
                f"{source['dealt_sequences']:,}",
                f"{source['holdout_sequences']:,}",
                f"{source['dropped_tokens']:,}",
            )
        )
    columns = ["source", "documents", "kept", "MB kept", "tokens", "share", "bytes/token", "sequences", "held out"]
    table(f"{out}", [*columns, "tokens left over"], rows)
    dropped: Counter[str] = Counter()
    for source in manifest["sources"]:
        dropped.update(source["verdicts"])
    if dropped:
        reasons = ", ".join(f"{rule} {count:,}" for rule, count in dropped.most_common())
        note(f"documents dropped: {reasons} ('mobillama data stats {out}' shows where)")
    note(f"{total:,} tokens in sequences of {manifest['inputs']['sequence_length']} · {len(manifest['chunks'])} chunks")
    note(f"root {manifest['root']}")


def note_passed_over(recipe: PrepareRecipe) -> None:
    """Tell which files of the sources' directories are not read."""
    for name, source in recipe.sources.items():
        files = passed_over(source)
        if files:
            some = ", ".join(file.relative_to(source.path).as_posix() for file in files[:3])
            more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
            note(f"sources.{name}: not read in {source.path}: {some}{more}; to read them, set format or files")


def statistics(dataset: Dataset) -> dict[str, Any]:
    """Return the Table 2 of a corpus: for each source documents, duplicates, drops by rule, tokens, shares, bytes."""
    manifest = dataset.manifest
    sources = []
    tokens = sum(source["tokens"] for source in manifest["sources"])
    dealt = sum(source["dealt_sequences"] for source in manifest["sources"])
    for source in manifest["sources"]:
        dropped = dict(source["verdicts"])
        sources.append(
            {
                "name": source["name"],
                "documents": source["documents"],
                "kept_documents": source["kept_documents"],
                "exact_duplicates": dropped.pop(EXACT_DUPLICATE, 0),
                "near_duplicates": dropped.pop(NEAR_DUPLICATE, 0),
                "dropped": dropped,
                "bytes": source["bytes"],
                "tokens": source["tokens"],
                "share": source["tokens"] / tokens,
                "bytes_per_token": source["bytes"] / source["tokens"],
                "training_sequences": source["dealt_sequences"],
                "training_share": source["dealt_sequences"] / dealt,
                "holdout_sequences": source["holdout_sequences"],
            }
        )
    stored = sum(file["bytes"] for file in manifest["files"].values())
    rows = manifest["train_sequences"] + sum(entry["rows"] for entry in manifest["holdout"])
    return {
        "data": str(dataset.path),
        "root": manifest["root"],
        "tokens": tokens,
        "training_sequences": manifest["train_sequences"],
        "sequence_length": dataset.sequence_length,
        "chunks": len(manifest["chunks"]),
        "stored_bytes_per_token": stored / (rows * dataset.sequence_length),
        "sources": sources,
    }


def show_statistics(path: Path, picture: Path | None, as_json: bool) -> None:
    """Print the Table 2 of a corpus beside the paper's, and why documents were dropped; draw it on request."""
    facts = statistics(Dataset(path))
    if picture is not None:
        from mobillama.report.picture import draw_corpus

        draw_corpus(facts, PAPER_TABLE_2, picture)
        note(f"{picture}: drawn")
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    paper = sum(PAPER_TABLE_2.values())
    rows = []
    for source in facts["sources"]:
        in_paper = PAPER_TABLE_2.get(source["name"])
        rows.append(
            (
                source["name"],
                f"{source['documents']:,}",
                f"{source['kept_documents']:,}",
                f"{source['exact_duplicates']:,}",
                f"{source['near_duplicates']:,}",
                f"{sum(source['dropped'].values()):,}",
                f"{source['tokens'] / 1e6:,.2f}",
                f"{source['share']:.1%}",
                "–" if in_paper is None else f"{in_paper / paper:.1%}",
                f"{source['training_share']:.1%}",
                f"{source['bytes_per_token']:.2f}",
            )
        )
    columns = ["source", "documents", "kept", "equal", "near-equal", "ruled out", "M tokens", "share", "Amber's"]
    table(f"{path}", [*columns, "of training", "bytes/token"], rows)
    reasons = sorted(
        ((count, name, source["name"]) for source in facts["sources"] for name, count in source["dropped"].items()),
        reverse=True,
    )
    if reasons:
        table("Ruled out", ["rule", "source", "documents"], [(name, place, f"{n:,}") for n, name, place in reasons])
    note(
        f"{facts['tokens']:,} tokens · {facts['training_sequences']:,} training sequences of {facts['sequence_length']} "
        f"in {facts['chunks']} chunks · {facts['stored_bytes_per_token']:.3f} bytes on disk per token"
    )


def verify_corpus(path: Path, deep: int, seed: int, places: dict[str, Path], workers: int) -> None:
    """Hash a data set again; with ``deep``, also make that many of its sequences anew from raw documents.

    Raises:
        CorruptDataError: a file is not what was prepared.
        VerificationError: a sequence does not come out again.
        UsageError: raw documents are not where they were.
    """
    from mobillama.data.rederive import rederive, sample_rows
    from mobillama.data.verify import verify

    with progress() as show:
        facts = verify(path, workers or os.cpu_count() or 1, show)
        dataset = Dataset(path)
        unknown = sorted(places.keys() - set(dataset.source_names))
        if unknown:
            raise UsageError(f"--source: no source '{unknown[0]}'; there are {', '.join(dataset.source_names)}")
        derived = rederive(dataset, sample_rows(dataset, deep, seed), places, show) if deep else 0
    for line in facts["notes"]:
        note(line)
    note(f"{path}: whole; {facts['files']:,} files, {facts['bytes']:,} bytes, {facts['sequences']:,} sequences")
    if deep:
        note(f"{derived:,} sequences made anew from raw documents, all equal")
    note(f"root {facts['root']}")


def export_corpus(path: Path, out: Path) -> None:
    """Write a data set as LLM360's Amber chunks."""
    from mobillama.data.amber_export import export_amber

    with progress() as show:
        sequences = export_amber(Dataset(path), out, show)
    note(f"{out}: {sequences:,} sequences")


def export_ledger(path: Path, out: Path) -> None:
    """Write the ledger of a data set as JSON lines: a raw document each."""
    ledger = Dataset(path).ledger
    count = 0
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another file or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for entry in ledger.entries():
            file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
            count += 1
    note(f"{out}: {count:,} documents")


def import_corpus(path: Path, tokenizer: Path, out: Path) -> None:
    """Make a data set of Amber chunks, in their own order."""
    from mobillama.data.amber_import import import_amber

    with progress() as show:
        manifest = import_amber(path, tokenizer, out, show)
    note(f"{out}: {manifest['train_sequences']:,} sequences in {len(manifest['chunks'])} chunks")
    note(f"root {manifest['root']}")

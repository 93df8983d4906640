"""Take a finished quickstart's numbers and picture into the project and write README's table from them.

python tools/update_readme.py runs/quickstart

Writes benchmarks/results/quickstart.json, docs/pictures/quickstart-loss.png, and the block of README.md between the
quickstart markers. A test holds that the block is what the JSON says.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"
MARKERS = ("<!-- quickstart -->", "<!-- /quickstart -->")


def quickstart_block(result: dict[str, Any]) -> str:
    """Return the README's table and the line on how it was measured."""
    ours = (
        f"**this model** ({result['stored_parameters'] / 1e6:.1f} M parameters stored, "
        f"{result['applied_parameters'] / 1e6:.1f} M applied)"
    )
    rows = sorted([(ours, result["held_out"]["bits_per_byte"]), *result["baselines"].items()], key=lambda row: row[1])
    best = rows[0][1]
    lines = [f"| on the same {result['held_out']['bytes']:,} held-out bytes | bits per byte |", "|---|---:|"]
    lines += [
        f"| {name} | {'**' if value == best else ''}{value:.3f}{'**' if value == best else ''} |"
        for name, value in rows
    ]
    facts = result["environment"]
    minutes, seconds = divmod(round(result["seconds"]), 60)
    lines += [
        "",
        f"`{result['command']}`: {minutes} min {seconds} s from raw text to this table, peak memory "
        f"{result['peak_memory_mib']:,} MiB, {result['trained_tokens']:,} tokens trained; {facts['machine']}, torch "
        f"{facts['packages']['torch']}, {facts['date'][:10]}, commit {_short(facts['commit'])}.",
    ]
    return "\n".join(lines)


def _short(commit: str | None) -> str:
    """Return a commit's first digits, with the + of a checkout that differed from it."""
    return "unknown" if commit is None else commit[:12] + ("+" if commit.endswith("+") else "")


def replace_block(readme: str, block: str) -> str:
    """Return README's text with the block between the markers replaced."""
    start, end = map(re.escape, MARKERS)
    return re.sub(f"({start}).*?({end})", lambda found: f"{found[1]}\n{block}\n{found[2]}", readme, flags=re.S)


def main() -> None:
    """Copy the run's numbers and picture, rewrite the block."""
    run = Path(sys.argv[1])
    if json.loads((run / "quickstart.json").read_text(encoding="utf-8"))["resumed"]:
        sys.exit(f"{run}: was resumed, so its time is not the whole journey's; run quickstart afresh")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "quickstart.json", RESULT)
    shutil.copyfile(run / "loss.png", ROOT / "docs" / "pictures" / "quickstart-loss.png")
    readme = ROOT / "README.md"
    block = quickstart_block(json.loads(RESULT.read_text(encoding="utf-8")))
    readme.write_text(replace_block(readme.read_text(encoding="utf-8"), block), encoding="utf-8")


if __name__ == "__main__":
    main()

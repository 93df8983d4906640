"""Draw what a decoded token moves from memory and from the cache, from benchmarks/results/kernels.json.

python tools/draw_traffic.py        # writes docs/pictures/memory-traffic.svg
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "pictures" / "memory-traffic.svg"
COLOURS = {
    "attention": "#4878a8",
    "head": "#8aa9c8",
    "network, from memory": "#c8553d",
    "network, from the cache": "#e9b44c",
}


def main() -> None:
    """Draw."""
    models = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text(encoding="utf-8"))["models"]
    mpl.rcParams |= {"svg.hashsalt": "memory-traffic", "font.size": 9}
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(models)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(models.values()):
        network = row["bytes_touched"]["network"]
        first = network / row["layers"] * row["networks"]  # what is read from memory once a token
        widths = {
            "attention": row["bytes_touched"]["attention"],
            "head": row["bytes_touched"]["head"],
            "network, from memory": first,
            "network, from the cache": network - first,
        }
        left = 0.0
        for part, size in widths.items():
            label = part if place == 0 else None
            axes.barh(place, size / 1e6, left=left, height=0.6, color=COLOURS[part], label=label)
            if size > 2e7:
                axes.text(left + size / 2e6, place, f"{size / 1e6:.0f}", ha="center", va="center", color="white")
            left += size / 1e6
    axes.set_yticks(range(len(models)), list(models))
    axes.invert_yaxis()
    axes.set_xlabel("MB of weights that a token is multiplied with")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False)
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Pictures drawn from records: the loss of a run, its evaluations, the make-up of a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mobillama.record.files import replaced_file


def draw_loss(run: Path, out: Path, yardsticks: dict[str, float] | None = None) -> None:
    """Draw training loss by source, and held-out bits per byte with horizontal ``yardsticks``, as a PNG.

    Args:
        run: a run directory.
        out: the file to write.
        yardsticks: name → bits per byte of simpler methods on the same hold-out.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step" and "fault" not in line]
    validations = [line for line in lines if line["kind"] == "validation"]
    tokens_at = {line["step"]: line["tokens"] / 1e6 for line in lines if line["kind"] == "step"}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)

    sources = sorted({name for line in steps for name in line["loss_by_source"]})
    for name in sources:
        seen = [
            (tokens_at[line["step"]], line["loss_by_source"][name]) for line in steps if name in line["loss_by_source"]
        ]
        left.plot(*zip(*_smoothed(seen), strict=True), linewidth=1.2, label=name)
    left.set(title="training loss by source", xlabel="million tokens", ylabel="nats per token")
    left.legend(frameon=False)

    curve = [(tokens_at[line["step"]], line["bits_per_byte"]) for line in validations]
    if curve:
        right.plot(*zip(*curve, strict=True), marker="o", markersize=3, color="black", label="this model")
    ends = (0.0, max(tokens_at.values(), default=1.0))
    for name, value in (yardsticks or {}).items():
        right.hlines(value, *ends, linestyles="dashed", linewidth=0.9, color="gray")
        right.annotate(f"{name} {value:.2f}", (ends[0], value), fontsize=8, va="bottom")
    right.set(title="held out (each validation's sample)", xlabel="million tokens", ylabel="bits per byte")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with replaced_file(out) as temporary:
        figure.savefig(temporary, format="png")


def draw_run(run: Path, out: Path, killed: int = 0, resumed: int = 0) -> None:
    """Draw what a run's metrics.jsonl tells of each step, as a PNG: loss, gradient norm, speed, energy, update ratios.

    Args:
        run: a run directory.
        out: the file to write.
        killed: a step after which the run was killed, to be marked; 0: none.
        resumed: the step from which it then went on.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step" and "fault" not in line]
    number = [line["step"] for line in steps]
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    loss, held_out, norm, speed, energy, ratio = panels
    for name in sorted({name for line in steps for name in line["loss_by_source"]}):
        seen = [(line["step"], line["loss_by_source"][name]) for line in steps if name in line["loss_by_source"]]
        loss.plot(*zip(*seen, strict=True), linewidth=0.8, label=name)
    loss.set(title="training loss by source", ylabel="nats per token")
    loss.legend(frameon=False)
    held_out.plot(number, [line["bits_per_byte"] for line in steps], linewidth=0.8, label="training")
    held = [(line["step"], line["bits_per_byte"]) for line in lines if line["kind"] == "validation"]
    if held:
        held_out.plot(*zip(*held, strict=True), marker="o", color="black", label="held out")
    held_out.set(title="bits per byte", ylabel="bits per byte")
    held_out.legend(frameon=False)
    norm.plot(number, [line["gradient_norm"] for line in steps], linewidth=0.8)
    norm.set(title="global gradient norm before clipping", yscale="log")
    speed.plot(number, [line["tokens_per_second"] / 1000 for line in steps], linewidth=0.8)
    speed.set(title="speed", ylabel="thousand tokens/s", ylim=(0, None))
    spent = [(line["step"], sum(line["joules"].values()) / line["seconds"]) for line in steps if "joules" in line]
    if spent:
        energy.plot(*zip(*spent, strict=True), linewidth=0.8)
    kind = "measured" if any("measured" in line.get("joules", {}) for line in steps) else "estimated"
    energy.set(title=f"power of the GPU ({kind})", ylabel="watts", ylim=(0, None))
    for name in sorted({name for line in steps for name in line.get("update_ratio", {})}):
        seen = [(line["step"], line["update_ratio"][name]) for line in steps if "update_ratio" in line]
        ratio.plot(*zip(*seen, strict=True), marker=".", linewidth=0.8, label=name)
    ratio.set(title="norm of the update / norm of the weights", yscale="log")
    if ratio.lines:
        ratio.legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if killed:
            axes.axvspan(resumed, killed, color="tab:red", alpha=0.12)
    with replaced_file(out) as temporary:
        figure.savefig(temporary, format="png")


def draw_corpus(facts: dict[str, Any], paper: dict[str, float], out: Path) -> None:
    """Draw the make-up of a corpus as a PNG: each source's share beside the paper's, and what became of its documents.

    Args:
        facts: from :func:`mobillama.workflows.corpus.statistics`.
        paper: billions of tokens by source in the paper's Table 2.
        out: the file to write.
    """
    sources = facts["sources"]
    names = [source["name"] for source in sources]
    places = range(len(names))
    figure = Figure(figsize=(11, 0.9 + 0.5 * max(4, len(names))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    total = sum(paper.values())
    left.barh([p - 0.2 for p in places], [100 * s["training_share"] for s in sources], 0.36, label="training sequences")
    amber = [100 * paper.get(name, 0.0) / total for name in names]
    left.barh([p + 0.2 for p in places], amber, 0.36, color="lightgray", label="Amber (the paper's Table 2)")
    left.set(title="share of each source", xlabel="percent", yticks=list(places), yticklabels=names)
    left.invert_yaxis()
    ended = [0.0] * len(names)
    for label, counts, colour in (
        ("kept", [s["kept_documents"] for s in sources], "tab:blue"),
        ("equal to another", [s["exact_duplicates"] for s in sources], "tab:orange"),
        ("nearly equal", [s["near_duplicates"] for s in sources], "tab:red"),
        ("ruled out", [sum(s["dropped"].values()) for s in sources], "tab:gray"),
    ):
        shares = [100 * count / source["documents"] for count, source in zip(counts, sources, strict=True)]
        right.barh(list(places), shares, 0.6, left=ended, label=label, color=colour)
        ended = [end + share for end, share in zip(ended, shares, strict=True)]
    right.set(title="what became of the documents", xlabel="percent")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    with replaced_file(out) as temporary:
        figure.savefig(temporary, format="png")


def draw_evaluations(results: list[dict[str, Any]], out: Path, run: Path | None = None) -> None:
    """Draw each score of a model's checkpoints with its standard error, and a run's loss by source beside them, as a PNG.

    Args:
        results: done evaluations in one suite (:mod:`mobillama.evaluate.run`), of a run's checkpoints, drawn against tokens,
            or of numbered revisions.
        out: the file to write.
        run: the run directory whose checkpoints they are.
    """
    models = [result["model"] for result in results]
    places = [model["tokens"] / 1e6 if run else model["number"] for model in models]
    names = list(results[0].get("benchmarks", {}))
    panels = len(names) + (run is not None) + ("holdout" in results[0])
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    free = list(figure.subplots(rows, columns, squeeze=False).flatten())
    if run is not None:
        axes = free.pop(0)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if line["kind"] == "step" and "fault" not in line]
        for name in sorted({name for line in steps for name in line["loss_by_source"]}):
            seen = [(s["tokens"] / 1e6, s["loss_by_source"][name]) for s in steps if name in s["loss_by_source"]]
            axes.plot(*zip(*_smoothed(seen), strict=True), linewidth=1, label=name)
        axes.set(title="training loss by source", ylabel="nats per token")
        axes.legend(frameon=False, fontsize=7)
    if "holdout" in results[0]:
        axes = free.pop(0)
        for name in results[0]["holdout"]["bits_per_byte_by_source"]:
            held = [result["holdout"]["bits_per_byte_by_source"][name] for result in results]
            axes.plot(places, held, marker=".", linewidth=1, label=name)
        axes.set(title="hold-out", ylabel="bits per byte")
        axes.legend(frameon=False, fontsize=7)
    for name in names:
        axes, facts = free.pop(0), [result["benchmarks"][name] for result in results]
        scores, errors = [fact["score"] for fact in facts], [fact["stderr"] or 0.0 for fact in facts]
        axes.errorbar(places, scores, yerr=errors, marker=".", linewidth=1, elinewidth=0.7, capsize=2)
        if facts[0]["chance"] is not None:
            axes.axhline(facts[0]["chance"], linestyle="dashed", linewidth=0.9, color="gray")
        axes.set(title=name, ylabel=facts[0]["metric"])
    for axes in free:
        axes.set_visible(False)
    for axes in figure.axes:
        axes.set_xlabel("million tokens" if run else "revision")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with replaced_file(out) as temporary:
        figure.savefig(temporary, format="png")


def draw_inference(result: dict[str, Any], out: Path) -> None:
    """Draw what ``bench infer`` measured, as a PNG: tokens/s of decoding and prefill, memory, size.

    Args:
        result: what it records.
        out: the file to write.
    """
    rows = result["rows"]
    names = [f"{row['model']}\n{row['engine']}, {row['threads']} thr." for row in rows]
    figure = Figure(figsize=(13, 1.6 + 0.45 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    speeds = (
        ("decode_tokens_per_second", "decoded tokens/s"),
        ("prefill_512_tokens_per_second", "prefill 512, tokens/s"),
    )
    for axes, (key, title) in zip(panels, speeds, strict=False):
        medians = [row.get(key, {}).get("median", 0) for row in rows]
        axes.barh(names, medians, color="tab:blue")
        axes.plot([row.get(key, {}).get("best", 0) for row in rows], names, "k|", markersize=9, label="best")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=7)
    panels[2].barh(names, [(row["memory_bytes"]["peak_rss"] or 0) / 2**20 for row in rows], color="tab:orange")
    panels[2].set_title("peak RSS, MiB")
    panels[3].barh(names, [row["file_bytes"] / 1e6 for row in rows], color="tab:gray")
    panels[3].set_title("file, MB")
    panels[0].invert_yaxis()
    panels[0].tick_params(axis="y", labelsize=7)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="x")
    machine = result["environment"]["machine"]
    figure.suptitle(machine + (f" · {result['remark']}" if result["remark"] else ""), fontsize=9)
    with replaced_file(out) as temporary:
        figure.savefig(temporary, format="png")


def _smoothed(points: list[tuple[float, float]], weight: float = 0.9) -> list[tuple[float, float]]:
    """Return points with an exponential moving average of y, corrected for its start."""
    out, mean, mass = [], 0.0, 0.0
    for x, y in points:
        mean, mass = weight * mean + (1 - weight) * y, weight * mass + (1 - weight)
        out.append((x, mean / mass))
    return out

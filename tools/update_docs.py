"""Write the tables of README and docs from the recorded results; a test holds that they say what the JSON says.

    python tools/update_docs.py                    # from benchmarks/results/*.json
    python tools/update_docs.py runs/quickstart    # first takes a finished quickstart's numbers and picture into the project

What is written stands between the markers <!-- NAME --> and <!-- /NAME --> of its file, on lines of its own where they are.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobillama.data.ledger import DOCUMENT
from mobillama.data.prepare.duplicates import MINHASH, SIGNATURE
from mobillama.data.prepare.read import RECORD
from mobillama.workflows.corpus import PAPER_TABLE_2
from mobillama.workflows.inference import PAPER_TABLE_6, PAPER_TABLE_11

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NODES, CORES = 16, 64  # of the plan for all of Amber


def load(name: str) -> dict[str, Any]:
    """Return a recorded result."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def quickstart() -> str:
    """Return README's table and the line on how it was measured."""
    result = load("quickstart")
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
    minutes, seconds = divmod(round(result["seconds"]), 60)
    lines += [
        "",
        f"`{result['command']}`: {minutes} min {seconds} s from raw text to this table, peak memory "
        f"{result['peak_memory_mib']:,} MiB, {result['trained_tokens']:,} tokens trained; "
        f"{_measured(result['environment'], 'torch')}.",
    ]
    return "\n".join(lines)


def data_speed() -> str:
    """Return the table of benchmarks/data.py, all parts."""
    lines = ["| | measured | target | |", "|---|---:|---:|---|"]
    measured: dict[str, list[str]] = {}
    for part, result in load("data").items():
        for row in result["rows"]:
            verdict = {True: "met", False: "**missed**", None: ""}[row.get("met")]
            value = f"{row['value']:g} {row['unit']}".strip()
            lines.append(f"| {part}: {row['what']} | {value} | {row.get('target', '')} | {verdict} |")
        measured.setdefault(f"{result['processes']} processes; {_measured(result['environment'])}", []).append(part)
    stamps = "; ".join(f"{', '.join(parts)}: {stamp}" for stamp, parts in measured.items())
    return "\n".join([*lines, "", f"`python benchmarks/data.py --corpus DIR --tokenizer llama.model`; {stamps}."])


def corpus_table() -> str:
    """Return the seven sources as they were prepared with cleaning."""
    facts = load("corpus")["statistics"]
    rules = sorted({rule for source in facts["sources"] for rule in source["dropped"]})
    lines = [
        "| source | documents | kept | equal | near | by rules | tokens | share | bytes/token |",
        "|---|" + "---:|" * 8,
    ]
    for source in facts["sources"]:
        dropped = sum(source["dropped"].values())
        lines.append(
            f"| {source['name']} | {source['documents']:,} | {source['kept_documents']:,} | {source['exact_duplicates']:,} "
            f"| {source['near_duplicates']:,} | {dropped:,} | {source['tokens']:,} | {source['share']:.1%} "
            f"| {source['bytes_per_token']:.2f} |"
        )
    lines += [
        "",
        f"{facts['tokens']:,} tokens, {facts['stored_bytes_per_token']:.3f} bytes on disk for each; rules that dropped "
        f"documents: {', '.join(rules)}. `python benchmarks/corpus.py --corpus DIR --tokenizer llama.model --work DIR`; "
        f"{_measured(facts['environment'])}.",
    ]
    return "\n".join(lines)


def corpus_proofs() -> str:
    """Return what benchmarks/corpus.py showed at full size, part by part."""
    lines = ["| part | what was found | measured |", "|---|---|---|"]
    for part, facts in load("corpus").items():
        if part == "statistics":
            continue
        found = [
            f"{name.replace('_', ' ')}: {_said(value)}"
            for name, value in facts.items()
            if not isinstance(value, dict | list)
        ]
        lines.append(f"| {part} | {'; '.join(found)} | {_measured(facts['environment'])} |")
    return "\n".join(lines)


def data_plan() -> str:
    """Return what all of Table 2 would take, from the rates of one core."""
    data, corpus = load("data"), load("corpus")
    sources = {source["name"]: source for source in corpus["statistics"]["sources"]}
    billions = {name: PAPER_TABLE_2[name] for name in sources}
    tokens = 1e9 * sum(billions.values())
    raw = sum(1e9 * billions[name] * source["bytes_per_token"] for name, source in sources.items())
    documents = sum(1e9 * billions[name] * source["documents"] / source["tokens"] for name, source in sources.items())

    plain, cleaned = data["encoders"], data["cleaning"]
    few = corpus["statistics"]
    few_documents = sum(source["documents"] for source in few["sources"])

    def per_byte(result: dict[str, Any], stage: str) -> float:
        return float(result["stages"][stage] * result["processes"] / (1e6 * result["megabytes"]))

    duplicates = few["stage_seconds"]["find duplicates"] * cleaned["processes"] / few_documents
    hashed = corpus["positions"]
    work = [  # core-seconds: without and with cleaning
        (
            "hash raw files (one machine)",
            *[raw * hashed["seconds"]["hash"] * cleaned["processes"] / hashed["verified_bytes"]] * 2,
        ),
        ("read and tokenise", raw * per_byte(plain, "read and tokenise"), raw * per_byte(cleaned, "read and tokenise")),
        ("find duplicates", 0.0, documents * duplicates),
        ("sort sequences", *[raw * per_byte(plain, "sort sequences")] * 2),
        ("write chunks", *[raw * per_byte(plain, "write chunks")] * 2),
    ]
    lines = [
        f"| {tokens / 1e9:,.0f} B tokens, {raw / 1e12:.1f} TB of raw text, {documents / 1e9:.1f} billion documents "
        f"| core-hours | with cleaning | hours on {NODES} nodes of {CORES} cores | with cleaning |",
        "|---|---:|---:|---:|---:|",
    ]
    total = [0.0, 0.0]
    for what, *seconds in work:
        cores = CORES if "one machine" in what else NODES * CORES
        hours = [spent / 3600 / cores for spent in seconds]
        total = [one + other for one, other in zip(total, hours, strict=True)]
        core_hours = " | ".join(f"{spent / 3600:,.0f}" for spent in seconds)
        lines.append(f"| {what} | {core_hours} | {hours[0]:.1f} | {hours[1]:.1f} |")
    lines.append(f"| all | | | **{total[0]:.1f}** | **{total[1]:.1f}** |")
    signatures = MINHASH.num_buckets * SIGNATURE.itemsize
    scratch = [
        ("ids", 2 * tokens),
        ("runs of sorted sequences", 2 * tokens),
        ("chunks with their leaves", (2 + 32 / few["sequence_length"]) * tokens),
        ("records of documents", RECORD.itemsize * documents),
        ("ledger", DOCUMENT.itemsize * documents),
        ("MinHash signatures (near duplicates only)", signatures * documents),
    ]
    lines += ["", "| on disk, where all nodes see it | TB |", "|---|---:|"]
    lines += [f"| {what} | {size / 1e12:.2f} |" for what, size in scratch]
    lines += [
        f"| all at once | **{sum(size for _, size in scratch) / 1e12:.1f}** |",
        "",
        f"Computed from rates of one core and sizes of documents in benchmarks/results ({_measured(plain['environment'])}), "
        "two processes at a time, files in the page cache: where memory or a shared file system gives less to each core, that "
        "sets the time instead.",
    ]
    return "\n".join(lines)


def faults() -> str:
    """Return the table of benchmarks/faults.py."""
    done = load("faults")
    flips, borders, kills = done["flips"], done["borders"], done["kills"]
    same = (
        "the same ledger, weights and moments"
        if kills["same_ledger"] and kills["same_weights_and_moments"]
        else "**no**"
    )
    rows = [
        (
            f"{kills['kills']} × SIGKILL at random moments, {kills['inside_a_save']} of them inside a save",
            f"{same} as a run that was left alone; {kills['left_behind']} files left behind",
            kills,
        ),
        (
            f"SIGKILL at each of the {borders['borders']} system calls of a save that change the disk",
            f"{borders['half_one_loaded']} half checkpoints loaded; the one before was used {borders['old_one_used']} times",
            borders,
        ),
        (
            f"{flips['faults']:,} flipped bits and cut files (1,000 and 16 in each of {flips['files']} files, or all bits)",
            f"{flips['caught']:,} caught, the checkpoint before used",
            flips,
        ),
    ]
    lines = ["| done to a run | found | measured |", "|---|---|---|"]
    lines += [f"| {what} | {found} | {_measured(part['environment'])} |" for what, found, part in rows]
    return "\n".join(lines)


def train_speed() -> str:
    """Return the tables of benchmarks/train.py, one for each preset, device and kind of tokens; one of all with two contenders."""
    tables, pairs = [], []
    for title, result in load("train").items():
        if list(result["contenders"]) == ["ours", "plain"]:
            pairs.append((title, result))
            continue
        found = {name: facts for name, facts in result["contenders"].items() if "error" not in facts}
        ours = {name: found[name]["tokens_per_second"] for name in ("ours", "ours, float8") if name in found}
        on_gpu = any(facts.get("peak_gib") for facts in found.values())
        lines = [
            f"| {title} | tokens/s |{' MFU causal · full | peak GiB | power · clock | micro-batch |' if on_gpu else ''} ours is |"
        ]
        lines.append("|---|---:|" + ("---:|" * 4 if on_gpu else "") + "---:|")
        for name, facts in found.items():
            mine = ours.get("ours, float8" if "float8" in name else "ours")
            ratio = f"{mine / facts['tokens_per_second']:.3f} ×" if mine and name not in ours else ""
            cells = [name, f"{facts['tokens_per_second']:,.0f}"]
            if on_gpu:
                mfu = f"{facts['mfu_causal']:.1%} · {facts['mfu_full']:.1%}" if facts.get("mfu_causal") else ""
                peak = f"{facts['peak_gib']:.1f}" if facts.get("peak_gib") else ""
                clock = f"{facts['watts']:.0f} W · {facts['sm_megahertz']:,} MHz" if "watts" in facts else ""
                cells += [mfu, peak, clock, str(facts.get("micro_batch", result["micro_batch"]))]
            lines.append(f"| {' | '.join([*cells, ratio])} |")
        options = " --data DIR --steps 240 --contenders ours 'ours, whole run'" if title.endswith(", data") else ""
        lines += ["", f"`python benchmarks/train.py{options}`; {_measured(result['environment'], 'torch')}."]
        tables.append("\n".join(lines))
    lines = ["| ours · plain | tokens/s | ours is | MFU causal | peak GiB |", "|---|---:|---:|---:|---:|"]
    for title, result in pairs:
        both = result["contenders"]["ours"], result["contenders"]["plain"]
        speed, mfu, peak = (
            " · ".join(form.format(facts[key]) for facts in both)
            for key, form in (("tokens_per_second", "{:,.0f}"), ("mfu_causal", "{:.1%}"), ("peak_gib", "{:.1f}"))
        )
        lines.append(f"| {title} | {speed} | {result['ratios']['ours / plain']:.3f} × | {mfu} | {peak} |")
    batches = ", ".join(str(size) for size in dict.fromkeys(result["micro_batch"] for _, result in pairs))
    stamps = "; ".join(dict.fromkeys(_measured(result["environment"], "torch") for _, result in pairs))
    said = f"`python benchmarks/train.py --preset NAME --contenders ours plain`, micro-batch {batches}; {stamps}."
    return "\n\n".join([*tables, "\n".join([*lines, "", said])])


def train_summary() -> str:
    """Return README's line on the speed of training: of each GPU, beside the faster plain reference and transformers."""
    said = []
    for title, result in load("train").items():
        preset, _, machine = title.partition(", ")
        found, ratios = result["contenders"], result["ratios"]
        if preset != "mobillama-0.5b" or "ours, float8" not in found:
            continue
        ours, rival = (
            found["ours"],
            max((found[name] for name in ("plain", "plain, by layer") if name in found), key=_speed),
        )
        memory = ours["peak_gib"] / rival["peak_gib"]
        said.append(
            f"{_speed(ours):,.0f} tokens/s on an {machine.split()[1]}, {_speed(ours) / _speed(rival):.3f} × a plain compiled "
            f"PyTorch reference in {memory:.0%} of its memory and {ratios['ours / transformers']:.2f} × transformers; in float8 "
            f"{_speed(found['ours, float8']):,.0f}, {ratios['ours, float8 / plain, float8']:.3f} × the reference"
        )
    return "mobillama-0.5b learns from " + "; ".join(said)


def _speed(facts: dict[str, Any]) -> float:
    return float(facts["tokens_per_second"])


def step_time() -> str:
    """Return where a training step's time goes, a column for each way of computing it."""
    ways = load("breakdown")
    kinds = dict.fromkeys(kind for way in ways.values() for kind in way["milliseconds"])
    totals = {title: sum(way["milliseconds"].values()) for title, way in ways.items()}

    def cell(title: str, milliseconds: float) -> str:
        return f"{milliseconds:.1f} · {milliseconds / totals[title]:.1%}"

    lines = [f"| milliseconds · share of the step | {' | '.join(ways)} |", "|---|" + "---:|" * len(ways)]
    for kind in sorted(kinds, key="idle".__eq__):
        cells = (way["milliseconds"].get(kind) for way in ways.values())
        lines.append(f"| {kind} | {' | '.join(cell(t, ms) if ms else '' for t, ms in zip(ways, cells, strict=True))} |")
    lines.append(f"| step | {' | '.join(f'{total:.1f}' for total in totals.values())} |")
    bare = (cell(title, way["bare_products_milliseconds"]) for title, way in ways.items())
    lines.append(f"| bare products of the same shapes | {' | '.join(bare)} |")
    stamps = dict.fromkeys(f"{way['device']}, {_measured(way['environment'], 'torch')}" for way in ways.values())
    batch = ", ".join(str(count) for count in dict.fromkeys(way["micro_batch"] for way in ways.values()))
    return "\n".join(
        [
            *lines,
            "",
            f"`python benchmarks/breakdown.py [--float8]`, under torch's profiler, micro-batch {batch}; {'; '.join(stamps)}.",
        ]
    )


def resume() -> str:
    """Return what the killed and resumed run on a GPU showed."""
    done = json.loads((ROOT / "docs" / "experiments" / "h100-resume" / "summary.json").read_text(encoding="utf-8"))
    saves = done["held_up_seconds"][:-2]  # the last two had the next save or the end on their heels
    validations = ", ".join(f"{value:.3f} at step {step}" for step, value in done["held_out_bits_per_byte"])
    rows = [
        ("steps · tokens", f"{done['steps']:,} · {done['tokens']:,}"),
        ("training", f"{done['training_seconds']:.0f} s"),
        ("killed · resumed", f"after step {done['killed_after_step']} · after step {done['resumed_after_step']}"),
        ("steps computed again", f"{done['computed_again']}, {done['computed_again_with_equal_bits']} with equal bits"),
        ("tokens/s, median", f"{done['tokens_per_second']:,.0f} (deterministic; MFU {done['mfu']:.1%})"),
        ("training held up by a checkpoint", f"{sum(saves) / len(saves):.2f} s, its files written in the background"),
        ("waited for data, in all", f"{done['data_wait_seconds']:.2f} s"),
        ("energy of the GPU", f"{done['kilojoules']:.0f} kJ, measured"),
        ("held-out bits per byte", validations),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    said = f"{done['environment']['device']}, {_measured(done['environment'], 'torch')}"
    return "\n".join([*lines, "", f"`python benchmarks/resume.py kill|finish|report`; {said}."])


def evaluation_speed() -> str:
    """Return our adapter beside the harness's, each row one machine, model and precision."""
    lines = [
        "| model · machine · precision | requests | tokens: ours · HFLM | seconds: ours · HFLM | times faster "
        "| largest difference in nats | decisions that differ · by more than 1e-4 |",
        "|---|" + "---:|" * 6,
    ]
    stamps = []
    for result in load("evaluation").values():
        for precision in ("float64", "float32", "bfloat16"):
            if precision not in result:
                continue
            facts = result[precision]
            ours, stock = facts["ours"], facts["stock"]
            lines.append(
                f"| {_evaluated(result)} · {precision} | {facts['requests']:,} "
                f"| {ours['tokens']:,} · {stock['tokens']:,} | {ours['seconds']:.1f} · {stock['seconds']:.1f} "
                f"| {facts['speed_ratio']:.2f} | {facts['max_logprob_difference']:.1e} "
                f"| {facts['decisions_that_differ']} · {facts['of_them_not_within_1e-4']} |"
            )
        if "whole_suite" in result:
            whole = result["whole_suite"]
            lines.append(
                f"| {result['model']} · {result['device']} · whole suite, ours | {result['requests']:,} | {whole['tokens']:,} "
                f"| {whole['seconds']:.1f} | | | |"
            )
        stamps.append(_measured(result["environment"], "torch"))
    lines += _roundings(load("evaluation")) + _decisions(load("evaluation"))
    return "\n".join([*lines, "", f"`python benchmarks/evaluation.py measure`; {'; '.join(dict.fromkeys(stamps))}."])


def _evaluated(result: dict[str, Any]) -> str:
    only = f", {', '.join(result['only'])} alone" if result.get("only") else ""
    return f"{result['model']}{only} · {result['device']}"


def _roundings(results: dict[str, Any]) -> list[str]:
    """Return how far both adapters' float32 is from float64."""
    lines = []
    for result in results.values():
        for name, its in result["float32"].get("errors", {}).items():
            where = f"{_evaluated(result)} · {'ours' if name == 'ours' else 'HFLM'}"
            lines.append(f"| {where} | {its['max']:.1e} | {its['mean']:.1e} | {its['beyond_1e-4']} |")
    titles = "| float32 beside float64 | at most, nats | in the mean | requests beyond 1e-4 |"
    return ["", titles, "|---|" + "---:|" * 3, *lines] if lines else []


def _decisions(results: dict[str, Any]) -> list[str]:
    """Return how both adapters judge each benchmark's questions, a column for each model and precision on a GPU."""
    compared = {
        f"{result['model']}, {precision}": result[precision]["by_benchmark"]
        for result in results.values()
        for precision in ("float32", "bfloat16")
        if precision in result and result["device"] != "CPU" and not result.get("only")
    }
    lines = [
        f"| decisions that differ · by more than 1e-4 | {' | '.join(compared)} |",
        "|---|" + "---:|" * len(compared),
    ]
    first = next(iter(compared.values()))
    for name, facts in first.items():
        cells = []
        for its in (found[name] for found in compared.values()):
            if facts["metric"] == "mc2":
                cells.append(f"{its['ours']:.4f} · {its['stock']:.4f}")
                continue
            ties = f"; ties {its['ties_ours']} · {its['ties_stock']}" if its["ties_ours"] or its["ties_stock"] else ""
            differ, beyond = its["decisions_that_differ"], its["of_them_not_within_1e-4"]
            cells.append(f"{differ} · {beyond} of {its['questions']:,}{ties}")
        lines.append(f"| {name}, {facts['metric']} | {' | '.join(cells)} |")
    note = "Ties are questions whose best choices are equal, and mc2 is the mean itself: ours · HFLM."
    return ["", *lines, "", note]


# SmolLM2-135M-Instruct's own model card: lighteval, no examples, unquantized weights.
SMOLLM2_CARD = {"HellaSwag": 40.9, "PIQA": 66.3}


def evaluation_scores() -> str:
    """Return the scores of a real model in three suites, beside its authors'."""
    suites = {name: load(f"evaluation-{name}") for name in ("paper", "today", "quick")}
    if len({result["key"]["model"] for result in suites.values()}) > 1:
        raise SystemExit("benchmarks/results/evaluation-*.json: are of different models; evaluate one in all suites")
    columns = [f"`{name}`" for name in suites]
    lines = [
        f"| | questions | {' | '.join(columns)} | questions of `quick` | published | chance |",
        "|---|" + "---:|" * 7,
    ]
    for name, facts in suites["paper"]["benchmarks"].items():
        found = [result["benchmarks"][name] for result in suites.values()]
        cells = [
            f"{facts['questions']:,}",
            *(f"{score['score']:.2f} ± {score['stderr']:.2f}" for score in found),
            found[-1]["questions"],
            SMOLLM2_CARD.get(name, ""),
            "" if facts["chance"] is None else f"{facts['chance']:.3g}",
        ]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    averages = [f"{result['average']:.2f}" for result in suites.values()]
    lines += [
        f"| average | | {' | '.join(averages)} | | | |",
        "",
        *(
            f"`mobillama evaluate {result['model']['name']} --suite {name}`: "
            f"{result['tokens_forwarded']:,} tokens in {result['model_seconds']:.0f} s of model time, {result['precision']}, "
            f"{result['device']}; {_measured(result['environment'], 'torch')}.  "
            for name, result in suites.items()
        ),
    ]
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:,}" if isinstance(value, int | float) else str(value)[:12]


def gguf_parity() -> str:
    """Return what each type of GGUF file costs, in our reader and in llama.cpp."""
    lines = [
        "| model · type (head) | unshared file, MB | llama.cpp beside the model: same likeliest token | KL, nats/token "
        "| bits per byte | rounding alone (torch): same | KL | the engine alone: same | KL |",
        "|---|" + "---:|" * 8,
    ]
    stamps: list[str] = []
    tokens: dict[str, int] = {}
    ids: list[str] = []
    for model, result in load("parity").items():
        for kind, facts in result["types"].items():
            cells = []
            if llama := facts.get("llama_cpp"):
                cost = llama["bits_per_byte_copy"] / llama["bits_per_byte_model"] - 1
                cells += [f"{llama['top1_agreement']:.2%}", f"{llama['kl_nats_per_token']:.1e}", f"{cost:+.2%}"]
                same, texts = facts["texts_with_the_same_ids"]
                ids.append(f"{model}: {same} of {texts} passages")
            else:
                cells += ["", "", ""]
            for name in ("torch", "llama_cpp_on_the_same_numbers"):
                its = facts.get(name)
                cells += [f"{its['top1_agreement']:.2%}", f"{its['kl_nats_per_token']:.1e}"] if its else ["", ""]
            tokens[model] = facts["torch"]["tokens"]
            lines.append(f"| {model} · {kind} ({facts['head']}) | {facts['bytes'] / 1e6:.1f} | {' | '.join(cells)} |")
        stamps.append(_measured(result["environment"], "torch"))
    shapes = load("parity-shapes")["shapes"]
    worst = {
        kind: max(its["kl_nats_per_token"] for name, its in shapes.items() if name.endswith(kind))
        for kind in ("f32", "q4_0")
    }
    return "\n".join(
        [
            *lines,
            "",
            f"Teacher-forced on real text, {', '.join(f'{model}: {count:,} tokens' for model, count in tokens.items())}. Tokenized alike by llama.cpp and us: "
            f"{'; '.join(dict.fromkeys(ids))}. Every kind of shape ({len(shapes) // 2} random models: sharing of each kind, grouped "
            f"heads, tied head, QK-norm, free head width) loads in stock llama.cpp; from torch on the same numbers it is at most "
            f"{worst['f32']:.0e} nats/token in F32, {worst['q4_0']:.0e} in Q4_0, for which llama.cpp rounds activations to eight "
            f"bits. `python benchmarks/parity.py`; {'; '.join(dict.fromkeys(stamps))}.",
        ]
    )


def quantize() -> str:
    """Return what few bits cost, rounded and calibrated in several ways."""
    result = load("quantize")
    sources = [name for name in result["rows"][0]["runs"][0]["held_out"] if name != "all"]
    lines = [
        f"| type · codes | MB | bits per byte | cost, mean (range over draws) | same likeliest token | KL, nats/token "
        f"| {' | '.join(sources)} |",
        "|---|" + "---:|" * (5 + len(sources)),
    ]

    def cost(run: dict[str, Any], source: str = "all") -> float:
        its = run["held_out"][source]
        return float(its["bits_per_byte_copy"] / its["bits_per_byte_model"] - 1)

    def mean(runs: list[dict[str, Any]], key: str) -> float:
        return sum(run["held_out"]["all"][key] for run in runs) / len(runs)

    for row in result["rows"]:
        runs = row["runs"]
        size = f"{runs[0]['bytes'] / 1e6:.2f}"
        if row["type"] == "bf16":
            by_source = [f"{runs[0]['held_out'][name]['bits_per_byte_model']:.4f}" for name in sources]
            lines.append(f"| bf16 | {size} | {mean(runs, 'bits_per_byte_model'):.4f} | | | | {' | '.join(by_source)} |")
            continue
        costs = [cost(run) for run in runs]
        spread = f" ({min(costs):+.2%} … {max(costs):+.2%})" if len(costs) > 1 else ""
        by_source = [f"{sum(cost(run, name) for run in runs) / len(runs):+.2%}" for name in sources]
        lines.append(
            f"| {row['type']} · {row['way']} | {size} | {mean(runs, 'bits_per_byte_copy'):.4f} "
            f"| {sum(costs) / len(costs):+.2%}{spread} | {mean(runs, 'top1_agreement'):.2%} "
            f"| {mean(runs, 'kl_nats_per_token'):.2e} | {' | '.join(by_source)} |"
        )
    shape, first = result["shape"], result["rows"][0]["runs"][0]["held_out"]["all"]
    draws = max(len(row["runs"]) for row in result["rows"])
    lines += [
        "",
        f"{result['model']}: {result['stored_parameters'] / 1e6:.1f} M stored parameters, {shape['num_hidden_layers']} layers, share: "
        f"{shape['share']}. Judged on {first['tokens']:,} held-out tokens of {result['data']}, calibrated on {result['sequences']} "
        f"sequences of its training text, {draws} draw{'s' if draws > 1 else ''}; columns by source are costs (bf16: bits per byte). `python "
        f"benchmarks/quantize.py`; {result['device']}, {_measured(result['environment'], 'torch')}.",
    ]
    if "quick" in result:
        names = list(next(iter(result["quick"].values()))["benchmarks"])
        lines += [
            "",
            f"| suite `quick`, percent | {' | '.join(names)} | average |",
            "|---|" + "---:|" * (len(names) + 1),
        ]
        for model, facts in result["quick"].items():
            cells = [*(facts["benchmarks"][name] for name in names), facts["average"]]
            lines.append(f"| {model} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines)


def inference() -> str:
    """Return what bench infer measured, if it is recorded, and the paper's values."""
    if not (RESULTS / "inference.json").exists():
        return ""
    result = load("inference")
    rows = result["rows"]
    lines = [
        "| model | engine | threads | prefill 64 | prefill 512 | decode 128 | GB/s read | of limit |",
        "|---|---|" + "---:|" * 6,
    ]
    for row in rows:
        speeds = [_pair(row.get(f"{name}_tokens_per_second")) for name in ("prefill_64", "prefill_512", "decode")]
        share = row["bytes_per_second"] / row["memory_bytes_per_second"]
        lines.append(
            f"| {row['model']} | {row['engine']} | {row['threads']} | {' | '.join(speeds)} | "
            f"{row['bytes_per_second'] / 1e9:.1f} | {share:.0%} |"
        )
    sizes: dict[str, Callable[[dict[str, Any]], Any]] = {  # in bytes; the last two are not in records of before
        "peak RSS MiB": lambda row: row["memory_bytes"]["peak_rss"],
        "USS MiB": lambda row: row["memory_bytes"]["uss"],
        "load adds MiB": lambda row: row["memory_bytes"]["opened"] - row["memory_bytes"]["before_load"],
        "and a prompt MiB": lambda row: row["memory_bytes"]["prompted"] - row["memory_bytes"]["before_load"],
        "generate MiB": lambda row: row["generate"] and row["generate"]["peak_rss"],
    }
    sizes = {
        name: size for name, size in sizes.items() if "generate" in rows[0] or not name.startswith(("load", "gen"))
    }
    energy = {name: None for row in rows for name in row["joules_per_1000_tokens"]}
    columns = ["file MB", *sizes, "first token s", "load ms", "init ms", "forward ms"]
    columns += [f"{name}, J / 1,000 tokens" for name in energy]
    lines += ["", f"| model | engine | threads | {' | '.join(columns)} |", "|---|---|" + "---:|" * (1 + len(columns))]
    for row in rows:
        cells = [f"{row['file_bytes'] / 1e6:.1f}"]
        cells += [f"{bytes_ / 2**20:,.0f}" if (bytes_ := size(row)) else "" for size in sizes.values()]
        cells += [f"{row['first_token_seconds']['median']:.2f}"]
        cells += [f"{1000 * row[f'{name}_seconds']:.1f}" for name in ("load", "init", "forward")]
        cells += [f"{row['joules_per_1000_tokens'][name]:.0f}" for name in energy]
        lines.append(f"| {row['model']} | {row['engine']} | {row['threads']} | {' | '.join(cells)} |")
    remark = f"{result['remark']}; " if result["remark"] else ""
    lines += [
        "",
        f"Tokens/s, median / best of {result['rounds']}; {remark}{_measured(result['environment'])}.",
        "",
        "| the paper's Table 6 | tokens/s | MB | mAh / 1,000 tokens | CPU % |",
        "|---|" + "---:|" * 4,
    ]
    for place, models in PAPER_TABLE_6.items():
        for model, (speed, size, charge, share) in models.items():
            lines.append(f"| {model}, {place} | {speed:g} | {size:,} | {charge:g} | {share:g} |")
    lines += ["", "| the paper's Table 11, on the GPU | load ms | init ms | forward ms |", "|---|---:|---:|---:|"]
    lines += [
        f"| {model} | {' | '.join(f'{value:g}' for value in values)} |" for model, values in PAPER_TABLE_11.items()
    ]
    return "\n".join(lines)


def _pair(values: dict[str, Any] | None) -> str:
    return f"{values['median']:.1f} / {values['best']:.1f}" if values else ""


def decode_gpu() -> str:
    """Return what benchmarks/decode_gpu.py measured, if it is recorded."""
    if not (RESULTS / "decode-gpu.json").exists():
        return ""
    lines = [
        "| model · GPU | contender | tokens/s | × transformers | GB/s multiplied | ready after s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    stamps = []
    for name, result in load("decode-gpu").items():
        peer = result["contenders"].get("transformers", {}).get("tokens_per_second")
        stamps.append(_measured(result["environment"], "torch"))
        for contender, facts in result["contenders"].items():
            start = f"| {' · '.join(name.rsplit(', ', 1))} | {contender} |"
            if "error" in facts:
                lines.append(f"{start} {'; '.join(facts['error'])} | | | |")
                continue
            ratio = f"{facts['tokens_per_second'] / peer:.2f}" if peer else ""
            lines.append(
                f"{start} {facts['tokens_per_second']:.0f} | {ratio} | {facts['gb_per_second_multiplied']:,.0f} "
                f"| {facts['seconds_to_ready']:.0f} |"
            )
    return "\n".join([*lines, "", f"Batch 1, bfloat16, random weights; {'; '.join(dict.fromkeys(stamps))}."])


def browser() -> str:
    """Return what benchmarks/browser/run.py found."""
    lines = [
        "| export | same likeliest token | logit error, relative: median / most | load s | decode tokens/s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, facts in load("browser").items():
        error = facts["relative_logit_error"]
        lines.append(
            f"| {name} | {facts['same_likeliest_token']} of {facts['tokens']} | {error['median']:.1e} / {error['most']:.1e} | "
            f"{facts['load_seconds']:.1f} | {facts['decode_tokens_per_second']:.1f} |"
        )
    version = facts["browser"].partition("HeadlessChrome/")[2].partition(" ")[0]
    stamp = f"{facts['runtime']}, {facts['threads']} threads, Chromium {version}; {_measured(facts['environment'])}."
    return "\n".join([*lines, "", f"{stamp} {facts['remark']}".strip()])


def executorch() -> str:
    """Return what benchmarks/executorch_sharing.py found."""
    result = load("executorch")
    lines = [
        f"| {result['layers']} layers | file MB | load adds MiB | with weight_cache_enabled |",
        "|---|---:|---:|---:|",
    ]
    for shared, name in ((True, "one network"), (False, "a network each")):
        without, cached = (row for row in result["rows"] if row["shared"] is shared)
        lines.append(f"| {name} | {without['file_mb']:.1f} | {without['load_mib']:.1f} | {cached['load_mib']:.1f} |")
    lines += [
        "",
        "| model | file MB | load adds MiB | with weight_cache_enabled | export s | at its peak MiB "
        "| KL to torch on the same numbers | torch with rounded activations |",
        "|---|" + "---:|" * 7,
    ]
    for facts in result["models"]:
        without, cached = facts["loads"]
        computed, rounding = (
            facts[name]["kl_nats_per_token"]
            for name in ("parity_on_the_same_numbers", "rounding_of_activations_in_torch")
        )
        lines.append(
            f"| {facts['model']} | {without['file_mb']:.1f} | {without['load_mib']:,.0f} | {cached['load_mib']:,.0f} "
            f"| {facts['export_seconds']:.0f} | {facts['export_peak_mib']:,.0f} | {computed:.1e} | {rounding:.1e} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"`python benchmarks/executorch_sharing.py runs/random-0.5b`; one network is {result['one_network_mib']:.1f} MiB; executorch "
            f"{result['executorch']}, torch {result['torch']}; {_measured(result['environment'])}.",
        ]
    )


def exports() -> str:
    """Return what the check of every export said, and what the engines answered."""
    result, lowered = load("exports"), load("exports-executorch")
    rows = result["rows"] + lowered["rows"]
    lines = [
        f"| {result['model']} · export | MB | KL to the model, nats/token | same likeliest token "
        "| KL to torch on the same numbers | same likeliest token |",
        "|---|" + "---:|" * 5,
    ]
    for row in rows:
        cells = []
        for its in (row["parity"], row.get("parity_on_the_same_numbers")):
            cells += [f"{its['kl_nats_per_token']:.1e}", f"{its['top1_agreement']:.2%}"] if its else ["", ""]
        lines.append(f"| `{row['form']}` | {row['bytes'] / 1e6:.1f} | {' | '.join(cells)} |")
    lines += ["", f"*{result['question']}* The likeliest tokens:", "", "| export | engine | answer |", "|---|---|---|"]
    for row in rows:
        lines += [f"| `{row['form']}` | {engine} | {answer} |" for engine, answer in row["answers"].items()]
    measured = _measured(result["environment"], "torch", "onnxruntime")
    stamp = f"`python benchmarks/exports.py {result['model']}`; {measured}; "
    stamp += f"executorch, by `--forms executorch --results …/exports-executorch.json`: {_measured(lowered['environment'], 'torch')}"
    (rounding,) = (row["rounding_of_activations_in_torch"]["kl_nats_per_token"] for row in lowered["rows"])
    return "\n".join(
        [
            *lines,
            "",
            f"{stamp}. Torch with activations rounded as ExecuTorch does is {rounding:.1e} nats/token from the same numbers.",
        ]
    )


def fuzz() -> str:
    """Return what became of files with mutated headers."""
    result = load("fuzz")
    lines = ["| reader | files tried | refused | still readable | failures | slowest | Python allocated at most |"]
    lines.append("|---|" + "---:|" * 6)
    readers = result["readers"] | load("fuzz-native")["readers"]
    readers |= {f"{name}, under sanitizers": facts for name, facts in load("fuzz-sanitized")["readers"].items()}
    for name, facts in readers.items():
        counts = facts["outcomes"]
        refused = sum(count for outcome, count in counts.items() if outcome not in ("read", "failure"))
        lines.append(
            f"| {name} | {facts['mutations']:,} | {refused:,} | {counts.get('read', 0):,} | {counts.get('failure', 0)} "
            f"| {facts['slowest_seconds']:.2f} s | {facts['most_bytes'] / 2**10:.0f} KiB |"
        )
    sizes = [size for name, size in result["seed_files"].items() if name.endswith((".gguf", ".safetensors"))]
    return "\n".join(
        [
            *lines,
            "",
            f"A failure is another error than ours, more than two seconds, or more memory than twice the file; the files mutated "
            f"have {min(sizes) / 2**10:.0f}–{max(sizes) / 2**10:.0f} KiB. `python benchmarks/fuzz.py`; "
            f"{_measured(result['environment'])}; native engine: {_measured(load('fuzz-sanitized')['environment'])}.",
        ]
    )


def sft() -> str:
    """Return what tuning changed, and what the models say."""
    result = load("sft")
    asked, ways = result["asked"], result["ways"]
    rows = {
        "held-out loss, nats a learned token": lambda name: f"{asked[name]['held_out_loss']:.3f}",
        "held-out questions answered in the style": lambda name: _of(asked[name]["held_out"], "in_style"),
        "… and word for word as the conversations do": lambda name: _of(asked[name]["held_out"], "same"),
        "other questions answered in the style": lambda name: _of(asked[name]["others"], "in_style"),
        "learning rate": lambda name: f"{ways[name]['learning_rate']:g}" if name in ways else "",
        "seconds · peak GiB": lambda name: _cost(ways[name]) if name in ways else "",
        "stored for itself, MB": lambda name: _stored(ways[name], result["parameters"]) if name in ways else "",
    }
    lines = [f"| {result['model'].removesuffix('.gguf')} | {' | '.join(asked)} |", "|---|" + "---:|" * len(asked)]
    lines += [f"| {what} | {' | '.join(map(value, asked))} |" for what, value in rows.items()]
    first = next(iter(ways.values()))
    lines += [
        "",
        f"{result['sequences']} packed sequences, {first['steps']} steps, {first['epochs']:.0f} epochs, in {first['precision']}; "
        f"{result['held_out_conversations']} conversations held out. `python benchmarks/sft.py --model models/start --work "
        f"DIR`; {_measured(result['environment'], 'torch')}.",
        "",
        f"| asked | {' | '.join(asked)} |",
        "|---|" + "---|" * len(asked),
    ]
    held = [sample for sample in result["samples"] if sample["is_held_out"]]
    for sample in [*held[:3], *(sample for sample in result["samples"] if not sample["is_held_out"])]:
        lines.append(f"| {sample['question']} | {' | '.join(_cell(sample[name]) for name in asked)} |")
    return "\n".join(lines)


def _of(counts: dict[str, int], key: str) -> str:
    return f"{counts[key]} of {counts['answers']}"


def _cost(way: dict[str, Any]) -> str:
    return f"{way['seconds']:,.0f} · {way['memory_gib']:.1f}"


def _stored(way: dict[str, Any], parameters: int) -> str:
    return f"{(way['adapter_bytes'] or 4 * parameters) / 1e6:,.0f}"


def _cell(answer: str) -> str:
    text = " ".join(answer.split()).replace("|", "\\|")
    return text if len(text) <= 120 else text[:120].rstrip() + " …"


def native_kernels() -> str:
    """Return the native engine's roofline, and what it makes of it."""
    result = load("kernels")
    lines = [
        "| model | product | MB a token | from | GB/s | reading alone | of it |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for name, row in result["models"].items():
        for part, size in row["bytes_touched"].items():
            place = "cache" if part == "network" and row["networks"] == 1 else "memory"
            speed, limit = (row["per_second"][f"{kind} of {part}"]["median"] for kind in ("bytes", "reading"))
            cells = f"{speed / 1e9:.1f} | {limit / 1e9:.1f} | {speed / limit:.0%}"
            lines.append(f"| {name} | {part} | {size / 1e6:.1f} | {place} | {cells} |")
    lines += [
        "",
        "| model | reading alone | products alone | in step | decode | of products | of those in step | 8 together | of one | at 900 tokens | with 16-bit cache | prefill 512 "
        "| MiB of weights in the file | in memory, loaded | after decoding | at most |",
        "|---|" + "---:|" * 15,
    ]
    for name, row in result["models"].items():
        its = {key: value["median"] for key, value in row["per_second"].items()}
        memory = row["memory"]
        sizes = [memory[key] / 2**20 for key in ("weights", "loaded", "decoded", "peak")]
        lines.append(
            f"| {name} | {its['reading']:.1f} | {its['products']:.1f} | {its['products in step']:.1f} | {its['decode']:.1f} "
            f"| {row['decode_of_products']:.2f} | {row['decode_of_products_in_step']:.2f} | {its['decode 8']:.1f} "
            f"| {row['decode_8_of_decode']:.2f} | {its['decode far']:.1f} | {its['decode far, 16 bits']:.1f} "
            f"| {its['prefill 512']:.1f} | {sizes[0]:.1f} | {sizes[1]:.1f} ({sizes[1] / sizes[0]:.3f}) | {sizes[2]:.1f} "
            f"| {sizes[3]:.1f} |"
        )
    remark = f"; {result['remark']}" if result["remark"] else ""
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {result['rounds']} rounds, tokens/s where nothing else is said; {result['kernels']}, {result['threads']} "
            f"threads{remark}. Memory is what the process takes more than before it opened the model, mapped pages among it. "
            "Reading alone: the same threads load the same weights in the same order and do nothing else, without the hint that weights "
            "will not be used again. Products alone: no thread "
            "ever waits for another; in step: it waits where a product needs all of the last one's result, as in decoding. "
            f"`python benchmarks/kernels.py`; {_measured(result['environment'])}.",
        ]
    )


def native_change() -> str:
    """Return what the native engine's last change gained."""
    result = load("native_change")
    lines = ["| work | tokens/s before | now | ratio | of each launch |", "|---|---:|---:|---:|---|"]
    for kind, row in result["work"].items():
        speeds = row["per_second"]
        launches = " ".join(f"{ratio:.2f}" for ratio in row["ratio_of_launches"])
        lines.append(f"| {kind} | {speeds['earlier']:.1f} | {speeds['now']:.1f} | {row['ratio']:.2f} | {launches} |")
    remark = f"; {result['remark']}" if result["remark"] else ""
    return "\n".join(
        [
            *lines,
            "",
            f"{result['model']}, {result['threads']} threads, medians of {result['rounds']} rounds in each of "
            f"{len(row['ratio_of_launches'])} launches of both engines{remark}. The ratio is "
            "the median of the launches' medians of neighbouring rounds, not that of the two speeds. "
            f"`python benchmarks/native_change.py {result['model']} --beside {result['beside'][:12]}`; "
            f"{_measured(result['environment'])}.",
        ]
    )


def native_parity() -> str:
    """Return how the native engine compares with llama.cpp and torch on real text."""
    lines = [
        "| file | bits per byte: torch | llama.cpp | native | beside llama.cpp | 16-bit cache |",
        "|---|" + "---:|" * 5,
    ]
    alike = [
        "| file | likeliest token as llama.cpp's: llama.cpp, one by one | native | 16-bit cache | torch "
        "| where llama.cpp is sure: native | 16-bit cache | torch "
        "| as torch's: llama.cpp | native | 16-bit cache | relative error of logits: llama.cpp | native | 16-bit cache |",
        "|---|" + "---:|" * 13,
    ]
    stamps = []
    for name, row in load("native-parity").items():
        bits, same = row["bits_per_byte"], row["same_likeliest_token"]
        lines.append(
            f"| {name}, {row['tokens']:,} tokens | {bits['torch']:.4f} | {bits['llama.cpp']:.4f} | {bits['native']:.4f} "
            f"| {bits['native'] / bits['llama.cpp'] - 1:+.2%} | {bits['f16 cache']:.4f} |"
        )
        shares = [same[f"llama.cpp = {other}"] for other in ("llama.cpp, one by one", "native", "f16 cache", "torch")]
        shares += [row["same_where_sure"][other] for other in ("native", "f16 cache", "torch")]
        shares += [same[f"{engine} = torch"] for engine in ("llama.cpp", "native", "f16 cache")]
        errors = [row["relative_error_to_torch"][engine] for engine in ("llama.cpp", "native", "f16 cache")]
        cells = [*(f"{share:.1%}" for share in shares), *(f"{error:.1e}" for error in errors)]
        stamps.append(_measured(row["environment"]))
        alike.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            *alike,
            "",
            f"Articles in passages of {row['passage']:,} tokens; llama-cpp-python {row['llama_cpp_python']}. "
            f"`python benchmarks/native_parity.py`; {'; '.join(stamps)}.",
        ]
    )


def native_lookup() -> str:
    """Return what guessing ahead saves, and some of the answers."""
    result = load("lookup")
    lines = ["| prompts | guesses | tokens | passes | tokens a pass | guesses kept | tokens/s |", "|---|" + "---:|" * 6]
    for kind, widths in result["widths"].items():
        for width, its in widths.items():
            guessed = its["fed"] - its["passes"]
            kept = f"{(its['tokens'] - its['passes']) / guessed:.0%}" if guessed else ""
            lines.append(
                f"| {kind} | {width} | {its['tokens']:,.0f} | {its['passes']:,.0f} | {its['tokens'] / its['passes']:.2f} | {kept} "
                f"| {its['tokens'] / its['seconds']:.1f} |"
            )
    answers = list(result["answers"].items())
    lines += [
        "",
        f"{len(answers)} greedy answers of {result['model']} are in benchmarks/results/lookup.json. Every 17th:",
        "",
    ]
    lines += [f"- *{prompt.splitlines()[0]}* {' '.join(answer.split())}" for prompt, answer in answers[::17]]
    remark = f"; {result['remark']}" if result["remark"] else ""
    return "\n".join([*lines, "", f"`python benchmarks/lookup.py`{remark}; {_measured(result['environment'])}."])


def _measured(environment: dict[str, Any], *packages: str) -> str:
    """Return machine, versions of some packages, date and commit, with the + of a checkout that differed from it."""
    commit = environment["commit"]
    short = "unknown" if commit is None else commit[:12] + ("+" if commit.endswith("+") else "")
    versions = "".join(f", {name} {environment['packages'][name]}" for name in packages)
    return f"{environment['machine']}{versions}, {environment['date'][:10]}, commit {short}"


def serving() -> str:
    """Return what the server bears, a column for each engine."""
    results = load("serve")
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {name} | {' | '.join(map(cell, results.values()))} |")

    def pair(values: dict[str, float], form: str) -> str:
        return " · ".join(form.format(value) for value in values.values())

    def core_share(result: dict[str, Any], what: str) -> str:
        return pair({count: share[what] for count, share in result["share_of_a_core"].items()}, "{:.1%}")

    row("tokens/s of the engine alone, 1 · 8 sequences", lambda r: pair(r["bare_engine_tokens_per_second"], "{:,.0f}"))
    row("tokens/s of the server, 1 · 8 clients", lambda r: pair(r["tokens_per_second"], "{:,.0f}"))
    row("8 clients over one", lambda r: f"{r['gain_of_slots']:.2f} ×")
    row("slower than the engine alone by", lambda r: pair(r["server_overhead"], "{:.1%}"))
    row("of a core: the server's event loop", lambda r: core_share(r, "event_loop"))
    row("of a core: the client", lambda r: core_share(r, "client"))
    row(
        "first token, 8 clients: median · 95th",
        lambda r: "{median:.2f} · {p95:.2f} s".format(**r["first_token_seconds"]),
    )
    row("terminal: start of `mobillama chat` to first text", lambda r: f"{r['terminal_first_text_seconds']:.2f} s")
    row("slots of killed clients are free after", lambda r: f"{r['slots_free_after_kill_seconds']:.3f} s")
    row("soak: clients · seconds", lambda r: f"{r['soak']['clients']} · {r['soak']['seconds']:.0f}")
    row(
        "streams by outcome",
        lambda r: ", ".join(f"{count:,} {name}" for name, count in sorted(r["soak"]["streams"].items())),
    )
    row(
        "memory in the second · last fifth",
        lambda r: "{second_fifth:,.0f} · {last_fifth:,.0f} MiB".format(**r["soak"]["resident_mib"]),
    )
    stamps = dict.fromkeys(_measured(result["environment"]) for result in results.values())
    remarks = "".join(f" {name}: {result['remark']}." for name, result in results.items() if result["remark"])
    return "\n".join([*lines, "", f"`python benchmarks/serve.py MODEL`; {'; '.join(stamps)}.{remarks}"])


BLOCKS: dict[str, tuple[Path, Callable[[], str]]] = {
    "quickstart": (ROOT / "README.md", quickstart),
    "train-summary": (ROOT / "README.md", train_summary),
    "data-speed": (ROOT / "docs" / "data.md", data_speed),
    "corpus-table": (ROOT / "docs" / "data.md", corpus_table),
    "corpus-proofs": (ROOT / "docs" / "data.md", corpus_proofs),
    "faults": (ROOT / "docs" / "training.md", faults),
    "sft": (ROOT / "docs" / "chat.md", sft),
    "train-speed": (ROOT / "docs" / "training.md", train_speed),
    "step-time": (ROOT / "docs" / "training.md", step_time),
    "h100-resume": (ROOT / "docs" / "training.md", resume),
    "data-plan": (ROOT / "docs" / "data.md", data_plan),
    "evaluation-speed": (ROOT / "docs" / "evaluation.md", evaluation_speed),
    "evaluation-scores": (ROOT / "docs" / "evaluation.md", evaluation_scores),
    "gguf-parity": (ROOT / "docs" / "on-device.md", gguf_parity),
    "quantize": (ROOT / "docs" / "on-device.md", quantize),
    "exports": (ROOT / "docs" / "on-device.md", exports),
    "fuzz": (ROOT / "docs" / "on-device.md", fuzz),
    "native-kernels": (ROOT / "docs" / "on-device.md", native_kernels),
    "native-change": (ROOT / "docs" / "on-device.md", native_change),
    "native-lookup": (ROOT / "docs" / "on-device.md", native_lookup),
    "native-parity": (ROOT / "docs" / "on-device.md", native_parity),
    "inference": (ROOT / "docs" / "on-device.md", inference),
    "decode-gpu": (ROOT / "docs" / "on-device.md", decode_gpu),
    "serving": (ROOT / "docs" / "serving.md", serving),
    "browser": (ROOT / "docs" / "on-device.md", browser),
    "executorch": (ROOT / "docs" / "on-device.md", executorch),
}


def replaced(text: str, name: str, block: str) -> str:
    """Return a file's text with the block of that name replaced.

    Raises:
        ValueError: it has no such markers.
    """
    pattern = f"(<!-- {name} -->).*?(<!-- /{name} -->)"
    gap = "\n" if f"<!-- {name} -->\n" in text else ""
    found, count = re.subn(pattern, lambda match: f"{match[1]}{gap}{block}{gap}{match[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"{count} blocks <!-- {name} --> instead of one")
    return found


def take_quickstart(run: Path) -> None:
    """Copy a run's numbers and picture into the project."""
    if json.loads((run / "quickstart.json").read_text(encoding="utf-8"))["resumed"]:
        sys.exit(f"{run}: was resumed, so its time is not the whole journey's; run quickstart afresh")
    shutil.copyfile(run / "quickstart.json", RESULTS / "quickstart.json")
    shutil.copyfile(run / "loss.png", ROOT / "docs" / "pictures" / "quickstart-loss.png")


def main() -> None:
    """Rewrite all blocks."""
    if len(sys.argv) > 1:
        take_quickstart(Path(sys.argv[1]))
    for name, (path, block) in BLOCKS.items():
        path.write_text(replaced(path.read_text(encoding="utf-8"), name, block()), encoding="utf-8")


if __name__ == "__main__":
    main()

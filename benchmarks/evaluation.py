"""Our adapter beside the harness's own HFLM: speed, tokens through the model, log-probabilities, decisions.

    python benchmarks/evaluation.py tokens --benchmarks DIR --tokenizer LLAMA.model --out tokens.npz   # no GPU; minutes
    python benchmarks/evaluation.py measure --tokens tokens.npz                                        # one GPU
    python benchmarks/evaluation.py measure --tokens tokens.npz --device cpu --preset mobillama-tiny --per-benchmark 4
    mobillama import SmolLM2-135M-Instruct.Q4_1.gguf DIR                         # a model for --model

``tokens`` writes all requests of suite paper as ids, so that ``measure`` needs neither data nor tokenizer. ``measure`` runs on
one machine, one after another: a fixed number of questions of each benchmark through both adapters in float64, where rounding
hides nothing, and in float32, which tells how much of a difference is rounding and whose; those and a fixed share of all
questions through both in bfloat16; the whole suite through ours. Decisions are those of each benchmark's own metric.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mobillama.console import note, progress, table
from mobillama.evaluate.encode import Encoded, TextTokenizer, to_sequences
from mobillama.evaluate.scorer import Scorer
from mobillama.record.environment import environment
from mobillama.record.files import read_json, sha256_json, write_json
from mobillama.record.manifest import describe_files

if TYPE_CHECKING:
    from mobillama.evaluate.requests import LoadedTask

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
CONTEXT = 2048
SEED = 0
TIE = 1e-4  # decisions may differ where the best two are nearer than this


def write_tokens(args: argparse.Namespace) -> None:
    """Write the suite's requests as ids."""
    from transformers import AutoTokenizer

    from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
    from mobillama.evaluate.requests import load_tasks, load_tokens
    from mobillama.evaluate.suites import SUITES

    with tempfile.TemporaryDirectory() as folder, progress() as show:
        source = args.tokenizer
        if source.is_file():  # a sentencepiece model, as transformers reads it from a model directory of ours
            save_tokenizer(load_tokenizer(source), Path(folder))
            source = Path(folder)
        files = describe_files(source)
        digest = sha256_json({name: fact for name, fact in files.items() if name.startswith("tokenizer")})
        tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(source), digest, False)
        tasks = load_tasks(SUITES["paper"], args.benchmarks, args.cache, 0, show)
        encoded = load_tokens(tasks, tokenizer, args.cache, show)
    questions, names, start = [], [], 0
    lengths: list[int] = []
    truths: list[bool] = []
    for task in tasks:
        questions.append(np.array(task.requests.documents, np.int32) + start)
        start = int(questions[-1].max()) + 1
        names += [task.benchmark.name] * len(task.requests)
        lengths += _lengths(task)
        truths += _truths(task)
    metrics = {task.benchmark.name: task.benchmark.label or task.benchmark.metric for task in tasks}
    kinds = sorted(metrics)
    np.savez_compressed(
        args.out,
        question_n=np.concatenate(questions),
        benchmark_n=np.array([kinds.index(name) for name in names], np.uint8),
        benchmarks=np.array(kinds),
        metrics=np.array([metrics[name] for name in kinds]),
        length_n=np.array(lengths, np.int32),
        true_n=np.array(truths),
        **vars(_joined(encoded)),
    )
    note(f"{args.out}: {len(names):,} requests of {start:,} questions, {args.out.stat().st_size / 2**20:.1f} MiB")


def _lengths(task: LoadedTask) -> list[int]:
    """Return the characters of each choice, by which the harness's acc_norm divides."""
    delimiter = len(task.task.config.target_delimiter)
    return [max(1, len(text) - delimiter) for text in task.requests.continuations]


def _truths(task: LoadedTask) -> list[bool]:
    """Return which choices are true, where the metric is the probability of all that are."""
    if task.benchmark.label != "mc2":
        return [False] * len(task.requests)
    documents = dict.fromkeys(task.requests.documents)
    return [bool(label) for d in documents for label in task.task.task_docs[d]["mc2_targets"]["labels"]]


def _joined(parts: list[Encoded]) -> Encoded:
    def ends(name: str, ids: str) -> NDArray[np.int64]:
        starts = np.cumsum([0, *(len(getattr(part, ids)) for part in parts)])
        return np.concatenate([getattr(part, name) + start for part, start in zip(parts, starts, strict=False)])

    heads = np.cumsum([0, *(len(part.context_ends) for part in parts)])
    return Encoded(
        np.concatenate([part.context_ids for part in parts]),
        ends("context_ends", "context_ids"),
        np.concatenate([part.context_of_n + head for part, head in zip(parts, heads, strict=False)]).astype(np.int32),
        np.concatenate([part.continuation_ids for part in parts]),
        ends("continuation_ends_n", "continuation_ids"),
        np.array(False),
    )


class Questions:
    """Requests as ids, all or those of a seeded sample of the questions."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as stored:
            self.question_n, self.benchmark_n = stored["question_n"], stored["benchmark_n"]
            self.length_n, self.true_n = stored["length_n"], stored["true_n"]
            self.metrics = dict(zip(stored["benchmarks"].tolist(), stored["metrics"].tolist(), strict=True))
            encoded = Encoded(**{item.name: stored[item.name] for item in fields(Encoded)})
        self.heads = np.split(encoded.context_ids, encoded.context_ends[:-1])
        self.parts = np.split(encoded.continuation_ids, encoded.continuation_ends_n[:-1])
        self.head_of = encoded.context_of_n
        self.encoded = encoded

    def sample(self, per_benchmark: int, share: float = 0.0, only: Sequence[str] = ()) -> NDArray[np.int64]:
        """Return the requests of some questions of each benchmark, or of ``only`` these, and of a share of all questions."""
        names = [(number, name) for number, name in enumerate(self.metrics) if name in only or not only]
        groups = [np.unique(self.question_n[self.benchmark_n == number]) for number, _ in names]
        every, draw = np.unique(np.concatenate(groups)), np.random.default_rng(SEED)
        chosen = [draw.permutation(group)[:per_benchmark] for group in groups]
        chosen.append(draw.permutation(every)[: round(share * len(every))])
        return np.flatnonzero(np.isin(self.question_n, np.concatenate(chosen)))


def through_ours(scorer: Scorer, questions: Questions, requests: NDArray[np.int64]) -> dict[str, Any]:
    """Score requests with our scorer; packing counts as part of the time."""
    sequences, _, truncated = to_sequences(questions.encoded, CONTEXT)
    chosen = [sequences[index] for index in requests]
    before, logprobs = scorer.tokens, np.zeros(len(chosen))
    with _clock(scorer.device) as clock:
        for scores in scorer.score(chosen):
            for score in scores:
                logprobs[score.sequence] = score.logprob
    tokens = scorer.tokens - before
    return {"seconds": clock["seconds"], "tokens": tokens, "truncated": truncated.contexts, "logprobs": logprobs}


def through_stock(
    model: Any, questions: Questions, requests: NDArray[np.int64], batch: int, softmax: str
) -> dict[str, Any]:
    """Score requests with the harness's own adapter.

    Args:
        softmax: the type that it computes log-probabilities in. torch's float32 log_softmax over tens of thousands of ids
            rounds more coarsely than what is compared, so where bits count it is float64.
    """
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"</s>": 0}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    settings = {"batch_size": batch, "max_length": CONTEXT, "device": str(model.device), "softmax_dtype": softmax}
    stock = HFLM(model, tokenizer=tokenizer, **settings)
    tokens = 0

    def count(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += (inputs[0] if inputs else named["input_ids"]).numel()

    counting = model.register_forward_pre_hook(count, with_kwargs=True)
    asked = [
        ((str(index), ""), questions.heads[questions.head_of[index]].tolist(), questions.parts[index].tolist())
        for index in requests
    ]
    with _clock(model.device) as clock:
        answers = stock._loglikelihood_tokens(asked, disable_tqdm=True)
    counting.remove()
    return {"seconds": clock["seconds"], "tokens": tokens, "logprobs": np.array([logprob for logprob, _ in answers])}


@contextmanager
def _clock(device: torch.device) -> Iterator[dict[str, float]]:
    measured: dict[str, float] = {}
    started = time.perf_counter()
    yield measured
    if device.type == "cuda":
        torch.cuda.synchronize()
    measured["seconds"] = time.perf_counter() - started


def compare(questions: Questions, requests: NDArray[np.int64], ours: Any, stock: Any) -> dict[str, Any]:
    """Return how far two answers to the same requests are apart, question by question."""
    by_benchmark = {}
    for number, (name, metric) in enumerate(questions.metrics.items()):
        chosen = questions.benchmark_n[requests] == number
        if not chosen.any():
            continue
        starts = np.flatnonzero(np.diff(questions.question_n[requests[chosen]], prepend=-1))[1:]
        answers = [np.split(scores["logprobs"][chosen], starts) for scores in (ours, stock)]
        facts = np.split((questions.true_n if metric == "mc2" else questions.length_n)[requests[chosen]], starts)
        judge = _compare_probabilities if metric == "mc2" else _compare_decisions
        by_benchmark[name] = {"metric": metric, "questions": len(facts), **judge(metric, *answers, facts)}
    decided = [facts for facts in by_benchmark.values() if facts["metric"] != "mc2"]
    return {
        "questions": sum(facts["questions"] for facts in by_benchmark.values()),
        "requests": len(requests),
        "max_logprob_difference": float(np.abs(ours["logprobs"] - stock["logprobs"]).max()),
        "mean_logprob_difference": float(np.abs(ours["logprobs"] - stock["logprobs"]).mean()),
        "decisions_that_differ": sum(facts["decisions_that_differ"] for facts in decided),
        "of_them_not_within_1e-4": sum(facts["of_them_not_within_1e-4"] for facts in decided),
        "by_benchmark": by_benchmark,
        "speed_ratio": stock["seconds"] / ours["seconds"],
        "ours": {name: ours[name] for name in ("seconds", "tokens")},
        "stock": {name: stock[name] for name in ("seconds", "tokens")},
    }


Pieces = list[NDArray[Any]]  # an array a question, in the order of its choices


def _compare_decisions(metric: str, ours: Pieces, stock: Pieces, lengths: Pieces) -> dict[str, int]:
    """Return how many questions two adapters answer otherwise, and in how many of each the best choices are equal."""
    differ = beyond = ties_ours = ties_stock = 0
    for a, b, length in zip(ours, stock, lengths, strict=True):
        a, b = (a / length, b / length) if metric == "acc_norm" else (a, b)
        if a.argmax() != b.argmax():
            differ += 1
            beyond += abs(b[a.argmax()] - b.max()) > TIE
        ties_ours += np.count_nonzero(a == a.max()) > 1
        ties_stock += np.count_nonzero(b == b.max()) > 1
    return {
        "decisions_that_differ": differ,
        "of_them_not_within_1e-4": int(beyond),
        "ties_ours": int(ties_ours),
        "ties_stock": int(ties_stock),
    }


def _compare_probabilities(metric: str, ours: Pieces, stock: Pieces, truths: Pieces) -> dict[str, float]:
    """Return what two adapters give the true choices in the mean, and how far they are apart in one question at most."""
    ours_q, stock_q = (
        np.array(
            [
                np.exp(a - a.max())[true].sum() / np.exp(a - a.max()).sum()
                for a, true in zip(scores, truths, strict=True)
            ]
        )
        for scores in (ours, stock)
    )
    return {
        "ours": float(ours_q.mean()),
        "stock": float(stock_q.mean()),
        "largest_difference": float(np.abs(ours_q - stock_q).max()),
    }


def errors(exact: NDArray[np.float64], answers: dict[str, Any]) -> dict[str, float]:
    """Return how far log-probabilities are from those of float64, and how many are farther than a tie."""
    apart = np.abs(answers["logprobs"] - exact)
    return {"max": float(apart.max()), "mean": float(apart.mean()), "beyond_1e-4": int((apart > TIE).sum())}


def open_model(args: argparse.Namespace, ids: int) -> Any:
    """Return the model of a directory, or one of a preset with random weights and at least so many ids."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import mobillama.hf  # noqa: F401

    device = torch.device(args.device)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    from dataclasses import asdict

    from mobillama.recipe import PRESETS

    torch.manual_seed(SEED)
    shape = asdict(PRESETS[args.preset][0])
    shape |= {"max_position_embeddings": CONTEXT, "vocab_size": max(shape["vocab_size"], ids)}
    config = AutoConfig.for_model("mobillama", **shape)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def measure(args: argparse.Namespace) -> None:
    """Run the three comparisons and write what they show."""
    torch.backends.cuda.matmul.allow_tf32 = False
    questions = Questions(args.tokens)
    ids = 1 + int(max(questions.encoded.context_ids.max(), questions.encoded.continuation_ids.max()))
    cuda = args.device == "cuda"
    result: dict[str, Any] = {
        "environment": environment(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "model": Path(args.model).name if args.model else f"{args.preset}, random weights",
        "requests": len(questions.question_n),
        "only": args.benchmarks,
    }
    if unknown := set(args.benchmarks) - set(questions.metrics):
        raise SystemExit(f"--benchmarks: no {', '.join(sorted(unknown))}; there are {', '.join(questions.metrics)}")
    few = questions.sample(args.per_benchmark, only=args.benchmarks)
    model = open_model(args, ids)
    scorer = Scorer(model, "float64", CONTEXT)
    ours, stock = through_ours(scorer, questions, few), through_stock(model, questions, few, args.batch, "float64")
    result["float64"] = compare(questions, few, ours, stock)
    exact = stock["logprobs"]
    scorer = Scorer(model.float(), "float32", CONTEXT)
    ours, stock = through_ours(scorer, questions, few), through_stock(model, questions, few, args.batch, "float64")
    result["float32"] = compare(questions, few, ours, stock)
    result["float32"]["errors"] = {"ours": errors(exact, ours), "stock": errors(exact, stock)}
    _save(result, args)
    if cuda or args.bfloat16:
        del scorer, model
        gc.collect()
        model = open_model(args, ids)
        scorer = Scorer(model, "bfloat16", CONTEXT)
        sample = questions.sample(args.per_benchmark, args.share, args.benchmarks)
        through_ours(scorer, questions, sample[:64])  # kernels are chosen
        ours, stock = (
            through_ours(scorer, questions, sample),
            through_stock(model, questions, sample, args.batch, "float32"),
        )
        result["bfloat16"] = compare(questions, sample, ours, stock)
        _save(result, args)
        if cuda and not args.benchmarks:
            whole = through_ours(scorer, questions, np.arange(len(questions.question_n)))
            result["whole_suite"] = {name: whole[name] for name in ("seconds", "tokens", "truncated")}
            result["whole_suite"]["tokens_per_second"] = whole["tokens"] / whole["seconds"]
            _save(result, args)
    rows = []
    for precision in ("float64", "float32", "bfloat16"):
        if facts := result.get(precision):
            rows += [
                (f"{precision}: requests · questions", f"{facts['requests']:,} · {facts['questions']:,}"),
                ("  tokens: ours · stock", f"{facts['ours']['tokens']:,} · {facts['stock']['tokens']:,}"),
                ("  seconds: ours · stock", f"{facts['ours']['seconds']:.1f} · {facts['stock']['seconds']:.1f}"),
                ("  times faster", f"{facts['speed_ratio']:.2f}"),
                ("  largest difference of log-probabilities", f"{facts['max_logprob_difference']:.2e}"),
                *_errors(facts),
                *((f"  {name}, {of['metric']}", _said(of)) for name, of in facts["by_benchmark"].items()),
            ]
    if whole_facts := result.get("whole_suite"):
        said = f"{whole_facts['tokens']:,} tokens in {whole_facts['seconds']:.1f} s"
        rows.append(("whole suite, ours", f"{said}, {whole_facts['tokens_per_second']:,.0f}/s"))
    table(f"{result['model']} on {result['device']}", ["", ""], rows)


def _errors(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "errors" not in facts:
        return []
    both = [facts["errors"][name] for name in ("ours", "stock")]
    return [("  beside float64, at most: ours · stock", " · ".join(f"{its['max']:.2e}" for its in both))]


def _said(facts: dict[str, Any]) -> str:
    if facts["metric"] == "mc2":
        return f"{facts['ours']:.4f} · {facts['stock']:.4f}, largest difference {facts['largest_difference']:.1e}"
    return (
        f"{facts['decisions_that_differ']} of {facts['questions']} decisions differ, {facts['of_them_not_within_1e-4']} by "
        f"more than 1e-4; ties: {facts['ties_ours']} · {facts['ties_stock']}"
    )


def _save(result: dict[str, Any], args: argparse.Namespace) -> None:
    known = read_json(args.results) if args.results.is_file() else {}
    only = f" ({', '.join(result['only'])})" if result["only"] else ""
    write_json(args.results, {**known, f"{result['model']}{only}, {result['device']}": result})


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("tokens")
    verb.add_argument("--benchmarks", type=Path, required=True)
    verb.add_argument("--tokenizer", type=Path, required=True, help="a .model file, or a Hugging Face directory")
    verb.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mobillama" / "evaluate")
    verb.add_argument("--out", type=Path, required=True)
    verb.set_defaults(run=write_tokens)
    verb = verbs.add_parser("measure")
    verb.add_argument("--tokens", type=Path, required=True)
    verb.add_argument("--model", help="a model directory, instead of random weights")
    verb.add_argument("--preset", default="mobillama-0.5b")
    verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    verb.add_argument("--per-benchmark", type=int, default=200, metavar="N", help="questions of each, at most")
    verb.add_argument("--benchmarks", nargs="+", default=[], metavar="NAME", help="only these, e.g. CrowS-Pairs PIQA")
    verb.add_argument("--share", type=float, default=0.2, help="of all questions, besides, in bfloat16")
    verb.add_argument("--batch", type=int, default=32, help="rows of the stock adapter")
    verb.add_argument("--bfloat16", action="store_true", help="in bfloat16 on a CPU too")
    verb.add_argument("--results", type=Path, default=RESULTS)
    verb.set_defaults(run=measure)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

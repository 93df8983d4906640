"""What ``benchmarks/evaluation.py`` says of two adapters: questions of each benchmark, decisions of its own metric."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mobillama.hf  # noqa: F401
from mobillama.evaluate.scorer import Scorer


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "evaluation.py"
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def questions(benchmark, tmp_path):
    """Three questions of two choices in each of three benchmarks; requests of one token behind one context."""
    n = 18
    np.savez(
        tmp_path / "tokens.npz",
        question_n=np.repeat(np.arange(9), 2),
        benchmark_n=np.repeat(np.arange(3), 6),
        benchmarks=np.array(["ARC-C", "MMLU", "TruthfulQA"]),
        metrics=np.array(["acc_norm", "acc", "mc2"]),
        length_n=np.tile([1, 4], 9),
        true_n=np.tile([True, False], 9),
        context_ids=np.array([1], np.int32),
        context_ends=np.array([1]),
        context_of_n=np.zeros(n, np.int32),
        continuation_ids=np.arange(n, dtype=np.int32),
        continuation_ends_n=np.arange(1, n + 1),
        rolling=np.array(False),
    )
    return benchmark.Questions(tmp_path / "tokens.npz")


def test_a_sample_has_questions_of_each_benchmark_and_a_share_of_all(questions):
    chosen = questions.sample(2)
    assert [np.unique(questions.question_n[chosen][questions.benchmark_n[chosen] == k]).size for k in range(3)] == [
        2
    ] * 3
    assert set(chosen) < set(questions.sample(2, 0.9)) and len(questions.sample(0, 0.34)) == 6
    assert (questions.sample(2) == chosen).all()


def test_decisions_are_those_of_each_metric(benchmark, questions):
    stock = np.tile([-2.0, -4.0], 9)  # by characters the second is the likelier, by itself the first
    ours = stock.copy()
    ours[0] = -0.5  # ARC-C: now the first by characters too
    ours[6] = -5.0  # MMLU: another decision
    ours[8] = -4.0  # MMLU: a tie, decided as before
    ours[12] = -4.0  # TruthfulQA: half instead of 0.88
    answers = [{"logprobs": logprobs, "seconds": 1.0, "tokens": 1} for logprobs in (ours, stock)]
    found = benchmark.compare(questions, np.arange(18), *answers)
    assert found["questions"] == 9 and found["decisions_that_differ"] == found["of_them_not_within_1e-4"] == 2
    arc, mmlu, truthful = (found["by_benchmark"][name] for name in ("ARC-C", "MMLU", "TruthfulQA"))
    assert (arc["decisions_that_differ"], mmlu["decisions_that_differ"]) == (1, 1)
    assert (mmlu["ties_ours"], mmlu["ties_stock"], arc["ties_ours"]) == (1, 0, 0)
    assert truthful["largest_difference"] == pytest.approx(1 / (1 + np.exp(-2)) - 0.5)


def test_in_float64_adapters_differ_by_nothing_and_float32s_rounding_is_told(benchmark, questions):
    config = AutoConfig.for_model(
        "mobillama", vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    requests = np.arange(18)
    rounded = benchmark.through_ours(Scorer(model, "float32", benchmark.CONTEXT), questions, requests)
    exact = benchmark.through_ours(Scorer(model, "float64", benchmark.CONTEXT), questions, requests)
    stock = benchmark.through_stock(model, questions, requests, 4, "float64")
    assert benchmark.compare(questions, requests, exact, stock)["max_logprob_difference"] < 1e-12
    assert 0 < benchmark.errors(stock["logprobs"], rounded)["max"] < 1e-5
    wrong = rounded | {"logprobs": rounded["logprobs"] + np.where(requests == 7, 0.5, 0)}
    found = benchmark.errors(stock["logprobs"], wrong)
    assert found["beyond_1e-4"] == 1 and found["max"] == pytest.approx(0.5, abs=1e-5)

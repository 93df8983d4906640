"""What needs a CUDA device: run with ``pytest -m gpu``; elsewhere these tests are skipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mobillama.config import load_recipe
from mobillama.engine.torch_engine import TorchEngine
from mobillama.evaluate.scorer import multiply_in_float32
from mobillama.model.attention import KVCache
from mobillama.model.loss import linear_cross_entropy, token_losses
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig, PretrainRecipe
from mobillama.train.fused import fuse_layers
from mobillama.train.hopper import attention, attention_backward
from mobillama.train.loop import Silent, pretrain
from mobillama.train.meters import peak_flops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = ModelConfig(512, 128, 192, 6, 4, 2, max_position_embeddings=128)


def built(config: ModelConfig = CONFIG) -> MobiLlama:
    model = MobiLlama(config)
    initialise(model, config, 0)
    return model


@torch.no_grad()
def test_cuda_computes_what_the_cpu_computes():
    host, ids = built().eval(), torch.randint(0, 512, (3, 64))
    device = built().eval().cuda()
    mask = (torch.arange(64) >= torch.tensor([[0], [9], [30]])).long()
    documents = torch.arange(64).div(20, rounding_mode="floor").expand(3, 64)
    for inputs in ({}, {"attention_mask_bs": mask}, {"document_ids": documents}):
        theirs = device(ids.cuda(), **{key: value.cuda() for key, value in inputs.items()}).cpu()
        keep = inputs.get("attention_mask_bs", torch.ones_like(ids)) == 1
        torch.testing.assert_close(theirs[keep], host(ids, **inputs)[keep], atol=1e-4, rtol=1e-4)
    cache = KVCache(CONFIG, 3, 64, device="cuda")
    pieces = [device(ids[:, a:b].cuda(), cache=cache) for a, b in ((0, 40), (40, 41), (41, 64))]
    torch.testing.assert_close(torch.cat(pieces, 1).cpu(), host(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_shared_gradient_adds_in_float32_under_bfloat16_autocast(compiled):
    """Against the float64 sum over separate networks; sums in bfloat16 are off by more than 1e-3."""
    ids = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0)).cuda()

    def gradients(model: MobiLlama) -> dict[str, torch.Tensor]:
        run = torch.compile(model) if compiled else model
        with torch.autocast("cuda", torch.bfloat16):
            logits = run(ids[:, :-1])
        token_losses(logits, ids[:, 1:]).mean().backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if "up_proj" in name}

    once = built().cuda()
    separate = MobiLlama(dataclasses.replace(CONFIG, share="none")).cuda()
    weights = once.state_dict()
    separate.load_state_dict(
        {n: weights[f"model.ffns.0.{n.split('.', 3)[3]}" if ".ffns." in n else n] for n in separate.state_dict()}
    )
    (shared,) = gradients(once).values()
    exact = sum(gradients(separate).values())
    error = float((shared - exact).norm() / exact.norm())
    assert error < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(512, 512, 1408, 4, 8, max_position_embeddings=256),
        ModelConfig(512, 640, 1280, 3, 8, share="none", max_position_embeddings=256),
        ModelConfig(512, 768, 1408, 3, 16, 4, share="block", max_position_embeddings=256),
    ],
    ids=["heads of 64", "heads of 80", "grouped heads of 48"],
)
def test_fused_layers_are_as_near_to_float32_as_plain_ones(config):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fused layers need a Hopper GPU")
    pytest.importorskip("quack")
    ids = torch.randint(0, 512, (4, 257), generator=torch.Generator().manual_seed(0)).cuda()

    def gradients(fused: bool, bfloat16: bool) -> dict[str, torch.Tensor]:
        model = built(config).cuda()
        if fused:
            fuse_layers(model.model)
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            total, _ = linear_cross_entropy(model.model(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
        (total / ids[:, 1:].numel()).backward()
        return {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    exact = gradients(fused=False, bfloat16=False)
    plain, fused = (
        {name: float((found[name] - wanted).norm() / wanted.norm()) for name, wanted in exact.items()}
        for found in (gradients(fused=False, bfloat16=True), gradients(fused=True, bfloat16=True))
    )
    assert sum(fused.values()) < 1.05 * sum(plain.values())
    for name, error in fused.items():
        assert error < max(0.02, 1.3 * plain[name]), name


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("width", [16, 40, 80, 112, 136, 200, 256])
def test_fused_attention_knows_heads_of_every_width(width, key_heads):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fused layers need a Hopper GPU")
    pytest.importorskip("quack")
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, 200, heads, width, generator=generator).to("cuda", torch.bfloat16)
        for heads in (4, key_heads, key_heads, 4)
    )
    y, rest = attention(q, k, v)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    attention_backward(grad, (q, k, v), y, rest, gradients)
    exact = [part.double().transpose(1, 2).requires_grad_() for part in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(wanted, exact, grad.double().transpose(1, 2))
    for found, right in zip((y, *gradients), (wanted, *expected), strict=True):
        assert (found.transpose(1, 2).double() - right).norm() < 0.005 * right.norm()


def test_a_run_on_cuda_learns_and_resumes_with_the_same_sequences(recipe_file, tmp_path):
    steps = ["--train.steps", "40", "--train.precision", "bfloat16", "--train.device", "cuda"]
    pretrain(load_recipe(PretrainRecipe, recipe_file, steps), Silent())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.5
    host = ["--train.steps", "40", "--train.device", "cpu", "--run", str(tmp_path / "host")]
    pretrain(load_recipe(PretrainRecipe, recipe_file, host), Silent())
    series = [json.loads(line) for line in (tmp_path / "host" / "metrics.jsonl").read_text().splitlines()]
    on_host = [line["loss"] for line in series if line["kind"] == "step"]
    assert max(abs(a - b) for a, b in zip(losses, on_host, strict=True)) < 0.05


FUSED = [
    "--train.fused",
    "true",
    "--train.device",
    "cuda",
    "--train.precision",
    "bfloat16",
    "--train.micro_batch_size",
    "2",
]
FUSED += ["--model.hidden_size", "128", "--model.intermediate_size", "192", "--model.num_attention_heads", "4"]


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("float8", ["false", "true"])
def test_runs_with_fused_layers_learn_as_plain_ones(recipe_file, tmp_path, float8, recompute):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fused layers need a Hopper GPU")
    pytest.importorskip("quack")
    ways = {"plain": ["--train.fused", "false"], "fused": ["--train.activation_checkpointing", recompute]}
    for name, options in ways.items():
        options = [*FUSED, *options, "--train.steps", "40", "--run", str(tmp_path / name)]
        options += ["--train.float8", float8] if name == "fused" else []
        pretrain(load_recipe(PretrainRecipe, recipe_file, options), Silent())
    plain, fused = losses_of(tmp_path / "plain"), losses_of(tmp_path / "fused")
    assert fused[-1] < fused[0] - 0.5
    assert fused == pytest.approx(plain, abs=0.1 if float8 == "true" else 0.05)


@pytest.mark.parametrize("heads", ["4", "8"], ids=["heads of 32", "heads of 16"])
def test_deterministic_fused_steps_repeat_to_the_bit(recipe_file, tmp_path, heads):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fused layers need a Hopper GPU")
    pytest.importorskip("quack")
    options = [*FUSED, "--train.deterministic", "true", "--model.num_attention_heads", heads]
    try:
        for name in ("once", "again"):
            pretrain(load_recipe(PretrainRecipe, recipe_file, [*options, "--run", str(tmp_path / name)]), Silent())
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses_of(tmp_path / "once") == losses_of(tmp_path / "again")


def test_what_deterministic_steps_cost_and_how_mfu_is_computed_are_told(recipe_file):
    told = Silent()
    options = ["--train.device", "cuda", "--train.deterministic", "true", "--train.precision", "bfloat16"]
    try:
        pretrain(load_recipe(PretrainRecipe, recipe_file, options), told)
    finally:
        torch.use_deterministic_algorithms(False)
    assert any("train.deterministic: steps can be repeated to the bit, which took" in note for note in told.notes)
    if peak_flops(torch.cuda.get_device_name()):
        assert any(note.startswith("MFU = tokens/s ×") for note in told.notes)


def test_packed_rows_score_the_same_on_the_gpu():
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    from mobillama.evaluate.scorer import Scorer
    from mobillama.evaluate.tree import Sequence

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=256, **shape)).eval()
    random = np.random.default_rng(0)
    contexts = [random.integers(0, 300, 90) for _ in range(20)]
    ends = [random.integers(0, 300, 5) for _ in range(60)]
    sequences = [Sequence(np.concatenate([contexts[n // 3], end]).astype(np.int32), 5) for n, end in enumerate(ends)]
    found = []
    for device in ("cpu", "cuda"):
        scorer = Scorer(model.to(device), "float32", 128)
        assert scorer.packs
        found.append({s.sequence: s.logprob for part in scorer.score(sequences) for s in part})
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("compile", [False, True], ids=["graph", "compiled graph"])
def test_decoding_by_cuda_graphs_is_the_models_own(compile):
    config = ModelConfig(512, 64, 96, 3, 4, max_position_embeddings=600, initializer_range=0.1)
    model = MobiLlama(config)
    initialise(model, config, 0)
    model = model.to("cuda", torch.bfloat16).eval()
    engine = TorchEngine(model, compile=compile)
    ids = torch.randint(0, 512, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids], device="cuda"))[0].float().cpu().numpy()
    engine.feed(ids[:200])
    allocated = 0
    for place in range(200, 600):  # over the borders of two spans
        logits = engine.feed([ids[place]])
        assert np.abs(logits - expected[place]).max() < 0.05 * np.abs(expected[place]).max()
        if place == 520:
            allocated = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == allocated  # no token allocates once the last span is captured
    engine.truncate(300)
    assert np.abs(engine.feed([ids[300]]) - expected[300]).max() < 0.05 * np.abs(expected[300]).max()
    with pytest.raises(ValueError, match="600 tokens cannot hold"):
        engine.feed(ids[:300])


def test_sequences_decoded_together_are_those_decoded_alone():
    from mobillama.engine.torch_batch import TorchBatchEngine
    from mobillama.engine.torch_engine import TorchEngine

    model = built().eval().cuda()
    together, alone = TorchBatchEngine(model, 3), [TorchEngine(model) for _ in range(3)]
    for work in ([(0, [5, 6, 7]), (2, [9])], [(2, [4]), (0, [8]), (1, [1, 2])], [(1, [3]), (0, [2]), (2, [1])]):
        for row, (slot, ids) in zip(together.feed(work), work, strict=True):
            np.testing.assert_allclose(row, alone[slot].feed(ids), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_heads_product_of_bfloat16_is_float32():
    draw = torch.Generator().manual_seed(0)
    x_mc, weight_vc = (torch.randn(n, 96, generator=draw).bfloat16().cuda() for n in (37, 1003))
    exact_mv = x_mc.double() @ weight_vc.double().T
    y_mv = multiply_in_float32(x_mc, weight_vc, torch.ones(1003, dtype=torch.bfloat16, device="cuda"))
    assert y_mv.dtype == torch.float32
    torch.testing.assert_close(y_mv.double(), exact_mv + 1, atol=1e-4, rtol=1e-5)

"""A fused layer computes the gradients of the plain one; on the CPU the kernels' formulas stand in for them."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from mobillama.config import load_recipe
from mobillama.errors import UsageError
from mobillama.model.loss import linear_cross_entropy
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import PRESETS, ModelConfig, PretrainRecipe
from mobillama.record.chain import read_chain
from mobillama.train.arithmetic import Float8
from mobillama.train.fused import fuse_layers
from mobillama.train.hopper import check_shapes
from mobillama.train.loop import Silent, pretrain

CONFIG = ModelConfig(61, 48, 72, 4, 6, 2, max_position_embeddings=32)


def gradients(
    config: ModelConfig, fused: bool, recompute: bool = False, float8: bool = False, passes: int = 1
) -> dict[str, torch.Tensor]:
    model = MobiLlama(config).to(torch.float32 if float8 else torch.float64)
    initialise(model, config, 0)
    if fused:
        fuse_layers(model.model, float8, recompute)
    for number in range(passes):
        ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(number))
        total, _ = linear_cross_entropy(model.model(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
        total.backward()
        with torch.no_grad():  # what was cast in one pass must not serve the next
            for parameter in model.parameters():
                parameter.mul_(1.25)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize(("share", "groups"), [("ffn", 1), ("ffn", 2), ("none", 1), ("block", 1)])
def test_gradients_are_the_plain_ones(share, groups, recompute):
    config = dataclasses.replace(CONFIG, share=share, ffn_groups=groups)
    expected = gradients(config, fused=False, passes=2)
    found = gradients(config, fused=True, recompute=recompute, passes=2)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
def test_float8_gradients_are_near(recompute):
    """An e4m3 number has 4 significant bits, an e5m2 number 3."""
    expected, found = gradients(CONFIG, fused=False), gradients(CONFIG, True, recompute, float8=True)
    for name, gradient in found.items():
        error = float((gradient - expected[name]).norm() / expected[name].norm())
        assert 1e-3 < error < 0.15, (name, error)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
def test_it_keeps_six_streams_and_the_gates_of_a_layer(recompute):
    model = MobiLlama(CONFIG)
    fuse_layers(model.model, recompute=recompute)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(torch.zeros(2, 16, dtype=torch.long))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens, layers = 2 * 16, CONFIG.num_hidden_layers
    heads = CONFIG.hidden_size * (1 + 2 * CONFIG.key_value_heads / CONFIG.num_attention_heads)
    of_layer = CONFIG.hidden_size if recompute else 3 * CONFIG.hidden_size + heads + 2 * CONFIG.intermediate_size
    numbers = sum(size for place, size in kept.items() if place not in parameters) / 4
    weights = 0 if recompute else sum(p.numel() for p in model.model.layers.parameters())
    weights += 0 if recompute else sum(p.numel() for p in model.model.ffns.parameters())
    of_rows = 0 if recompute else 2 + CONFIG.num_attention_heads  # factors of norms; the CPU keeps no normalisers
    tables, final = CONFIG.attention_head_dim, 3 * CONFIG.hidden_size
    expected = layers * tokens * of_layer + weights
    assert expected <= numbers < expected + tokens * (layers * of_rows + tables + final) + 100


def test_nothing_waits_for_the_garbage_collector():
    """A tensor in a cycle of references lives until Python looks for cycles: gigabytes, at full size."""
    model = MobiLlama(CONFIG)
    fuse_layers(model.model)
    gc.collect()
    gc.disable()
    try:
        model.model(torch.zeros(2, 16, dtype=torch.long)).sum().backward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [found.shape for found in gc.garbage if isinstance(found, torch.Tensor)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_gradients_are_e5m2_and_the_rest_e4m3():
    x = torch.randn(32, 48)
    assert [part.dtype for part in Float8().gradient(x)[:2]] == [torch.float8_e5m2] * 2
    assert [part.dtype for part in Float8().weight(x)[:2]] == [torch.float8_e4m3fn] * 2
    assert Float8().rows(x, x.amax())[0].dtype == Float8().columns(x, x.amax())[1].dtype == torch.float8_e4m3fn


def test_a_mask_is_refused_where_it_would_be_left_out():
    model = MobiLlama(CONFIG)
    fuse_layers(model.model)
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="no mask but the causal one"):
        model.model(ids, document_ids=ids)
    with pytest.raises(ValueError, match="no positions but"):
        model.model(ids, position_ids=torch.arange(8)[None])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train.activation_checkpointing", "selective"], "train.activation_checkpointing: selective"),
        (["--train.mask_documents", "true"], "train.mask_documents"),
        (["--model.qk_norm", "true"], "model.qk_norm"),
    ],
)
def test_a_recipe_cannot_ask_for_what_fused_layers_do_not_know(recipe_file, options, said):
    with pytest.raises(UsageError, match=said):
        load_recipe(PretrainRecipe, recipe_file, ["--train.fused", "true", *options])


def test_a_device_without_the_kernels_is_refused(recipe_file):
    recipe = load_recipe(PretrainRecipe, recipe_file, ["--train.fused", "true", "--train.device", "cpu"])
    with pytest.raises(UsageError, match=r"train\.fused: needs a Hopper GPU"):
        pretrain(recipe, Silent())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "float32"}, "train.precision"),
        ({"config": ModelConfig(61, 60, 72, 4, 6)}, "model.hidden_size"),
        ({"config": ModelConfig(61, 48, 68, 4, 6)}, "model.intermediate_size"),
        ({"config": PRESETS["mobillama-0.8b-paper"][0]}, "model.hidden_size"),
        ({"config": ModelConfig(61, 4096, 72, 4, 8)}, "heads 512 wide"),
        ({"config": ModelConfig(61, 64, 72, 4, 8)}, "heads 8 wide"),
        ({"float8": True, "context": 2047}, "train.float8"),
    ],
)
def test_shapes_that_the_kernels_do_not_know_are_refused(change, said):
    facts = {"precision": "bfloat16", "config": ModelConfig(), "context": 2048, "float8": False}
    check_shapes(**facts)
    check_shapes(**{**facts, "float8": True, "config": PRESETS["mobillama-0.8b"][0]})
    check_shapes(**{**facts, "config": ModelConfig(61, 1088, 72, 4, 8)})
    with pytest.raises(UsageError, match=said):
        check_shapes(**{**facts, **change})


def test_a_run_takes_its_steps_by_fused_layers(recipe_file, tmp_path, monkeypatch):
    """Where a GPU is missing the check for it is passed over, and the formulas compute the same."""
    found = []
    monkeypatch.setattr("mobillama.train.step.require_hopper", lambda *facts: found.append(facts))
    for name, options in {"plain": [], "fused": ["--train.fused", "true"]}.items():
        options += ["--train.precision", "float32", "--train.device", "cpu", "--run", str(tmp_path / name)]
        pretrain(load_recipe(PretrainRecipe, recipe_file, options), Silent())
    assert len(found) == 1
    plain, fused = (list(read_chain(tmp_path / name / "ledger.jsonl")) for name in ("plain", "fused"))
    losses = [[line["loss"] for line in lines if line["kind"] == "step"] for lines in (plain, fused)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != losses[1]  # another order of sums: it was the fused layers that computed


def test_without_gradients_layers_stay_as_they_were():
    model = MobiLlama(CONFIG)
    initialise(model, CONFIG, 0)
    ids = torch.randint(0, 61, (2, 16))
    with torch.no_grad():
        expected = model(ids)
        fuse_layers(model.model)
        assert torch.equal(model(ids), expected)

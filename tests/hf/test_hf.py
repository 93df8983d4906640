"""The transformers class is the one model; its unshared twin is stock Llama; saving stores the network once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM, Trainer, TrainingArguments

from mobillama.data.tokenizer import load_tokenizer
from mobillama.directory import save_model
from mobillama.hf import MobiLlamaConfig, MobiLlamaForCausalLM, unshare
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

SHAPES = [
    {"share": "none"},
    {"share": "ffn"},
    {"share": "block"},
    {"share": "ffn", "ffn_groups": 2, "num_key_value_heads": 2},
    {"share": "none", "num_key_value_heads": 1, "head_dim": 20},
    {"share": "ffn", "rms_norm_eps": 1e-3, "rope_theta": 500.0},
    {"share": "ffn", "qk_norm": True, "num_key_value_heads": 2},
    {"share": "ffn", "tie_word_embeddings": True},
]


def shape(**changes) -> ModelConfig:
    return ModelConfig(512, 64, 96, 5, 4, max_position_embeddings=64, **changes)


def wrapped(**changes) -> tuple[MobiLlamaForCausalLM, MobiLlama]:
    """The transformers class and the plain model with the same random weights."""
    config = shape(**changes)
    model = MobiLlama(config)
    initialise(model, config, 0)
    outer = MobiLlamaForCausalLM(MobiLlamaConfig(**asdict(config)))
    outer.load_state_dict(model.state_dict(), strict=not config.tie_word_embeddings)
    return outer.eval(), model.eval()


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@torch.no_grad()
def test_unshared_twin_is_stock_llama_with_equal_logits(changes):
    model, ids = wrapped(**changes)[1], torch.randint(0, 512, (3, 40))
    twin = unshare(model.state_dict(), model.model.shape)
    assert type(twin) is (Qwen3ForCausalLM if changes.get("qk_norm") else LlamaForCausalLM)
    torch.testing.assert_close(twin(ids).logits, model(ids), atol=1e-5, rtol=0)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    padded = model(ids, attention_mask_bs=mask)
    theirs = twin(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(theirs[mask == 1], padded[mask == 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@torch.no_grad()
def test_saved_directory_stores_weights_once_and_reloads_equal(changes, tmp_path):
    outer, _ = wrapped(**changes)
    outer.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 not a mapping
    assert stored == sum(parameter.numel() for parameter in outer.parameters())
    reloaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(0, 512, (2, 20))
    assert type(reloaded) is MobiLlamaForCausalLM
    assert torch.equal(reloaded(ids).logits, outer(ids).logits)
    assert reloaded.model.shape == outer.model.shape


@torch.no_grad()
def test_generate_with_and_without_cache_and_left_padding_agree_with_the_twin():
    outer, model = wrapped(share="ffn")
    twin = unshare(model.state_dict(), model.model.shape)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = torch.randint(3, 512, (1, 15))
    alone = outer.generate(ids, **options)
    assert torch.equal(outer.generate(ids, use_cache=False, **options), alone)
    assert torch.equal(twin.generate(ids, **options), alone)
    longer = torch.randint(3, 512, (1, 20))
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1), longer])
    mask = (torch.arange(20) >= torch.tensor([[5], [0]])).long()
    together = outer.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0, 20:], alone[0, 15:])
    assert torch.equal(together[1], outer.generate(longer, **options)[0])
    beams = outer.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, twin.generate(ids, num_beams=3, **options))


def test_loss_is_llamas_and_backpropagates():
    outer, model = wrapped(share="ffn")
    twin = unshare(model.state_dict(), model.model.shape)
    ids = torch.randint(0, 512, (3, 20))
    labels = ids.clone()
    labels[:, :4] = -100
    ours, theirs = outer(ids, labels=labels).loss, twin(ids, labels=labels).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        outer(ids, labels=labels, num_items_in_batch=7).loss, twin(ids, labels=labels, num_items_in_batch=7).loss
    )
    ours.backward()
    theirs.backward()
    summed = sum(layer.mlp.up_proj.weight.grad for layer in twin.model.layers)
    torch.testing.assert_close(outer.model.ffns[0].up_proj.weight.grad, summed)


def test_transformers_trainer_trains_it(tmp_path):
    outer, _ = wrapped(share="ffn")
    rows = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=6, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True
    )
    before = outer(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss
    Trainer(outer, arguments, train_dataset=rows).train()
    assert outer.eval()(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss < before - 0.5


def test_stock_tools_load_our_directory_through_the_stub(tokenizer_path, tmp_path):
    """A process that never imports mobillama loads the directory with trust_remote_code, tokenizer included."""
    config = shape(share="ffn")
    model = MobiLlama(config)
    initialise(model, config, 0)
    save_model(tmp_path / "m", config, model.state_dict(), load_tokenizer(tokenizer_path))
    code = f"""
import torch, json
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained({str(tmp_path / "m")!r})("Call me Ishmael.", return_tensors="pt").input_ids
print(json.dumps([ids.tolist(), model(ids).logits.double().sum().item(), model.config.eos_token_id]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids, total, eos = json.loads(done.stdout.splitlines()[-1])
    assert ids == [load_tokenizer(tokenizer_path).encode(["Call me Ishmael."])[0]]
    with torch.no_grad():
        assert total == pytest.approx(float(model(torch.tensor(ids)).double().sum()), abs=1e-3)
    assert eos == 2


@pytest.mark.parametrize("share", ["ffn", "block"])
def test_activation_checkpointing_changes_no_gradient(share):
    model, ids = wrapped(share=share)[0].train(), torch.randint(0, 512, (2, 20))
    gradients = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    assert model.is_activation_checkpointing
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())

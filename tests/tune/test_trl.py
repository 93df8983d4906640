"""The transformers class runs in trl's trainers as it is, and with adapters of peft's."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import mobillama.hf  # noqa: F401 registers the Auto classes
from mobillama.data.template import DEFAULT

ADAPTERS = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], task_type="CAUSAL_LM"
)
OPTIONS = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def loaded(small_model):
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template, tokenizer.pad_token = DEFAULT, tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32), tokenizer


def question(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {n}?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["full", "lora"])
def test_sft_trainer_runs_with_our_class_unchanged(loaded, tmp_path, adapters):
    model, tokenizer = loaded
    rows = Dataset.from_list([{"prompt": question(n), "completion": answer("A number.")} for n in range(16)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), max_length=64, **{**OPTIONS, "learning_rate": 3e-2 if adapters else 3e-3}),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapters,
    )
    found = losses(trainer)
    assert found[-1] < 0.7 * found[0]
    if adapters:
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        # Each has learned, those too whose products the model makes side by side.
        assert all(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
        base = trainer.model.unload().state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["full", "lora"])
def test_dpo_trainer_runs_with_our_class_unchanged(loaded, tmp_path, adapters):
    model, tokenizer = loaded
    rows = Dataset.from_list(
        [{"prompt": question(n), "chosen": answer("A number."), "rejected": answer("No idea!")} for n in range(16)]
    )
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(str(tmp_path), max_length=64, **{**OPTIONS, "learning_rate": 1e-3}),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapters,
    )
    found = losses(trainer)
    assert found[0] == pytest.approx(0.693, abs=0.01)  # ln 2: model and reference are one
    assert found[-1] < 0.6

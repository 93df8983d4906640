"""Tuning is a run like any other: it learns, stops and resumes with the same bits, and its records say what it did."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mobillama.hf  # noqa: F401 registers the Auto classes
from conftest import run_cli
from mobillama.config import load_recipe
from mobillama.data.template import DEFAULT, ChatTemplate
from mobillama.data.tokenizer import load_tokenizer
from mobillama.deploy.gguf import export_gguf
from mobillama.deploy.hf import export_hf
from mobillama.deploy.onnx import export_onnx
from mobillama.directory import load_model, save_model
from mobillama.engine.gguf_model import read_model
from mobillama.errors import CorruptDataError, Stopped, UsageError
from mobillama.model.loss import IGNORE
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig
from mobillama.record.chain import read_chain
from mobillama.train.checkpoint import list_checkpoints
from mobillama.train.loop import Silent
from mobillama.train.step import Stepper
from mobillama.train.world import World
from mobillama.tune.conversations import Conversation, read_conversations
from mobillama.tune.dataset import ChatData
from mobillama.tune.recipe import SftRecipe
from mobillama.tune.sft import Tuning, sft
from train_support import StopAt

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, 1, torch.device("cpu"))
LORA = ("--lora.rank", "4", "--lora.alpha", "8")


def recipe_of(path: Path, *overrides: str) -> SftRecipe:
    return load_recipe(SftRecipe, path, overrides)


def ledger(run: Path) -> list[dict]:
    return list(read_chain(run / "ledger.jsonl"))


def last_model(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1][1] / "model"


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_a_run_learns_its_conversations_and_the_held_out_loss_falls(sft_file, tmp_path, lora):
    sft(recipe_of(sft_file, "--train.steps", "0", "--train.epochs", "20", *lora), Silent())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    held_out = [line["loss"] for line in lines if line["kind"] == "validation"]
    data = ChatData(tmp_path / "run" / "data")
    assert len(losses) == -(-20 * data.size // 8)
    assert losses[-1] < 0.7 * losses[0]
    assert held_out[-1] < 0.8 * held_out[0]
    assert set(lines[0]["loss_by_source"]) == {"openai", "sharegpt"}
    held = {source["name"]: source["held_out"] for source in data.manifest["sources"]}
    assert all(5 < count < 25 for count in held.values())
    first = ledger(tmp_path / "run")[0]
    assert first["data"] == data.digest and len(first["init"]) == 64


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_a_stopped_run_goes_on_with_the_same_bits(sft_file, tmp_path, lora):
    sft(recipe_of(sft_file, *lora), Silent())
    other = recipe_of(sft_file, *lora, "--run", str(tmp_path / "other"))
    with pytest.raises(Stopped, match="saved after step 5"):
        sft(other, StopAt(5))
    sft(other, Silent())
    computed = [
        [line for line in ledger(tmp_path / name) if line["kind"] in ("step", "validation")]
        for name in ("run", "other")
    ]
    assert [{**line, "previous": ""} for line in computed[0]] == [{**line, "previous": ""} for line in computed[1]]
    (_, one), (_, two) = (list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("run", "other"))
    files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    assert len(files) == (3 if lora else 2)
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_a_killed_run_resumes_and_ends_with_the_same_ledger(sft_file, tmp_path):
    sft(recipe_of(sft_file), Silent())
    other = tmp_path / "other"
    command = [sys.executable, "-m", "mobillama", "sft", str(sft_file), "--run", str(other)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (other / "checkpoints" / "step-000003" / "manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = run_cli("sft", sft_file, "--run", other)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == last_model(other)
    assert ledger(other) == ledger(tmp_path / "run")


def test_a_batch_is_what_the_mean_over_learned_tokens_of_each_conversation_alone_gives(sft_file):
    """Loss and gradient of a packed step, against conversations that stand alone in their sequences, in float64."""
    task = Tuning(recipe_of(sft_file), Silent())
    task.check(ALONE)
    Path(task.recipe.run).mkdir()
    task.prepare()
    task.open()
    stepper = Stepper(task, ALONE)
    stepper.gradient(0)
    gradients = {name: p.grad.clone() for name, p in stepper.model.named_parameters()}
    numbers = stepper.gradient(0).numbers()
    batch = task.data.batch(7, 0, 8)
    assert len({tuple(marks // 2) for marks in batch.marks.tolist() for marks in [np.array(marks)]}) > 1
    model = load_model(Path(task.recipe.init_from), torch.float64)
    model.zero_grad()
    total, count, nats = 0, 0, {}
    for ids, marks, source in zip(batch.ids, batch.marks, batch.sources, strict=True):
        for document in np.unique(marks // 2):
            part = torch.from_numpy(ids[marks // 2 == document])[None]
            learned = torch.from_numpy(marks[marks // 2 == document] % 2 == 1)[None]
            if not learned.any():
                continue  # what fills a sequence up
            targets = torch.where(learned[:, 1:], part[:, 1:], IGNORE)
            losses = torch.nn.functional.cross_entropy(
                model(part[:, :-1])[0], targets[0], reduction="sum", ignore_index=IGNORE
            )
            total, count = total + losses, count + int(learned.sum())
            known = nats.get(int(source), (0.0, 0))
            nats[int(source)] = known[0] + losses.item(), known[1] + int(learned.sum())
    assert count == task.data.learned_tokens(7, 0, 8) > 80
    assert numbers.loss == pytest.approx(total.item() / count, rel=1e-5)
    for index, (of_source, tokens) in nats.items():
        assert numbers.loss_by_source[task.data.source_names[index]] == pytest.approx(of_source / tokens, rel=1e-5)
    (total / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=1e-3, atol=1e-6)


def test_adapters_leave_the_base_alone_and_the_merged_model_is_what_peft_computes(sft_file, small_model, tmp_path):
    sft(recipe_of(sft_file, *LORA), Silent())
    merged = last_model(tmp_path / "run")
    adapters = load_file(merged.parent / "adapter" / "adapter_model.safetensors")
    shared = [name for name in adapters if "ffns" in name]
    assert len(shared) == 2 * 3, "one pair for each matrix of the shared network, however many layers use it"
    assert len(adapters) == 2 * (3 + 2 * 4)
    before, after = (load_file(path / "model.safetensors") for path in (small_model, merged))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[-2].endswith("_proj")}
    base = AutoModelForCausalLM.from_pretrained(small_model).eval()
    tuned = PeftModel.from_pretrained(base, merged.parent / "adapter").eval()
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = load_model(merged)(ids)
    torch.testing.assert_close(tuned(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", ["attention", "ffn"])
def test_adapters_stand_where_they_are_asked_for(sft_file, tmp_path, targets):
    sft(recipe_of(sft_file, *LORA, "--lora.targets", targets, "--train.steps", "1"), Silent())
    names = load_file(last_model(tmp_path / "run").parent / "adapter" / "adapter_model.safetensors")
    assert all(("self_attn" in name) == (targets == "attention") for name in names)


def test_the_template_travels_into_checkpoints_and_every_export(sft_file, tokenizer_path, tmp_path):
    config = ModelConfig(512, 32, 64, 2, 2, max_position_embeddings=128)  # widths that ONNX's blocks divide
    start = MobiLlama(config)
    initialise(start, config, 0)
    save_model(tmp_path / "start", config, start.state_dict(), load_tokenizer(tokenizer_path))
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    reporter = Silent()
    options = ["--init_from", str(tmp_path / "start"), "--template", str(template), "--train.steps", "1"]
    sft(recipe_of(sft_file, *options), reporter)
    assert any(template.read_text() in note and "[user] What is 2 + 2?</s>" in note for note in reporter.notes)
    model = last_model(tmp_path / "run")
    export_hf(model, tmp_path / "hf", unshared=True)
    export_gguf(model, tmp_path / "model.gguf", None, tokens=64)
    export_onnx(model, tmp_path / "onnx")
    for place in (model, tmp_path / "hf", tmp_path / "onnx"):
        assert (place / "chat_template.jinja").read_text() == template.read_text()
        assert load_tokenizer(place).chat_template == template.read_text()
    assert read_model(tmp_path / "model.gguf").tokenizer.chat_template == template.read_text()
    messages = [{"role": "user", "content": "Hi"}]
    ours = ChatTemplate.of(load_tokenizer(model)).encode(messages, True).ids
    stock = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours


def test_a_model_without_a_template_gets_the_default_one(sft_file, tmp_path):
    reporter = Silent()
    sft(recipe_of(sft_file, "--train.steps", "1"), reporter)
    assert reporter.notes[0].startswith("the default chat template:")
    assert (last_model(tmp_path / "run") / "chat_template.jinja").read_text() == DEFAULT


def test_a_run_goes_on_from_a_checkpoint_of_another_one(sft_file, tmp_path):
    sft(recipe_of(sft_file), Silent())
    start = last_model(tmp_path / "run")
    sft(recipe_of(sft_file, "--init_from", str(start), "--run", str(tmp_path / "more")), Silent())
    first, last = (
        [line["loss"] for line in ledger(tmp_path / name) if line["kind"] == "step"] for name in ("more", "run")
    )
    assert first[0] < last[0] - 0.1
    with pytest.raises(UsageError, match=r"no config.json there.*did you mean .*step-000008/model"):
        sft(recipe_of(sft_file, "--init_from", str(tmp_path / "run"), "--run", str(tmp_path / "none")), Silent())
    assert not (tmp_path / "none").exists()


def test_rows_that_are_wrong_stop_the_run_with_their_place_or_are_counted(sft_file, chat_files, tmp_path):
    broken = tmp_path / "broken.jsonl"
    good = (chat_files / "openai.jsonl").read_text()
    empty = json.dumps({"messages": []}) + "\n"
    broken.write_text(good + empty + '{"messages": [{"role": "robot", "content": "Hi"}]}\n')
    options = ["--sources", f"{{x: {{path: {broken}}}}}", "--train.steps", "1"]
    done = run_cli("sft", sft_file, *options)
    assert done.returncode == 2
    line = good.count("\n") + 2
    assert f"{broken}:{line}: messages[0].role: 'robot' is none of" in done.stderr
    assert "set bad_rows: skip" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    reporter = Silent()
    sft(recipe_of(sft_file, *options, "--bad_rows", "skip"), reporter)
    (source,) = ChatData(tmp_path / "run" / "data").manifest["sources"]
    assert (source["rows"], source["faulty"], source["nothing_to_learn"]) == (line, 1, 1)
    assert any("1 faulty, 1 nothing to learn" in note for note in reporter.notes)
    broken.write_text(empty)
    with pytest.raises(UsageError, match=r"hold nothing to learn \(rows 1"):
        sft(recipe_of(sft_file, *options, "--run", str(tmp_path / "other")), Silent())


def test_other_conversations_or_other_weights_cannot_take_over_a_run(sft_file, chat_files, small_model, tmp_path):
    own = tmp_path / "own.jsonl"
    shutil.copy(chat_files / "openai.jsonl", own)
    start = tmp_path / "start"
    shutil.copytree(small_model, start)
    options = ["--sources", f"{{x: {{path: {own}}}}}", "--init_from", str(start)]
    sft(recipe_of(sft_file, *options), Silent())
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    own.write_text(own.read_text() * 2)
    with pytest.raises(UsageError, match="learns from other conversations"):
        sft(recipe_of(sft_file, *options), Silent())
    shutil.copy(chat_files / "openai.jsonl", own)
    shutil.copy(last_model(tmp_path / "run") / "model.safetensors", start)
    with pytest.raises(UsageError, match=r"init_from: .*other weights"):
        sft(recipe_of(sft_file, *options), Silent())
    assert before == {path: path.read_bytes() for path in before}


def test_a_data_set_in_the_hubs_layout_is_learned_from_like_a_file(sft_file, chat_files, tmp_path):
    folder = tmp_path / "owner" / "chats"
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (chat_files / "sharegpt.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    options = ["--train.steps", "2", "--sources"]
    sft(recipe_of(sft_file, *options, f"{{x: {{path: {folder}}}}}"), Silent())
    (of_set,) = ChatData(tmp_path / "run" / "data").manifest["inputs"]["sources"]
    assert of_set["files"].keys() == {"train.parquet"}
    of_file = recipe_of(
        sft_file, *options, f"{{x: {{path: {chat_files / 'sharegpt.jsonl'}}}}}", "--run", str(tmp_path / "file")
    )
    sft(of_file, Silent())
    assert ChatData(tmp_path / "run" / "data").root == ChatData(tmp_path / "file" / "data").root


def test_damaged_conversations_are_caught_before_they_are_used(sft_file, tmp_path):
    with pytest.raises(Stopped):
        sft(recipe_of(sft_file), StopAt(3))
    victim = tmp_path / "run" / "data" / "train" / "sequences.npy"
    content = bytearray(victim.read_bytes())
    for offset in range(300, len(content), 500):
        content[offset] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CorruptDataError, match=r"sequences\.npy: sequence \d+ differs"):
        sft(recipe_of(sft_file), Silent())


def test_what_does_not_fit_is_refused(sft_file):
    for options, said in (
        (["--context", "129"], r"context: 129 is longer than the 128 tokens"),
        (
            ["--lora.rank", "2", "--train.fused", "true", "--train.mask_documents", "false"],
            r"train\.fused: True is not false",
        ),
        (["--template", "none.jinja"], r"template: none\.jinja cannot be read"),
        (["--init_from", __file__], r"init_from: .*test_sft\.py is a file; .* mobillama import"),
        (["--holdout", "1"], r"holdout: 1.0 is not a share"),
    ):
        with pytest.raises(UsageError, match=said):
            sft(recipe_of(sft_file, *options), Silent())


@pytest.mark.parametrize(("lora", "kind"), [((), "ddp"), (LORA, "fsdp")], ids=["full-ddp", "lora-fsdp"])
def test_two_processes_compute_what_one_does(sft_file, tmp_path, lora, kind):
    sft(recipe_of(sft_file, *lora), Silent())
    words = ["sft", sft_file, *lora, "--run", tmp_path / "two", "--train.parallelism", kind]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--"]
    done = subprocess.run([*map(str, [*torchrun, "mobillama", *words])], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    steps = [[line for line in ledger(tmp_path / name) if line["kind"] == "step"] for name in ("run", "two")]
    for ours, theirs in zip(*steps, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert theirs["gradient_norm"] == pytest.approx(ours["gradient_norm"], rel=1e-4)


def test_what_a_step_learned_from_is_shown_with_what_is_learned_in_brackets(sft_file, tmp_path):
    sft(recipe_of(sft_file, "--train.steps", "1"), Silent())
    shown = run_cli("data", "show", tmp_path / "run", "--step", "1").stdout
    assert "── sequence" in shown and "⟧" in shown
    assert re.search(r"Which colour has .*\?</s>.*\n +<\|assistant\|>\n +⟦It is \w+\.</s>⟧", shown)
    done = run_cli("data", "show", tmp_path / "run", "--step", "2")
    assert done.returncode == 2 and "not within the 1 steps" in done.stderr


@pytest.mark.parametrize("name", ["local", "paper"])
def test_the_recipes_that_ship_hold_what_they_say(name, monkeypatch, tmp_path):
    recipe = load_recipe(SftRecipe, ROOT / "recipes" / "chat" / f"{name}.yaml")
    if name == "local":
        (source,) = recipe.sources.values()
        rows = [row for _, row in read_conversations(replace(source, path=str(ROOT / source.path)))]
        assert len(rows) > 200 and all(isinstance(row, Conversation) and all(row.is_learned[1::2]) for row in rows)
        spec = importlib.util.spec_from_file_location("make_conversations", ROOT / "tools" / "make_conversations.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        monkeypatch.setattr(script, "OUT", tmp_path / "again.jsonl")
        script.main()
        assert script.OUT.read_bytes() == (ROOT / source.path).read_bytes()

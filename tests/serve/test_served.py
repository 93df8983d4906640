from __future__ import annotations

import hashlib
import shutil

import pytest

from mobillama.data.template import DEFAULT
from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.engine.load import engine_for
from mobillama.errors import UsageError
from mobillama.serve.served import open_served
from mobillama.serve.turns import Continuation
from onnx_support import model_and_graph


def test_a_models_facts_are_those_of_its_file(chat_model, tmp_path):
    from conftest import run_cli

    served = open_served(chat_model, slots=2)
    facts = served.facts()["mobillama"]
    assert (served.name, facts["engine"], facts["slots"], facts["number_format"]) == ("tiny", "torch", 2, "float32")
    assert facts["has_chat_template"] and facts["context_length"] == 4096
    weights = (chat_model / "model.safetensors").read_bytes()
    assert served.digest == f"sha256:{hashlib.sha256(weights).hexdigest()}"

    file = tmp_path / "tiny.gguf"
    assert run_cli("export", "gguf", chat_model, file, "--type", "q8_0").returncode == 0
    quantized = open_served(file, name="mine", slots=2)
    theirs = quantized.facts()
    assert theirs["id"] == "mine" and theirs["mobillama"]["number_format"] == "Q8_0"
    assert theirs["mobillama"]["parameters"] == facts["parameters"] > 0
    messages = [{"role": "user", "content": "hello"}]
    assert (
        quantized.turns.encode(messages, True).ids == served.turns.encode(messages, True).ids
    )  # the template went along
    assert quantized.digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert engine_for(file) in ("native", "torch")


def test_clients_are_told_what_a_template_refuses_and_no_path(chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "tiny")
    template = DEFAULT + "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    (tmp_path / "tiny" / "chat_template.jinja").write_text(template)
    served = open_served(tmp_path / "tiny", slots=1)
    with pytest.raises(UsageError) as refused:
        served.turns.encode([{"role": "user", "content": "x"}] * 3)
    assert str(refused.value) == "the model's chat template: too many"
    (tmp_path / "tiny" / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(UsageError, match=r"chat_template\.jinja: never"):
        open_served(tmp_path / "tiny", slots=1)


def test_engines_of_one_sequence_serve_one_request_at_a_time(tokenizer_path, tmp_path):
    model_and_graph(tmp_path, vocab_size=512)
    save_tokenizer(load_tokenizer(tokenizer_path), tmp_path)
    served = open_served(tmp_path)
    assert (served.engine.name, served.engine.slots) == ("onnxruntime", 1)
    assert served.facts()["mobillama"]["engine"] == "onnxruntime" and isinstance(served.turns, Continuation)
    assert served.engine.feed([(0, [1, 2, 3])]).shape == (1, served.engine.vocab_size)
    with pytest.raises(UsageError, match="--context"):
        open_served(tmp_path, context=16)

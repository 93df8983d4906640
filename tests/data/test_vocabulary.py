"""A vocabulary as plain data gives a tokenizer.json and comes back from it."""

from __future__ import annotations

import json

import pytest

from mobillama.data.tokenizer import JsonTokenizer, load_tokenizer, save_tokenizer
from mobillama.data.vocabulary import CONTROL, NORMAL, Vocabulary, describe, describe_config, vocabulary_of
from mobillama.errors import CorruptDataError, UsageError


def byte_level(**changes) -> Vocabulary:
    letters = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
    pieces = ["<|end|>", *letters, "th", "the", "Ġthe"]
    facts = {"kind": "gpt2", "pieces": pieces, "kinds": [CONTROL] + [NORMAL] * (len(pieces) - 1), "scores": []}
    facts |= {"merges": [("t", "h"), ("th", "e"), ("Ġ", "the")], "words": "gpt-2", "bos_id": 0, "eos_id": 0}
    return Vocabulary(**facts | changes)


def test_a_vocabulary_comes_back_from_its_description():
    for vocabulary in (byte_level(), byte_level(words="smollm", add_bos=True), byte_level(chat_template="{{ x }}")):
        found = vocabulary_of(describe(vocabulary), describe_config(vocabulary), 0, 0)
        assert found == vocabulary


def test_a_begin_mark_that_prompts_have_stands_before_them(tmp_path):
    tokenizer = JsonTokenizer.from_vocabulary(byte_level(add_bos=True), tmp_path / "model.gguf")
    assert tokenizer.backend.encode("the the").ids[0] == 0
    assert tokenizer.encode(["the the"]) == [[98, 99]]  # documents have none


def test_what_no_gguf_can_say_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="pre-tokenizer 'chameleon' is not known"):
        describe(byte_level(words="chameleon"))
    description = describe(byte_level())
    with pytest.raises(UsageError, match="cuts words in a way"):
        vocabulary_of(description | {"pre_tokenizer": {"type": "Whitespace"}}, {}, 0, 0)
    with pytest.raises(UsageError, match="a Unigram model"):
        vocabulary_of(description | {"model": {"type": "Unigram", "vocab": []}}, {}, 0, 0)
    with pytest.raises(UsageError, match="eos_id is 4000"):
        byte_level(eos_id=4000)
    with pytest.raises(CorruptDataError, match=r"m\.gguf: its vocabulary contradicts itself"):
        JsonTokenizer.from_vocabulary(byte_level(merges=[("no", "such")]), tmp_path / "m.gguf")


@pytest.mark.parametrize("form", ["config", "list", "file"])
def test_a_chat_template_travels_with_either_kind_of_tokenizer(form, tokenizer_path, tmp_path):
    template, folder = "{% for m in messages %}{{ m }}{% endfor %}", tmp_path / "given"
    save_tokenizer(load_tokenizer(tokenizer_path), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if form == "file":
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template if form == "config" else [{"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer.json"):
        tokenizer = load_tokenizer(folder / name)
        assert tokenizer.vocabulary.chat_template == template
        save_tokenizer(tokenizer, tmp_path / name.replace(".", "-"))
        assert load_tokenizer(tmp_path / name.replace(".", "-")).vocabulary.chat_template == template

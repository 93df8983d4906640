from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from mobillama.data.template import DEFAULT
from mobillama.data.tokenizer import load_tokenizer
from mobillama.engine.sampling import Sampling
from mobillama.serve.chat import Conversation, chat


class Echo:
    """An engine that answers "ok." and an end mark, and keeps what it was fed."""

    name, vocab_size = "echo", 512

    def __init__(self, tokenizer, context_length):
        self.context_length, self.held, self.largest = context_length, [], 0
        self._answer = [*tokenizer.encode(["ok."])[0], tokenizer.eos_id]
        self._said = 0

    @property
    def length(self):
        return len(self.held)

    def feed(self, ids):
        self._said = self._said + 1 if len(ids) == 1 and self.held and self._said < len(self._answer) - 1 else 0
        self.held += ids
        self.largest = max(self.largest, len(ids))
        logits = np.zeros(512, np.float32)
        logits[self._answer[self._said]] = 9
        return logits

    def truncate(self, length):
        del self.held[length:]


def talk(tokenizer_path, lines, context_length=200, template=None, system=""):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.chat_template = template
    engine, written = Echo(tokenizer, context_length), []
    conversation = Conversation(engine, tokenizer, Sampling(0), 8, seed=0, system=system)
    remaining = iter(lines)

    def read():
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    chat(conversation, read, written.append, lambda text: written.append(text + "\n"))
    return engine, tokenizer, "".join(written)


def text_in(engine, tokenizer):
    names = {i: text.encode() for text, i in tokenizer.added_tokens.items()}
    return b"".join(names.get(i, tokenizer.token_bytes[i]) for i in engine.held).decode()


def test_turns_grow_one_text_and_commands_work(tokenizer_path):
    engine, tokenizer, shown = talk(tokenizer_path, ["hello there", "", "again", "/help", "/exit", "never read"])
    assert shown.count("ok.") == 2
    assert shown.count("a second") == 2
    assert shown.count("/reset ") == 1 and "it continues what you type" in shown
    assert text_in(engine, tokenizer).startswith(" hello there ok.\nagain")
    assert "never read" not in text_in(engine, tokenizer)


def test_with_a_template_turns_are_told_apart(tokenizer_path):
    engine, tokenizer, shown = talk(tokenizer_path, ["hello", "more", "/stats"], template=DEFAULT, system="be brief")
    assert text_in(engine, tokenizer) == (
        " <|system|>\nbe brief</s> \n<|user|>\nhello</s> \n<|assistant|>\n ok.</s> \n<|user|>\nmore</s> \n<|assistant|>\n ok."
    )
    assert "it continues" not in shown and "of 200 tokens" in shown
    computed = int(shown.split(" of them computed")[0].split()[-1])
    assert 0 < computed < len(engine.held) // 2  # the rest was held


def test_reset_forgets_and_long_histories_drop_whole_turns(tokenizer_path):
    engine, tokenizer, shown = talk(tokenizer_path, ["hello there", "/reset", "/stats", "again"])
    assert "hello" not in text_in(engine, tokenizer) and "context     0 of 200 tokens" in shown
    for template in (None, DEFAULT):
        lines = [f"question number {n}" for n in range(9)]
        engine, tokenizer, shown = talk(tokenizer_path, lines, context_length=100, template=template, system="short")
        assert "oldest messages no longer fit and were dropped" in shown
        assert len(engine.held) <= 100 and "short" in text_in(engine, tokenizer)
        assert "number 8" in text_in(engine, tokenizer) and "number 0" not in text_in(engine, tokenizer)


def test_a_text_that_fits_no_context_is_refused_and_forgotten(tokenizer_path):
    engine, tokenizer, shown = talk(tokenizer_path, ["hello there", "word " * 200, "again"], context_length=64)
    assert "56 fit a context of 64" in shown and shown.count("ok.") == 2
    held = text_in(engine, tokenizer)
    assert "again" in held and "word" not in held and "hello there" in held  # what was said before stays


def test_a_conversation_is_saved_and_goes_on(tokenizer_path, tmp_path):
    file = tmp_path / "talk.json"
    talk(tokenizer_path, ["hello", f"/save {file}"], template=DEFAULT, system="be brief")
    said = [message["content"].strip() for message in json.loads(file.read_text())["messages"]]
    assert said == ["be brief", "hello", "ok."]
    engine, tokenizer, shown = talk(tokenizer_path, [f"/load {file}", "more"], template=DEFAULT)
    other = tmp_path / "weights"
    other.write_bytes(b"\x00\xff")
    _, _, refused = talk(tokenizer_path, ["hello", f"/save {other}", f"/save {file}"], template=DEFAULT)
    assert "holds no conversation" in refused and other.read_bytes() == b"\x00\xff" and "2 messages saved" in refused
    assert "2 messages loaded" in shown and "be brief</s>" in text_in(engine, tokenizer)
    (tmp_path / "bad.json").write_text('{"messages": [{"role": "robot", "content": ""}]}')
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    lines = [
        f"/save {file}",
        f"/load {tmp_path}/deep.json",
        "hello",
        "/load",
        f"/load {tmp_path}/no.json",
        f"/load {tmp_path}/bad.json",
        f"/load {tmp_path}/torn.json",
    ]
    engine, tokenizer, shown = talk(tokenizer_path, [*lines, f"/save {tmp_path}/no/such.json", "more"])
    for words in (
        "nothing was said yet",
        "deep.json: is no JSON",
        "name the file",
        "no such file",
        "'robot' is none of",
        "torn.json",
        "No such file or directory",
    ):
        assert words in shown
    assert text_in(engine, tokenizer).startswith(" hello ok.\nmore")


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    conversation = Conversation(Echo(tokenizer, 200), tokenizer, Sampling(0), 8, seed=0)
    pieces = []

    def write(text):
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    lines = iter(["hello", "/exit"])
    chat(conversation, lambda: next(lines), write, lambda text: None)
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces[:2])}


def test_the_verb_talks_in_a_terminal(chat_model):
    command = [sys.executable, "-m", "mobillama", "chat", chat_model, "--temperature", "0", "--max-tokens", "6"]
    done = subprocess.run(command, input="hello\n/stats\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "6 tokens" in done.stdout and "of 4096 tokens" in done.stdout
    assert "pre-trained only" not in done.stdout and done.stderr == ""
    refused = subprocess.run([*command, "--min-p", "2"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "min-p: 2.0 is not from 0 to 1" in refused.stderr

from __future__ import annotations

import numpy as np

from mobillama.data.tokenizer import load_tokenizer
from mobillama.engine.sampling import Sampling
from mobillama.serve.chat import Conversation, chat


class Echo:
    """An engine that answers "ok." and an end mark, and keeps what it was fed."""

    vocab_size = 512

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


def talk(tokenizer_path, lines, context_length=200):
    tokenizer = load_tokenizer(tokenizer_path)
    engine, written = Echo(tokenizer, context_length), []
    conversation = Conversation(engine, tokenizer, Sampling(0), 8, seed=0)
    remaining = iter(lines)

    def read():
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    chat(conversation, read, written.append)
    return engine, tokenizer, "".join(written)


def test_turns_grow_one_text_and_commands_work(tokenizer_path):
    engine, tokenizer, shown = talk(tokenizer_path, ["hello there", "", "again", "/help", "/exit", "never read"])
    assert shown.count("ok.") == 2
    assert shown.count("a second") == 2
    assert shown.count("/reset forgets") == 2
    text = b"".join(tokenizer.token_bytes[i] for i in engine.held).decode()
    assert text.startswith(" hello there ok. \nagain")
    assert "never read" not in text


def test_reset_forgets_and_long_histories_drop_whole_turns(tokenizer_path):
    engine, tokenizer, shown = talk(tokenizer_path, ["hello there", "/reset", "again"])
    assert b"hello" not in b"".join(tokenizer.token_bytes[i] for i in engine.held)
    engine, tokenizer, shown = talk(tokenizer_path, [f"question number {n}" for n in range(9)], context_length=64)
    assert "oldest turns no longer fit and were dropped" in shown
    assert len(engine.held) <= 64


def test_a_text_that_fits_no_context_is_refused_and_forgotten(tokenizer_path):
    engine, tokenizer, shown = talk(tokenizer_path, ["hello there", "word " * 200, "again"], context_length=64)
    assert "56 fit a context of 64" in shown and shown.count("ok.") == 2
    text = b"".join(tokenizer.token_bytes[i] for i in engine.held).decode()
    assert "again" in text and "word" not in text

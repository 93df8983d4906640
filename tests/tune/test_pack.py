"""What is learned of a conversation, token by token; how long ones are split and short ones packed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobillama.data.template import ChatTemplate
from mobillama.data.tokenizer import load_tokenizer
from mobillama.tune.conversations import Conversation, conversation_of
from mobillama.tune.pack import Piece, encode, pack, rows_of

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def template(tokenizer_path) -> ChatTemplate:
    return ChatTemplate.default(load_tokenizer(tokenizer_path))


def conversation(*texts: str, system: str = "", weights: dict[int, int] | None = None) -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(texts):
        message = {"role": "assistant" if number % 2 else "user", "content": text}
        messages.append({**message, "weight": (weights or {}).get(number, 1)})
    return conversation_of({"messages": messages})


def said(piece: Piece, tokenizer) -> list[tuple[str, str]]:
    """Return runs of what is learned (``+``) and what is not (``-``), special tokens by their names."""
    names = {token: name for name, token in tokenizer.added_tokens.items()}
    runs: list[tuple[str, bytes]] = []
    for token, learned in zip(piece.ids.tolist(), piece.is_learned.tolist(), strict=True):
        text, sign = names[token].encode() if token in names else tokenizer.token_bytes[token], "+" if learned else "-"
        if runs and runs[-1][0] == sign:
            text = runs.pop()[1] + text
        runs.append((sign, text))
    return [(sign, text.decode()) for sign, text in runs]


def test_the_mask_token_by_token(template, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    (piece,) = encode(conversation("Hi", "Yes", system="Be"), template, 64, Counter())
    names = {token: name for name, token in tokenizer.added_tokens.items()}
    tokens = [names.get(token) or tokenizer.token_bytes[token].decode() for token in piece.ids.tolist()]
    assert list(zip(tokens, piece.is_learned.astype(int).tolist(), strict=True)) == [
        *((token, 0) for token in [" ", "<", "|", "s", "y", "st", "em", "|", ">", "\n", "B", "e", "</s>"]),
        *((token, 0) for token in [" ", "\n", "<", "|", "u", "s", "er", "|", ">", "\n", "H", "i", "</s>"]),
        *((token, 0) for token in [" ", "\n", "<", "|", "as", "s", "ist", "ant", "|", ">", "\n"]),
        ("Y", 1),
        ("es", 1),
        ("</s>", 1),  # it must learn to stop
        (" ", 0),
        ("\n", 0),
    ]


def test_every_answer_is_learned_with_its_end_mark_unless_its_weight_is_0(template, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    (piece,) = encode(conversation("Hi", "Yes", "So", "No"), template, 64, Counter())
    head = [
        ("-", " <|user|>\nHi</s> \n<|assistant|>\n"),
        ("+", "Yes</s>"),
        ("-", " \n<|user|>\nSo</s> \n<|assistant|>\n"),
    ]
    assert said(piece, tokenizer) == [*head, ("+", "No</s>"), ("-", " \n")]
    (piece,) = encode(conversation("Hi", "Yes", "So", "No", weights={1: 0}), template, 64, Counter())
    assert [text for sign, text in said(piece, tokenizer) if sign == "+"] == ["No</s>"]


def test_learning_starts_where_the_prompt_ends_though_a_token_holds_a_space_of_the_template(tokenizer_path):
    """Vicuna's form puts a space before the answer, which the tokenizer joins to the answer's first word."""
    tokenizer = load_tokenizer(tokenizer_path)
    vicuna = ChatTemplate((RECIPES / "chat" / "vicuna.jinja").read_text(encoding="utf-8"), tokenizer, "vicuna.jinja")
    for answer in ("the old man", "No"):
        spoken = conversation("Hi", "Ho", "So?", answer, system="Be brief.")
        (piece,) = encode(spoken, vicuna, 200, Counter())
        prompt = vicuna.encode(spoken.messages[:-1], add_generation_prompt=True).ids
        assert piece.ids[: len(prompt)].tolist() == prompt
        assert piece.is_learned[len(prompt) :].all() and not piece.is_learned[len(prompt) - 1]
        assert [text for sign, text in said(piece, tokenizer) if sign == "+"] == [" Ho</s>", f" {answer}</s>"]


def test_text_that_spells_an_end_mark_is_no_end_mark(template, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    (piece,) = encode(conversation("</s>\n<|assistant|>\nlie", "Yes"), template, 128, Counter())
    assert [text for sign, text in said(piece, tokenizer) if sign == "+"] == ["Yes</s>"]
    assert (piece.ids == tokenizer.eos_id).sum() == 2


def test_long_conversations_are_split_before_a_question_and_each_part_has_the_system_message(template, tokenizer_path):
    tokenizer, counts = load_tokenizer(tokenizer_path), Counter()
    texts = [f"{'question' if n % 2 == 0 else 'answer'} number {n}" for n in range(12)]
    whole = encode(conversation(*texts, system="Be brief"), template, 10_000, Counter())
    pieces = encode(conversation(*texts, system="Be brief"), template, 150, counts)
    assert counts == {"split": 1, "too_long": 0}
    assert len(pieces) > 1
    assert all(len(piece.ids) <= 150 for piece in pieces)
    assert all(said(piece, tokenizer)[0][1].startswith(" <|system|>\nBe brief</s> \n<|user|>\n") for piece in pieces)
    learned = [[text for sign, text in said(piece, tokenizer) if sign == "+"] for piece in pieces]
    assert [text for texts in learned for text in texts] == [
        text for sign, text in said(whole[0], tokenizer) if sign == "+"
    ]
    fewest = -(-6 // max(map(len, learned)))
    assert len(pieces) == fewest


def test_an_exchange_that_fits_no_sequence_is_left_out_and_counted(template, tokenizer_path):
    tokenizer, counts = load_tokenizer(tokenizer_path), Counter()
    pieces = encode(conversation("a", "b", "c " * 300, "d", "e", "f"), template, 64, counts)
    assert counts == {"split": 1, "too_long": 1}
    assert [text for piece in pieces for sign, text in said(piece, tokenizer) if sign == "+"] == ["b</s>", "f</s>"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=120))
def test_packing_puts_each_piece_into_one_sequence_that_holds_it(lengths):
    sequences = pack(lengths, 40)
    assert sorted(piece for members in sequences for piece in members) == list(range(len(lengths)))
    fill = [sum(lengths[piece] for piece in members) for members in sequences]
    assert all(0 < size <= 40 for size in fill)
    # No two sequences could have been one, since each piece goes where it fits.
    assert len(fill) < 2 or sum(sorted(fill)[:2]) > 40


def test_rows_hold_ids_and_marks_and_are_filled_up_with_what_nobody_learns():
    pieces = [
        Piece(np.array([5, 6, 7], np.uint32), np.array([0, 1, 1], bool)),
        Piece(np.array([8, 9]), np.array([0, 1], bool)),
    ]
    (row,) = rows_of(pieces, [[0, 1]], 7, eos_id=2)
    assert row.tolist() == [5, 6, 7, 8, 9, 2, 2, 0, 1, 1, 2, 3, 4, 4]

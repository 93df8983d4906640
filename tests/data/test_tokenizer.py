"""sentencepiece is the oracle: what we encode with it, export beside it and decode must agree with it byte for byte."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from conftest import SAMPLE, VOCAB, shared_data
from mobillama.data.documents import Piece, Reading, read_piece, read_texts
from mobillama.data.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    decode,
    load_tokenizer,
    save_tokenizer,
    tokenizer_digest,
)
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.errors import CorruptDataError, UsageError

AWKWARD = [
    "",
    " ",
    "   ",
    "a  b   c    d" + " " * 40 + "e",
    "def f():\n    if x:\n        return {  'a':   1 }\n\n\n\treturn\t\t2\n",
    "\n\n\n",
    " leading and trailing ",
    "naïve café — “quotes” … 漢字 🦙 \u200b\ufeff x̂",
    "<s> </s> <unk> <0x0A> ▁ ▁▁",
    "1234567890 3.14159 0x1F",
    "\x00\x01\x7f\r\n",
]


@pytest.fixture(scope="module")
def exported(tokenizer_path, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    save_tokenizer(load_tokenizer(tokenizer_path), directory)
    return directory


def assert_equal_to_the_oracle(model_path, directory, texts):
    oracle = SentencePieceProcessor(model_file=str(model_path))
    expected = [oracle.encode(text) for text in texts]
    assert SentencePieceTokenizer(model_path).encode(texts) == expected
    assert JsonTokenizer(directory / "tokenizer.json").encode(texts) == expected
    for tokenizer in (SentencePieceTokenizer(model_path), JsonTokenizer(directory / "tokenizer.json")):
        packed = tokenizer.encode_packed(texts)
        assert [np.frombuffer(ids, "<u2").tolist() for ids in packed] == expected


def test_both_forms_equal_sentencepiece_on_awkward_text(tokenizer_path, exported):
    assert_equal_to_the_oracle(tokenizer_path, exported, AWKWARD)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.sampled_from(" \n\tabcdefthe1.0(){}_▁"), st.characters(codec="utf-8"))))
def test_both_forms_equal_sentencepiece_on_any_text(tokenizer_path, exported, text):
    assert_equal_to_the_oracle(tokenizer_path, exported, [text])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet=st.sampled_from(" \n\tab▁é漢"), max_size=60), max_size=8), st.integers(1, 20))
def test_long_texts_are_cut_between_words_and_forgotten_words_are_learnt_again(tokenizer_path, texts, size):
    tokenizer = SentencePieceTokenizer(tokenizer_path)
    assert tokenizer._words is not None
    tokenizer._words._SLICE, tokenizer._words._MAX_WORDS, tokenizer._words._MAX_BYTES = size, 5, 4
    for _ in range(2):
        packed = tokenizer.encode_packed(texts)
        assert [np.frombuffer(ids, "<u2").tolist() for ids in packed] == tokenizer.encode(texts)


def test_a_model_whose_pieces_reach_across_words_is_encoded_whole(corpus, tmp_path):
    """Split at nothing, trained pieces hold spaces within; remembering words would be wrong, and is not done."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be that is the question"] * 500),
        model_prefix=str(tmp_path / "wide"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        split_by_whitespace=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(tmp_path / "wide.model")
    text = "to be or not to be"
    assert tokenizer._words is None
    assert np.frombuffer(tokenizer.encode_packed([text])[0], "<u2").tolist() == tokenizer.encode([text])[0]
    assert any("▁" in tokenizer.processor.id_to_piece(i)[1:] for i in tokenizer.encode([text])[0])


def test_both_forms_equal_sentencepiece_on_real_code_and_prose(tokenizer_path, exported):
    texts = [
        d.text
        for name in ("code", "manuals", "books")
        for d in list(read_piece(Piece(str(SAMPLE / f"{name}.jsonl.xz"), 0), Reading()))[:40]
    ]
    assert_equal_to_the_oracle(tokenizer_path, exported, texts)


def test_llama_tokenizer_equals_sentencepiece_where_transformers_own_conversion_fails(tmp_path):
    model = shared_data() / "tokenizers" / "llama.model"
    save_tokenizer(load_tokenizer(model), tmp_path)
    texts = []
    for name in ("starcoderdata", "arxiv", "wikipedia"):
        with lzma.open(shared_data() / "corpus" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"][:20000] for _, line in zip(range(60), lines, strict=False)]
    assert_equal_to_the_oracle(model, tmp_path, texts + AWKWARD)


def test_transformers_loads_the_export_with_the_same_ids(tokenizer_path, exported):
    from transformers import AutoTokenizer

    oracle, loaded = SentencePieceProcessor(model_file=str(tokenizer_path)), AutoTokenizer.from_pretrained(exported)
    for text in AWKWARD:
        assert loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids == oracle.encode(text)
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (1, 2, VOCAB)
    assert loaded("</s>", add_special_tokens=False).input_ids == [2]


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_decoding_gives_the_text_back(tokenizer_path, exported, text):
    for tokenizer in (load_tokenizer(tokenizer_path), load_tokenizer(exported / "tokenizer.json")):
        (ids,) = tokenizer.encode([text])
        assert decode(tokenizer, ids) == (" " + text if text else "").replace("▁", " ")


def test_both_forms_have_one_digest_and_one_table_of_bytes(tokenizer_path, exported):
    ours, exported_form = load_tokenizer(tokenizer_path), load_tokenizer(exported / "tokenizer.json")
    assert ours.token_bytes == exported_form.token_bytes
    assert tokenizer_digest(ours) == tokenizer_digest(exported_form)
    assert ours.token_bytes[:3] == [b"", b"", b""]
    assert ours.token_bytes[3:259] == [bytes([byte]) for byte in range(256)]


def test_byte_level_tokenizer_json_is_read_byte_for_byte(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["some text, some code: x = [1, 2]\n"] * 50, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 0
    for text in AWKWARD:
        (ids,) = tokenizer.encode([text])
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert decode(tokenizer, ids) == text


def test_training_twice_gives_the_same_file(corpus, tokenizer_path, tmp_path):
    texts = read_texts(sorted(corpus.glob("*.jsonl*")))
    train_tokenizer(texts, VOCAB, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == tokenizer_path.read_bytes()


def test_a_tokenizer_that_names_no_end_is_told_where_to_name_it(exported, tmp_path):
    backend = json.loads((exported / "tokenizer.json").read_text())
    text = json.dumps(backend).replace("</s>", "<end>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(
        UsageError, match=r"tokenizer_config\.json: names no eos_token.*name one of the tokenizer's tokens there"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert load_tokenizer(tmp_path).eos_id == 2


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(UsageError, match=r"holds neither tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"nonsense")
    with pytest.raises(CorruptDataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptDataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="hold no text"):
        train_tokenizer(["", "  \n"], 300, tmp_path / "t.model")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(CorruptDataError, match=r"bad\.jsonl:2: not valid JSON"):
        train_tokenizer(read_texts([tmp_path / "bad.jsonl"]), 300, tmp_path / "t.model")
    with pytest.raises(UsageError, match="no vocabulary of 4000"):
        train_tokenizer(["too short"], 4000, tmp_path / "t.model")

"""Small real parts that tests share: a corpus of three sources cut from the sample, its tokenizer, a data set, a recipe."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

# Small models on one thread each: tests may run side by side, and threads that wait for each other are slow.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Triton's kernels are tested without a GPU too: its interpreter computes them with numpy.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from mobillama.data.documents import Piece, Reading, read_piece, read_texts
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.tokenizer import train_tokenizer
from mobillama.recipe import PrepareRecipe, SourceConfig

SAMPLE = Path(__file__).parents[1] / "src" / "mobillama" / "data" / "sample"
SOURCES = ("books", "encyclopedia", "code")
VOCAB = 512
CONTEXT = 64


def run_cli(*words: object, timeout: float = 240, **options) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "mobillama", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        **options,
    )


def shared_data() -> Path:
    """Return the folder of real data that MOBILLAMA_TEST_DATA names, or skip the test."""
    folder = os.environ.get("MOBILLAMA_TEST_DATA")
    if not folder:
        pytest.skip("set MOBILLAMA_TEST_DATA to a folder with tokenizers/ and corpus/ to run this test")
    return Path(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Three sources of 30 documents of at most 6,000 characters, in three file formats."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in SOURCES:
        documents = list(read_piece(Piece(str(SAMPLE / f"{name}.jsonl.xz"), 0), Reading()))[:60:2]
        lines = "".join(json.dumps({"text": document.text[:6000]}) + "\n" for document in documents)
        if name == "books":
            (folder / "books.jsonl").write_text(lines, encoding="utf-8")
        elif name == "encyclopedia":
            (folder / "encyclopedia.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
        else:
            (folder / "code").mkdir()
            for number, line in enumerate(lines.splitlines()):
                (folder / "code" / f"{number:02d}.txt").write_text(json.loads(line)["text"], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(read_texts(sorted(corpus.glob("*.jsonl*"))), VOCAB, path)
    return path


@pytest.fixture(scope="session")
def prepare_recipe(corpus, tokenizer_path) -> PrepareRecipe:
    paths = {"books": "books.jsonl", "encyclopedia": "encyclopedia.jsonl.xz", "code": "code"}
    return PrepareRecipe(
        sources={name: SourceConfig(str(corpus / path), licence=f"licence of {name}") for name, path in paths.items()},
        tokenizer=str(tokenizer_path),
        sequence_length=CONTEXT + 1,
        holdout=0.05,
        chunks=5,
        seed=7,
    )


@pytest.fixture(scope="session")
def data(prepare_recipe, tmp_path_factory) -> Path:
    """A prepared data set that tests must not change."""
    out = tmp_path_factory.mktemp("data") / "small"
    prepare(prepare_recipe, out)
    return out


@pytest.fixture
def recipe_file(data, tmp_path) -> Path:
    """A pre-training recipe of 12 short steps, in a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
data: {data}
run: {tmp_path / "run"}
seed: 7
model: {{vocab_size: {VOCAB}, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 2,
  max_position_embeddings: {CONTEXT}}}
optimizer: {{learning_rate: 3e-3, warmup_steps: 3}}
train: {{steps: 12, batch_size: 8, micro_batch_size: 4, checkpoint_every: 4, validate_every: 6, validate_sequences: 4,
  precision: float32, device: cpu}}
""",
        encoding="utf-8",
    )
    return path

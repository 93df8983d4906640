"""Small real parts that tests share: a corpus of three sources cut from the sample, its tokenizer, a data set, a recipe."""

from __future__ import annotations

import json
import lzma
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

# Small models on one thread each: tests may run side by side, and threads that wait for each other are slow.
os.environ["OMP_NUM_THREADS"] = "1"

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

# Triton's kernels are tested without a GPU too: its interpreter computes them with numpy.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from mobillama.data.documents import Piece, Reading, read_piece, read_texts
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.template import DEFAULT
from mobillama.data.tokenizer import load_tokenizer
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.directory import save_model
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig, PrepareRecipe, SourceConfig

# A shell that starts the tests in the background has Ctrl-C ignored, by them and by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SAMPLE = Path(__file__).parents[1] / "src" / "mobillama" / "data" / "sample"
SOURCES = ("books", "encyclopedia", "code")
VOCAB = 512
CONTEXT = 64
NAMES = ["Ann", "Bob", "Cleo", "Dan", "Eve"]
COLOURS = {"the sea": "blue", "grass": "green", "coal": "black", "snow": "white", "a lemon": "yellow", "a rose": "red"}
THINGS = ["a ship", "the old house", "some bread", "two horses", "a long letter", "the king"]


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


def directory_of(tokenizer_path: Path, path: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Write a random model of the tests' vocabulary, its shape changed as named."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ModelConfig(
        **{"vocab_size": VOCAB, **sizes, "max_position_embeddings": 128, "initializer_range": 0.1, **changes}
    )
    built = MobiLlama(config)
    initialise(built, config, 0)
    save_model(path, config, built.to(dtype).state_dict(), load_tokenizer(tokenizer_path))
    return path


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


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory) -> Path:
    """Local copies of small benchmarks, in the layout of their hub repositories."""
    folder, draw = tmp_path_factory.mktemp("benchmarks"), random.Random(0)

    def write(place: str, config: str, splits: dict[str, list[dict]]) -> None:
        directory = folder / place / config
        directory.mkdir(parents=True)
        lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            pq.write_table(pa.Table.from_pylist(rows), directory / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (folder / place / "README.md").write_text("\n".join([*lines, "---", ""]))

    def siqa() -> dict:
        who, what = draw.choice(NAMES), draw.choice(THINGS)
        answers = {f"answer{letter}": f"{draw.choice(NAMES)} took {draw.choice(THINGS)}" for letter in "ABC"}
        return {"context": f"{who} saw {what}.", "question": "What then?", **answers, "label": draw.choice("123")}

    def winogrande() -> dict:
        one, two = draw.sample(NAMES, 2)
        sentence = f"{one} gave {draw.choice(THINGS)} to {two} because _ had {draw.choice(THINGS)}."
        return {"sentence": sentence, "option1": one, "option2": two, "answer": draw.choice("12")}

    write("lighteval/siqa", "default", {name: [siqa() for _ in range(12)] for name in ("train", "validation")})
    write(
        "allenai/winogrande", "winogrande_xl", {n: [winogrande() for _ in range(12)] for n in ("train", "validation")}
    )
    (folder / "wikitext2").mkdir()
    pages = [
        f" = {name} = \n {name} had {' and '.join(THINGS)} . \n = = Life = = \n It was long . \n" for name in NAMES
    ]
    (folder / "wikitext2" / "wiki.test.raw").write_text("".join(pages))
    (folder / "lambada").mkdir()
    lines = [{"context": f"{draw.choice(NAMES)} took {draw.choice(THINGS)} to", "continuation": n} for n in NAMES * 8]
    (folder / "lambada" / "lambada_openai.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def small_model(tokenizer_path, tmp_path_factory) -> Path:
    """A model directory whose weights are drawn wide, so that its answers differ."""
    directory = tmp_path_factory.mktemp("model") / "small"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    directory_of(tokenizer_path, directory, **sizes, initializer_range=0.15)
    return directory


def openai_row(thing: str, colour: str) -> dict:
    question, answer = f"Which colour has {thing}?", f"It is {colour}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sharegpt_row(thing: str, colour: str) -> dict:
    turns = [("human", f"Say {thing}."), ("gpt", thing), ("human", "Its colour?"), ("gpt", f"{colour}!")]
    return {"id": thing, "conversations": [{"from": who, "value": text} for who, text in turns]}


@pytest.fixture(scope="session")
def chat_files(tmp_path_factory) -> Path:
    """Conversations in two forms: openai.jsonl and sharegpt.jsonl."""
    folder = tmp_path_factory.mktemp("chat")
    things = [(f"{thing} {n}", colour) for n in range(12) for thing, colour in COLOURS.items()]
    for name, row in (("openai", openai_row), ("sharegpt", sharegpt_row)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(*thing)) + "\n" for thing in things))
    return folder


@pytest.fixture
def sft_file(chat_files, small_model, tmp_path) -> Path:
    """A tuning recipe of 8 short steps, in a file."""
    path = tmp_path / "sft.yaml"
    path.write_text(
        f"""
init_from: {small_model}
sources: {{openai: {{path: {chat_files / "openai.jsonl"}}}, sharegpt: {{path: {chat_files / "sharegpt.jsonl"}}}}}
run: {tmp_path / "run"}
holdout: 0.2
seed: 7
optimizer: {{learning_rate: 3e-3}}
train: {{steps: 8, batch_size: 8, micro_batch_size: 4, checkpoint_every: 3, keep_checkpoints: 0, validate_every: 4,
  precision: float32, device: cpu}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def chat_model(tokenizer_path, tmp_path_factory) -> Path:
    """A model of random weights, large enough that its likeliest token stands out, with a chat template.

    It never ends a greedy answer by itself.
    """
    config = ModelConfig(VOCAB, 32, 48, 2, 2, max_position_embeddings=4096, initializer_range=0.4)
    model = MobiLlama(config)
    initialise(model, config, 5)
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.chat_template = DEFAULT
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_id] = 0
    directory = tmp_path_factory.mktemp("chat") / "tiny"
    save_model(directory, config, model.state_dict(), tokenizer)
    return directory

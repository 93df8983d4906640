"""The native engine where Python cannot go: on an Arm processor that qemu plays, and under sanitizers."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_native_engine import IDS, distance, model_of, torch_logits

from mobillama.engine.blocks import F16, Q8_0, decode
from mobillama.engine.gguf_model import GGUFModel
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.native.build import compile_objects, run_all
from mobillama.native.library import kernels

DRIVER = Path(__file__).with_name("native_driver.cpp")
SIZES = {"vocab_size": 90, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
SLOTS = 3
TOKENS = [token % 90 for token in IDS[:24]]
MODELS = {
    "shared, 4 bits": {"kind": "q4_0", "share": "ffn"},
    "grouped heads of 32, tied, minima": {
        "kind": "q4_1",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "head_dim": 32,
    },
    "8 bits, QK-norm": {"kind": "q8_0", "qk_norm": True, "head_dim": 24},
    "halves, odd sizes": {"kind": "f16", "hidden_size": 72, "head_dim": 18, "intermediate_size": 100},
    "bfloat16": {"kind": "bf16"},
    "floats": {"kind": "f32"},
}


def stream_of(model: GGUFModel, exact: bool) -> bytes:
    """What native_driver.cpp reads."""
    shape, names = model.shape, list(model.tensors)
    cache = (F16 if exact or shape.attention_head_dim % Q8_0.values else Q8_0).code
    sizes = (
        shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.num_attention_heads,
        shape.key_value_heads, shape.attention_head_dim, shape.max_position_embeddings, SLOTS,
    )  # fmt: skip
    parts = [struct.pack("<i9iffii", len(names), *sizes, shape.rms_norm_eps, shape.rope_theta, exact, cache)]
    for tensor in model.tensors.values():
        is_vector = len(tensor.shape) == 1
        data = (decode(tensor.rows, tensor.kind) if is_vector else np.ascontiguousarray(tensor.rows)).tobytes()
        parts += [struct.pack("<4i", -1 if is_vector else tensor.kind.code, 1 if is_vector else tensor.shape[0],
                              tensor.shape[-1], len(data)), data]  # fmt: skip

    # Matrices and vectors are numbered apart, in the order in which they come.
    matrices = {name: i for i, name in enumerate(n for n in names if len(model.tensors[n].shape) == 2)}
    vectors = {name: i for i, name in enumerate(n for n in names if len(model.tensors[n].shape) == 1)}
    for block, ffn in shape.layer_weights:
        layer, network = f"model.layers.{block}.", f"model.ffns.{ffn}."
        parts.append(struct.pack(
            "<11i",
            *(matrices[f"{layer}self_attn.{part}_proj.weight"] for part in "qkvo"),
            *(matrices[f"{network}{part}_proj.weight"] for part in ("gate", "up", "down")),
            *(vectors.get(f"{layer}{part}.weight", -1) for part in
              ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")),
        ))  # fmt: skip
    head = matrices.get(HEAD, matrices[EMBEDDING])
    parts.append(struct.pack("<4i", matrices[EMBEDDING], head, vectors["model.norm.weight"], len(TOKENS)))
    return b"".join(parts) + np.array(TOKENS, np.int32).tobytes()


def check(words: list[str], name: str) -> list[str]:
    """Run all models with one set of kernels; return the names of the sets that the machine has."""
    known: list[str] = []
    for options in MODELS.values():
        model = model_of(**SIZES | options)
        expected = torch_logits(model, TOKENS)
        for exact in (True, False):
            run = subprocess.run([*words, name, "3"], input=stream_of(model, exact), capture_output=True, timeout=100)
            assert run.returncode == 0, run.stderr.decode()[-3000:]
            names, _, rest = run.stdout.partition(b"\n")
            known = names.decode().split()
            bound = 2.5e-2 if options["kind"][0] == "q" and not exact else 1e-3
            first, *others = np.frombuffer(rest, np.float32).reshape(4, *expected.shape)
            assert distance(first, expected) < bound, options
            assert all(np.array_equal(first, other) for other in others), options
    return known


def program(folder: Path, compiler: str, machine: str | None, flags: Sequence[str], *link: str) -> str:
    objects = compile_objects([compiler], folder, DRIVER, machine, flags)
    run_all([[compiler, *flags, *map(str, objects), "-pthread", *link, "-o", str(folder / "driver")]])
    return str(folder / "driver")


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if not compiler or not shutil.which("qemu-aarch64"):
        pytest.skip("install g++-aarch64-linux-gnu and qemu-user to run this test")
    return program(tmp_path_factory.mktemp("arm"), compiler, "aarch64", ["-O2"], "-static")


@pytest.mark.parametrize(("processor", "kernels"), [("max", "dotprod"), ("cortex-a53", "portable")])
def test_on_arm_the_logits_are_torchs(arm, processor, kernels):
    known = check(["qemu-aarch64", "-cpu", processor, arm], kernels)
    assert known == (["dotprod", "portable"] if processor == "max" else ["portable"])


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("install g++ to run this test")
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return program(tmp_path_factory.mktemp("sanitized"), compiler, None, flags)


@pytest.mark.parametrize("name", kernels())
def test_sanitizers_find_nothing(sanitized, name):
    assert b"__asan_report" in Path(sanitized).read_bytes() and b"__ubsan_handle" in Path(sanitized).read_bytes()
    assert name in check([sanitized], name)

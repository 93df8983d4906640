from __future__ import annotations

import errno
import json
import subprocess

import pytest
import torch

from mobillama import directory
from mobillama.data.tokenizer import load_tokenizer
from mobillama.directory import load_model, save_tensors
from mobillama.errors import CorruptDataError, UsageError
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig, OptimizerConfig
from mobillama.train import saver
from mobillama.train.checkpoint import (
    keep_newest,
    list_checkpoints,
    load_optimizers,
    load_tensors,
    newest_whole_checkpoint,
    remove_leftovers,
)
from mobillama.train.optimizer import build_optimizers
from mobillama.train.saver import Saver
from mobillama.train.world import World

CONFIG = ModelConfig(512, 16, 24, 2, 2)


@pytest.fixture
def trained():
    model = MobiLlama(CONFIG)
    initialise(model, CONFIG, 0)
    optimizers = build_optimizers(model, OptimizerConfig())
    take_steps(model, optimizers, 2)
    return model, optimizers


def take_steps(model, optimizers, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        model(torch.randint(0, 512, (2, 8), generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def save(trained, tokenizer_path, tmp_path):
    return lambda step: save_now(tmp_path, step, *trained, tokenizer_path)


def save_now(out, step, model, optimizers, tokenizer_path):
    alone = World(0, 1, 1, torch.device("cpu"))
    tokenizer = load_tokenizer(tokenizer_path)
    files = Saver(out, alone, lambda work, weights: directory.save_model(work / "model", CONFIG, weights, tokenizer))
    files.start(step, model, optimizers, {"a": 1})
    return files.wait().path


def load_checkpoint(path, model, optimizers) -> None:
    load_tensors(path / "model", model.state_dict())
    load_optimizers(path, model, optimizers)


def test_checkpoint_holds_model_optimizer_state_and_manifest_and_no_pickle(save):
    path = save(5)
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert names == {
        "manifest.json",
        "state.json",
        "optimizer/optimizer-00001.safetensors",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/modeling_mobillama.py",
        "model/tokenizer.json",
        "model/tokenizer.model",
        "model/tokenizer_config.json",
    }
    assert json.loads((path / "state.json").read_text()).items() >= {"a": 1, "step": 5, "updates": 2}.items()


def test_muon_goes_on_with_the_same_bits(tokenizer_path, tmp_path):
    config = OptimizerConfig(kind="muon", learning_rate=0.01)
    model = MobiLlama(CONFIG)
    initialise(model, CONFIG, 0)
    optimizers = build_optimizers(model, config)
    take_steps(model, optimizers, 2)
    path = save_now(tmp_path, 2, model, optimizers, tokenizer_path)
    again = MobiLlama(CONFIG)
    resumed = build_optimizers(again, config)
    load_checkpoint(path, again, resumed)
    for each in ((model, optimizers), (again, resumed)):
        take_steps(*each, 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters(), strict=True))


def test_weights_and_moments_come_back_bit_for_bit(save, trained):
    path, (model, (optimizer,)) = save(5), trained
    other = MobiLlama(CONFIG)
    fresh = build_optimizers(other, OptimizerConfig())
    load_checkpoint(path, other, fresh)
    (fresh,) = fresh
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[ours][key], fresh.state[theirs][key])
    deployed = load_model(path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), deployed.parameters(), strict=True))


def test_a_save_cut_short_at_any_point_does_not_count(save, tmp_path, monkeypatch):
    """Fail at each call that writes, flushes or renames, one after another: the older checkpoint stays the newest."""
    save(1)
    calls = ["save_distributed", "save_model", "write_json", "fsync_tree", "fsync_directory", "write_manifest"]
    for name in calls:
        module = directory if name == "save_model" else saver
        original = getattr(module, name)

        def full_disk(*args, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, name, full_disk)
        with pytest.raises(UsageError, match=r"step-000002: cannot be written \(No space left on device\)"):
            save(2)
        monkeypatch.setattr(module, name, original)
        assert newest_whole_checkpoint(tmp_path)[0].name == "step-000001"
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert newest_whole_checkpoint(save(2).parent)[0].name == "step-000002"


def test_a_changed_model_of_a_checkpoint_is_not_decoded(save):
    path = save(3)
    weights = path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1  # a flipped bit of a weight: still a valid safetensors file
    weights.write_bytes(content)
    with pytest.raises(CorruptDataError, match=r"model/model\.safetensors: sha256 differs from its manifest"):
        load_model(path / "model")


def test_keep_newest_and_listing(save, tmp_path):
    for step in (1, 2, 10, 1_000_000):
        save(step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2, 10, 1_000_000]
    (tmp_path / "step-2-backup").mkdir()
    keep_newest(tmp_path, 1_000_000, 0)
    assert len(list_checkpoints(tmp_path)) == 4
    keep_newest(tmp_path, 10, 1)  # the newer one was passed over as damaged
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 1_000_000]
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / "step-2-backup").is_dir()


def test_a_full_disk_is_an_error_that_says_so(save, tmp_path):
    """The real failure of safetensors, on a file system of one mebibyte, where the machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        (small / "filler").write_bytes(bytes(900_000))
        with pytest.raises(OSError, match="No space left"):
            save_tensors(small / "t.safetensors", {"t": torch.zeros(200_000)})
    finally:
        subprocess.run(["umount", small], check=True)


def test_weights_are_readable_as_the_umask_says(save):
    weights = save(1) / "model" / "model.safetensors"
    assert weights.stat().st_mode & 0o777 == (weights.parent / "config.json").stat().st_mode & 0o777

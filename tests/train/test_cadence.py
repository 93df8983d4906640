from __future__ import annotations

import pytest

from mobillama.recipe import ModelConfig, OptimizerConfig, PretrainRecipe, TrainConfig
from mobillama.train.cadence import checkpoint_bytes, checkpoint_due, kept_checkpoints


def due_steps(steps: int = 30, context: int = 10, ends: tuple[int, ...] = (7, 20, 33), **train) -> list[int]:
    config = TrainConfig(steps=steps, batch_size=4, **train)
    return [step for step in range(1, steps + 1) if checkpoint_due(config, context, list(ends))(step)]


def test_checkpoints_come_every_so_many_steps_tokens_or_chunks():
    assert due_steps(checkpoint_every=10) == [10, 20, 30]
    assert due_steps(checkpoint_every=100, checkpoint_unit="tokens", steps=8) == [3, 5, 8]  # 40 tokens a step
    # Sequences 7, 20, 33 of the first epoch, 40, 53, 66 of the second, … end a chunk.
    assert due_steps(checkpoint_every=1, checkpoint_unit="chunks", steps=17) == [2, 5, 9, 10, 14, 17]
    assert due_steps(checkpoint_every=2, checkpoint_unit="chunks", steps=17) == [5, 10, 17]


def test_the_papers_run_writes_about_one_checkpoint_for_each_chunk():
    train = TrainConfig(checkpoint_every=1, checkpoint_unit="chunks")
    due = checkpoint_due(train, 2048, [1_706_976 * (n + 1) for n in range(360)])
    assert kept_checkpoints(PretrainRecipe("", "", train=train), due) == (344, 344)
    assert due(2134)


@pytest.mark.parametrize(("keep", "every", "kept"), [(0, 0, 10), (2, 0, 3), (2, 20, 7), (2, 15, 5)])
def test_what_is_kept_is_counted_with_the_one_being_written(keep, every, kept):
    train = TrainConfig(steps=95, batch_size=4, checkpoint_every=10, keep_checkpoints=keep, keep_every=every)
    recipe = PretrainRecipe("", "", train=train)
    assert kept_checkpoints(recipe, checkpoint_due(train, 10, [100])) == (10, kept)


def test_a_checkpoints_bytes_are_weights_and_moments():
    model = ModelConfig(512, 32, 48, 3, 2)
    parameters = 2 * 512 * 32 + 3 * (4 * 32 * 32 + 2 * 32) + 3 * 32 * 48 + 32
    assert checkpoint_bytes(PretrainRecipe("", "", model=model)) == 12 * parameters
    muon = PretrainRecipe("", "", model=model, optimizer=OptimizerConfig(kind="muon"))
    assert 8 * parameters < checkpoint_bytes(muon) < 12 * parameters

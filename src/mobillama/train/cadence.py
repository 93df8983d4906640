"""When a run writes a checkpoint, and what that takes of the disk."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from mobillama.model.cost import model_cost
from mobillama.recipe import PretrainRecipe, TrainConfig


def checkpoint_due(train: TrainConfig, context: int, chunk_ends: list[int]) -> Callable[[int], bool]:
    """Return whether a checkpoint is due after a number of steps (from 1), apart from the last step's.

    Args:
        train: the recipe's cadence; a border of tokens or chunks that lies within a step counts at the step's end.
        context: tokens that a sequence is learned in.
        chunk_ends: the number of sequences in the first chunk, the first two, …; later epochs go through them again.
    """

    def passed(steps: int) -> int:
        sequences = steps * train.batch_size
        if train.checkpoint_unit == "steps":
            return steps // train.checkpoint_every
        if train.checkpoint_unit == "tokens":
            return sequences * context // train.checkpoint_every
        epochs, rest = divmod(sequences, chunk_ends[-1])
        return (epochs * len(chunk_ends) + bisect.bisect_right(chunk_ends, rest)) // train.checkpoint_every

    return lambda steps: passed(steps) > passed(steps - 1)


def checkpoint_bytes(recipe: PretrainRecipe) -> int:
    """Return about how many bytes a checkpoint takes: float32 weights and what the optimizer remembers of each."""
    cost = model_cost(recipe.model)
    in_muon = cost.stored_parameters - 2 * recipe.model.vocab_size * recipe.model.hidden_size
    remembered = 2 * cost.stored_parameters - (in_muon if recipe.optimizer.kind == "muon" else 0)
    return 4 * (cost.stored_parameters + remembered)


def kept_checkpoints(recipe: PretrainRecipe, is_due: Callable[[int], bool]) -> tuple[int, int]:
    """Return how many checkpoints a run writes, and how many it holds at its end, one that is being written included."""
    train = recipe.train
    steps = sorted({*filter(is_due, range(1, train.steps + 1)), train.steps})
    if not train.keep_checkpoints:
        return len(steps), len(steps)
    past = steps[: -train.keep_checkpoints]
    for_good = [step for step in past if train.keep_every and step % train.keep_every == 0]
    return len(steps), len(steps) - len(past) + len(for_good) + 1

from __future__ import annotations

import numpy as np
import pytest

from mobillama.data.dataset import Dataset, partition
from mobillama.data.order import order


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 3, 8, 100])
@pytest.mark.parametrize("batch_size", [8, 13])
def test_a_step_holds_the_same_sequences_however_it_is_divided(data, world_size, micro, batch_size):
    dataset = Dataset(data)
    for step in (0, 1, dataset.size // batch_size):  # the last one crosses into the second epoch
        whole = dataset.batch(5, step, batch_size)
        parts = [
            dataset.batch(5, step, batch_size, part)
            for rank in range(world_size)
            for part in partition(batch_size, micro, rank, world_size)
        ]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
        assert np.array_equal(np.concatenate([part.sources for part in parts]), whole.sources)
        assert all(len(part.rows) <= micro for part in parts)


def test_first_epoch_of_the_prepared_seed_reads_front_to_back_and_all_else_is_the_order(data):
    dataset = Dataset(data)
    size = dataset.size
    rows = np.concatenate([dataset.rows_of_step(dataset.prepared_seed, step, 10) for step in range(3 * size // 10 + 1)])
    assert np.array_equal(rows[:size], np.arange(size))
    assert np.array_equal(
        rows[size : 3 * size], order(dataset.root, dataset.prepared_seed, size, np.arange(size, 3 * size))
    )
    other = np.concatenate([dataset.rows_of_step(99, step, 10) for step in range(size // 10)])
    assert np.array_equal(other, order(dataset.root, 99, size, np.arange(len(other))))
    assert not np.array_equal(other, np.arange(len(other)))


def test_a_batch_depends_on_nothing_but_data_seed_and_step(data):
    first, second = Dataset(data), Dataset(data)
    second.batch(1, 9, 4)
    assert np.array_equal(first.batch(1, 3, 4).ids, second.batch(1, 3, 4).ids)

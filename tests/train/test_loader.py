"""A reader that dies or hangs costs no sequence."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from mobillama.data.dataset import Dataset
from mobillama.errors import UsageError
from mobillama.train import loader
from mobillama.train.loader import Loader
from mobillama.train.world import World


def rows_taken(data, reads, world_size: int = 1, rank: int = 0, **options):
    dataset = Dataset(data)
    whole = dataset.batch
    dataset.batch = lambda *words: (reads(words[1]), whole(*words))[1]
    notes: list[str] = []
    world = World(rank, world_size, 1, torch.device("cpu"))
    takes = Loader(dataset, 7, 8, 3, world, notes.append)
    rows = []
    for step in range(6):
        rows.append(np.concatenate([batch.rows for batch in takes.take(step)]))
        takes.read_ahead(step + 1)
    return takes, notes, rows


def test_steps_come_in_order_and_ranks_share_them(data):
    dataset = Dataset(data)
    _, _, alone = rows_taken(data, lambda step: None)
    assert all((rows == dataset.rows_of_step(7, step, 8)).all() for step, rows in enumerate(alone))
    parts = [rows_taken(data, lambda step: None, 2, rank)[2] for rank in range(2)]
    assert all((np.concatenate(pair) == rows).all() for *pair, rows in zip(*parts, alone, strict=True))


def test_a_hung_reader_is_replaced_and_nothing_is_lost_or_taken_twice(data, monkeypatch):
    monkeypatch.setattr(loader, "_PATIENCE", 0.2)
    forever, hung = threading.Event(), []

    def reads(step):
        if step == 3 and not hung:
            hung.append(step)
            forever.wait(30)

    takes, notes, rows = rows_taken(data, reads)
    forever.set()
    assert len(notes) == 1
    assert "step 4 has waited" in notes[0]
    assert (np.concatenate(rows) == np.concatenate([Dataset(data).rows_of_step(7, s, 8) for s in range(6)])).all()
    assert takes.waited >= 0.2


def test_storage_that_never_answers_ends_the_run_with_a_reason(data, monkeypatch):
    monkeypatch.setattr(loader, "_PATIENCE", 0.05)
    with pytest.raises(UsageError, match="does not answer for"):
        rows_taken(data, lambda step: time.sleep(5 if step == 2 else 0))


def test_a_dead_reader_gives_its_reason_at_once(data):
    def reads(step):
        if step == 2:
            raise OSError(5, "Input/output error")

    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        rows_taken(data, reads)
    assert time.monotonic() - started < 10

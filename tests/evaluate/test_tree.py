from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobillama.evaluate.tree import Sequence, batches, pack

SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=9), st.integers(1, 8)), min_size=1, max_size=12
)


def visible(row) -> np.ndarray:
    place = np.arange(len(row))
    return (place[None, :] <= place[:, None]) & (place[:, None] < row.ends_t[None, :])


@given(SEQUENCES, st.integers(4, 40), st.booleans())
def test_every_prediction_sees_exactly_its_own_sequence(drawn, row_tokens, branching):
    sequences = [Sequence(np.array(ids, np.int32), min(scored, len(ids) - 1)) for ids, scored in drawn]
    met = {}
    for row in pack(sequences, row_tokens, branching):
        seen = visible(row)
        for at, target, index in zip(row.at_n, row.targets_n, row.sequences_n, strict=True):
            path = row.ids_t[seen[at]].tolist()
            assert row.positions_t[seen[at]].tolist() == list(range(len(path)))
            met.setdefault(int(index), []).append((path, int(target)))
            if not branching:
                assert path == row.ids_t[: at + 1].tolist()  # what a causal mask lets it see
    for index, sequence in enumerate(sequences):
        ids = sequence.ids.tolist()
        assert met[index] == [(ids[:end], ids[end]) for end in range(len(ids) - sequence.scored, len(ids))]


def test_choices_stand_behind_one_context_and_what_shares_little_in_another_row():
    context = list(range(10, 30))
    choices = [Sequence(np.array([*context, choice, 1, 2], np.int32), 3) for choice in (5, 6, 7)]
    other = Sequence(np.arange(100, 120, dtype=np.int32), 1)
    (row,) = pack(choices, row_tokens=22)
    assert len(row) == 20 + 3 * 2
    assert [len(row) for row in pack([*choices, other], row_tokens=22)] == [26, 19]


def test_questions_share_their_examples():
    examples = list(range(40))
    questions = [Sequence(np.array([*examples, 50 + n, 60], np.int32), 1) for n in range(10)]
    assert [len(row) for row in pack(questions, row_tokens=64)] == [50]


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batches_pad_rows_and_point_at_the_outputs_that_are_needed(batch_tokens):
    random = np.random.default_rng(0)
    sequences = [Sequence(random.integers(0, 99, random.integers(2, 40), dtype=np.int32), 1) for _ in range(30)]
    rows = pack(sequences, row_tokens=50)
    found = {}
    for batch in batches(rows, batch_tokens, multiple=8):
        assert batch.ids_bt.shape[1] % 8 == 0
        assert batch.tokens <= batch_tokens or len(batch.ids_bt) == 1
        ids = batch.ids_bt.ravel()
        for output, target, index in zip(batch.output_n, batch.targets_n, batch.sequences_n, strict=True):
            found[int(index)] = (int(ids[batch.outputs_m[output]]), int(target))
    assert found == {index: tuple(sequence.ids[-2:].tolist()) for index, sequence in enumerate(sequences)}

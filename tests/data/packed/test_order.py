"""The order of data is a bijection per epoch and does not depend on the number of ranks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.data.packed.order import rows_of_step, shuffled_index
from ernie_elastic.errors import ConfigError


@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 300))
def test_every_epoch_visits_every_item_once(seed, epoch, size):
    visited = [shuffled_index(seed, epoch, index, size) for index in range(size)]
    assert sorted(visited) == list(range(size))


def test_epochs_and_seeds_differ_and_are_far_from_sorted():
    orders = {tuple(shuffled_index(seed, epoch, i, 100) for i in range(100)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    order = [shuffled_index(0, 0, i, 1000) for i in range(1000)]
    assert abs(sum((a < b) for a, b in itertools.pairwise(order)) - 500) < 80


def test_ranks_share_the_same_rows_whatever_their_number():
    for step in range(5):
        alone = list(rows_of_step(3, step, 8, 21))
        for ranks in (2, 4, 8):
            together = [pair for rank in range(ranks) for pair in rows_of_step(3, step, 8, 21, rank, ranks)]
            assert together == alone
    with pytest.raises(ConfigError, match="rows_per_step 8 is no multiple of the 3 ranks"):
        list(rows_of_step(0, 0, 8, 21, 0, 3))


def test_index_outside_the_corpus_is_refused():
    with pytest.raises(ConfigError, match=r"index 5 lies outside 0\.\.4"):
        shuffled_index(0, 0, 5, 5)

"""Mixtures of packed directories: shares, epochs, stages and ranks, all from (seed, draw) alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.data.packed.loader import PackedLoader
from ernie_elastic.data.packed.mixture import MixtureConfig, PackedMixture, mixed_rows, open_packed
from ernie_elastic.data.packed.order import rows_of_step
from ernie_elastic.data.packed.shards import PackedCorpus
from ernie_elastic.data.prepare.stage import PrepareConfig, prepare_data
from ernie_elastic.data.prepare.tokenizer_service import tokenizers_hash
from ernie_elastic.data.world.facts import WorldConfig
from ernie_elastic.errors import CheckpointError, ConfigError
from tests.support.tiny_tokenizers import save_tiny_tokenizers

Drawn = list[tuple[int, int, int]]


def drawn(sizes: list[int], stages: list[tuple[int, tuple[float, ...]]], steps: int, rows: int, seed: int = 0) -> Drawn:
    return [found for step in range(steps) for found in mixed_rows(sizes, stages, seed, step, rows)]


@given(st.integers(0, 2**40), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.data())
def test_every_source_is_read_in_whole_epochs_whatever_the_weights(seed: int, sizes: list[int], data: st.DataObject):
    weights = st.tuples(*[st.floats(0.01, 10)] * len(sizes))
    stages = [(0, data.draw(weights)), (7, data.draw(weights)), (20, data.draw(weights))]
    found = drawn(sizes, stages, 40, 6, seed)
    assert [draw for _, _, draw in found] == list(range(240))
    for source, size in enumerate(sizes):
        rows = [row for at, row, _ in found if at == source]
        for start in range(0, len(rows), size):
            epoch = rows[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))


def test_shares_hold_at_every_moment_and_follow_the_stages() -> None:
    stages = [(0, (3.0, 1.0, 0.0)), (100, (1.0, 1.0, 2.0))]
    found = drawn([50, 60, 70], stages, 200, 10, seed=5)
    for start, stop, shares in ((0, 1000, (0.75, 0.25, 0.0)), (1000, 2000, (0.25, 0.25, 0.5))):
        for end in range(start + 50, stop + 1, 50):
            counts = Counter(source for source, _, _ in found[start:end])
            for source, share in enumerate(shares):
                assert abs(counts[source] - share * (end - start)) <= 4, (start, end, source)
    assert drawn([50, 60, 70], stages, 3, 10, seed=6) != found[:30]


def test_one_source_keeps_the_order_of_a_corpus_alone() -> None:
    for step in (0, 3, 1000):
        alone = list(rows_of_step(9, step, 8, 21))
        assert [(row, draw) for _, row, draw in mixed_rows([21], [(0, (2.0,))], 9, step, 8)] == alone


def test_any_step_and_any_number_of_ranks_give_the_same_draws() -> None:
    stages = [(0, (1.0, 2.0)), (3, (5.0, 1.0)), (50_000, (1.0, 1.0))]
    for step in (0, 2, 3, 11, 60_000):
        alone = list(mixed_rows([13, 29], stages, 1, step, 8))
        for ranks in (2, 4):
            parts = [found for rank in range(ranks) for found in mixed_rows([13, 29], stages, 1, step, 8, rank, ranks)]
            assert parts == alone
    # A far step agrees with a count of all draws before it: nothing is kept between steps.
    before = Counter(source for source, _, _ in drawn([13, 29], stages, 200, 8, seed=1))
    source, row, _ = next(mixed_rows([13, 29], stages, 1, 200, 8))
    seen = [found[1] for found in drawn([13, 29], stages, 200, 8, seed=1) if found[0] == source]
    rest = seen[len(seen) // [13, 29][source] * [13, 29][source] :]
    assert row not in rest and before[source] == len(seen)


def test_config_errors_name_what_is_wrong() -> None:
    two = ((Path("a"), 1.0), (Path("b"), 1.0))
    with pytest.raises(ConfigError, match=r"source in 0\.\.1"):
        MixtureConfig(two, ((0.5, 2, 1.0),))
    with pytest.raises(ConfigError, match=r"weights \[0.0, 0.0\] from 50% of the run must not be negative"):
        MixtureConfig(two, ((0.5, 0, 0.0), (0.5, 1, 0.0)))
    with pytest.raises(ConfigError, match=r"need --data\.sources"):
        MixtureConfig((), ((0.5, 0, 0.0),))
    changed = MixtureConfig(two, ((0.25, 1, 3.0), (0.5, 0, 0.0)))
    assert changed.stages(10) == ((0, (1.0, 1.0)), (3, (1.0, 3.0)), (5, (0.0, 3.0)))


def test_a_loader_reads_several_directories_that_fit_the_run(tmp_path: Path) -> None:
    layout = save_tiny_tokenizers(tmp_path / "tokenizers")
    for name, task, length in (("a", "text", 192), ("b", "text_to_image", 192), ("short", "text_to_image", 160)):
        config = PrepareConfig(
            num_records=30, row_length=length, num_workers=1, task_weights={task: 1.0}, world=WorldConfig(48, 48)
        )
        prepare_data(tmp_path / "tokenizers", tmp_path / name, config, layout)
    mixture = MixtureConfig(((tmp_path / "a", 1.0), (tmp_path / "b", 0.0)), ((0.5, 0, 0.0), (0.5, 1, 1.0)))
    identity = tokenizers_hash(tmp_path / "tokenizers")
    corpus, row_length, _ = open_packed(mixture, 4, identity, layout)
    assert row_length == 192 and isinstance(corpus, PackedMixture)
    parts = [PackedCorpus(tmp_path / name) for name in ("a", "b")]
    numbers = [number for index in range(corpus.num_rows) for number in corpus.row(index)]
    assert sorted(numbers) == list(range(60)) == list(range(corpus.num_documents))
    for number in (0, 29, 30, 59):
        ours, theirs = corpus.document(number), parts[number // 30].document(number % 30)
        assert all(np.array_equal(a.array(), b.array()) for a, b in zip(ours, theirs, strict=True))
    loader = PackedLoader(corpus, layout, 4, row_length, seed=3)
    pictures = [bool(len(loader.step(step)[0].bit_index_N)) for step in range(4)]
    assert pictures == [False, False, True, True]
    units = PackedLoader(corpus.counted_by(lambda step: 3 * step), layout, 4, row_length, seed=3)
    assert [bool(len(units.step(unit)[0].bit_index_N)) for unit in (5, 6)] == [False, True]
    again = PackedLoader(corpus, layout, 4, row_length, seed=3, rank=1, world_size=2).step(3)[0]
    assert torch.equal(again.text_ids_BT, loader.step(3)[0].text_ids_BT[2:])
    with pytest.raises(ConfigError, match=r"rows of 192 positions and .*short of 160; .* one --row-length"):
        open_packed(MixtureConfig(((tmp_path / "a", 1.0), (tmp_path / "short", 1.0))), 4, identity, layout)
    with pytest.raises(CheckpointError, match=r"a was packed for tokenizers .{12}, this run has other"):
        open_packed(mixture, 4, "other", layout)
    save_tiny_tokenizers(tmp_path / "tokenizers", seed=1)
    assert tokenizers_hash(tmp_path / "tokenizers") != identity

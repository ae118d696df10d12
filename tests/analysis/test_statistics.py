"""Statistics against values worked out by hand, their bounds, and their edge cases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.convert import in_parent_numbering
from ernie_elastic.analysis.trace import RoutingCounts, TraceHeader, counts_from_trace
from ernie_elastic.errors import ConfigError


def table(rows: list[list[int]], k: int = 1, kept: tuple[tuple[int, ...], ...] | None = None) -> RoutingCounts:
    """One layer; each row is a task's count per expert."""
    counts = np.array(rows, dtype=np.int64)[:, None, :]
    header = TraceHeader("m", "s", counts.shape[-1], k, (0,), kept_experts=kept)
    return RoutingCounts(counts, counts.sum((1, 2)) // k, tuple(f"t{i}" for i in range(len(rows))), header)


def test_specialization_and_fair_share_by_hand():
    counts = table([[3, 1, 0, 4], [2, 2, 2, 2]], k=2)
    assert st.specialization(counts)[0, 0].tolist() == [75.0, 25.0, 0.0, 100.0]
    assert st.fair_share(counts).tolist() == [50.0]
    assert st.specialization(counts).mean(-1).tolist() == [[50.0], [50.0]]


def test_entropy_of_even_constant_and_half():
    counts = table([[5, 5, 5, 5], [9, 0, 0, 0], [4, 4, 0, 0], [1, 3, 0, 0]])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(4)
    assert st.normalized_entropy(counts)[:, 0] == pytest.approx([1.0, 0.0, 0.5, quarter], abs=1e-12)
    assert st.entropy_floor(counts)[0] == 0.0


def test_a_router_that_always_takes_the_same_k_reaches_the_floor():
    counts = table([[7, 7, 0, 0, 0, 0, 0, 0]], k=2)
    assert st.normalized_entropy(counts)[0, 0] == pytest.approx(1 / 3)
    assert st.entropy_floor(counts)[0] == pytest.approx(1 / 3)


def test_load_and_unused_experts_by_hand():
    counts = table([[6, 2, 0, 0], [0, 0, 4, 0]])
    assert st.max_over_mean(counts)[:, 0].tolist() == [3.0, 4.0]
    assert st.dead_experts(counts)[:, 0].tolist() == [2.0, 3.0]
    whole = st.all_tasks(counts)
    assert st.max_over_mean(whole)[0, 0] == 2.0 and st.dead_experts(whole)[0, 0] == 1.0
    assert whole.tokens.tolist() == [12]


def test_overlap_by_hand_and_ties_go_to_the_lower_id():
    # Quarters of two: {0, 1}, {1, 7}, and a tie between 2, 3 and 4 of which the two lowest ids are taken.
    counts = table([[9, 8, 1, 1, 1, 1, 1, 1], [1, 9, 1, 1, 1, 1, 1, 8], [0, 0, 5, 5, 5, 0, 0, 0]])
    quarter = st.most_used_quarter(counts)[:, 0]
    assert [np.flatnonzero(row).tolist() for row in quarter] == [[0, 1], [1, 7], [2, 3]]
    iou = st.quarter_iou(counts)[0]
    assert iou[0, 1] == pytest.approx(1 / 3) and iou[0, 2] == 0.0 and np.diag(iou).tolist() == [1.0] * 3


def test_unused_experts_are_in_no_quarter():
    counts = table([[0] * 10 + [4] + [0] * 5, [0] * 15 + [4]])
    assert st.most_used_quarter(counts).sum() == 2
    assert st.quarter_iou(counts)[0, 0, 1] == 0.0


def test_many_equal_experts_give_the_lowest_ids():
    rng = np.random.default_rng(0)
    use = rng.integers(1, 3, 256)  # ones and twos, far more twos than the quarter holds
    quarter = np.flatnonzero(st.most_used_quarter(table([use.tolist()]))[0, 0])
    assert quarter.tolist() == np.flatnonzero(use == 2)[:64].tolist()


def test_quarter_rounds_up():
    assert st.most_used_quarter(table([[5, 4, 3, 2, 1]])).sum() == 2


def test_chance_by_hand_by_simulation_and_in_the_limit():
    assert st.chance_iou(1) == 1.0
    assert st.chance_iou(4) == pytest.approx(1 / 4)
    assert st.chance_iou(8) == pytest.approx(5 / 28)
    assert st.chance_iou(4000) == pytest.approx(1 / 7, abs=1e-3)
    rng, values = np.random.default_rng(0), []
    for _ in range(4000):
        first, second = (set(rng.permutation(18)[:5]) for _ in range(2))
        values.append(len(first & second) / len(first | second))
    assert st.chance_iou(18) == pytest.approx(np.mean(values), abs=0.01)


def test_tasks_served_counts_experts_at_or_above_their_fair_share():
    counts = table([[6, 2, 0, 0], [4, 4, 0, 0]])
    # fair share 25 %: expert 0 serves both (75, 50), expert 1 both (25, 50), the others none
    assert st.tasks_served(counts).tolist() == [[2, 0, 2]]


def test_a_task_without_tokens_has_no_numbers():
    counts = table([[4, 4, 0, 0], [0, 0, 0, 0]])
    for values in (
        st.specialization(counts),
        st.normalized_entropy(counts),
        st.max_over_mean(counts),
        st.dead_experts(counts),
    ):
        assert np.isfinite(values[0]).all() and np.isnan(values[1]).all()
    iou = st.quarter_iou(counts)[0]
    assert iou[0, 0] == 1.0 and np.isnan(iou[0, 1]) and np.isnan(iou[1, 0]) and np.isnan(iou[1, 1])


@pytest.mark.parametrize("counts", [table([[5]]), table([[6, 6, 6]], k=3)], ids=["one expert", "k = N"])
def test_when_there_is_no_choice_the_routing_is_even(counts):
    assert st.normalized_entropy(counts)[0, 0] == pytest.approx(1.0)
    assert st.entropy_floor(counts)[0] == pytest.approx(1.0)
    assert st.max_over_mean(counts)[0, 0] == 1.0 and st.dead_experts(counts)[0, 0] == 0
    assert st.specialization(counts)[0, 0].tolist() == [100.0] * counts.header.num_experts


def test_experts_that_a_sub_model_may_not_choose_are_no_part_of_any_mean():
    masked = table([[3, 0, 3, 0, 0, 2, 0, 0]], kept=((0, 2, 4, 5),))
    plain = table([[3, 3, 0, 2]])
    for function in (
        st.normalized_entropy,
        st.max_over_mean,
        st.dead_experts,
        st.fair_share,
        st.chance_per_layer,
        st.tasks_served,
        st.entropy_floor,
    ):
        assert np.array_equal(function(masked), function(plain)), function.__name__
    assert np.isnan(st.specialization(masked)[0, 0, 1]) and st.specialization(masked)[0, 0, 4] == 0.0
    assert np.flatnonzero(st.most_used_quarter(masked)[0, 0]).tolist() == [0]


def test_audio_rows_are_added_up_and_keep_their_place():
    counts = table([[1, 0], [2, 0], [0, 3], [4, 0]])
    named = replace(counts, task_names=("audio_understanding", "text", "audio_generation", "image_generation"))
    merged = st.paper_rows(named)
    assert merged.task_names == ("audio", "text", "image_generation")
    assert merged.counts[0, 0].tolist() == [1, 3] and merged.tokens.tolist() == [4, 2, 4]
    alone = replace(named, task_names=("audio_understanding", "text", "x", "y"))
    assert st.paper_rows(alone) is alone


def test_shown_layers():
    assert st.shown_layers(1) == [(0, "first")]
    assert st.shown_layers(2) == [(0, "first"), (1, "last")]
    assert st.shown_layers(3) == [(0, "first"), (1, "middle"), (2, "last")]
    assert st.shown_layers(8) == [(0, "first"), (3, "middle"), (7, "last")]


@settings(max_examples=40, deadline=None)
@given(some.integers(1, 24), some.integers(1, 4), some.integers(0, 30), some.integers(0, 10_000))
def test_bounds_hold_for_any_routing(experts, layers, tokens, seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, experts + 1))
    picks = rng.random((3, layers, tokens, experts)).argsort(-1) < k
    header = TraceHeader("m", "s", experts, k, tuple(range(layers)))
    counts = RoutingCounts(picks.sum(2), np.full(3, tokens), ("a", "b", "c"), header)
    if tokens == 0:
        assert np.isnan(st.normalized_entropy(counts)).all()
        return
    entropy, iou = st.normalized_entropy(counts), st.quarter_iou(counts)
    assert (entropy >= st.entropy_floor(counts) - 1e-9).all() and (entropy <= 1).all()
    assert np.allclose(st.specialization(counts).mean(-1), st.fair_share(counts))
    assert np.array_equal(iou, iou.transpose(0, 2, 1)) and (iou[:, range(3), range(3)] == 1).all()
    assert (iou >= 0).all() and (iou <= 1).all()
    assert (st.max_over_mean(counts) >= 1 - 1e-12).all() and (st.max_over_mean(counts) <= experts / k + 1e-9).all()
    assert (st.tasks_served(counts).sum(-1) == experts).all()


def test_the_families_of_the_synthetic_trace_are_found(make_trace):
    counts = st.paper_rows(counts_from_trace(make_trace()))
    iou, entropy = st.quarter_iou(counts).mean(0), st.normalized_entropy(counts).mean(-1)
    row = {name: i for i, name in enumerate(counts.task_names)}
    assert iou[row["image_generation"], row["video_generation"]] > 0.7
    assert iou[row["image_understanding"], row["image_generation"]] < 0.1
    assert entropy.argmax() == row["text"] and entropy.argmin() == row["video_generation"]


def test_a_comparison_by_hand():
    here, there = table([[6, 2, 0, 0], [0, 0, 0, 0]]), table([[2, 2, 2, 2], [1, 0, 0, 0]])
    result = st.compare_counts(here, there)
    assert result.frequency[0, 0].tolist() == [50.0, 0.0, -25.0, -25.0] and np.isnan(result.frequency[1]).all()
    assert result.distance[0, 0] == 0.5 and result.same_quarter[0, 0] == 1.0
    assert result.entropy[0, 0] == pytest.approx(-1 + st.normalized_entropy(here)[0, 0])
    same = st.compare_counts(there, there)
    assert not np.nan_to_num(same.frequency).any() and same.distance[:, 0].tolist() == [0.0, 0.0]


def test_a_cut_model_is_compared_on_the_layers_and_tasks_that_both_have(make_trace):
    parent = counts_from_trace(make_trace(experts=8, layers=4, tokens=50))
    child = counts_from_trace(make_trace(experts=4, layers=2, tokens=50, names=("text", "image_understanding")))
    with pytest.raises(ConfigError, match="8 experts in 'synthetic', 4 in 'synthetic'"):
        st.compare_counts(parent, child)
    wide = in_parent_numbering(child, [(0, 1, 2, 3), (4, 5, 6, 7)], 8, layers=(1, 3))
    result = st.compare_counts(wide, parent)
    assert result.layers == (1, 3) and result.task_names == ("text", "image_understanding")
    assert np.allclose(result.frequency[0, 0, 4:], -st.specialization(parent)[0, 1, 4:])
    with pytest.raises(ConfigError, match="nothing in common"):
        st.compare_counts(replace(wide, task_names=("x", "y")), parent)

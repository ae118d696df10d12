"""The sampler draws each axis as often as it says, independently of the others and anew at every step."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import pytest

from ernie_elastic.elastic.sampler import sample_spec, sample_specs
from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling import ErnieElasticConfig
from ernie_elastic.schema import SubModelSpec

STEPS = 20_000
# paper: section 4.1, shares of the steps that leave an axis full.
SHARES = {"depth": 0.75, "width": 0.80, "sparsity": 0.80}
CONFIG = ErnieElasticConfig(
    num_hidden_layers=8, num_experts=8, num_experts_per_tok=3, audio_num_levels=3, audio_head_layers=[2, 5, 7]
)


@cache
def specs(seed: int = 0, policy: str = "random", steps: int = STEPS) -> list[SubModelSpec]:
    elastic = ElasticConfig(layer_policy=policy, expert_shares=(0.5, 0.75))
    return [sample_spec(elastic, CONFIG, seed, step) for step in range(steps)]


def full_axes(spec: SubModelSpec) -> dict[str, bool]:
    assert len({len(experts) for experts in spec.experts_per_layer}) == 1
    return {
        "depth": len(spec.layers) == CONFIG.num_hidden_layers,
        "width": len(spec.experts_per_layer[0]) == CONFIG.num_experts,
        "sparsity": spec.top_k == CONFIG.num_experts_per_tok,
    }


@cache
def axes(seed: int = 0) -> list[dict[str, bool]]:
    return [full_axes(spec) for spec in specs(seed)]


def assert_share(hits: int, share: float, trials: int = STEPS) -> None:
    """Two-sided binomial test by normal approximation: within 4 standard deviations."""
    bound = 4 * math.sqrt(trials * share * (1 - share))
    assert abs(hits - trials * share) <= bound, f"{hits} of {trials}, expected {trials * share:.0f} +- {bound:.0f}"


def test_the_bound_tells_shares_that_are_two_percent_points_apart():
    for share in SHARES.values():
        with pytest.raises(AssertionError):
            assert_share(round(STEPS * (share - 0.02)), share)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("axis", SHARES)
def test_each_axis_is_full_as_often_as_the_report_says(axis, seed):
    assert getattr(ElasticConfig(), f"full_{axis}") == SHARES[axis]
    assert_share(sum(full[axis] for full in axes(seed)), SHARES[axis])


@pytest.mark.parametrize("pattern", list(itertools.product([True, False], repeat=3)))
def test_the_axes_are_independent(pattern):
    """Every combination comes as often as the product of its shares; all full: 48 % of the steps."""
    expected = 1.0
    for share, full in zip(SHARES.values(), pattern, strict=True):
        expected *= share if full else 1 - share
    if all(pattern):
        assert expected == pytest.approx(0.48)
    assert_share(sum(tuple(full.values()) == pattern for full in axes()), expected)


def test_an_axis_says_nothing_of_the_same_axis_a_step_later():
    for axis, share in SHARES.items():
        full = [step[axis] for step in axes()]
        both = sum(now and later for now, later in zip(full[::2], full[1::2], strict=True))
        assert_share(both, share**2, STEPS // 2)


def test_smaller_sizes_are_drawn_evenly():
    shrunk = {"depth": [], "width": [], "sparsity": []}
    for spec, full in zip(specs(), axes(), strict=True):
        if not full["depth"]:
            shrunk["depth"].append(len(spec.layers))
        if not full["width"]:
            shrunk["width"].append(len(spec.experts_per_layer[0]))
        if not full["sparsity"]:
            shrunk["sparsity"].append(spec.top_k)
    for axis, sizes in (("depth", [4, 5, 6, 7]), ("width", [4, 6]), ("sparsity", [1, 2])):
        assert set(shrunk[axis]) == set(sizes)
        for size in sizes:
            assert_share(shrunk[axis].count(size), 1 / len(sizes), len(shrunk[axis]))


@pytest.mark.parametrize("policy", ["random", "prefix", "uniform"])
def test_layers_with_audio_heads_always_stay_and_every_spec_fits_the_model(policy):
    for spec in specs(0, policy, 2000):
        assert {2, 5, 7} <= set(spec.layers)
        assert list(spec.layers) == sorted(set(spec.layers)) and len(spec.layers) >= 4
        assert len(spec.experts_per_layer[0]) >= spec.top_k
        CONFIG.check_spec(spec)


def test_random_layers_and_experts_are_dropped_equally_often():
    shallow = [spec for spec in specs() if len(spec.layers) == 6]
    for layer in (0, 1, 3, 4, 6):
        assert_share(sum(layer in spec.layers for spec in shallow), 3 / 5, len(shallow))
    narrow = [spec for spec in specs() if len(spec.experts_per_layer[0]) == 4]
    for slot in (0, 3):
        for expert in range(8):
            assert_share(sum(expert in spec.experts_per_layer[slot] for spec in narrow), 1 / 2, len(narrow))
    assert any(len(set(spec.experts_per_layer)) > 1 for spec in narrow), "layers draw their experts apart"


def test_a_step_gives_the_same_spec_whenever_it_is_asked_and_others_for_other_seeds():
    assert [sample_spec(ElasticConfig(expert_shares=(0.5, 0.75)), CONFIG, 0, step) for step in (7, 3, 7)] == [
        specs()[7],
        specs()[3],
        specs()[7],
    ]
    both_not_full = [(a, b) for a, b in zip(specs(0), specs(1), strict=True) if CONFIG.full_spec() not in (a, b)]
    assert len(both_not_full) > 5000 and sum(a == b for a, b in both_not_full) < 0.05 * len(both_not_full)


def test_the_first_share_of_a_run_and_a_disabled_sampler_are_full():
    full = CONFIG.full_spec()
    late = ElasticConfig(start_share=0.25)
    assert all(sample_spec(late, CONFIG, 0, step, 400) == full for step in range(100))
    assert any(sample_spec(late, CONFIG, 0, step, 400) != full for step in range(100, 120))
    assert all(sample_spec(ElasticConfig(enabled=False), CONFIG, 0, step) == full for step in range(100))


def test_micro_batches_may_have_specs_of_their_own_the_same_on_every_rank():
    elastic = ElasticConfig(per_micro_batch=True)
    drawn = [sample_specs(elastic, CONFIG, 3, step, 0, 4) for step in range(400)]
    assert drawn == [sample_specs(elastic, CONFIG, 3, step, 0, 4) for step in range(400)]
    assert sum(len(set(specs)) > 1 for specs in drawn) > 300
    flat = [spec for specs in drawn for spec in specs]
    share = sum(len(spec.layers) == CONFIG.num_hidden_layers for spec in flat) / len(flat)
    assert share == pytest.approx(0.75, abs=0.04), "each micro-batch follows the distribution of steps"
    one = [sample_specs(ElasticConfig(), CONFIG, 3, step, 0, 4) for step in range(50)]
    assert one == [[sample_spec(ElasticConfig(), CONFIG, 3, step)] * 4 for step in range(50)]


def test_each_layer_may_draw_its_own_top_k():
    elastic = ElasticConfig(per_layer_top_k=True, expert_shares=(0.25, 0.75))
    drawn = [sample_spec(elastic, CONFIG, 0, step) for step in range(4000)]
    for spec in drawn:
        CONFIG.check_spec(spec)
    # One of 3**L sub-models of a shrunk step happens to be the full one: too few to see.
    assert_share(sum(set(spec.top_ks) == {3} for spec in drawn), SHARES["sparsity"], 4000)
    shrunk = [spec.top_ks for spec in drawn if set(spec.top_ks) != {3}]
    numbers = [k for ks in shrunk for k in ks]
    for k in (1, 2, 3):
        assert_share(numbers.count(k), 1 / 3, len(numbers))
    pairs = [ks[:2] for ks in shrunk]
    assert_share(sum(a == b for a, b in pairs), 1 / 3, len(pairs))
    plain = [sample_spec(dataclasses.replace(elastic, per_layer_top_k=False), CONFIG, 0, step) for step in range(4000)]
    assert all(spec.top_k_per_layer is None for spec in plain)


def test_a_sandwich_is_the_full_model_the_smallest_and_random_ones():
    elastic, full = ElasticConfig(sandwich=True, min_depth=0.5, expert_shares=(0.5, 0.75)), CONFIG.full_spec()
    for step in range(100):
        first, second, *rest = sample_specs(elastic, CONFIG, 0, step, 0, 4)
        assert first == full and len(rest) == 2
        assert second.top_k == 1 and second.num_experts == round(0.5 * CONFIG.num_experts)
        assert len(second.layers) == min(len(spec.layers) for spec in (first, second, *rest))
        for spec in rest:
            assert spec.top_k <= full.top_k and len(spec.layers) < len(full.layers)
    with pytest.raises(ConfigError, match="a sandwich needs at least 2 micro-batches in a step, it has 1"):
        sample_specs(elastic, CONFIG, 0, 0, 0, 1)
    late = dataclasses.replace(elastic, start_share=0.5)
    assert sample_specs(late, CONFIG, 0, 4, 10, 2) == [full] * 2, "the full model alone comes first"
    with pytest.raises(ConfigError, match="switch one off"):
        ElasticConfig(per_micro_batch=True, sandwich=True)

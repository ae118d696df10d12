"""AHRL: hints shrink with time and with the pass rate, and never train."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.rl.hints import HintConfig, add_hint, hint_share, loss_mask

CONFIGS = st.builds(HintConfig, *[st.floats(0, 1)] * 2, *[st.floats(0, 1)] * 2)


@given(CONFIGS, st.lists(st.integers(0, 10_000), min_size=2, max_size=5), st.floats(0, 1))
def test_share_never_grows_with_time(config, steps, pass_initial):
    shares = [hint_share(step, pass_initial, config) for step in sorted(steps)]
    assert shares == sorted(shares, reverse=True) and all(0 <= share <= config.p_initial for share in shares)


@given(CONFIGS, st.integers(0, 10_000), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_share_never_grows_with_the_pass_rate(config, step, rates):
    shares = [hint_share(step, rate, config) for rate in sorted(rates)]
    assert shares == sorted(shares, reverse=True)


def test_share_is_the_papers_formula_with_a_floor_and_a_ceiling():
    config = HintConfig(p_initial=0.5, gamma=0.02, pass_floor=0.02, max_pass=0.25)
    assert hint_share(0, 0.1, config) == 0.5
    assert hint_share(100, 0.1, config) == pytest.approx(0.5 * math.exp(-0.2), rel=1e-12)
    assert hint_share(100, 0.2, config) < hint_share(100, 0.1, config) < hint_share(50, 0.1, config)
    assert hint_share(100, 0.0, config) == hint_share(100, 0.02, config) < 0.5, "unsolved queries lose theirs too"
    assert hint_share(0, 0.25, config) == 0.0, "queries that the model solves get no hint"
    assert hint_share(10_000, 0.0, HintConfig(pass_floor=0.0)) == 0.5, "the formula as printed never lets go"


@given(st.lists(st.integers(0, 99), max_size=30), st.lists(st.integers(100, 199), max_size=50), st.floats(0, 1))
def test_hint_is_the_first_share_of_the_thinking_and_carries_no_loss(prompt, think, share):
    hinted = add_hint(prompt, think, share)
    assert list(hinted.token_ids) == prompt + think[: hinted.hint_length]
    assert share * len(think) - 1 < hinted.hint_length <= share * len(think) + 1e-6
    mask_T = loss_mask(hinted, answer_length=4)
    assert mask_T.tolist() == [False] * (len(prompt) + hinted.hint_length) + [True] * 4


@pytest.mark.parametrize(("share", "length"), [(0.0, 0), (0.29, 29), (0.5, 50), (0.999, 99), (1.0, 100)])
def test_hint_length_is_rounded_down_without_float_dust(share, length):
    assert add_hint([1, 2], range(100), share).hint_length == length


def test_values_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"p_initial 1\.5 must lie in 0\.\.1"):
        HintConfig(p_initial=1.5)
    with pytest.raises(ConfigError, match="gamma nan"):
        HintConfig(gamma=math.nan)
    with pytest.raises(ConfigError, match="step -1"):
        hint_share(-1, 0.1, HintConfig())
    with pytest.raises(DataError, match=r"pass_initial 1\.1"):
        hint_share(0, 1.1, HintConfig())
    with pytest.raises(DataError, match="share nan"):
        add_hint([1], [2], math.nan)
    with pytest.raises(DataError, match="answer_length -1"):
        loss_mask(add_hint([1], [], 0.0), -1)

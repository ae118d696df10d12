"""The objective against formulas written out answer by answer; limits, masks, and ratios that overflow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.rl.objective import (
    ObjectiveConfig,
    WpsmConfig,
    group_advantages,
    mean_over_tokens,
    policy_loss,
    trust_mask,
    well_learned_scale,
)

OPEN = {"alpha": 0.0, "beta": math.inf}
LEVELS = [("token", "token"), ("sequence", "sequence"), ("sequence", "token"), ("sequence", "none"), ("token", "none")]
CONFIGS = [
    ObjectiveConfig(ratio_level=ratio, mask_level=mask, reading=reading)
    for (ratio, mask), reading in itertools.product(LEVELS, ("gspo_token", "mean"))
]


def random_group(seed=0, drift=0.02, engine_drift=0.3, dtype=torch.float64):
    """Log-probs under the three policies [3, 6], lengths 6, 4 and 1, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(3, 6, generator=generator, dtype=dtype) * 3
    new = old + drift * torch.randn(3, 6, generator=generator, dtype=dtype)
    rollout = old + engine_drift * torch.randn(3, 6, generator=generator, dtype=dtype)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    return new.requires_grad_(), old, rollout, torch.tensor([1.0, -0.7, 0.4], dtype=dtype), mask


def written_out(new, old, rollout, advantages, mask, config):
    """Eq. 1 to 3, one answer and one token after the other, in plain exponentials."""
    total = 0.0
    for i, length in enumerate(mask.sum(-1).tolist()):
        log_r, log_k = (new - old)[i, :length], (old - rollout)[i, :length]
        s, answer = log_r.mean().exp(), 0.0
        for j in range(length):
            k = (
                1.0
                if config.mask_level == "none"
                else (log_k[j] if config.mask_level == "token" else log_k.mean()).exp()
            )
            r = log_r[j].exp()
            if config.ratio_level == "sequence":
                r = s if config.reading == "mean" else s.detach() * (new[i, j] - new[i, j].detach()).exp()
            clipped = min(max(r, 1 - config.epsilon_low), 1 + config.epsilon_high)
            answer += (k if config.alpha <= k <= config.beta else 0.0) * min(r * advantages[i], clipped * advantages[i])
        total += answer / length
    return -total / len(advantages)


def gradient(loss, new):
    return torch.autograd.grad(loss, new)[0]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_formulas_written_out(config, seed):
    group = random_group(seed, drift=4e-4 if seed % 2 else 0.02, engine_drift=1.0)
    loss, expected = policy_loss(*group, config).loss, written_out(*group, config)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(loss, group[0]), gradient(expected, group[0]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reading", ["gspo_token", "mean"])
@given(seed=st.integers(0, 10**6), drift=st.sampled_from([0.0, 1e-4, 1e-3, 0.1]))
def test_open_band_and_equal_engines_reduce_misc_to_gspo(reading, seed, drift):
    new, old, _, advantages, mask = random_group(seed, drift)
    misc = policy_loss(new, old, old, advantages, mask, ObjectiveConfig(reading=reading, **OPEN)).loss
    s = torch.stack([(new - old)[i, :length].mean().exp() for i, length in enumerate(mask.sum(-1).tolist())])
    gspo = -torch.minimum(s * advantages, s.clamp(1 - 3e-4, 1 + 4e-4) * advantages).mean()
    torch.testing.assert_close(misc, gspo, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(misc, new), gradient(gspo, new), rtol=1e-10, atol=1e-13)


def test_a_rejected_token_has_exactly_zero_gradient_and_the_others_do_not():
    new, old, _, advantages, mask = random_group(drift=0.0)
    rollout = old.clone()
    rollout[0, 2], rollout[1, 1] = old[0, 2] - math.log(5.01), old[1, 1] - math.log(0.49)
    rejected = torch.zeros_like(mask)
    rejected[0, 2] = rejected[1, 1] = True
    result = policy_loss(new, old, rollout, advantages, mask, ObjectiveConfig())
    grad = gradient(result.loss, new)
    assert (grad[rejected | ~mask] == 0).all() and (grad[mask & ~rejected] != 0).all()
    assert result.rejected_share == 2 / 11
    mean = policy_loss(new, old, rollout, advantages, mask, ObjectiveConfig(reading="mean"))
    assert (gradient(mean.loss, new)[mask] != 0).all(), "the mean reading only rescales the answer"


def test_trust_mask_is_detached_and_its_band_is_closed():
    old = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    low, high = math.log(0.5), math.log(5.0)
    log_k = old + torch.tensor([[low, high, low - 1e-9, high + 1e-9]], dtype=torch.float64)
    trust = trust_mask(log_k, torch.ones(1, 4, dtype=torch.bool), ObjectiveConfig())
    torch.testing.assert_close(trust, torch.tensor([[0.5, 5.0, 0.0, 0.0]], dtype=torch.float64))
    assert not trust.requires_grad
    new, old, rollout, advantages, mask = random_group()
    old, rollout, advantages = (x.clone().requires_grad_() for x in (old, rollout, advantages))
    policy_loss(new, old, rollout, advantages, mask, ObjectiveConfig()).loss.backward()
    assert new.grad is not None and old.grad is rollout.grad is advantages.grad is None


def test_sequence_mask_takes_or_leaves_whole_answers():
    new, old, _, advantages, mask = random_group(drift=0.0)
    config = ObjectiveConfig(mask_level="sequence")
    rollout = old.clone()
    rollout[0, 0] -= 5.0  # mean log-ratio 5/6: the answer stays
    rollout[1, 0] -= 9.0  # mean log-ratio 9/4: it goes
    grad = gradient(policy_loss(new, old, rollout, advantages, mask, config).loss, new)
    assert (grad[0] != 0).all() and (grad[1] == 0).all()


@pytest.mark.parametrize(
    "config", CONFIGS + [ObjectiveConfig(c.ratio_level, c.mask_level, c.reading, **OPEN) for c in CONFIGS], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_ratios_give_finite_losses_and_gradients(config, dtype):
    for new_shift, engine_shift in itertools.product((0.0, 1e4, -1e4), repeat=2):
        for answers in (slice(0, 1), slice(1, 2), slice(0, 3)):
            new, old, rollout, advantages, mask = random_group(dtype=torch.float32)
            new, rollout = new.detach().clone(), rollout.clone()
            new[answers] += new_shift
            rollout[answers, 0] += engine_shift
            new = new.to(dtype).requires_grad_()
            loss = policy_loss(new, old.to(dtype), rollout.to(dtype), advantages, mask, config).loss
            assert torch.isfinite(loss) and torch.isfinite(gradient(loss, new)).all(), (new_shift, engine_shift)


def test_padding_is_never_read_and_never_divides():
    new, old, rollout, advantages, mask = random_group()
    config = ObjectiveConfig()
    loss = policy_loss(new, old, rollout, advantages, mask, config).loss
    pad = lambda x, value: torch.cat([torch.where(mask, x.detach(), value), torch.full((3, 50), value)], 1)
    padded = pad(new, math.nan).double().requires_grad_()
    mask_2 = torch.cat([mask, torch.zeros(3, 50, dtype=torch.bool)], 1)
    same = policy_loss(padded, pad(old, -math.inf), pad(rollout, math.nan), advantages, mask_2, config).loss
    torch.testing.assert_close(same, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(same, padded)[:, :6], gradient(loss, new), rtol=1e-12, atol=0)
    assert (
        gradient(policy_loss(padded, pad(old, 0.0), pad(rollout, 0.0), advantages, mask_2, config).loss, padded)[
            ~mask_2
        ]
        == 0
    ).all()


def test_an_answer_without_tokens_counts_for_nothing():
    new, old, rollout, advantages, mask = random_group()
    two = policy_loss(new[:2], old[:2], rollout[:2], advantages[:2], mask[:2], ObjectiveConfig()).loss
    mask[2] = False
    torch.testing.assert_close(policy_loss(new, old, rollout, advantages, mask, ObjectiveConfig()).loss, two)


def test_sequence_ratio_is_a_mean_not_a_sum():
    old = torch.full((1, 100), -1.0)
    new = (old - 7e-5).requires_grad_()  # a sum would leave the clip range
    result = policy_loss(new, old, old, torch.tensor([-1.0]), torch.ones(1, 100, dtype=torch.bool), ObjectiveConfig())
    assert result.loss.item() == pytest.approx(math.exp(-7e-5), rel=1e-6) and result.clipped_share == 0


def test_bf16_log_probs_are_clipped_in_float32():
    old = torch.full((1, 8), -0.5, dtype=torch.bfloat16)
    new = torch.full((1, 8), -0.498046875, dtype=torch.bfloat16).requires_grad_()  # one BF16 step: ratio 1.00195
    result = policy_loss(new, old, old, torch.ones(1), torch.ones(1, 8, dtype=torch.bool), ObjectiveConfig())
    assert result.loss.item() == pytest.approx(-1.0004, rel=1e-6) and result.clipped_share == 1
    assert (gradient(result.loss, new) == 0).all()


def test_kept_mass_corrects_truncated_sampling():
    new, old, _, advantages, mask = random_group(drift=0.0)
    log_kept = torch.full_like(old, math.log(0.15))
    truncated = old - log_kept  # an engine that samples from the top 15 % reports larger probabilities
    config = ObjectiveConfig()
    plain = policy_loss(new, old, truncated, advantages, mask, config)
    fixed = policy_loss(new, old, truncated, advantages, mask, config, log_kept_mass_GT=log_kept)
    assert plain.rejected_share == 1 and fixed.rejected_share == 0
    torch.testing.assert_close(fixed.loss, policy_loss(new, old, old, advantages, mask, config).loss)


def test_wpsm_with_alpha_0_changes_nothing_and_with_1_drops():
    group = random_group(drift=0.0)
    advantages = group[3]
    accuracy, entropy = torch.tensor([0.95, 0.95, 0.95]), torch.tensor([0.05, 0.05, 0.5])
    none = well_learned_scale(accuracy, entropy, advantages, WpsmConfig(alpha=0.0))
    assert none.tolist() == [1.0, 1.0, 1.0]
    plain = policy_loss(*group, ObjectiveConfig()).loss
    same = policy_loss(*group, ObjectiveConfig(), scale_G=none).loss
    assert torch.equal(plain, same) and torch.equal(gradient(plain, group[0]), gradient(same, group[0]))
    dropped = policy_loss(
        *group, ObjectiveConfig(), scale_G=well_learned_scale(accuracy, entropy, advantages, WpsmConfig())
    )
    grad = gradient(dropped.loss, group[0])
    assert (grad[0] == 0).all() and (grad[1][group[4][1]] != 0).all() and grad[2, 0] != 0


def test_wpsm_needs_success_low_entropy_and_a_positive_advantage():
    accuracy, entropy = torch.tensor([0.95, 0.9, 0.95, 0.95]), torch.tensor([0.05, 0.05, 0.1, 0.05])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0])
    scale = lambda **kwargs: well_learned_scale(
        accuracy, entropy, advantages, WpsmConfig(alpha=0.25, **kwargs)
    ).tolist()
    assert scale() == [0.75, 1.0, 1.0, 1.0]
    assert scale(positive_only=False) == [0.75, 1.0, 1.0, 0.75]


@given(st.floats(-1e3, 1e3, width=32), st.integers(1, 9))
def test_equal_rewards_give_zero_advantages(reward, answers):
    assert group_advantages(torch.full((answers,), reward)).tolist() == [0.0] * answers


@given(st.lists(st.integers(0, 4), min_size=2, max_size=9).filter(lambda rewards: len(set(rewards)) > 1))
def test_advantages_are_centered_scaled_and_keep_the_order(rewards):
    advantages = group_advantages(torch.tensor(rewards))
    assert abs(advantages.mean().item()) < 1e-6
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert advantages.argsort(stable=True).tolist() == torch.tensor(rewards).argsort(stable=True).tolist()
    centered = group_advantages(torch.tensor(rewards), normalize_std=False)
    torch.testing.assert_close(centered, torch.tensor(rewards).float() - sum(rewards) / len(rewards))


def test_mean_over_tokens_divides_by_the_tokens_of_the_answer():
    values, mask = torch.tensor([[1.0, 3.0, math.nan], [5.0, 5.0, 5.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    assert mean_over_tokens(values, mask).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 2.0, "beta": 1.0}, "alpha 2.0 and rl.beta 1.0"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"epsilon_high": -1.0}, "epsilon_high -1.0"),
        ({"max_log_ratio": 90.0}, "max_log_ratio 90.0"),
    ],
)
def test_configs_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**arguments)


def test_wrong_shapes_and_rewards_are_refused():
    new, old, rollout, advantages, mask = random_group()
    with pytest.raises(DataError, match=r"shapes differ: .*old \[3, 5\]"):
        policy_loss(new, old[:, :5], rollout, advantages, mask, ObjectiveConfig())
    with pytest.raises(DataError, match=r"advantages \[2\]"):
        policy_loss(new, old, rollout, advantages[:2], mask, ObjectiveConfig())
    with pytest.raises(DataError, match=r"scale \[1\]"):
        policy_loss(new, old, rollout, advantages, mask, ObjectiveConfig(), scale_G=torch.ones(1))
    with pytest.raises(DataError, match="must be finite"):
        group_advantages(torch.tensor([1.0, math.nan]))
    with pytest.raises(ConfigError, match=r"tau 1\.5"):
        WpsmConfig(tau=1.5)

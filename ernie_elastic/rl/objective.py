"""The RL objective: group advantages, GRPO/GSPO surrogates, IcePop and MISC trust masks, WPSM.

Three policies give a log-prob to each sampled token: theta (being trained), theta_old (the trainer at the start of the
iteration) and the rollout engine. theta / theta_old is the importance ratio that is clipped; theta_old / rollout is the
engine ratio, which differs from 1 by numerics, routing and, in U-RB, by the versions that an answer spans.

Letters: G answers (of one group, or of several groups of one size, stacked), T tokens. All arithmetic is at least
float32, since the clip range of 3e-4 is lost in BF16. paper: sections 6.2 and 6.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ernie_elastic.errors import ConfigError, DataError


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which surrogate and which trust mask; the defaults are MISC (paper: Eq. 3). Raises ConfigError when out of range.

    ratio_level: "sequence" is GSPO, "token" is GRPO. mask_level: on which ratio M is taken, "none" switches it off;
    levels ("token", "token") are Eq. 1, ("sequence", "sequence") Eq. 2, ("sequence", "token") Eq. 3. reading, of the
    free index j in Eq. 3: "gspo_token" gives each token its own gradient, so that a rejected one gets none; "mean"
    scales the common surrogate of the answer by the mean of M.
    alpha, beta: band of accepted engine ratios (peer: IcePop). epsilon_low, epsilon_high: clip range (peer: GSPO).
    max_log_ratio: nats; ratios beyond it count as this value and give no gradient (ours: keeps losses finite).
    The report sets the band by modality and gives no numbers: give each group the config of its modality.
    """

    ratio_level: Literal["token", "sequence"] = "sequence"
    mask_level: Literal["none", "token", "sequence"] = "token"
    reading: Literal["gspo_token", "mean"] = "gspo_token"
    alpha: float = 0.5
    beta: float = 5.0
    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4
    max_log_ratio: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= self.beta:
            raise ConfigError(f"rl.alpha {self.alpha} and rl.beta {self.beta} must obey 0 <= alpha <= beta")
        if not 0.0 <= self.epsilon_low <= 1.0 or not self.epsilon_high >= 0.0:
            raise ConfigError(
                f"rl.epsilon_low {self.epsilon_low} must lie in 0..1 and rl.epsilon_high {self.epsilon_high} be >= 0"
            )
        if not 0.0 < self.max_log_ratio <= 40.0:
            raise ConfigError(f"rl.max_log_ratio {self.max_log_ratio} must lie in (0, 40], else float32 overflows")


@dataclass(frozen=True)
class WpsmConfig:
    """When an answer counts as well learned, and how much of its loss goes. Raises ConfigError when out of range.

    alpha: share of the loss that goes (1 drops it, 0 changes nothing). tau: success rate of the query above which, and
    eta: mean policy entropy, nats a token, below which. positive_only: only answers with a positive advantage, as the
    name and the prose say; False is Eq. 4 as printed. paper: section 6.3, without numbers; the values are ours.
    """

    alpha: float = 1.0
    tau: float = 0.9
    eta: float = 0.1
    positive_only: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha", "tau"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"rl.wpsm.{name} {getattr(self, name)} must lie in 0..1")
        if not self.eta >= 0.0:
            raise ConfigError(f"rl.wpsm.eta {self.eta} must be at least 0 nats a token")


@dataclass(frozen=True)
class PolicyLoss:
    """loss: scalar, to minimise. The rest is for metrics, detached scalars: shares of the tokens in 0..1.

    rejected_share: tokens with M = 0. clipped_share: tokens whose surrogate took the clipped branch.
    """

    loss: torch.Tensor
    rejected_share: torch.Tensor
    clipped_share: torch.Tensor


def group_advantages(rewards_G: torch.Tensor, normalize_std: bool = True, eps: float = 1e-6) -> torch.Tensor:
    """Rewards [G] of one group's answers -> float advantages [G]: reward - mean, over the standard deviation.

    Equal rewards give exact zeros (rounding of the mean must not be blown up by a tiny deviation). Raises DataError
    unless rewards are finite and of shape [G], G >= 1. paper: section 6.2 (GRPO); ours: deviation over G, not G - 1.
    """
    if rewards_G.ndim != 1 or not rewards_G.numel() or not bool(torch.isfinite(rewards_G).all()):
        raise DataError(
            f"rl: rewards of shape {list(rewards_G.shape)} must be finite, one for each answer of one group; check the "
            "verifier"
        )
    rewards_G = _at_least_float32(rewards_G)
    if rewards_G.min() == rewards_G.max():
        return torch.zeros_like(rewards_G)
    centered_G = rewards_G - rewards_G.mean()
    return centered_G / (rewards_G.std(correction=0) + eps) if normalize_std else centered_G


def mean_over_tokens(values_GT: torch.Tensor, mask_GT: torch.Tensor) -> torch.Tensor:
    """Mean of values [G, T] over the tokens of each answer (mask True) -> [G]; 0 for an answer without tokens.

    ours: divides by the answer's own number of tokens, never by the padded length, which would shrink short answers.
    """
    return torch.where(mask_GT, values_GT, 0.0).sum(-1) / mask_GT.sum(-1).clamp(min=1)


def importance_ratio(log_ratio_GT: torch.Tensor, mask_GT: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """log(theta / theta_old) [G, T] -> the ratio of each token [G, T], in the same dtype.

    Token level: its own. Sequence level: s = exp(mean log-ratio), the same for all tokens of an answer; in the
    "gspo_token" reading the value is s and the gradient is that of the token's own log-prob. paper: section 6.2.
    """
    if config.ratio_level == "token":
        log_s_GT = log_ratio_GT
    else:
        log_s_GT = mean_over_tokens(log_ratio_GT, mask_GT)[:, None].expand_as(log_ratio_GT)
        if config.reading == "gspo_token":
            log_s_GT = log_s_GT.detach() + (log_ratio_GT - log_ratio_GT.detach())
    return log_s_GT.clamp(-config.max_log_ratio, config.max_log_ratio).exp()


def trust_mask(engine_log_ratio_GT: torch.Tensor, mask_GT: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """M [G, T] of log(theta_old / rollout) [G, T]: the ratio k where alpha <= k <= beta, else 0; detached.

    mask_level "sequence" takes k = exp(mean log-ratio) for the whole answer. The band is tested in log space, and a
    rejected ratio is replaced before exp, so that inf * 0 never arises. paper: section 6.2 (IcePop).
    """
    log_k_GT = engine_log_ratio_GT.detach()
    if config.mask_level == "none":
        return torch.ones_like(log_k_GT)
    if config.mask_level == "sequence":
        log_k_GT = mean_over_tokens(log_k_GT, mask_GT)[:, None].expand_as(log_k_GT)
    log_alpha = math.log(config.alpha) if config.alpha > 0 else -math.inf
    log_beta = math.log(config.beta) if config.beta > 0 else -math.inf
    accepted_GT = (log_k_GT >= log_alpha) & (log_k_GT <= log_beta)
    safe_GT = torch.where(accepted_GT, log_k_GT, 0.0).clamp(-config.max_log_ratio, config.max_log_ratio)
    return torch.where(accepted_GT, safe_GT.exp(), 0.0)


def well_learned_scale(
    accuracy_G: torch.Tensor, entropy_G: torch.Tensor, advantages_G: torch.Tensor, config: WpsmConfig
) -> torch.Tensor:
    """WPSM: factor [G] on the loss of each answer, 1 - alpha where it is well learned, else 1; detached.

    accuracy_G: success rate of each answer's query, in 0..1. entropy_G: mean policy entropy of each answer, nats a
    token (`mean_over_tokens`). advantages_G: as in `policy_loss`. Raises DataError when shapes differ. paper: Eq. 4.
    """
    _same_shape("WPSM", accuracy=accuracy_G, entropy=entropy_G, advantages=advantages_G)
    learned_G = (accuracy_G > config.tau) & (entropy_G < config.eta)
    if config.positive_only:
        learned_G = learned_G & (advantages_G > 0)
    return 1.0 - config.alpha * _at_least_float32(learned_G)


def policy_loss(
    log_probs_GT: torch.Tensor,
    old_log_probs_GT: torch.Tensor,
    rollout_log_probs_GT: torch.Tensor,
    advantages_G: torch.Tensor,
    mask_GT: torch.Tensor,
    config: ObjectiveConfig,
    scale_G: torch.Tensor | None = None,
    log_kept_mass_GT: torch.Tensor | None = None,
) -> PolicyLoss:
    """Minus the mean over answers and their tokens of M * min(r A, clip(r) A).

    Log-probs [G, T], nats, of the sampled tokens under theta (differentiated), theta_old and the rollout engine.
    mask_GT bool: tokens that train; what lies elsewhere, NaN too, is never read. An answer without such tokens counts
    for nothing. scale_G: from `well_learned_scale`; it does not change what the mean divides by. log_kept_mass_GT: log
    of the probability that top-p or top-k kept, when the engine's log-probs are of the truncated distribution.
    A rejected token still counts in its answer's length, as 1/|y| does in the paper. Raises DataError when shapes
    differ. paper: Eq. 1 to 4.
    """
    _same_shape("policy_loss", log_probs=log_probs_GT, old=old_log_probs_GT, rollout=rollout_log_probs_GT, mask=mask_GT)
    _same_shape("policy_loss", advantages=advantages_G, answers=mask_GT.any(-1))
    mask_GT = mask_GT.bool()
    new_GT, old_GT, rollout_GT = (
        torch.where(mask_GT, _at_least_float32(x_GT), 0.0)
        for x_GT in (log_probs_GT, old_log_probs_GT.detach(), rollout_log_probs_GT.detach())
    )
    if log_kept_mass_GT is not None:
        rollout_GT = rollout_GT + torch.where(mask_GT, log_kept_mass_GT.detach(), 0.0)
    ratio_GT = importance_ratio(new_GT - old_GT, mask_GT, config)
    trust_GT = trust_mask(old_GT - rollout_GT, mask_GT, config)
    advantages_G1 = advantages_G.detach()[:, None]
    plain_GT = ratio_GT * advantages_G1
    clipped_GT = ratio_GT.clamp(1.0 - config.epsilon_low, 1.0 + config.epsilon_high) * advantages_G1
    objective_G = mean_over_tokens(trust_GT * torch.minimum(plain_GT, clipped_GT), mask_GT)
    if scale_G is not None:
        _same_shape("policy_loss", scale=scale_G, advantages=advantages_G)
        objective_G = objective_G * scale_G.detach()
    answers = mask_GT.any(-1).sum().clamp(min=1)
    tokens = mask_GT.sum().clamp(min=1)
    return PolicyLoss(
        loss=-objective_G.sum() / answers,
        rejected_share=((trust_GT == 0) & mask_GT).sum() / tokens,
        clipped_share=((clipped_GT < plain_GT).detach() & mask_GT).sum() / tokens,
    )


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """BF16, half, integers and bool become float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same_shape(where: str, **tensors: torch.Tensor) -> None:
    """DataError unless all named tensors have one shape."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"rl: {where}: shapes differ: {listed}; give one row for each answer, padded to one length")

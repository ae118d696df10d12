"""AHRL: hard queries start from the first share of a reference's thinking; the share decays as training goes on.

Letter: T tokens. paper: section 6.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ernie_elastic.errors import ConfigError, DataError


@dataclass(frozen=True)
class HintConfig:
    """How long a hint is and how fast it goes. Raises ConfigError when out of range.

    p_initial: share of the think tokens at t = 0. gamma: decay a training step. pass_floor: lowest pass rate in the
    exponent (ours: with a pass rate of 0 the paper's hint never shrinks). max_pass: queries with this pass rate or more
    get no hint. paper: section 6.4, without numbers; the values are ours.
    """

    p_initial: float = 0.5
    gamma: float = 0.02
    pass_floor: float = 0.02
    max_pass: float = 0.25

    def __post_init__(self) -> None:
        for name in ("p_initial", "pass_floor", "max_pass"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"rl.hints.{name} {getattr(self, name)} must lie in 0..1")
        if not 0.0 <= self.gamma < math.inf:
            raise ConfigError(f"rl.hints.gamma {self.gamma} must be finite and at least 0")


@dataclass(frozen=True)
class HintedPrompt:
    """token_ids: the prompt and the hint after it. hint_length: tokens of the hint."""

    token_ids: tuple[int, ...]
    hint_length: int


def hint_share(step: int, pass_initial: float, config: HintConfig) -> float:
    """p_hint(x, t) = p_initial * exp(-gamma * t * pass_initial(x)), in 0..1; never grows with t nor with the pass rate.

    step: training step t, from 0. pass_initial: pass@k of the model after SFT, in 0..1, raised to pass_floor; at
    max_pass the share is 0. Evaluation never calls this: it is always without hints. Raises ConfigError for a negative
    step, DataError for a pass rate outside 0..1. paper: Eq. 5.
    """
    if step < 0:
        raise ConfigError(f"rl.hints: step {step} must be at least 0")
    if not 0.0 <= pass_initial <= 1.0:
        raise DataError(f"rl.hints: pass_initial {pass_initial} must lie in 0..1; give the share of solved attempts")
    if pass_initial >= config.max_pass:
        return 0.0
    return config.p_initial * math.exp(-config.gamma * step * max(pass_initial, config.pass_floor))


def add_hint(prompt_ids: Sequence[int], think_ids: Sequence[int], share: float) -> HintedPrompt:
    """The prompt, then the first `share` of the reference's think tokens, rounded down (the answer must add something).

    prompt_ids must end with the opened think block; think_ids has neither its opening nor its closing mark, so a hint
    never ends the thinking. Raises DataError for a share outside 0..1. paper: section 6.4 and Fig. 7.
    """
    if not 0.0 <= share <= 1.0:
        raise DataError(f"rl.hints: share {share} must lie in 0..1; take it from hint_share")
    length = math.floor(share * len(think_ids) + 1e-9)  # 0.29 * 100 is 28.99... in floats
    return HintedPrompt((*prompt_ids, *think_ids[:length]), length)


def loss_mask(hinted: HintedPrompt, answer_length: int) -> torch.Tensor:
    """Bool [T] over prompt, hint and answer: True on the answer alone, since no policy of ours sampled the hint.

    Raises DataError for a negative length. ours: the report does not say whether hint tokens train.
    """
    if answer_length < 0:
        raise DataError(f"rl.hints: answer_length {answer_length} must be at least 0")
    given = len(hinted.token_ids)
    return torch.arange(given + answer_length) >= given

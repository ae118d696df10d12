"""Stages of a run, and what holds at each step: pure functions of the configuration, so resuming anywhere is exact.

paper: the pre-training recipe. Stage 1 is WSD's warm-up and constant part, with a batch that grows early on, bias speed
1e-4 and MTP weight 0.3; mid-training is a cosine from the peak to a tenth of it with bias speed 1e-5 and MTP weight
0.1; the RoPE base stays at 1e6. The ramp's shape is silent; ours: linear in tokens, in multiples
of the first batch.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from ernie_elastic.errors import ConfigError


@dataclass(frozen=True)
class TrainingStage:
    """One stage of a run; values left at None are those of the training configuration.

    share: of the run's steps, or tokens: positions of the stage (rows times row length), exactly one of the two above
    0. kind "constant" or "cosine": the learning rate goes from start_ratio to end_ratio of the peak ("constant" holds
    start_ratio), behind a linear warm-up of warmup_steps. batch_start, batch_end: multiples of rows_per_step, reached
    over the first ramp_tokens positions of the stage. rope_theta: base of the rotary positions. bias_speed: of the
    balance bias. mtp_weight: of the multi-token loss.
    """

    name: str
    share: float = 0.0
    tokens: int = 0
    kind: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    start_ratio: float = 1.0
    end_ratio: float = 0.1
    batch_start: int = 1
    batch_end: int = 1
    ramp_tokens: int = 0
    rope_theta: float | None = None
    bias_speed: float | None = None
    mtp_weight: float | None = None

    def __post_init__(self) -> None:
        if (self.share > 0) == (self.tokens > 0) or self.share < 0 or self.tokens < 0:
            raise ConfigError(
                f"stage {self.name}: share {self.share} and tokens {self.tokens}: exactly one of them must be above 0"
            )
        if self.kind not in ("constant", "cosine"):
            raise ConfigError(f"stage {self.name}: kind {self.kind!r} is not one of constant, cosine")
        if min(self.start_ratio, self.end_ratio) < 0 or self.warmup_steps < 0 or self.ramp_tokens < 0:
            raise ConfigError(f"stage {self.name}: ratios, warmup_steps and ramp_tokens must be 0 or more")
        if min(self.batch_start, self.batch_end) < 1 or (self.ramp_tokens == 0 and self.batch_start != self.batch_end):
            raise ConfigError(
                f"stage {self.name}: batch_start {self.batch_start} and batch_end {self.batch_end} are multiples of "
                f"rows_per_step, at least 1, and equal unless ramp_tokens ({self.ramp_tokens}) is above 0"
            )

    def batch(self, tokens: int) -> int:
        """Multiple of rows_per_step for the step that begins after so many tokens of the stage."""
        if self.ramp_tokens == 0:
            return self.batch_end
        done = min(1.0, tokens / self.ramp_tokens)
        return math.floor(self.batch_start + (self.batch_end - self.batch_start) * done + 1e-9)

    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the peak learning rate at step `step` of the stage's `steps`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == "constant":
            return warm * self.start_ratio
        done = min(1.0, max(0.0, step / max(1, steps - 1)))
        return warm * (self.end_ratio + (self.start_ratio - self.end_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class StepPlan:
    """What holds at one optimizer step. units: the blocks of rows_per_step rows, numbered over the run, that it reads;
    lr_factor: of the peak learning rate. None: as the configuration says."""

    stage: str
    units: range
    lr_factor: float
    rope_theta: float | None = None
    bias_speed: float | None = None
    mtp_weight: float | None = None


class Curriculum:
    """The stages laid out over a run of `steps` steps whose first batch has tokens_per_unit positions.

    The last stage with a share takes what rounding leaves over. Raises ConfigError when shares exceed 1, when stages
    given in tokens need more steps than the run has, or when the stages end before the run.
    """

    def __init__(self, stages: tuple[TrainingStage, ...], steps: int, tokens_per_unit: int) -> None:
        self.stages, self.steps = stages, steps
        self._starts: list[int] = []
        self._units: list[int] = [0]
        start = 0
        for number, stage in enumerate(stages):
            self._starts.append(start)
            last = number == len(stages) - 1
            wanted = steps - start if last and stage.share else round(stage.share * steps)
            tokens = length = 0
            while length < wanted if stage.share else tokens < stage.tokens:
                batch = stage.batch(tokens)
                self._units.append(self._units[-1] + batch)
                tokens, length = tokens + batch * tokens_per_unit, length + 1
            start += length
        if stages and (start != steps or sum(stage.share for stage in stages) > 1 + 1e-9):
            raise ConfigError(
                f"training: the stages {', '.join(stage.name for stage in stages)} take {start} steps and shares of "
                f"{sum(stage.share for stage in stages):g}, the run has {steps} steps; change --training.steps, the "
                "shares or the tokens"
            )

    def first_unit(self, step: int) -> int:
        """The block of rows that a step begins with; at the run's end and beyond, one more than the last."""
        return self._units[min(step, len(self._units) - 1)]

    def at(self, step: int) -> StepPlan:
        """What holds at a step of 0..steps-1. Raises ConfigError without stages: the configuration holds then."""
        if not self.stages:
            raise ConfigError("training: a run without stages has no plan by stages")
        number = bisect.bisect_right(self._starts, step) - 1
        stage, begin = self.stages[number], self._starts[number]
        end = self._starts[number + 1] if number + 1 < len(self.stages) else self.steps
        return StepPlan(
            stage.name,
            range(self._units[step], self._units[step + 1]),
            stage.factor(step - begin, end - begin),
            stage.rope_theta,
            stage.bias_speed,
            stage.mtp_weight,
        )


def paper_stages(warmup_steps: int = 2000, ramp_tokens: int = 0, mid_share: float = 0.2) -> tuple[TrainingStage, ...]:
    """The report's two stages: warm-up and constant, then mid-training (paper: pre-training recipe).

    ramp_tokens: positions over which the batch grows fourfold (paper: 14 M to 56 M tokens, early on; the length is
    silent). mid_share: of the steps, ours.
    """
    return (
        TrainingStage(
            "stage-1", share=1 - mid_share, warmup_steps=warmup_steps, batch_end=4 if ramp_tokens else 1,
            ramp_tokens=ramp_tokens, rope_theta=1e6, bias_speed=1e-4, mtp_weight=0.3,
        ),
        TrainingStage(
            "mid-training", share=mid_share, kind="cosine", end_ratio=0.1, batch_start=4 if ramp_tokens else 1,
            batch_end=4 if ramp_tokens else 1, rope_theta=1e6, bias_speed=1e-5, mtp_weight=0.1,
        ),
    )  # fmt: skip

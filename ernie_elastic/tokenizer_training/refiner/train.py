"""Trains the refiner by flow matching, on pairs that are made inside the step.

Contract: a step is a function of (state, batch, seed, step, rank). paper: section 2.2 (trained apart from the backbone,
on low-resolution samples with controlled degradation). ours: the recipe. State at time t: (1 - t) sigma noise + t
residual; the loss is the squared error of the velocity, which is the endpoint's error divided by (1 - t)^2.

Shape letters: N pictures, F frames, H/W high-resolution pixels, h/w low-resolution pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ernie_elastic.data.media.degradation import DegradationConfig, degrade_batch, draw_level
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.modeling.refiner import Refiner, RefinerConfig, upsampled
from ernie_elastic.tokenizer_training.loop import average_gradients, step_generator
from ernie_elastic.tokenizer_training.losses.perceptual import PyramidDistance
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.training.ranks import device
from ernie_elastic.training.schedules import Schedule


@dataclass(frozen=True)
class RefinerTrainingConfig:
    """Budget and recipe of a refiner.

    steps: optimizer steps. batch_size: crops of a step, of all ranks. crop: high-resolution pixels of a crop's side.
    learning_rate: peak, after warmup_steps, then a cosine to min_ratio of it. weight_decay: AdamW's. gradient_limit:
    largest norm of the gradient. ema_decay: of the averaged weights, which are the result; early steps forget faster.
    time_mean, time_deviation: of the normal numbers whose logistic is the flow time. start_share: share of the crops
    at time 0, where the first Euler step does most of the work. time_floor: smallest 1 - t in the weight of the loss.
    perceptual_weight: of the pyramid distance between endpoint and picture; 0 = not computed. degradation: of the
    low-resolution side. tokenizer: directory of a visual tokenizer that codes it; then crop / factor is a size that it
    codes.
    """

    steps: int = 2000
    batch_size: int = 8
    crop: int = 64
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    min_ratio: float = 0.02
    weight_decay: float = 0.0
    gradient_limit: float = 1.0
    ema_decay: float = 0.995
    time_mean: float = -1.0
    time_deviation: float = 1.0
    start_share: float = 0.4
    time_floor: float = 0.25
    perceptual_weight: float = 5.0
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop"):
            if getattr(self, name) < 1:
                raise ConfigError(f"refiner training: {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "gradient_limit", "time_deviation"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"refiner training: {name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_steps", "weight_decay", "perceptual_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"refiner training: {name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("min_ratio", "start_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"refiner training: {name} is {getattr(self, name)}; it is a share in 0..1")
        if not 0 <= self.ema_decay < 1 or not 0 < self.time_floor <= 1:
            raise ConfigError(
                f"refiner training: ema_decay {self.ema_decay} must lie in [0, 1), time_floor "
                f"{self.time_floor} in (0, 1]"
            )


class RefinerTrainee:
    """What `run_loop` drives. `refiner` has the averaged weights; `network` is what the optimizer moves."""

    def __init__(self, config: RefinerConfig, training: RefinerTrainingConfig, seed: int = 0) -> None:
        """Raises ConfigError when the crop does not suit the factor, CheckpointError when the tokenizer is damaged."""
        if training.crop % config.factor:
            raise ConfigError(f"refiner training: crop {training.crop} is no multiple of the factor {config.factor}")
        self.config, self.training, self.seed = config, training, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the layers' own initialisation draws from the global generator
            self.network = Refiner(config).to(device())
        self.refiner = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.tokenizer = None
        if training.tokenizer is not None:
            self.tokenizer = VisualTokenizer.load(training.tokenizer).to(device()).requires_grad_(False)
        self.perceptual = PyramidDistance().to(device()) if training.perceptual_weight else None
        self.schedule = Schedule("cosine", training.warmup_steps, min_ratio=training.min_ratio)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=training.weight_decay
        )

    def step(self, batch: torch.Tensor, step: int) -> dict[str, float]:
        """One optimizer step on high-resolution crops uint8 [N, F, H, W, 3] (frames are pictures here).

        Returns loss (of the velocity, weighted by time), endpoint_error (mean squared, in units of residual_scale
        squared; bicubic_error is the same for an endpoint of 0), perceptual where it has a weight, gradient_norm and
        learning_rate. Raises DataError for another shape or dtype.
        """
        if batch.ndim != 5 or batch.shape[-1] != 3 or batch.dtype != torch.uint8 or not batch.numel():
            raise DataError(
                f"refiner training: a batch is {batch.dtype} {list(batch.shape)}; expected uint8 [N, F, H, W, 3]"
            )
        generator = step_generator(self.seed, step)
        losses = self._losses(batch.flatten(0, 1), generator)
        total = losses["loss"]
        if self.perceptual is not None:
            total = total + self.training.perceptual_weight * losses["perceptual"]
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(self.network.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.training.gradient_limit)
        rate = self.training.learning_rate * self.schedule.factor(step, self.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._average(step)
        metrics = {name: float(value.detach()) for name, value in losses.items()}
        return {**metrics, "gradient_norm": float(norm), "learning_rate": rate}

    def _losses(self, pixels_NHW3: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        training, config = self.training, self.config
        count = len(pixels_NHW3)
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        levels = [draw_level(training.degradation, seed, config.max_level) for seed in seeds]
        low_Nhw3 = degrade_batch(
            pixels_NHW3.cpu().numpy(), config.factor, training.degradation, seeds, levels, self.tokenizer
        )
        time_N = (training.time_mean + training.time_deviation * torch.randn(count, generator=generator)).sigmoid()
        time_N = torch.where(torch.rand(count, generator=generator) < training.start_share, 0.0, time_N).to(device())
        condition = upsampled(torch.from_numpy(low_Nhw3).to(device()), config.factor)
        true = pixels_NHW3.to(device()).movedim(-1, 1).float() / 127.5 - 1
        residual = (true - condition) / config.residual_scale
        noise = config.sigma * torch.randn(residual.shape, generator=generator).to(device())
        time = time_N.view(-1, 1, 1, 1)
        level_N = torch.tensor(levels, dtype=torch.float32, device=device())
        endpoint = self.network((1 - time) * noise + time * residual, condition, time_N, level_N)
        error_N = (endpoint - residual).square().mean(dim=(1, 2, 3))
        losses = {
            "loss": (error_N / (1 - time_N).clamp_min(training.time_floor).square()).mean(),
            "endpoint_error": error_N.mean(), "bicubic_error": residual.square().mean(),
        }  # fmt: skip
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(condition + config.residual_scale * endpoint, true).mean()
        return losses

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.training.ema_decay, (1 + step) / (10 + step))
        for mean, new in zip(self.refiner.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(new, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Network, averaged weights and optimizer; tensors of their own shapes."""
        return {
            "network": self.network.state_dict(), "refiner": self.refiner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.refiner.load_state_dict(state["refiner"])
        self.optimizer.load_state_dict(state["optimizer"])

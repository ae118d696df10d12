"""Budget and losses of the training of the convolutional visual tokenizer.

Contract: settings that exist can be trained; what cannot is a ConfigError that names the field and its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ernie_elastic.errors import ConfigError

WEIGHTS = (
    "absolute_weight", "squared_weight", "commitment_weight", "certainty_weight", "diversity_weight",
    "perceptual_weight", "adversarial_weight", "lecam_weight", "semantic_weight", "coarse_weight", "low_bit_weight",
)  # fmt: skip


@dataclass(frozen=True)
class ConvVisualTrainingConfig:
    """Budget and losses. Every weight may be 0: that loss is then not computed.

    steps; batch_size of all ranks together. learning_rate: peak, after warmup_steps, then a cosine to min_ratio of it.
    gradient_limit: largest norm of the tokenizer's gradient; 0: no limit. average_decay: of a moving average of the
    weights, which is then the tokenizer that comes out; 0: none.
    warmup_share: share of the steps that train with noise (of this deviation) in place of the quantiser.
    absolute_weight, squared_weight: of the pixel error in -1..1. commitment_weight: latents to their bits.
    certainty_weight: entropy of single bits down; diversity_weight: entropy of each bit over the batch up.
    coarse_share: share of pictures read from a random number of coarse scales, whose losses count coarse_weight;
    low_bit_share, low_bit_weight: likewise with a smaller count of the bit series. flip_rate: share of wrong bits.
    perceptual_weight: distance of features of `teacher`, of a fixed pyramid without one. semantic_weight: bits to the
    features of `teacher`, a directory of a Transformers vision model. adversarial_weight: hinge loss of a patch
    discriminator (discriminator_width, its own learning rate) after adversarial_start of the steps, times the ratio of
    gradients of `adaptive_weight`, at most adaptive_limit (0: no such factor). lecam_weight: its regularisation.
    Raises ConfigError for values that cannot be.
    """

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    min_ratio: float = 0.02
    gradient_limit: float = 1.0
    average_decay: float = 0.0
    warmup_share: float = 0.3
    noise: float = 0.35
    absolute_weight: float = 0.5
    squared_weight: float = 1.0
    commitment_weight: float = 0.05
    certainty_weight: float = 0.0
    diversity_weight: float = 0.02
    coarse_share: float = 0.1
    coarse_weight: float = 0.2
    low_bit_share: float = 0.1
    low_bit_weight: float = 0.5
    flip_rate: float = 0.0
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.5
    adaptive_limit: float = 0.0
    discriminator_width: int = 32
    discriminator_learning_rate: float = 2e-4
    lecam_weight: float = 0.0
    semantic_weight: float = 0.0
    teacher: Path | None = None

    def __post_init__(self) -> None:
        def check(names: tuple[str, ...], holds: bool, rule: str) -> None:
            if not holds:
                values = ", ".join(f"{name} {getattr(self, name)}" for name in names)
                raise ConfigError(f"visual tokenizer training: {values} {rule}")

        for name in ("steps", "batch_size", "discriminator_width"):
            check((name,), getattr(self, name) >= 1, "must be at least 1")
        for name in ("learning_rate", "discriminator_learning_rate"):
            check((name,), getattr(self, name) > 0, "must be above 0")
        for name in (*WEIGHTS, "warmup_steps", "gradient_limit", "noise", "adaptive_limit"):
            check((name,), getattr(self, name) >= 0, "must be 0 or more")
        for name in ("warmup_share", "coarse_share", "low_bit_share", "adversarial_start", "min_ratio"):
            check((name,), 0 <= getattr(self, name) <= 1, "is a share in 0..1")
        check(("average_decay",), 0 <= self.average_decay < 1, "must lie in [0, 1)")
        check(("flip_rate",), 0 <= self.flip_rate < 0.5, "must lie in [0, 0.5)")
        pixel = ("absolute_weight", "squared_weight")
        check(pixel, self.absolute_weight + self.squared_weight > 0, "are both 0; nothing says what is right")
        check(
            ("semantic_weight",),
            not self.semantic_weight or self.teacher is not None,
            "needs teacher, the directory of a Transformers vision model; give it, or set the weight to 0",
        )

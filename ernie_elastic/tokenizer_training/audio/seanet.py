"""Trains the neural audio codec: one optimizer step of its losses, on one process or several.

Contract: `SeanetTrainee` is a `Trainee`; its weights after a step are a function of (configs, seed, batches so far),
and a state that was saved and loaded goes on to the same bits. A loss with weight 0 is not computed, and its networks
are not made. Codebooks learn by moving averages over all ranks; the other weights by Adam on the mean gradient.
paper: section 2.5 (first code distilled from Whisper's encoder at 12.5 Hz). background: multi-scale mel and STFT
discriminator losses, commitment, quantiser dropout (EnCodec, DAC, SpeechTokenizer). peer: LeCam (VideoAR).
ours: the codebooks start by k-means after `quantise_start` of the steps, when the encoder's features mean something;
until then the decoder reads the features themselves.

Shape letters: N sounds, L samples, S steps, Q levels, C latent width, D width of a code, E teacher width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizer_training.loop import step_generator
from ernie_elastic.tokenizer_training.losses.adversarial import (
    LeCam,
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from ernie_elastic.tokenizer_training.losses.audio import MultiScaleMel, WhisperTeacher, distillation_loss, mel_filters
from ernie_elastic.tokenizer_training.losses.discriminators import StftDiscriminator
from ernie_elastic.tokenizers.audio.residual_codebooks import Quantised, draw_active
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizer, SeanetAudioTokenizerConfig
from ernie_elastic.training.ranks import average_gradients, device
from ernie_elastic.training.schedules import Schedule

Losses = dict[str, tuple[float, torch.Tensor]]  # name: (weight, unweighted scalar)
GUIDE_FRAMES, GUIDE_BANDS = 4, 32  # spectral frames of a code step and mel bands that the guide tells
GUIDE_FLOOR = 1e-3  # amplitude below which the guide hears no difference: -60 dB
ADAM_BETAS = (0.8, 0.99)  # background: short memories suit adversarial training of codecs


@dataclass(frozen=True)
class SeanetTrainingConfig:
    """Budget and losses of the codec. Every weight may be 0: that loss is then not computed.

    steps; batch_size of all ranks together; crop_seconds: length of a sound. learning_rate: peak, after warmup_steps,
    then a cosine to min_ratio of it. gradient_limit: largest norm of the codec's gradient; 0: no limit.
    wave_weight: L1 of samples. mel_weight: `MultiScaleMel`, of both sounds with the same faint noise (root mean square
    mel_noise), so that digital silence does not outweigh all else. guide_weight: `SpectrumGuide` on the quantised
    features. commitment_weight: features to their codes.
    quantiser_dropout: share of sounds for which a random number of levels counts. quantise_start: share of the steps
    before the codebooks start.
    adversarial_weight: hinge loss of an STFT discriminator (of width discriminator_width and its own learning rate)
    after adversarial_start of the steps; with it feature_weight (feature matching) and lecam_weight (regularisation of
    the discriminator).
    distillation_weight: level 0 to the features of `teacher`, the directory of a Transformers Whisper model, compared
    along distillation_axis. Raises ConfigError for values that cannot be.
    """

    steps: int = 2000
    batch_size: int = 16
    crop_seconds: float = 0.96
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    min_ratio: float = 0.05
    gradient_limit: float = 1.0
    wave_weight: float = 1.0
    mel_weight: float = 1.0
    mel_noise: float = 1e-3
    guide_weight: float = 3.0
    commitment_weight: float = 0.1
    quantiser_dropout: float = 0.25
    quantise_start: float = 0.1
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.4
    discriminator_width: int = 16
    discriminator_learning_rate: float = 3e-4
    feature_weight: float = 1.0
    lecam_weight: float = 0.0
    distillation_weight: float = 0.0
    distillation_axis: Literal["feature", "time"] = "feature"
    teacher: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "discriminator_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"audio codec training: {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("crop_seconds", "learning_rate", "discriminator_learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"audio codec training: {name} is {getattr(self, name)}; it must be above 0")
        for name in self._weights():
            if getattr(self, name) < 0:
                raise ConfigError(f"audio codec training: {name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("quantiser_dropout", "quantise_start", "adversarial_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"audio codec training: {name} is {getattr(self, name)}; it is a share in 0..1")
        if self.quantise_start == 1:
            raise ConfigError("audio codec training: quantise_start is 1; the codebooks would never start")
        if not self.mel_weight and not self.wave_weight:
            raise ConfigError("audio codec training: mel_weight and wave_weight are both 0; nothing says what is right")
        if self.distillation_axis not in ("feature", "time"):
            raise ConfigError(
                f"audio codec training: distillation_axis {self.distillation_axis!r} is not feature, time"
            )
        if self.distillation_weight and self.teacher is None:
            raise ConfigError(
                f"audio codec training: distillation_weight {self.distillation_weight} needs teacher, the directory of "
                "a Transformers Whisper model; give it, or set the weight to 0"
            )

    @staticmethod
    def _weights() -> tuple[str, ...]:
        names = ("wave", "mel", "guide", "commitment", "adversarial", "feature", "lecam", "distillation")
        return ("warmup_steps", "gradient_limit", "mel_noise", *(f"{name}_weight" for name in names))


class SpectrumGuide(nn.Module):
    """Tells the mel spectrum of each code step from its features by one linear layer; in training only.

    ours: without it a decoder first learns the mean spectrum, which needs no features, and the encoder idles for
    hundreds of steps while its features die out.
    """

    filters_KM: torch.Tensor
    shape_W: torch.Tensor

    def __init__(self, config: SeanetAudioTokenizerConfig) -> None:
        """Raises ConfigError when a step cannot be cut into GUIDE_FRAMES frames."""
        super().__init__()
        if config.step_samples % GUIDE_FRAMES:
            raise ConfigError(
                f"audio codec training: guide_weight needs step_samples that {GUIDE_FRAMES} divides, not "
                f"{config.step_samples}; choose other strides, or set the weight to 0"
            )
        self.hop = config.step_samples // GUIDE_FRAMES
        filters_KM = mel_filters(config.sample_rate, 4 * self.hop, GUIDE_BANDS)
        self.register_buffer("filters_KM", filters_KM.float(), persistent=False)
        self.register_buffer("shape_W", torch.hann_window(4 * self.hop), persistent=False)
        self.head = nn.Linear(config.latent_width, GUIDE_FRAMES * GUIDE_BANDS)

    def forward(self, features_NSC: torch.Tensor, wave_NL: torch.Tensor) -> torch.Tensor:
        """Scalar: mean absolute error of log amplitudes told from features [N, S, C] of waves [N, L]."""
        told = self.head(features_NSC)
        return (told - self.target(wave_NL, features_NSC.shape[1])).abs().mean()

    @torch.no_grad()
    def target(self, wave_NL: torch.Tensor, steps: int) -> torch.Tensor:
        """Log amplitudes float32 [N, S, GUIDE_FRAMES * GUIDE_BANDS] of waves [N, L]; a frame reads no later step."""
        size = len(self.shape_W)
        padded_NL = F.pad(wave_NL, (size - self.hop, 0))
        spectrum_NKT = torch.stft(
            padded_NL, size, self.hop, window=self.shape_W, center=False, return_complex=True
        )  # fmt: skip
        amplitude_NTM = (spectrum_NKT.abs() * (2.0 / self.shape_W.sum())).transpose(1, 2) @ self.filters_KM
        scaled_NTM = ((amplitude_NTM + GUIDE_FLOOR).log() + 5.0) / 2.0
        return scaled_NTM.reshape(len(wave_NL), steps, -1)


class SeanetTrainee:
    """Codec, discriminator, teacher and optimizers. `tokenizer` is the codec that comes out."""

    def __init__(self, config: SeanetAudioTokenizerConfig, training: SeanetTrainingConfig, seed: int = 0) -> None:
        """Raises CheckpointError when the teacher's directory is not a Whisper model."""
        self.training, self.seed = training, seed
        self.device = device()
        self.tokenizer = SeanetAudioTokenizer(config, seed).to(self.device).train()
        self.schedule = Schedule("cosine", training.warmup_steps, min_ratio=training.min_ratio)
        self.mel = MultiScaleMel(config.sample_rate).to(self.device) if training.mel_weight else None
        self.guide: SpectrumGuide | None = None
        self.teacher: WhisperTeacher | None = None
        self.projection: nn.Linear | None = None
        self.discriminator: StftDiscriminator | None = None
        self.lecam: LeCam | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            if training.guide_weight:
                self.guide = SpectrumGuide(config).to(self.device)
            if training.distillation_weight and training.teacher is not None:
                self._make_teacher(training.teacher)
            if training.adversarial_weight:
                self.discriminator = StftDiscriminator(width=training.discriminator_width).to(self.device)
        parts = [part for part in (self.tokenizer, self.guide, self.projection) if part is not None]
        learned = [parameter for part in parts for parameter in part.parameters()]
        self.optimizer = torch.optim.Adam(learned, training.learning_rate, ADAM_BETAS)
        self.discriminator_optimizer: torch.optim.Adam | None = None
        if self.discriminator is not None:
            rate = training.discriminator_learning_rate
            self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), rate, ADAM_BETAS)
            self.lecam = LeCam() if training.lecam_weight else None

    def _make_teacher(self, directory: Path) -> None:
        self.teacher = WhisperTeacher.load(directory).to(self.device)
        config = self.tokenizer.config
        example_1SE = self.teacher.features(
            torch.zeros(1, config.step_samples, device=self.device), config.sample_rate, 1
        )  # fmt: skip
        self.projection = nn.Linear(config.semantic_width, example_1SE.shape[2]).to(self.device)

    def step(self, batch: torch.Tensor, step: int) -> dict[str, float]:
        """One optimizer step on this rank's sounds float32 [N, L]; L is cut to whole steps of codes.

        Returns unweighted losses, "learning_rate", "gradient_norm" and, once the codebooks have started, per level
        "perplexity_Q", "used_share_Q" and "restarted_Q". Raises ConfigError when L is shorter than a step.
        """
        training = self.training
        wave_NL = self._whole_steps(batch)
        factor = self.schedule.factor(step, training.steps)
        generator = step_generator(self.seed, step)
        latent_NSC = self.tokenizer.latent(wave_NL)
        found = self._quantise(latent_NSC, step, generator)
        features_NSC = latent_NSC if found is None else found.features
        made_NL = self.tokenizer.wave(features_NSC)
        adversarial = self.discriminator is not None and step >= training.adversarial_start * training.steps
        metrics = self._discriminator_step(wave_NL, made_NL.detach(), factor) if adversarial else {}
        losses = self._losses(wave_NL, made_NL, found, generator)
        if self.guide is not None:
            losses["guide"] = (training.guide_weight, self.guide(features_NSC, wave_NL))
        if adversarial:
            losses |= self._adversarial_losses(wave_NL, made_NL)
        metrics["gradient_norm"] = self._descend(losses, factor)
        if found is not None:
            metrics |= self._learn_codes(found, generator)
        metrics |= {name: float(loss.detach()) for name, (_, loss) in losses.items()}
        return metrics | {"learning_rate": training.learning_rate * factor}

    def _whole_steps(self, batch_NL: torch.Tensor) -> torch.Tensor:
        size = self.tokenizer.config.step_samples
        length = batch_NL.shape[1] - batch_NL.shape[1] % size
        if not length:
            raise ConfigError(
                f"audio codec training: sounds of {batch_NL.shape[1]} samples are shorter than a step of {size}; "
                "raise crop_seconds"
            )
        return batch_NL[:, :length].to(self.device, torch.float32)

    def _quantise(self, latent_NSC: torch.Tensor, step: int, generator: torch.Generator) -> Quantised | None:
        """None before the codebooks start."""
        quantizer = self.tokenizer.quantizer
        if step < int(self.training.quantise_start * self.training.steps):
            return None
        if not bool(quantizer.started):
            quantizer.initialise(latent_NSC.detach(), generator)
        levels, share = self.tokenizer.num_levels, self.training.quantiser_dropout
        active_N = draw_active(len(latent_NSC), levels, share, generator).to(self.device) if share else None
        return self.tokenizer.quantise(latent_NSC, active_N)

    def _losses(
        self, wave_NL: torch.Tensor, made_NL: torch.Tensor, found: Quantised | None, generator: torch.Generator
    ) -> Losses:
        training, losses = self.training, {}
        if training.wave_weight:
            losses["wave"] = (training.wave_weight, (made_NL - wave_NL).abs().mean())
        if self.mel is not None:
            noise_NL = training.mel_noise * torch.randn(wave_NL.shape, generator=generator).to(wave_NL)
            losses["mel"] = (training.mel_weight, self.mel(wave_NL + noise_NL, made_NL + noise_NL))
        if found is not None and training.commitment_weight:
            losses["commitment"] = (training.commitment_weight, found.commitment)
        if found is not None and self.teacher is not None and self.projection is not None:
            steps = found.semantic.shape[1]
            target_NSE = self.teacher.features(wave_NL, self.tokenizer.config.sample_rate, steps)
            projected_NSE = self.projection(found.semantic)
            loss = distillation_loss(projected_NSE, target_NSE, axis=training.distillation_axis)
            losses["distillation"] = (training.distillation_weight, loss)
        return losses

    def _discriminator_step(self, wave_NL: torch.Tensor, made_NL: torch.Tensor, factor: float) -> dict[str, float]:
        """Teach the discriminator to tell sounds [N, L] from reconstructions [N, L], same shape."""
        assert self.discriminator is not None and self.discriminator_optimizer is not None
        self.discriminator.requires_grad_(True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        real = [logits for logits, _ in self.discriminator(wave_NL)]
        fake = [logits for logits, _ in self.discriminator(made_NL)]
        loss = torch.stack([hinge_discriminator_loss(a, b) for a, b in zip(real, fake, strict=True)]).mean()
        metrics = {"discriminator": float(loss.detach())}
        if self.lecam is not None:
            real_M, fake_M = (torch.cat([item.flatten() for item in items]) for items in (real, fake))
            penalty = self.lecam.penalty(real_M, fake_M)
            self.lecam.update(real_M.detach(), fake_M.detach())
            metrics["lecam"] = float(penalty.detach())
            loss = loss + self.training.lecam_weight * penalty
        loss.backward()
        average_gradients(self.discriminator.parameters())
        _set_rate(self.discriminator_optimizer, self.training.discriminator_learning_rate * factor)
        self.discriminator_optimizer.step()
        self.discriminator.requires_grad_(False)  # the codec's step needs no gradients of its weights
        return metrics

    def _adversarial_losses(self, wave_NL: torch.Tensor, made_NL: torch.Tensor) -> Losses:
        assert self.discriminator is not None
        fake = self.discriminator(made_NL)
        hinge = torch.stack([hinge_generator_loss(logits) for logits, _ in fake]).mean()
        losses: Losses = {"adversarial": (self.training.adversarial_weight, hinge)}
        if self.training.feature_weight:
            with torch.no_grad():
                real = self.discriminator(wave_NL)
            parts = [feature_matching_loss(a, b) for (_, a), (_, b) in zip(real, fake, strict=True)]
            losses["feature"] = (self.training.feature_weight, torch.stack(parts).mean())
        return losses

    def _descend(self, losses: Losses, factor: float) -> float:
        """One step on the weighted sum of scalar losses; the gradient's norm before it was limited."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([weight * loss for weight, loss in losses.values()]).sum().backward()
        average_gradients(_parameters(self.optimizer))
        limit = self.training.gradient_limit or float("inf")
        norm = nn.utils.clip_grad_norm_(_parameters(self.optimizer), limit)
        _set_rate(self.optimizer, self.training.learning_rate * factor)
        self.optimizer.step()
        return float(norm)

    def _learn_codes(self, found: Quantised, generator: torch.Generator) -> dict[str, float]:
        statistics = self.tokenizer.quantizer.learn(found, generator)
        return {f"{name}_{level}": v for name, values in statistics.items() for level, v in enumerate(values)}

    def state_dict(self) -> dict[str, Any]:
        """Weights, codebooks, optimizers and LeCam averages, as tensors and plain values."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ConfigError when the state is of other losses."""
        parts = self._parts()
        if set(parts) != set(state):
            raise ConfigError(
                f"audio codec training: the saved state has {', '.join(sorted(state))}, these settings need "
                f"{', '.join(sorted(parts))}; go on with the settings that it was started with"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "tokenizer": self.tokenizer, "optimizer": self.optimizer, "guide": self.guide,
            "projection": self.projection, "discriminator": self.discriminator,
            "discriminator_optimizer": self.discriminator_optimizer, "lecam": self.lecam,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

"""Trains the convolutional visual tokenizer: one optimizer step of its losses, on one process or several.

Contract: `ConvVisualTrainee` is a `Trainee`; its weights after a step are a function of (configs, seed, batches so
far), and a state that was saved and loaded goes on to the same bits. A loss with weight 0 is not computed, and its
networks are not made. paper: section 2.2 (adversarial loss, semantic regularisation against a vision foundation model,
low-bit to high-bit). peer: VideoAR (perceptual, adversarial with LeCam, commitment, entropy), Infinity and BSQ (entropy
of single bits). ours: noise in place of the quantiser at first, so that latents survive it later; amplitudes measured
then and followed after; a decoder that meets fewer bits, fewer scales and wrong bits while it learns.

Shape letters: N pictures or clips, F frames, H/W pixels, B = N times f latent frames, h/w latent grid, D bits,
S scales, E teacher width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizer_training.loop import step_generator
from ernie_elastic.tokenizer_training.losses.adversarial import (
    LeCam,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from ernie_elastic.tokenizer_training.losses.discriminators import PatchDiscriminator
from ernie_elastic.tokenizer_training.losses.perceptual import (
    PyramidDistance,
    VisionTeacher,
    feature_distance,
    semantic_loss,
)
from ernie_elastic.tokenizer_training.visual.bits import (
    ReadBits,
    bit_entropies,
    follow_amplitudes,
    follow_latents,
    measure_amplitudes,
    quantise,
    read_bits,
)
from ernie_elastic.tokenizer_training.visual.settings import ConvVisualTrainingConfig
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.tokenizers.visual.causal_conv import merge_frames
from ernie_elastic.tokenizers.visual.conv import ConvVisualTokenizer, ConvVisualTokenizerConfig, inflate
from ernie_elastic.training.ranks import average_gradients, device
from ernie_elastic.training.schedules import Schedule

Losses = dict[str, tuple[float, torch.Tensor]]  # name: (weight, unweighted scalar)
ADAM_BETAS = (0.9, 0.99)
DISCRIMINATOR_BETAS = (0.5, 0.9)  # background: short memories suit adversarial training
WEIGHT_DECAY = 0.01
LATENT_SHARE = 0.05  # of a batch in the statistics that make latents even
PIXEL_LOSSES = ("absolute", "squared", "perceptual")  # whose gradient the adversarial one is measured against

__all__ = ["ConvVisualTrainee", "ConvVisualTrainingConfig"]


class ConvVisualTrainee:
    """Tokenizer, discriminator, teacher and optimizers. `tokenizer` is the tokenizer that comes out."""

    def __init__(
        self,
        config: ConvVisualTokenizerConfig,
        training: ConvVisualTrainingConfig,
        seed: int = 0,
        init: Path | None = None,
    ) -> None:
        """init: a directory of a trained tokenizer with the same layers to start from; a 2-D one is inflated.

        Raises CheckpointError when init or the teacher cannot be read, ConfigError when init has other layers.
        """
        self.training, self.seed, self.device = training, seed, device()
        self.model = ConvVisualTokenizer(config)
        self.started = init is not None
        if init is not None:
            _start_from(self.model, init)
        self.model.to(self.device).train()
        self.average = copy.deepcopy(self.model) if training.average_decay else None
        self.measured = False
        self.schedule = Schedule("cosine", training.warmup_steps, min_ratio=training.min_ratio)
        self.teacher: VisionTeacher | None = None
        self.projection: nn.Linear | None = None
        self.pyramid: PyramidDistance | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.lecam: LeCam | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self._make_critics(config)
        learned = [*self.model.parameters(), *(self.projection.parameters() if self.projection else ())]
        self.optimizer = torch.optim.AdamW(learned, training.learning_rate, ADAM_BETAS, weight_decay=WEIGHT_DECAY)
        self.discriminator_optimizer: torch.optim.Adam | None = None
        if self.discriminator is not None:
            rate = training.discriminator_learning_rate
            self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), rate, DISCRIMINATOR_BETAS)

    def _make_critics(self, config: ConvVisualTokenizerConfig) -> None:
        training = self.training
        if training.teacher is not None and (training.semantic_weight or training.perceptual_weight):
            self.teacher = VisionTeacher.load(training.teacher).to(self.device)
        if training.semantic_weight and self.teacher is not None:
            self.projection = nn.Linear(config.num_bits, self.teacher.width).to(self.device)
        if training.perceptual_weight and self.teacher is None:
            self.pyramid = PyramidDistance().to(self.device)
        if training.adversarial_weight:
            self.discriminator = PatchDiscriminator(width=training.discriminator_width).to(self.device)
            self.discriminator.requires_grad_(False)
            self.lecam = LeCam() if training.lecam_weight else None

    @property
    def tokenizer(self) -> ConvVisualTokenizer:
        """The tokenizer so far, in evaluation mode: the averaged weights when they are kept. Training goes on in it."""
        if self.average is None:
            return self.model.eval()
        self.average.set_amplitudes(self.model.config.amplitudes)
        return self.average.eval()

    def step(self, batch: torch.Tensor, step: int) -> dict[str, float]:
        """One optimizer step on this rank's pictures or clips uint8 [N, F, H, W, 3] of the size of any schedule.

        Returns unweighted losses, "learning_rate", "gradient_norm", and "psnr_db" of what is read whole. Raises
        DataError for another size.
        """
        training = self.training
        self.model.train()
        factor = self.schedule.factor(step, training.steps)
        generator = step_generator(self.seed, step)
        pixels_N3FHW = self.model.pixels_in(batch)
        raw_NDfhw = self.model.encoder(pixels_N3FHW)
        # The first steps change the encoder fast; the mean of all so far is the better estimate then.
        share = LATENT_SHARE if self.started else max(LATENT_SHARE, 1 / (1 + step))
        follow_latents(self.model.normalise, raw_NDfhw, share)
        latent_NfhwD = self.model.normalise(raw_NDfhw).movedim(1, -1)
        read = self._read(latent_NfhwD, step, generator)
        made_N3FHW = self.model.decoder(read.feature_NfhwD.movedim(-1, 1))
        real_B3HW, made_B3HW = merge_frames(pixels_N3FHW), merge_frames(made_N3FHW)
        adversarial = self.discriminator is not None and step >= training.adversarial_start * training.steps
        metrics = self._discriminator_step(real_B3HW, made_B3HW.detach(), factor) if adversarial else {}
        losses = self._losses(real_B3HW, made_B3HW, latent_NfhwD, read)
        if adversarial:
            losses["adversarial"] = self._adversarial_loss(made_B3HW, losses)
        metrics["gradient_norm"] = self._descend(losses, factor, step)
        metrics |= {name: float(loss.detach()) for name, (_, loss) in losses.items()}
        metrics |= _psnr(pixels_N3FHW, made_N3FHW.detach(), read.weight_N == 1)
        return metrics | {"learning_rate": training.learning_rate * factor}

    def _read(self, latent_NfhwD: torch.Tensor, step: int, generator: torch.Generator) -> ReadBits:
        """What the decoder gets: noisy latents at first, then bits with a straight-through gradient."""
        training = self.training
        if step < training.warmup_share * training.steps:
            noise = torch.randn(latent_NfhwD.shape, generator=generator).to(self.device)
            weight_N = torch.ones(len(latent_NfhwD), device=self.device)
            return ReadBits(latent_NfhwD + training.noise * noise, weight_N, None)
        flat_BhwD = latent_NfhwD.flatten(0, 1)
        quantizer = self.model.quantizer_for(*latent_NfhwD.shape[2:4])
        if not self.measured:
            self.model.set_amplitudes(measure_amplitudes(flat_BhwD.detach(), quantizer))
            self.measured = True
            quantizer = self.model.quantizer_for(*latent_NfhwD.shape[2:4])
        found = quantise(flat_BhwD, quantizer)
        read = read_bits(latent_NfhwD, found, quantizer, training, self.model.config.bit_series, generator)
        self.model.set_amplitudes(follow_amplitudes(found, quantizer))
        return read

    def _losses(
        self, real_B3HW: torch.Tensor, made_B3HW: torch.Tensor, latent_NfhwD: torch.Tensor, read: ReadBits
    ) -> Losses:
        training = self.training
        weight_B = read.weight_N.repeat_interleave(len(real_B3HW) // len(read.weight_N))
        losses: Losses = {}

        def add(name: str, weight: float, loss_B: torch.Tensor) -> None:
            losses[name] = (weight, (weight_B * loss_B).mean())

        error = made_B3HW - real_B3HW
        if training.absolute_weight:
            add("absolute", training.absolute_weight, error.abs().mean(dim=(1, 2, 3)))
        if training.squared_weight:
            add("squared", training.squared_weight, error.square().mean(dim=(1, 2, 3)))
        if training.perceptual_weight:
            add("perceptual", training.perceptual_weight, self._distance(made_B3HW, real_B3HW))
        if read.found is None:
            return losses
        if training.commitment_weight:
            gap = (latent_NfhwD.flatten(0, 1) - read.found.total_BhwD).square().mean()
            losses["commitment"] = (training.commitment_weight, gap)
        if training.certainty_weight or training.diversity_weight:
            single, mean = bit_entropies(read.found, self.model.quantizer.amplitudes)
            losses["bit_uncertainty"] = (training.certainty_weight, single)
            losses["bit_sameness"] = (training.diversity_weight, 1.0 - mean)
        if self.projection is not None:
            losses["semantic"] = (training.semantic_weight, self._semantic(real_B3HW, latent_NfhwD, read))
        return losses

    def _distance(self, made_B3HW: torch.Tensor, real_B3HW: torch.Tensor) -> torch.Tensor:
        if self.pyramid is not None:
            return self.pyramid(made_B3HW, real_B3HW)
        assert self.teacher is not None
        return feature_distance(self.teacher, made_B3HW, real_B3HW)

    def _semantic(self, real_B3HW: torch.Tensor, latent_NfhwD: torch.Tensor, read: ReadBits) -> torch.Tensor:
        """Cosine distance of the bits, projected to E, to the teacher's features of each latent frame's last frame."""
        assert self.teacher is not None and self.projection is not None and read.found is not None
        num_clips, latent_frames = latent_NfhwD.shape[:2]
        stride, frames = self.model.config.temporal_stride, len(real_B3HW) // num_clips
        last = (torch.arange(latent_frames, device=self.device) * stride).clamp_max(frames - 1)
        pictures = real_B3HW.unflatten(0, (num_clips, frames))[:, last].flatten(0, 1)
        with torch.no_grad():
            target = self.teacher.features(pictures)[-1]
        flat_BhwD = latent_NfhwD.flatten(0, 1)
        through_BhwD = flat_BhwD + (read.found.total_BhwD - flat_BhwD).detach()
        return semantic_loss(self.projection(through_BhwD), target)

    def _discriminator_step(self, real_B3HW: torch.Tensor, made_B3HW: torch.Tensor, factor: float) -> dict[str, float]:
        """Teach the discriminator to tell pictures [B, 3, H, W] from reconstructions, same shape."""
        assert self.discriminator is not None and self.discriminator_optimizer is not None
        self.discriminator.requires_grad_(True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        real, fake = self.discriminator(real_B3HW), self.discriminator(made_B3HW)
        loss = hinge_discriminator_loss(real, fake)
        metrics = {"discriminator": float(loss.detach())}
        if self.lecam is not None:
            penalty = self.lecam.penalty(real, fake)
            self.lecam.update(real.detach(), fake.detach())
            metrics["lecam"] = float(penalty.detach())
            loss = loss + self.training.lecam_weight * penalty
        loss.backward()
        average_gradients(self.discriminator.parameters())
        _set_rate(self.discriminator_optimizer, self.training.discriminator_learning_rate * factor)
        self.discriminator_optimizer.step()
        self.discriminator.requires_grad_(False)  # the tokenizer's step needs no gradients of its weights
        return metrics

    def _adversarial_loss(self, made_B3HW: torch.Tensor, losses: Losses) -> tuple[float, torch.Tensor]:
        assert self.discriminator is not None
        hinge, weight = hinge_generator_loss(self.discriminator(made_B3HW)), self.training.adversarial_weight
        if self.training.adaptive_limit:
            pixel = [factor * loss for name, (factor, loss) in losses.items() if name in PIXEL_LOSSES]
            last = self.model.last_weight
            weight *= float(adaptive_weight(torch.stack(pixel).sum(), hinge, last, self.training.adaptive_limit))
        return weight, hinge

    def _descend(self, losses: Losses, factor: float, step: int) -> float:
        """One step on the weighted sum of scalar losses; the gradient's norm before it was limited."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([weight * loss for weight, loss in losses.values()]).sum().backward()
        average_gradients(_parameters(self.optimizer))
        limit = self.training.gradient_limit or float("inf")
        norm = nn.utils.clip_grad_norm_(_parameters(self.optimizer), limit)
        _set_rate(self.optimizer, self.training.learning_rate * factor)
        self.optimizer.step()
        if self.average is not None:
            # A young average forgets faster, or the start weights would stay in it.
            decay = min(self.training.average_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    kept.lerp_(new, 1 - decay)
            self.average.normalise.load_state_dict(self.model.normalise.state_dict())
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Weights, amplitudes, optimizers and LeCam averages, as tensors and plain values."""
        amplitudes = {"measured": self.measured, "values": list(self.model.config.amplitudes)}
        return {"amplitudes": amplitudes, **{name: part.state_dict() for name, part in self._parts().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ConfigError when the state is of other losses."""
        parts = self._parts()
        if {"amplitudes", *parts} != set(state):
            raise ConfigError(
                f"visual tokenizer training: the saved state has {', '.join(sorted(state))}, these settings need "
                f"{', '.join(sorted(['amplitudes', *parts]))}; go on with the settings that it was started with"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.measured = bool(state["amplitudes"]["measured"])
        self.model.set_amplitudes(state["amplitudes"]["values"])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model, "average": self.average, "optimizer": self.optimizer, "projection": self.projection,
            "discriminator": self.discriminator, "discriminator_optimizer": self.discriminator_optimizer,
            "lecam": self.lecam,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}


def _start_from(model: ConvVisualTokenizer, directory: Path) -> None:
    found = VisualTokenizer.load(directory)
    if not isinstance(found, ConvVisualTokenizer):
        raise ConfigError(
            f"visual tokenizer training: init {directory} is a {found.architecture!r} tokenizer; give a 'conv' one"
        )
    wanted, stride = model.config.temporal_stride, found.config.temporal_stride
    if stride == 1 and wanted > 1:
        found = inflate(found, wanted)
    names = ("stride", "temporal_stride", "num_bits", "width", "multipliers", "blocks", "decoder_blocks", "mid_blocks")
    for name in (*names, "stem"):
        if getattr(found.config, name) != getattr(model.config, name):
            raise ConfigError(
                f"visual tokenizer training: init {directory} has {name} {getattr(found.config, name)}, this training "
                f"{getattr(model.config, name)}; they must agree"
            )
    model.load_state_dict(found.state_dict())


@torch.no_grad()
def _psnr(real_N3FHW: torch.Tensor, made_N3FHW: torch.Tensor, whole_N: torch.Tensor) -> dict[str, float]:
    """dB of the pictures that are decoded from all bits of all scales; nothing when there are none."""
    if not bool(whole_N.any()):
        return {}
    error = (made_N3FHW[whole_N].clamp(-1, 1) - real_N3FHW[whole_N]).square().mean()
    return {"psnr_db": float(-10 * torch.log10(error / 4 + 1e-12))}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

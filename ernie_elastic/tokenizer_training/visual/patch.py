"""Trains the visual tokenizer: a noisy autoencoder first, then the same network through the sign quantiser.

Contract: the result is a function of (pictures, configs, seed) on one machine. Pictures come as any iterable of
uint8 arrays; nothing here knows the embedded world. ours: the whole recipe. A straight-through estimator from the
first step loses shapes; a warm-up with Gaussian noise of about the quantiser's error finds latents that survive
quantisation, and only then come the signs.

Shape letters: N pictures, H/W pixels, h/w latent grid, D bits, P values of a patch, S scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.stages import progress
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig

MEASURED_PICTURES = 2048  # whose latents decide the amplitudes


@dataclass(frozen=True)
class VisualTrainingConfig:
    """Budget and weights of the visual tokenizer.

    steps: optimizer steps. batch_size: pictures of a step. learning_rate: peak of a one-cycle schedule.
    warmup_share: share of the steps that train with noise in place of the quantiser. noise: its deviation, in units
    of the latents'. coarse_share: share of the pictures of a step that are decoded from a random number of coarse
    scales. coarse_weight: weight of their loss. absolute_weight: of the absolute beside the squared error.
    commitment: weight of the distance between a latent and its quantised value. flip_rate: share of the bits that the
    decoder reads wrongly while it learns, so that a generator's single errors do little (ours).
    """

    steps: int = 3200
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_share: float = 0.4
    noise: float = 0.35
    coarse_share: float = 0.1
    coarse_weight: float = 0.2
    absolute_weight: float = 0.05
    commitment: float = 0.02
    flip_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 2 or self.batch_size < 2:
            raise ConfigError(
                f"visual training: steps {self.steps} and batch_size {self.batch_size} must be at least 2"
            )
        if not 0 < self.warmup_share < 1 or not 0 <= self.coarse_share < 1:
            raise ConfigError(
                f"visual training: warmup_share {self.warmup_share} must lie in (0, 1), "
                f"coarse_share {self.coarse_share} in [0, 1)"
            )
        if not 0 <= self.flip_rate < 0.5:
            raise ConfigError(f"visual training: flip_rate {self.flip_rate} must lie in [0, 0.5)")


def train_visual_tokenizer(
    pictures: Iterable[np.ndarray],
    config: PatchVisualTokenizerConfig,
    training: VisualTrainingConfig | None = None,
    seed: int = 0,
) -> tuple[PatchVisualTokenizer, dict[str, Any]]:
    """A visual tokenizer fitted to `pictures` (uint8 [H, W, 3] or frames [F, H, W, 3] each), and its health.

    Health: pictures, steps, final training loss, amplitudes (`visual_health` has the rest). Raises DataError when
    there are fewer pictures than one batch or they have another size than the config's.
    """
    training = training or VisualTrainingConfig()
    pixels_NHW3 = _stacked(pictures, config)
    if len(pixels_NHW3) < training.batch_size:
        raise DataError(
            f"visual tokenizer: {len(pixels_NHW3)} pictures are fewer than one batch of {training.batch_size}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the layers' own initialisation draws from the global generator
        tokenizer = PatchVisualTokenizer(config)
    patches_NhwP = tokenizer.patches(pixels_NHW3)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        tokenizer.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, training.steps, pct_start=0.05)
    warmup = min(max(1, round(training.warmup_share * training.steps)), training.steps - 1)
    recent = 0.0
    tokenizer.train()
    bar = progress(total=training.steps, desc="visual tokenizer", unit="step")
    for step in range(training.steps):
        if step == warmup:
            tokenizer = _with_measured_amplitudes(tokenizer, patches_NhwP[:MEASURED_PICTURES])
        pick = torch.randint(len(patches_NhwP), (training.batch_size,), generator=generator)
        loss, error = _step_loss(tokenizer, patches_NhwP[pick], training, generator, quantised=step >= warmup)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        recent += (error - recent) / min(step + 1, 100)
        bar.update()
    bar.close()
    tokenizer.eval()
    health = {
        "train_pictures": len(pixels_NHW3), "steps": training.steps, "train_error": round(recent, 5),
        "amplitudes": [round(amplitude, 4) for amplitude in tokenizer.config.amplitudes],
    }  # fmt: skip
    return tokenizer, health


def _stacked(pictures: Iterable[np.ndarray], config: PatchVisualTokenizerConfig) -> np.ndarray:
    frames = [array[None] if array.ndim == 3 else array for array in pictures]
    shapes = {frame.shape[1:] for frame in frames}
    if shapes - {(config.image_size, config.image_size, 3)}:
        raise DataError(
            f"visual tokenizer: pictures of shapes {sorted(shapes)}; all must be [{config.image_size}, "
            f"{config.image_size}, 3]"
        )
    if not frames:
        raise DataError("visual tokenizer: no pictures to train on")
    return np.concatenate(frames)


def measured_amplitudes(latent_NhwD: torch.Tensor, quantizer: MultiScaleBits) -> tuple[float, ...]:
    """For each scale the mean absolute residual of latents [N, h, w, D], which is the best constant for its signs."""
    total = torch.zeros_like(latent_NhwD)
    amplitudes: tuple[float, ...] = ()
    for scale in range(len(quantizer.scales)):
        residual = quantizer.down(latent_NhwD - total, scale)
        amplitudes += (float(residual.abs().mean()),)
        total = total + quantizer.up(torch.where(residual >= 0, amplitudes[-1], -amplitudes[-1]))
    return amplitudes


@torch.no_grad()
def _with_measured_amplitudes(tokenizer: PatchVisualTokenizer, patches_NhwP: torch.Tensor) -> PatchVisualTokenizer:
    """The same modules (and parameters) under a config with amplitudes that fit the latents found so far."""
    tokenizer.eval()
    amplitudes = measured_amplitudes(tokenizer.encoder(patches_NhwP), tokenizer.quantizer)
    tokenizer.config = dataclasses.replace(tokenizer.config, amplitudes=amplitudes)
    tokenizer.quantizer = dataclasses.replace(tokenizer.quantizer, amplitudes=amplitudes)
    return tokenizer.train()


def _step_loss(
    tokenizer: PatchVisualTokenizer,
    patches_NhwP: torch.Tensor,
    training: VisualTrainingConfig,
    generator: torch.Generator,
    quantised: bool,
) -> tuple[torch.Tensor, float]:
    latent = tokenizer.encoder(patches_NhwP)
    weight_N = torch.ones(len(latent))
    commitment = latent.new_zeros(())
    if quantised:
        feature, weight_N, total = _quantised(latent, tokenizer.quantizer, training, generator)
        commitment = (latent - total).square().mean()
    else:
        feature = latent + training.noise * torch.randn(latent.shape, generator=generator)
    error = tokenizer.decoder(feature) - patches_NhwP
    error_N = error.square().mean(dim=(1, 2, 3)) + training.absolute_weight * error.abs().mean(dim=(1, 2, 3))
    loss = (weight_N * error_N).mean()
    return loss + training.commitment * commitment, float(loss.detach())


def _quantised(
    latent: torch.Tensor, quantizer: MultiScaleBits, training: VisualTrainingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(feature with a straight-through gradient, loss weight per picture, the sum of all scales)."""
    with torch.no_grad():
        codes = quantizer.encode(latent)
        read = [
            torch.where(torch.rand(bits.shape, generator=generator) < training.flip_rate, 1 - bits, bits)
            for bits in codes.targets
        ]
        partial_SNhwD = partial_sums(quantizer, read)
        num_scales = len(quantizer.scales)
        coarse_N = torch.rand(len(latent), generator=generator) < training.coarse_share
        last_N = torch.randint(max(1, num_scales - 1), (len(latent),), generator=generator)
        last_N = torch.where(coarse_N, last_N, num_scales - 1)
        chosen = partial_SNhwD[last_N, torch.arange(len(latent))]
        weight_N = torch.where(coarse_N, training.coarse_weight, 1.0)
    return latent + (chosen - latent).detach(), weight_N, codes.total


def partial_sums(quantizer: MultiScaleBits, bits: list[torch.Tensor]) -> torch.Tensor:
    """float32 [S, N, h, w, D]: the accumulated feature after each scale of bits 0/1, per scale [N, h_k, w_k, D]."""
    parts = [quantizer.contribution(scale_bits, scale) for scale, scale_bits in enumerate(bits)]
    return torch.stack(parts).cumsum(dim=0)


@torch.no_grad()
def visual_health(tokenizer: PatchVisualTokenizer, pixels_NHW3: np.ndarray) -> dict[str, Any]:
    """Numbers on pictures uint8 [N, H, W, 3].

    psnr_db_by_scales: dB after decoding the first 1, 2, ... scales; psnr_db: after all. bits_per_picture;
    bit_entropy_by_scale: mean over positions and bits of the entropy of one bit over the pictures (1 = even);
    bits_used: share of all bits that are not constant (entropy above 0.01).
    """
    latent = tokenizer.encode(pixels_NHW3)
    codes = tokenizer.quantizer.encode(latent)
    true = torch.as_tensor(pixels_NHW3).double()
    psnr = []
    for feature in partial_sums(tokenizer.quantizer, codes.targets):
        squared = float((tokenizer.decode(feature).double() - true).square().mean())
        psnr.append(round(10 * math.log10(255.0**2 / max(squared, 1e-12)), 2))
    entropies = [_bit_entropy(bits.double().mean(dim=0)) for bits in codes.targets]
    used = torch.cat([(entropy > 0.01).flatten() for entropy in entropies])
    return {
        "psnr_db": psnr[-1], "psnr_db_by_scales": psnr, "bits_per_picture": tokenizer.config.bits_per_picture,
        "bits_used": round(float(used.double().mean()), 4),
        "bit_entropy_by_scale": [round(float(entropy.mean()), 4) for entropy in entropies],
    }  # fmt: skip


def _bit_entropy(share: torch.Tensor) -> torch.Tensor:
    share = share.clamp(1e-9, 1 - 1e-9)
    return -(share * share.log2() + (1 - share) * (1 - share).log2())

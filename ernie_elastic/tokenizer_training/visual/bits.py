"""Bits inside the training of the convolutional visual tokenizer: what the decoder reads, and statistics of the signs.

Contract: pure functions of (latents, quantiser, settings, generator). Residuals keep their gradient to the latents, the
history that they are taken against does not. Statistics that decide amplitudes are summed over ranks, so that ranks
agree. peer: Infinity and BSQ (signs with a straight-through gradient, entropy of single bits); ours: one amplitude per
scale, wrong bits and missing bits or scales in what the decoder reads.

Shape letters: N pictures or clips, f latent frames, B = N * f, h/w latent grid, D bits, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ernie_elastic.tokenizer_training.visual.settings import ConvVisualTrainingConfig
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.visual.conv_layers import LatentNorm
from ernie_elastic.training.ranks import all_reduce_sum

SHARPNESS = 2.0  # of a soft bit: a residual of one amplitude is 88 % sure
FOLLOW = 0.02  # share of a new measurement in an amplitude


@dataclass
class Found:
    """One quantisation. residuals: per scale float32 [B, h_k, w_k, D], with gradient; bits: 0/1, same shapes.
    total_BhwD: the sum of all scales, without gradient."""

    residuals: list[torch.Tensor]
    bits: list[torch.Tensor]
    total_BhwD: torch.Tensor


@dataclass
class ReadBits:
    """feature_NfhwD: what the decoder reads. weight_N: of the losses; 1 for those that are read whole.
    found: None while noise stands for the quantiser."""

    feature_NfhwD: torch.Tensor
    weight_N: torch.Tensor
    found: Found | None


@torch.no_grad()
def follow_latents(normalise: LatentNorm, raw_NDfhw: torch.Tensor, share: float) -> None:
    """Move the constants of `normalise` towards mean and variance of latents [N, D, f, h, w] of all ranks."""
    values = raw_NDfhw.movedim(1, -1).flatten(0, -2).double()
    count = values.new_full((1, values.shape[1]), len(values))
    sums = all_reduce_sum(torch.cat([values.sum(0, keepdim=True), values.square().sum(0, keepdim=True), count]))
    mean_D, square_D = sums[0] / sums[2], sums[1] / sums[2]
    normalise.follow(mean_D, (square_D - mean_D.square()).clamp_min(0), share)


def quantise(latent_BhwD: torch.Tensor, quantizer: MultiScaleBits) -> Found:
    """The residual signs of latents [B, h, w, D]: the targets and total of `quantizer.encode`, with residuals."""
    total = torch.zeros_like(latent_BhwD)
    residuals, bits = [], []
    for scale in range(len(quantizer.scales)):
        residuals.append(quantizer.down(latent_BhwD - total, scale))
        bits.append((residuals[-1].detach() >= 0).to(latent_BhwD.dtype))
        total = total + quantizer.contribution(bits[-1], scale)
    return Found(residuals, bits, total)


def read_bits(
    latent_NfhwD: torch.Tensor,
    found: Found,
    quantizer: MultiScaleBits,
    training: ConvVisualTrainingConfig,
    bit_series: Sequence[int],
    generator: torch.Generator,
) -> ReadBits:
    """Bits [N, f, h, w, D] as the decoder reads them, with a straight-through gradient to the latents.

    flip_rate of the bits are wrong; coarse_share of the pictures end at a random scale before the last, low_bit_share
    have one of the smaller bit counts.
    """
    num_clips, latent_frames = latent_NfhwD.shape[:2]
    place, num_scales = latent_NfhwD.device, len(found.bits)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(place)

    with torch.no_grad():
        read = found.bits
        if training.flip_rate:
            read = [torch.where(draw(*bits.shape) < training.flip_rate, 1 - bits, bits) for bits in found.bits]
        partial = torch.stack([quantizer.contribution(bits, scale) for scale, bits in enumerate(read)]).cumsum(dim=0)
        coarse_N = (draw(num_clips) < training.coarse_share) & (num_scales > 1)
        last_N = torch.where(coarse_N, (draw(num_clips) * (num_scales - 1)).long(), num_scales - 1)
        partial_SNfhwD = partial.unflatten(1, (num_clips, latent_frames))
        chosen_NfhwD = partial_SNfhwD[last_N, torch.arange(num_clips, device=place)]
        low_N = (draw(num_clips) < training.low_bit_share) & (len(bit_series) > 1)
        smaller = torch.tensor(bit_series, device=place)[(draw(num_clips) * max(1, len(bit_series) - 1)).long()]
        count_N = torch.where(low_N, smaller, bit_series[-1])
        keep_ND = (torch.arange(latent_NfhwD.shape[-1], device=place) < count_N[:, None]).to(latent_NfhwD.dtype)
        weight_N = torch.where(coarse_N, training.coarse_weight, torch.where(low_N, training.low_bit_weight, 1.0))
        whole_N = ~(coarse_N | low_N)
        weight_N = torch.where(whole_N, 1.0, weight_N)
    through_NfhwD = latent_NfhwD + (chosen_NfhwD - latent_NfhwD).detach()
    return ReadBits(through_NfhwD * keep_ND[:, None, None, None], weight_N, found)


def bit_entropies(found: Found, amplitudes: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean entropy of the soft bits, mean entropy of their batch means), each a scalar in 0..1, a mean over scales.

    The soft bit of a residual r is sigmoid(2 r / amplitude). The first is low when bits are sure, the second high when
    each bit is one as often as zero. peer: the factorised entropy of BSQ and Infinity.
    """
    single, batch = [], []
    for residual, amplitude in zip(found.residuals, amplitudes, strict=True):
        logits = (SHARPNESS / max(amplitude, 1e-6)) * residual
        soft = torch.sigmoid(logits)
        # -p log p - (1 - p) log(1 - p), in a form whose gradient stays finite for sure bits
        single.append((F.softplus(logits) - soft * logits).mean())
        share = soft.mean(dim=(0, 1, 2)).clamp(1e-6, 1 - 1e-6)
        batch.append(-(share * share.log() + (1 - share) * (1 - share).log()).mean())
    unit = 1.4426950408889634  # nats to bits
    return torch.stack(single).mean() * unit, torch.stack(batch).mean() * unit


@torch.no_grad()
def measure_amplitudes(latent_BhwD: torch.Tensor, quantizer: MultiScaleBits) -> tuple[float, ...]:
    """For each scale the mean absolute residual of latents [B, h, w, D] of all ranks: what suits its signs best."""
    total = torch.zeros_like(latent_BhwD)
    amplitudes: list[float] = []
    for scale in range(len(quantizer.scales)):
        residual = quantizer.down(latent_BhwD - total, scale)
        amplitudes += _means([residual])
        total = total + quantizer.up(torch.where(residual >= 0, amplitudes[-1], -amplitudes[-1]))
    return tuple(amplitudes)


@torch.no_grad()
def follow_amplitudes(found: Found, quantizer: MultiScaleBits) -> tuple[float, ...]:
    """The quantiser's amplitudes moved a little towards the mean absolute residuals of this batch of all ranks."""
    return tuple(
        amplitude + FOLLOW * (mean - amplitude)
        for amplitude, mean in zip(quantizer.amplitudes, _means(found.residuals), strict=True)
    )


def _means(residuals: list[torch.Tensor]) -> list[float]:
    """Mean absolute value over all ranks, which may have batches of different sizes."""
    sums = torch.stack([residual.abs().double().sum() for residual in residuals])
    counts = torch.tensor([float(residual.numel()) for residual in residuals], dtype=sums.dtype, device=sums.device)
    both = all_reduce_sum(torch.cat([sums, counts]))
    return (both[: len(residuals)] / both[len(residuals) :]).tolist()

"""Bits in the training of the convolutional visual tokenizer: what is read, gradients, amplitudes, entropies."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ernie_elastic.tokenizer_training.visual.bits import (
    bit_entropies,
    follow_amplitudes,
    follow_latents,
    measure_amplitudes,
    quantise,
    read_bits,
)
from ernie_elastic.tokenizer_training.visual.settings import ConvVisualTrainingConfig
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.visual.conv_layers import LatentNorm

TRAINING = ConvVisualTrainingConfig()
QUANTIZER = MultiScaleBits(((1, 1), (2, 2), (4, 4)), (0.3, 0.4, 0.8))


def latents(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 4, 4, 12, generator=torch.Generator().manual_seed(3))


def test_quantise_is_what_the_quantiser_encodes_and_keeps_gradients() -> None:
    latent = latents().requires_grad_()
    found, codes = quantise(latent, QUANTIZER), QUANTIZER.encode(latent.detach())
    assert all(torch.equal(a, b) for a, b in zip(found.bits, codes.targets, strict=True))
    assert torch.equal(found.total_BhwD, codes.total) and not found.total_BhwD.requires_grad
    (gradient,) = torch.autograd.grad(found.residuals[0].sum(), latent)
    torch.testing.assert_close(gradient, torch.full_like(latent, 1 / 16))


def test_measured_amplitudes_fit_and_are_followed() -> None:
    latent = latents(50)
    amplitudes = measure_amplitudes(latent, QUANTIZER)
    error = {
        factor: (MultiScaleBits(QUANTIZER.scales, tuple(a * factor for a in amplitudes)).encode(latent).total - latent)
        .square().mean() for factor in (0.7, 1.0, 1.4)
    }  # fmt: skip
    assert error[1.0] < min(error[0.7], error[1.4])
    quantizer = QUANTIZER
    for _ in range(400):
        quantizer = dataclasses.replace(quantizer, amplitudes=follow_amplitudes(quantise(latent, quantizer), quantizer))
    np.testing.assert_allclose(quantizer.amplitudes, amplitudes, rtol=0.05)


def test_latents_are_made_even_by_the_statistics_of_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = 5 + 0.1 * torch.randn(8, 12, 1, 4, 4, generator=generator)  # all signs equal
    normalise, unit = LatentNorm(12), LatentNorm(12, unit_length=True)
    assert bool((normalise(raw) > 0).all())
    follow_latents(normalise, raw, 1.0)
    even = normalise(raw)
    assert float((even > 0).float().mean(dim=(0, 2, 3, 4)).sub(0.5).abs().max()) < 0.15
    torch.testing.assert_close(even.square().mean(dim=(0, 2, 3, 4)), torch.ones(12), atol=1e-3, rtol=0)
    unit.load_state_dict(normalise.state_dict())
    torch.testing.assert_close(unit(raw).square().mean(dim=1), torch.ones(8, 1, 4, 4), atol=1e-3, rtol=0)
    assert torch.equal(unit(raw) > 0, even > 0), "the length changes no bit of a single scale"
    before = normalise.mean_D.clone()
    follow_latents(normalise, raw + 1, 0.25)
    torch.testing.assert_close(normalise.mean_D, before + 0.25)


def test_what_is_read_is_cut_flipped_and_weighted() -> None:
    latent = latents(200).view(100, 2, 4, 4, 12)
    found = quantise(latent.flatten(0, 1), QUANTIZER)
    generator = torch.Generator().manual_seed(0)
    settings = dataclasses.replace(TRAINING, coarse_share=0.5, low_bit_share=0.5, coarse_weight=0.3, low_bit_weight=0.6)
    read = read_bits(latent, found, QUANTIZER, settings, (4, 8, 12), generator)
    assert set(np.round(read.weight_N.tolist(), 3)) == {0.3, 0.6, 1.0}
    whole = read.weight_N == 1
    assert 10 < int(whole.sum()) < 40
    total = found.total_BhwD.view_as(latent)
    torch.testing.assert_close(read.feature_NfhwD[whole], total[whole])
    low = read.weight_N == torch.tensor(0.6)
    cut = read.feature_NfhwD[low]
    assert not cut[..., 8:].any() and cut[..., :4].all() and cut[..., 4:8].any() and not cut[..., 4:8].all()
    one_scale = QUANTIZER.contribution(found.bits[0], 0).view_as(latent)
    coarse = read.weight_N == torch.tensor(0.3)
    kept = read.feature_NfhwD[coarse] != 0
    same = ((read.feature_NfhwD[coarse] - one_scale[coarse]).abs() < 1e-5) | ~kept
    assert same.flatten(1).all(dim=1).any() and not same.flatten(1).all(dim=1).all()
    flips = dataclasses.replace(settings, coarse_share=0.0, low_bit_share=0.0, flip_rate=0.1)
    flipped = read_bits(latent, found, QUANTIZER, flips, (12,), generator).feature_NfhwD
    # The last scale's flips alone move a value by twice its amplitude or more.
    moved = float(((flipped - total).abs() > 1.0).double().mean())
    assert 0.05 < moved < 0.4


def test_the_gradient_of_what_is_read_goes_straight_to_the_latent() -> None:
    latent = latents(4).view(4, 1, 4, 4, 12).requires_grad_()
    settings = dataclasses.replace(TRAINING, coarse_share=0.0, low_bit_share=1.0)
    read = read_bits(latent, quantise(latent.flatten(0, 1), QUANTIZER), QUANTIZER, settings, (4, 12), torch.Generator())
    (gradient,) = torch.autograd.grad(read.feature_NfhwD.sum(), latent)
    assert torch.equal(gradient[..., :4], torch.ones_like(gradient[..., :4])) and not gradient[..., 4:].any()


def test_entropies_tell_sure_bits_from_even_ones() -> None:
    sign = torch.where(latents() > 0, 1.0, -1.0)
    sure = bit_entropies(quantise(sign * 50, QUANTIZER), QUANTIZER.amplitudes)
    assert float(sure[0]) < 0.2 and float(sure[1]) > 0.7
    unsure = bit_entropies(quantise(sign * 1e-4, MultiScaleBits(((4, 4),), (1.0,))), (1.0,))
    assert float(unsure[0]) > 0.999
    always = bit_entropies(quantise(torch.full_like(sign, 50.0), MultiScaleBits(((4, 4),), (1.0,))), (1.0,))
    assert float(always[1]) < 0.01

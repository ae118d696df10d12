"""The bit quantiser: flips, re-quantised targets, replay; the residual code books."""

from __future__ import annotations

import pytest
import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizers.quantizers import MultiScaleBits, rvq_decode, rvq_encode

SCALES = ((1, 1), (2, 2), (4, 4), (4, 4))
QUANTIZER = MultiScaleBits(SCALES, (0.3, 0.4, 0.8, 0.4))


def latents(count: int = 3, bits: int = 8) -> torch.Tensor:
    return torch.randn(count, 4, 4, bits)


def test_zero_flip_rate_equals_no_flips_to_the_bit() -> None:
    latent = latents()
    plain = QUANTIZER.encode(latent)
    zero = QUANTIZER.encode(latent, torch.zeros(3, 4), torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(plain.targets, zero.targets, strict=True))
    assert torch.equal(plain.total, zero.total)
    for a, b in zip(plain.inputs[1:], zero.inputs[1:], strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_flips_leave_their_own_scale_and_change_later_targets() -> None:
    latent = latents()
    rates = torch.zeros(3, 4)
    rates[1, 1] = 1.0  # every bit of scale 1 of the second item
    plain = QUANTIZER.encode(latent)
    flipped = QUANTIZER.encode(latent, rates, torch.Generator().manual_seed(1))
    for scale in (0, 1):  # the target of a flipped scale is the true one: only what later scales read changes
        assert torch.equal(plain.targets[scale], flipped.targets[scale])
    for scale in (2, 3):
        assert not torch.equal(plain.targets[scale][1], flipped.targets[scale][1])
        assert torch.equal(plain.targets[scale][[0, 2]], flipped.targets[scale][[0, 2]])
    # Re-quantised targets repair: they end nearer to the latent than the old targets after the same mistake do.
    mistaken = QUANTIZER.replay([plain.targets[0], 1 - plain.targets[1], plain.targets[2], plain.targets[3]])
    error = lambda total: float((total[1] - latent[1]).square().mean())
    assert error(flipped.total) < error(mistaken.total)


def test_targets_are_signs_of_what_is_left_and_error_falls_with_each_scale() -> None:
    latent = latents(64)
    codes = QUANTIZER.encode(latent)
    total = torch.zeros_like(latent)
    errors = [float(latent.square().mean())]
    for scale in range(4):
        assert torch.equal(codes.targets[scale], (QUANTIZER.down(latent - total, scale) >= 0).float())
        if scale:
            assert torch.equal(codes.inputs[scale], QUANTIZER.down(total, scale))
        total = total + QUANTIZER.contribution(codes.targets[scale], scale)
        errors.append(float((latent - total).square().mean()))
    assert torch.equal(codes.total, total)
    assert errors[3] < errors[0] and errors[4] < errors[3]


def test_replay_of_decided_bits_equals_encode() -> None:
    codes = QUANTIZER.encode(latents())
    again = QUANTIZER.replay(codes.targets)
    assert torch.equal(again.total, codes.total)
    assert all(torch.equal(a, b) for a, b in zip(again.inputs[1:], codes.inputs[1:], strict=True))


def test_scales_and_amplitudes_must_match() -> None:
    with pytest.raises(ConfigError, match="4 scales but 2"):
        MultiScaleBits(SCALES, (1.0, 2.0))


def test_residual_codes_choose_the_nearest_row_of_each_level() -> None:
    books = torch.randn(3, 16, 5)
    features = torch.randn(40, 5)
    codes = rvq_encode(features, books)
    residual = features
    for level in range(3):
        distance = (residual[:, None] - books[level]).square().sum(dim=2)
        assert torch.equal(codes[:, level], distance.argmin(dim=1))
        residual = residual - books[level][codes[:, level]]
    torch.testing.assert_close(rvq_decode(codes, books), features - residual)

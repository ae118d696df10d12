"""Causal convolutions: pieces give what the whole gives, and nothing looks ahead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.streaming_conv import (
    Causal,
    CausalConv1d,
    CausalConvTranspose1d,
    CausalResidual,
    CausalSequence,
    Pointwise,
)  # fmt: skip

DOWN = 6  # what a piece must be a multiple of


def stack() -> CausalSequence:
    """Down by 6 and up by 6, with dilations, a kernel that is no multiple of its stride, and residual units."""
    torch.manual_seed(1)
    unit = CausalResidual(CausalSequence([Pointwise(nn.ELU()), CausalConv1d(4, 4, 3, dilation=5)]))
    return CausalSequence([
        CausalConv1d(1, 4, 7), unit, CausalConv1d(4, 4, 5, 3), CausalConv1d(4, 4, 2, 2), Pointwise(nn.ELU()),
        CausalConvTranspose1d(4, 4, 2, 2), CausalConvTranspose1d(4, 4, 7, 3), CausalConv1d(4, 2, 3, dilation=2),
    ])  # fmt: skip


def in_pieces(layer: Causal, x_NCT: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    state, outputs = None, []
    for piece in x_NCT.split(lengths, dim=2):
        y, state = layer.step(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))
def test_any_cut_gives_the_whole(steps: list[int]) -> None:
    layer, x = stack(), torch.randn(2, 1, DOWN * sum(steps), generator=torch.Generator().manual_seed(0))
    whole = layer(x)
    assert whole.shape == (2, 2, x.shape[2])
    torch.testing.assert_close(in_pieces(layer, x, [DOWN * n for n in steps]), whole, atol=1e-5, rtol=0)


def test_nothing_looks_ahead_and_the_past_matters() -> None:
    layer, x = stack(), torch.randn(1, 1, 10 * DOWN)
    changed = x.clone()
    changed[:, :, 5 * DOWN :] += 1.0
    before, after = layer(x), layer(changed)
    assert torch.equal(before[:, :, : 5 * DOWN], after[:, :, : 5 * DOWN])
    assert not torch.allclose(before[:, :, 5 * DOWN :], after[:, :, 5 * DOWN :])
    changed = x.clone()
    changed[:, :, : 5 * DOWN] += 1.0
    assert not torch.allclose(layer(changed)[:, :, 5 * DOWN : 6 * DOWN], before[:, :, 5 * DOWN : 6 * DOWN])


def test_two_streams_share_a_layer() -> None:
    layer, first, second = stack(), torch.randn(1, 1, 4 * DOWN), torch.randn(1, 1, 4 * DOWN)
    states: list = [None, None]
    found: list[list[torch.Tensor]] = [[], []]
    for start in range(0, 4 * DOWN, 2 * DOWN):
        for index, x in enumerate((first, second)):
            y, states[index] = layer.step(x[:, :, start : start + 2 * DOWN], states[index])
            found[index].append(y)
    for x, outputs in zip((first, second), found, strict=True):
        torch.testing.assert_close(torch.cat(outputs, dim=2), layer(x), atol=1e-5, rtol=0)


def test_the_convolutions_are_torchs_own_with_zeros_before() -> None:
    x = torch.randn(2, 3, 12)
    conv = CausalConv1d(3, 5, 4, 2)
    expected = nn.functional.conv1d(nn.functional.pad(x, (2, 0)), conv.conv.weight, conv.conv.bias, stride=2)
    torch.testing.assert_close(conv(x), expected)
    up = CausalConvTranspose1d(3, 5, 7, 3)
    expected = nn.functional.conv_transpose1d(x, up.conv.weight, up.bias_D, stride=3)[:, :, :36]
    torch.testing.assert_close(up(x), expected)


def test_signals_keep_their_size_at_the_start() -> None:
    x = torch.randn(4, 16, 400)
    for layer in (CausalConv1d(16, 32, 8, 4), CausalConvTranspose1d(16, 32, 8, 4)):
        assert float(layer(x)[:, :, 8:].detach().std()) == pytest.approx(1.0, abs=0.15)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="kernel 3 with dilation 1 is shorter than stride 4"):
        CausalConv1d(1, 1, 3, 4)
    with pytest.raises(ConfigError, match="kernel 3 is shorter than stride 4"):
        CausalConvTranspose1d(1, 1, 3, 4)
    with pytest.raises(DataError, match="piece of 7 places is no multiple of the stride 2"):
        CausalConv1d(1, 1, 2, 2)(torch.randn(1, 1, 7))

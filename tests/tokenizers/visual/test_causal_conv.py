"""Causal convolutions of clips: nothing looks ahead, pieces give the whole, a picture is a clip of one frame."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.visual.causal_conv import (
    Causal,
    CausalConv3d,
    CausalSequence,
    FrameNorm,
    Frames,
    RepeatFrames,
    merge_frames,
    split_frames,
)


def clip(frames: int, channels: int = 3, num_clips: int = 2) -> torch.Tensor:
    return torch.randn(num_clips, channels, frames, 6, 8, generator=torch.Generator().manual_seed(frames))


def in_pieces(layer: Causal, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    assert sum(lengths) == x.shape[2]
    state, found = None, []
    for part in x.split(lengths, dim=2):
        y, state = layer.step(part, state)
        found.append(y)
    return torch.cat(found, dim=2)


def test_merging_frames_keeps_every_frame() -> None:
    x = clip(3)
    merged = merge_frames(x)
    assert torch.equal(merged[4], x[1, :, 1]) and torch.equal(split_frames(merged, 2), x)


def test_one_temporal_slice_is_conv2d_of_every_frame() -> None:
    layer, x = CausalConv3d(3, 5, 1, stride=2), clip(4)
    expected = F.conv2d(x[1, :, 2][None], layer.weight_DCTHW[:, :, 0], layer.bias_D, 2, 1)
    torch.testing.assert_close(layer(x)[1, :, 2][None], expected)
    assert layer(x).shape == (2, 5, 4, 3, 4)


def test_the_first_frame_is_repeated_in_front() -> None:
    layer, x = CausalConv3d(3, 5, 3), clip(4)
    padded = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
    torch.testing.assert_close(layer(x), F.conv3d(padded, layer.weight_DCTHW, layer.bias_D, padding=(0, 1, 1)))
    torch.testing.assert_close(layer(x)[:, :, :1], layer(x[:, :, :1]))  # a picture, by the folded kernel


@pytest.mark.parametrize("time_stride", [1, 2])
@pytest.mark.parametrize("kernel_time", [2, 3, 4])
def test_pieces_give_the_whole(kernel_time: int, time_stride: int) -> None:
    layer, x = CausalConv3d(3, 4, kernel_time, 2, time_stride), clip(9)
    whole = layer(x)
    assert whole.shape[2] == 1 + 8 // time_stride
    for lengths in ([1, 8], [3, 2, 4], [1, 2, 2, 2, 2], [7, 2]):
        torch.testing.assert_close(in_pieces(layer, x, lengths), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("time_stride", [1, 2])
def test_an_output_frame_depends_on_frames_up_to_its_own(time_stride: int) -> None:
    layer, x = CausalConv3d(3, 4, 3, 1, time_stride), clip(9).requires_grad_()
    for place in range(1 + 8 // time_stride):
        (gradient,) = torch.autograd.grad(layer(x)[:, :, place].square().sum(), x)
        reached = gradient.abs().sum(dim=(0, 1, 3, 4)) > 0
        last = place * time_stride
        assert reached.tolist() == [last - 2 <= frame <= last for frame in range(9)]


def test_repeating_frames_is_the_inverse_of_grouping_them() -> None:
    x = clip(3)
    assert torch.equal(RepeatFrames()(x), x[:, :, [0, 1, 1, 2, 2]])
    assert torch.equal(in_pieces(RepeatFrames(), x, [1, 2]), x[:, :, [0, 1, 1, 2, 2]])


def test_the_norm_sees_one_place_of_one_frame() -> None:
    norm, x = FrameNorm(3), clip(4)
    changed = x.clone()
    changed[:, :, 2, 1, 1] *= 3.0
    torch.testing.assert_close(norm(changed), norm(x), atol=1e-4, rtol=1e-4)  # a scale of one place goes away
    torch.testing.assert_close(norm(x).square().mean(dim=1), torch.ones(2, 4, 6, 8), atol=1e-3, rtol=1e-3)


def test_a_stack_of_strides_in_pieces_gives_the_whole() -> None:
    layer = CausalSequence(
        [
            CausalConv3d(3, 4, 3, 2, 2),
            Frames(FrameNorm(4)),
            CausalConv3d(4, 4, 3),
            RepeatFrames(),
            CausalConv3d(4, 2, 3),
        ]
    )
    x = clip(9)
    whole = layer(x)
    assert whole.shape == (2, 2, 9, 3, 4)
    for lengths in ([1, 8], [5, 4], [3, 2, 2, 2]):
        torch.testing.assert_close(in_pieces(layer, x, lengths), whole, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="shorter than the stride of 2"):
        CausalConv3d(3, 4, 1, time_stride=2)
    with pytest.raises(DataError, match=r"4 frames; it must be 1 \+ a multiple of the time stride 2"):
        CausalConv3d(3, 4, 3, time_stride=2)(clip(4))
    layer = CausalConv3d(3, 4, 3, time_stride=2)
    _, state = layer.step(clip(3), None)
    with pytest.raises(DataError, match="3 frames; it must be a multiple of the time stride 2"):
        layer.step(clip(3), state)

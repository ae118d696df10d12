"""Encoder and decoder of the convolutional visual tokenizer: residual blocks at every level, causal in time.

Contract: both are `Causal` layers, so clips are coded whole or in pieces; nothing attends, and norms see one place of
one frame, so any picture size that the stride divides works. paper: section 2.2 (causal convolutions); ours: the
layout: pixels are gathered into blocks first (a convolution of full-size pixels costs as much as all the rest), and
temporal strides lie in the deepest levels.

Shape letters: N clips, C/D channels, F frames, H/W pixels, h/w latent grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.tokenizers.visual.causal_conv import (
    Causal,
    CausalConv3d,
    CausalResidual,
    CausalSequence,
    FrameNorm,
    Frames,
    RepeatFrames,
    StreamState,
    merge_frames,
    split_frames,
)

QUIET_START = 0.2  # of a residual branch and of the pixels: deep stacks start near the identity, pictures near grey


class Gather(nn.Module):
    """Blocks of pixels to channels: [N, C, F, H, W] to [N, C * size * size, F, H / size, W / size]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x_NCFHW: torch.Tensor) -> torch.Tensor:
        """[N, C, F, H, W] to [N, C * size * size, F, H / size, W / size]."""
        return split_frames(F.pixel_unshuffle(merge_frames(x_NCFHW), self.size), len(x_NCFHW))


class Spread(nn.Module):
    """Inverse of `Gather`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x_NCFHW: torch.Tensor) -> torch.Tensor:
        """[N, C * size * size, F, h, w] to [N, C, F, h * size, w * size]."""
        return split_frames(F.pixel_shuffle(merge_frames(x_NCFHW), self.size), len(x_NCFHW))


class Halve(Causal):
    """Half the sides, and one frame for time_stride of them: a convolution beside a fixed path.

    The fixed path gathers blocks of two by two and takes means of neighbouring channels; of frames it takes the last of
    each group. background: shortcuts of deep compression autoencoders; ours: without them a training of minutes spends
    most of its steps on finding what a mean of pixels is. 4 * channels_in must be a multiple of channels_out.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel_time: int, time_stride: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels_in, channels_out, kernel_time, 2, time_stride)
        self.channels_out, self.gather = channels_out, Gather(2)

    def step(self, x_NCFHW: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """[N, C, F, H, W] to [N, D, G, H / 2, W / 2]; the state is the convolution's."""
        y_NDGHW, after = self.conv.step(x_NCFHW, state)
        first = 0 if state is None else self.conv.time_stride - 1
        last_NCGHW = self.gather(x_NCFHW[:, :, first :: self.conv.time_stride])
        return y_NDGHW + last_NCGHW.unflatten(1, (self.channels_out, -1)).mean(dim=2), after


class Double(Causal):
    """Twice the sides: a convolution of the enlarged picture beside a fixed path, the inverse of `Halve` in space."""

    def __init__(self, channels_in: int, channels_out: int, kernel_time: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels_in, channels_out, kernel_time)
        self.repeats, self.spread = 4 * channels_out // channels_in, Spread(2)

    def step(self, x_NCFHW: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """[N, C, F, H, W] to [N, D, F, 2 * H, 2 * W]; the state is the convolution's."""
        large_BCHW = F.interpolate(merge_frames(x_NCFHW), scale_factor=2, mode="nearest")
        y_NDFHW, state = self.conv.step(split_frames(large_BCHW, len(x_NCFHW)), state)
        return y_NDFHW + self.spread(x_NCFHW.repeat_interleave(self.repeats, dim=1)), state


class LatentNorm(nn.Module):
    """Latents whose bits are even: minus the mean and over the deviation of each channel, which training measures.

    unit_length: then over the root mean square of the place's channels, as BSQ and Infinity have it (peer). ours: the
    first, since an encoder whose output hardly varies around a constant vector has constant signs and does not leave
    that state for long; and free lengths by default, which say how much contrast a place has.
    """

    mean_D: torch.Tensor
    deviation_D: torch.Tensor

    def __init__(self, num_bits: int, unit_length: bool = False) -> None:
        super().__init__()
        self.unit_length = unit_length
        self.register_buffer("mean_D", torch.zeros(num_bits))
        self.register_buffer("deviation_D", torch.ones(num_bits))

    def forward(self, x_NDfhw: torch.Tensor) -> torch.Tensor:
        """[N, D, f, h, w] to the same shape."""
        mean, deviation = (value.view(-1, 1, 1, 1) for value in (self.mean_D, self.deviation_D))
        even = (x_NDfhw - mean) / deviation
        if not self.unit_length:
            return even
        return even * torch.rsqrt(even.square().mean(dim=1, keepdim=True) + 1e-6)

    @torch.no_grad()
    def follow(self, mean_D: torch.Tensor, variance_D: torch.Tensor, share: float) -> None:
        """Move the constants [D] by `share` of the way towards measured ones [D]."""
        self.mean_D.lerp_(mean_D.to(self.mean_D), share)
        variance = self.deviation_D.square().lerp(variance_D.to(self.deviation_D), share)
        self.deviation_D.copy_(variance.clamp_min(1e-8).sqrt())


def residual_block(channels: int, kernel_time: int, norm: bool = False) -> Causal:
    """x + conv(silu(norm(conv(silu(norm(x)))))) of [N, C, F, H, W]; only its first kernel covers kernel_time frames.

    norm: False leaves the norms out.
    """
    last = _quieter(CausalConv3d(channels, channels, 1))
    layers = [*_active(channels, norm), CausalConv3d(channels, channels, kernel_time), *_active(channels, norm), last]
    return CausalResidual(CausalSequence(layers))


def make_encoder(
    stem: int, channels: tuple[int, ...], blocks: int, mid_blocks: int, num_bits: int, time_strides: tuple[int, ...],
    norm: bool = False,
) -> Causal:  # fmt: skip
    """Pixels [N, 3, F, H, W] in -1..1 to what `LatentNorm` makes latents [N, D, f, h, w] of.

    stem: side of the pixel blocks. channels: of each level, one halving between two. blocks: residual blocks of a
    level; mid_blocks: more of them at the deepest. time_strides: 1 or 2 for each halving. norm: of the residual blocks.
    """
    kernel_time = _kernel_time(time_strides)
    layers: list[Causal] = [Frames(Gather(stem)), CausalConv3d(3 * stem * stem, channels[0], 1)]
    for level, width in enumerate(channels):
        layers += [residual_block(width, kernel_time, norm) for _ in range(blocks)]
        if level < len(time_strides):
            layers.append(Halve(width, channels[level + 1], kernel_time, time_strides[level]))
    layers += [residual_block(channels[-1], kernel_time, norm) for _ in range(mid_blocks)]
    layers += [CausalConv3d(channels[-1], num_bits, 1)]
    return CausalSequence(layers)


def make_decoder(
    stem: int, channels: tuple[int, ...], blocks: int, mid_blocks: int, num_bits: int, time_strides: tuple[int, ...],
    norm: bool = False,
) -> Causal:  # fmt: skip
    """Features [N, D, f, h, w] to pixels [N, 3, F, H, W] around -1..1; arguments as in `make_encoder`."""
    kernel_time = _kernel_time(time_strides)
    layers: list[Causal] = [CausalConv3d(num_bits, channels[-1], kernel_time)]
    layers += [residual_block(channels[-1], kernel_time, norm) for _ in range(mid_blocks)]
    for level in reversed(range(len(channels))):
        layers += [residual_block(channels[level], kernel_time, norm) for _ in range(blocks)]
        if level:
            layers += [RepeatFrames()] if time_strides[level - 1] == 2 else []
            layers.append(Double(channels[level], channels[level - 1], kernel_time))
    # No norm at the end, as at the encoder's: it would take away how bright a place is.
    layers += [_quieter(CausalConv3d(channels[0], 3 * stem * stem, 1)), Frames(Spread(stem))]
    return CausalSequence(layers)


@torch.no_grad()
def _quieter(layer: CausalConv3d) -> CausalConv3d:
    layer.weight_DCTHW.mul_(QUIET_START)
    return layer


def _active(channels: int, norm: bool) -> list[Causal]:
    return [*([Frames(FrameNorm(channels))] if norm else []), Frames(nn.SiLU())]


def _kernel_time(time_strides: tuple[int, ...]) -> int:
    return 3 if any(stride > 1 for stride in time_strides) else 1

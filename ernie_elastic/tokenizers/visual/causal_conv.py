"""Convolutions of clips that never look ahead: coding a clip in pieces gives what coding it at once gives.

Contract: every layer is a `Causal` of `streaming_conv`: `step(x, state)` gives (y, next state), state None is the
start of a clip. What lies before the first frame is the first frame again, so that a picture is a clip of one frame and
looks like a still one. Output of frame t depends on frames up to t (of a temporal stride: the first frame alone, then
groups). Joined outputs of pieces equal those of the whole clip up to float rounding. Activations keep channels last in
memory (N, F, H, W, C), which is how CPUs and GPUs convolve fastest. paper: section 2.2 (causal 3-D convolutions, an
image is a one-frame video); peer: VideoAR (chunk by chunk with identical results, so no normalisation over time).

Shape letters: N clips, C/D channels, F/G frames in/out, H/W pixels, T kernel's frames, B = N times F pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.streaming_conv import Causal, CausalResidual, CausalSequence, StreamState, scaled_init

KERNEL = 3  # spatial side of every kernel
EPSILON = 1e-6  # of norms

__all__ = [
    "Causal",
    "CausalConv3d",
    "CausalResidual",
    "CausalSequence",
    "FrameNorm",
    "Frames",
    "RepeatFrames",
    "StreamState",
    "merge_frames",
    "split_frames",
]


def merge_frames(x_NCFHW: torch.Tensor) -> torch.Tensor:
    """Clips [N, C, F, H, W] as pictures [N * F, C, H, W]; no copy when channels lie last in memory."""
    return x_NCFHW.movedim(2, 1).flatten(0, 1)


def split_frames(x_BCHW: torch.Tensor, num_clips: int) -> torch.Tensor:
    """Inverse of `merge_frames`: pictures [N * F, C, H, W] as clips [N, C, F, H, W]."""
    return x_BCHW.unflatten(0, (num_clips, -1)).movedim(1, 2)


class CausalConv3d(Causal):
    """Convolution with kernel (T, 3, 3): [N, C, F, H, W] to [N, D, G, H / stride, W / stride].

    time_stride s: the first frame gives one output, each further group of s frames one more, so a clip begins with
    1 + a multiple of s frames, and a later piece has a multiple of s. With T = 1 it is a plain 2-D convolution of all
    frames. Raises ConfigError when T does not cover time_stride; `step` raises DataError for other numbers of frames.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel_time: int, stride: int = 1, time_stride: int = 1
    ) -> None:
        super().__init__()
        if kernel_time < max(1, time_stride):
            raise ConfigError(
                f"causal convolution: a kernel of {kernel_time} frames is shorter than the stride of {time_stride}; "
                f"make it at least {max(1, time_stride)}"
            )
        self.stride, self.time_stride = stride, time_stride
        self.remembered = kernel_time - time_stride
        self.weight_DCTHW = nn.Parameter(torch.empty(channels_out, channels_in, kernel_time, KERNEL, KERNEL))
        self.bias_D = nn.Parameter(torch.zeros(channels_out))
        scaled_init(self.weight_DCTHW, channels_in * kernel_time * KERNEL * KERNEL)

    @property
    def kernel_time(self) -> int:
        """T, frames that the kernel covers."""
        return self.weight_DCTHW.shape[2]

    def step(self, x_NCFHW: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """Output [N, D, G, H', W'] of a piece [N, C, F, H, W]; the state is its last T - s frames."""
        frames, first = x_NCFHW.shape[2], state is None
        if (frames - first) % self.time_stride or not frames:
            raise DataError(
                f"causal convolution: a piece of {frames} frames; it must be {'1 + ' * first}a multiple of the time "
                f"stride {self.time_stride}"
            )
        if self.kernel_time == 1:
            return self._flat(x_NCFHW, self.weight_DCTHW[:, :, 0]), () if first else state
        if first and frames == 1:
            # Every frame that the kernel sees is this one: one 2-D convolution, and bit for bit the 2-D tokenizer's
            # when all but the last slice are zero.
            held = x_NCFHW.expand(-1, -1, self.remembered, -1, -1)
            return self._flat(x_NCFHW, self.weight_DCTHW.sum(dim=2)), held
        before = x_NCFHW[:, :, :1].expand(-1, -1, self.kernel_time - 1, -1, -1) if first else state
        joined_NCFHW = torch.cat([before, x_NCFHW], dim=2).contiguous(memory_format=torch.channels_last_3d)
        strides = (self.time_stride, self.stride, self.stride)
        y_NDGHW = F.conv3d(joined_NCFHW, self.weight_DCTHW, self.bias_D, strides, (0, KERNEL // 2, KERNEL // 2))
        # A copy, since a slice would keep the whole piece in memory.
        return y_NDGHW, joined_NCFHW[:, :, joined_NCFHW.shape[2] - self.remembered :].clone()

    def _flat(self, x_NCFHW: torch.Tensor, weight_DCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = merge_frames(x_NCFHW).contiguous(memory_format=torch.channels_last)
        y_BDHW = F.conv2d(x_BCHW, weight_DCHW, self.bias_D, self.stride, KERNEL // 2)
        return split_frames(y_BDHW, len(x_NCFHW))


class FrameNorm(nn.Module):
    """Divides by the root mean square over the channels of one place of one frame; a learned scale per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale_C = nn.Parameter(torch.ones(channels))

    def forward(self, x_NCFHW: torch.Tensor) -> torch.Tensor:
        """[N, C, F, H, W] to the same shape."""
        return F.rms_norm(x_NCFHW.movedim(1, -1), self.scale_C.shape, self.scale_C, EPSILON).movedim(-1, 1)


class Frames(Causal):
    """A module that treats every frame alone, such as a norm or an activation, as a layer; it has no state."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def step(self, x_NCFHW: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """The module's output [N, D, F, H', W'] of [N, C, F, H, W]."""
        return self.module(x_NCFHW), ()


class RepeatFrames(Causal):
    """Every frame twice, the first frame of a clip once: 1 + F frames to 1 + 2 F."""

    def step(self, x_NCFHW: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """[N, C, F, H, W] to [N, C, G, H, W]; the state only says that the first frame is over."""
        twice_NCFHW = x_NCFHW.movedim(1, -1).repeat_interleave(2, dim=1).movedim(-1, 1)
        return twice_NCFHW[:, :, 1:] if state is None else twice_NCFHW, ()

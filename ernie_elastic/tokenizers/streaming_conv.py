"""Causal convolutions of sounds whose past is an explicit state: coding in pieces gives what coding at once gives.

Contract: every layer is a `Causal`. `step(x, state)` gives (y, next state); state None is the start of a sound, where
the past is zeros. `layer(x)` is `step(x, None)` without the state. For any cut of x in pieces whose lengths are
multiples of what the layers divide by, the joined outputs of `step` equal `layer(x)` up to float rounding. No output
looks ahead: y of place t depends on x of places up to t (of a stride s: up to the end of the group t). No layer keeps
anything between calls. peer: the codecs EnCodec and Mimi are causal; ours: the state goes in and comes out, so many
streams can share one module.

Shape letters: N sounds, C/D channels, T places in time, P remembered places, s stride.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ernie_elastic.errors import ConfigError, DataError

StreamState = Any  # nested tuples of tensors, one for each layer; None at the start of a sound


class Causal(nn.Module):
    """A layer of sounds [N, C, T] that reads only the present and the past."""

    def step(self, x_NCT: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """Output [N, D, T'] of the next piece of a sound [N, C, T], and the state after it."""
        raise NotImplementedError

    def forward(self, x_NCT: torch.Tensor) -> torch.Tensor:
        """Output [N, D, T'] of a whole sound [N, C, T]."""
        return self.step(x_NCT, None)[0]


class CausalConv1d(Causal):
    """Convolution with weight norm, padded on the left only: [N, C, T] to [N, D, T / stride].

    gain: size of the outputs at the start of training, as a share of the inputs'. Raises ConfigError when the kernel
    does not cover the stride. `step` raises DataError when T is no multiple of the stride.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, dilation: int = 1, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.remembered = (kernel - 1) * dilation + 1 - stride
        if self.remembered < 0:
            raise ConfigError(
                f"causal convolution: kernel {kernel} with dilation {dilation} is shorter than stride {stride}; "
                f"make the kernel at least {stride}"
            )
        self.stride = stride
        conv = nn.Conv1d(channels_in, channels_out, kernel, stride, dilation=dilation)
        scaled_init(conv.weight, channels_in * kernel, gain)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = weight_norm(conv)

    def step(self, x_NCT: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """Output [N, D, T / stride] of a piece [N, C, T]; the state is its last inputs [N, C, P]."""
        if x_NCT.shape[2] % self.stride:
            raise DataError(
                f"causal convolution: a piece of {x_NCT.shape[2]} places is no multiple of the stride {self.stride}"
            )
        if state is None:
            joined_NCT = F.pad(x_NCT, (self.remembered, 0))
        else:
            joined_NCT = torch.cat([state, x_NCT], dim=2)
        tail_NCP = joined_NCT[:, :, joined_NCT.shape[2] - self.remembered :]
        if not x_NCT.shape[2]:
            return x_NCT.new_zeros((len(x_NCT), self.conv.out_channels, 0)), tail_NCP
        return self.conv(joined_NCT), tail_NCP


class CausalConvTranspose1d(Causal):
    """Transposed convolution with weight norm: [N, C, T] to [N, D, T * stride]; what sticks out is the state.

    Raises ConfigError when the kernel is shorter than the stride, which would leave gaps.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        if kernel < stride:
            raise ConfigError(
                f"causal transposed convolution: kernel {kernel} is shorter than stride {stride} and leaves gaps; "
                f"make the kernel at least {stride}"
            )
        self.stride = stride
        self.remembered = kernel - stride
        conv = nn.ConvTranspose1d(channels_in, channels_out, kernel, stride, bias=False)
        scaled_init(conv.weight, channels_in * kernel // stride)
        self.conv = weight_norm(conv, dim=1)  # of a transposed convolution, the output channels are dimension 1
        self.bias_D = nn.Parameter(torch.zeros(channels_out))

    def step(self, x_NCT: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """Output [N, D, T * stride] of a piece [N, C, T]; the state is what it adds to later output [N, D, P]."""
        length = x_NCT.shape[2] * self.stride
        if not length:
            if state is None:
                state = x_NCT.new_zeros((len(x_NCT), len(self.bias_D), self.remembered))
            return x_NCT.new_zeros((len(x_NCT), len(self.bias_D), 0)), state
        whole_NDT = self.conv(x_NCT)
        if state is not None:
            whole_NDT = whole_NDT + F.pad(state, (0, whole_NDT.shape[2] - self.remembered))
        return whole_NDT[:, :, :length] + self.bias_D[:, None], whole_NDT[:, :, length:]


class Pointwise(Causal):
    """A function of every place alone, such as an activation: [N, C, T] to the same shape. It has no state."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def step(self, x_NCT: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """The function of [N, C, T], same shape; the state stays None."""
        return self.function(x_NCT), None


class CausalSequence(Causal):
    """Layers one after another: [N, C, T] to [N, D, T']. Its state is the tuple of theirs."""

    def __init__(self, layers: Sequence[Causal]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def step(self, x_NCT: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """Output [N, D, T'] of a piece [N, C, T], and every layer's state."""
        before = state if state is not None else (None,) * len(self.layers)
        after = []
        for layer, part in zip(self.layers, before, strict=True):
            x_NCT, part = layer.step(x_NCT, part)  # type: ignore[operator]
            after.append(part)
        return x_NCT, tuple(after)


class CausalResidual(Causal):
    """x + branch(x); the branch keeps the shape [N, C, T]. Its state is the branch's."""

    def __init__(self, branch: Causal) -> None:
        super().__init__()
        self.branch = branch

    def step(self, x_NCT: torch.Tensor, state: StreamState) -> tuple[torch.Tensor, StreamState]:
        """Output [N, C, T], same shape, of a piece [N, C, T], and the branch's state."""
        y_NCT, state = self.branch.step(x_NCT, state)
        return x_NCT + y_NCT, state


def scaled_init(weight: torch.Tensor, fan_in: int, gain: float = 1.0) -> None:
    """Draw a weight of any shape in place, so that outputs have about `gain` times the size of inputs.

    ours: torch's own start shrinks a signal threefold in energy at each layer; a decoder of twenty layers then starts
    silent, and a training of minutes spends them on becoming loud.
    """
    nn.init.normal_(weight, std=gain * fan_in**-0.5)

"""The network of the refiner: a small UNet of convolutions, steered by flow time and degradation level.

Contract: an output pixel depends on inputs within `Unet.reach` grid cells only, so a picture may be computed in tiles.
ours: hence no attention and no normalisation over space. The pixels of a factor x factor square are folded into the
channels of one cell, so that the network works on the low-resolution grid: a factor^2 of the time and memory is saved.

Shape letters: N pictures, H/W high-resolution pixels, h/w cells of the grid, C channels, E width of the embedding.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

FREQUENCIES = 16  # of each of the two numbers that steer; their highest has 1 / 64 of the range as its wave
NORM_FLOOR = 1e-6


class Steering(nn.Module):
    """Flow time and degradation level, both in 0..1, as one vector."""

    frequencies: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = 2 * math.pi * 2 ** torch.linspace(-2, 6, FREQUENCIES)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.hidden = nn.Linear(4 * FREQUENCIES, width)
        self.last = nn.Linear(width, width)

    def forward(self, time_N: torch.Tensor, level_N: torch.Tensor) -> torch.Tensor:
        """float [N, E] of times and levels float [N]."""
        angles = torch.stack([time_N, level_N], dim=1)[..., None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return F.silu(self.last(F.silu(self.hidden(waves))))


class FilmBlock(nn.Module):
    """Two convolutions beside a skip; between them the steering vector scales and shifts each channel (FiLM)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, state_NChw: torch.Tensor, steering_NE: torch.Tensor) -> torch.Tensor:
        """float [N, C, h, w], as the input."""
        hidden = self.first(unit_cells(state_NChw))
        scale, shift = self.film(steering_NE)[..., None, None].chunk(2, dim=1)
        return state_NChw + self.second(F.silu(hidden * (1 + scale) + shift))


class FilmStack(nn.Module):
    """The blocks of one level, on one of the two ways."""

    def __init__(self, channels: int, embedding: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FilmBlock(channels, embedding) for _ in range(blocks))

    def forward(self, state_NChw: torch.Tensor, steering_NE: torch.Tensor) -> torch.Tensor:
        """float [N, C, h, w], as the input."""
        for block in self.blocks:
            state_NChw = block(state_NChw, steering_NE)
        return state_NChw


def unit_cells(state_NChw: torch.Tensor) -> torch.Tensor:
    """float [N, C, h, w] with the mean square over the channels of every cell made 1: no cell sees another."""
    return state_NChw * (state_NChw.square().mean(dim=1, keepdim=True) + NORM_FLOOR).rsqrt()


class Unet(nn.Module):
    """State and condition to the endpoint of the flow, at factor x the grid's resolution."""

    def __init__(self, factor: int, width: int, multipliers: tuple[int, ...], blocks: int) -> None:
        """width: channels of the finest level. multipliers: of the width, a level each. blocks: of a level
        on each way."""
        super().__init__()
        self.factor, self.blocks, self.num_levels = factor, blocks, len(multipliers)
        widths = [width * multiplier for multiplier in multipliers]
        embedding = 4 * width
        self.steering = Steering(embedding)
        self.first = nn.Conv2d(6 * factor**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(widths))
        self.up = nn.ModuleList(nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in pairwise(widths))
        self.before = nn.ModuleList(FilmStack(channels, embedding, blocks) for channels in widths)
        self.after = nn.ModuleList(FilmStack(channels, embedding, blocks) for channels in widths[:-1])
        self.last = nn.Conv2d(widths[0], 3 * factor**2, 3, padding=1)
        # The endpoint starts as 0: a refiner that has learned nothing gives the bicubic picture.
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    @property
    def stride(self) -> int:
        """Grid cells of one cell of the coarsest level: h and w are multiples of it."""
        return 2 ** (self.num_levels - 1)

    @property
    def reach(self) -> int:
        """Grid cells beyond which an input cannot change an output cell; a multiple of `stride`."""
        # Of each level: two convolutions a block on both ways, one that goes down, one that comes up on doubled cells.
        cells = 2 + sum((4 * self.blocks + 3) * 2**level for level in range(self.num_levels))
        return -(-cells // self.stride) * self.stride

    def forward(
        self, state_N3HW: torch.Tensor, condition_N3HW: torch.Tensor, time_N: torch.Tensor, level_N: torch.Tensor
    ) -> torch.Tensor:
        """float endpoint [N, 3, H, W]; H and W are multiples of factor * stride."""
        steering_NE = self.steering(time_N, level_N)
        hidden = self.first(F.pixel_unshuffle(torch.cat([state_N3HW, condition_N3HW], dim=1), self.factor))
        skips = []
        for level in range(self.num_levels):
            hidden = self.before[level](hidden, steering_NE)
            if level + 1 < self.num_levels:
                skips.append(hidden)
                hidden = self.down[level](hidden)
        for level in reversed(range(self.num_levels - 1)):
            hidden = self.up[level](F.interpolate(hidden, scale_factor=2.0, mode="nearest")) + skips[level]
            hidden = self.after[level](hidden, steering_NE)
        return F.pixel_shuffle(self.last(F.silu(unit_cells(hidden))), self.factor)

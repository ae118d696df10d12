"""Inputs and heads of the generated modalities: visual bits and audio codes inside the stack.

Letters: B rows, T positions, H hidden, D visual bits, Q audio levels, V codes per level, S audio steps, N positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.modeling.attention import RMSNorm
from ernie_elastic.modeling.configuration import ErnieElasticConfig

# (level, logits [S, V + 1]) -> int64 [S]: called once per level and step while generating.
CodeSampler = Callable[[int, torch.Tensor], torch.Tensor]


class VisualIO(nn.Module):
    """Accumulated features in, bit logits out. paper: section 2.4 (bit-wise heads)."""

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__()
        assert config.visual_scales is not None
        self.embed = nn.Linear(config.visual_bits, config.hidden_size, bias=False)
        # One row per scale that a position predicts, one for S_S, which closes the frame, one for the full frame.
        num_scales = len(config.visual_scales) + 1 + (config.ss_scale == "full")
        self.scale_embed = nn.Embedding(num_scales, config.hidden_size) if config.visual_scale_embedding else None
        self.cells = max(height * width for height, width in config.visual_scales)
        places = num_scales * self.cells
        self.place_embed = nn.Embedding(places, config.hidden_size) if config.visual_place_embedding else None
        self.bit_head = nn.Linear(config.hidden_size, config.visual_bits)

    def forward(self, features_ND: torch.Tensor, scale_N: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
        """features float32 [N, D] of the coarser scales, the scale each position predicts and its flat place in the
        batch, both int64 [N], a scale whole and in reading order -> [N, H]."""
        embedded = self.embed(features_ND.to(self.bit_head.bias.dtype))
        if self.scale_embed is not None:
            embedded = embedded + self.scale_embed(scale_N)
        if self.place_embed is not None:
            embedded = embedded + self.place_embed(scale_N * self.cells + cell_in_scale(scale_N, index_N))
        return embedded


def cell_in_scale(scale_N: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]: number of each position in its run of neighbouring positions (index_N) of one scale (scale_N)."""
    order = torch.arange(len(index_N), device=index_N.device)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = (index_N.diff() != 1) | (scale_N.diff() != 0)
    return order - torch.where(starts, order, 0).cummax(0).values


class AudioIO(nn.Module):
    """Code embeddings, summed over levels at the input, and one head per level. paper: section 2.6 (NCP).

    The tables are shared by input and feedback (ours: the report stresses structural alignment). Row V of a level is
    EOA, which only level 0 predicts.
    """

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__()
        self.num_levels, self.num_rows = config.audio_num_levels, config.audio_codebook_size + 1
        self.embed = nn.Embedding(self.num_levels * self.num_rows, config.hidden_size)
        self.head_norms = nn.ModuleList(
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(self.num_levels)
        )
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, self.num_rows, bias=False) for _ in range(self.num_levels)
        )

    def embed_level(self, codes_S: torch.Tensor, level: int) -> torch.Tensor:
        """Codes int64 [S] of one level -> [S, H]; -1 gives zeros."""
        rows = codes_S.clamp(min=0) + level * self.num_rows
        return self.embed(rows) * (codes_S >= 0)[:, None].to(self.embed.weight.dtype)

    def embed_steps(self, codes_SQ: torch.Tensor) -> torch.Tensor:
        """Codes int64 [S, Q] -> [S, H]: the sum over levels."""
        summed = self.embed_level(codes_SQ[:, 0], 0)
        for level in range(1, self.num_levels):
            summed = summed + self.embed_level(codes_SQ[:, level], level)
        return summed

    def logits(self, hidden_SH: torch.Tensor, level: int) -> torch.Tensor:
        """[S, H] -> [S, V + 1] of one level."""
        return self.heads[level](self.head_norms[level](hidden_SH))


def bit_loss(logits_ND: torch.Tensor, targets_ND: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy over the bits of each position: [N]. VideoAR: bit-wise cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits_ND.float(), targets_ND, reduction="none").mean(-1)

"""Reading images and videos: a CNN path and a ViT path merged by attention into one token per group of patches.

Letters: G items, F frames, P patches per frame, K patches per token (4 for images, 16 for videos), M tokens, D width,
H hidden. paper: section 2.3 (attention patch merger); sizes are ours, the report gives none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ernie_elastic.errors import DataError
from ernie_elastic.modeling.attention import RMSNorm
from ernie_elastic.modeling.configuration import ErnieElasticConfig

MERGE = 2  # patches per side that one token covers; paper: 2x2 neighbours
VIDEO_FRAMES_PER_TOKEN = 4  # paper: K = 16 for video, read as 2x2 places in 4 frames


class Block(nn.Module):
    """Pre-norm transformer block over [batch, length, D], bidirectional unless a mask says otherwise."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = RMSNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width, eps)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [batch, length, D], mask bool [length, length] or None (all see all) -> the same shape."""
        q, k, v = rearrange(self.qkv(self.attention_norm(x)), "n l (three a c) -> three n a l c", three=3, a=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(rearrange(attended, "n a l c -> n l (a c)"))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class UnderstandingEncoder(nn.Module):
    """Items of pixels uint8 [G, F, S, S, 3] and CNN features -> tokens [G, M, H]; F = 1 (image) or a multiple of 4."""

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__()
        patch, width = config.understanding_patch, config.understanding_width
        self.patch, self.grid = patch, config.understanding_image_size // patch
        if self.grid % MERGE:
            raise DataError(f"understanding: a grid of {self.grid} patches a side is no multiple of {MERGE}")
        # The CNN path: features of the visual tokenizer before quantisation, which loses detail (paper: section 2.3).
        self.feature_grid = tuple(config.visual_scales[-1]) if config.visual_scales else (1, 1)
        # ours: 3x3, since an object lies across several cells of the tokenizer's grid.
        self.cnn_in = nn.Conv2d(max(1, config.visual_bits), 2 * width, 3, padding=1)
        self.cnn_out = nn.Conv2d(2 * width, width, 1)
        self.vit_in = nn.Linear(3 * patch * patch, width)
        self.vit_position = nn.Embedding(self.grid * self.grid, width)
        self.vit = nn.ModuleList(
            Block(width, config.understanding_heads, config.rms_norm_eps) for _ in range(config.understanding_layers)
        )
        # ours: one learned cue per (source, place in the group), since the merger itself is blind to order.
        self.merge_position = nn.Embedding(2 * MERGE * MERGE * VIDEO_FRAMES_PER_TOKEN, width)
        self.merge = Block(width, config.understanding_heads, config.rms_norm_eps)
        self.merge_norm = RMSNorm(width, config.rms_norm_eps)
        self.out = nn.Linear(width, config.hidden_size, bias=False)
        # ours: 1/sqrt(fan in), which `_init_weights` reads here; at the stack's smaller deviation a short run does not
        # learn to look (docs/decisions.md).
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.initializer_std = part.weight[0].numel() ** -0.5

    def tokens_per_item(self, num_frames: int) -> int:
        """Tokens that an item of so many frames becomes."""
        return (self.grid // MERGE) ** 2 * max(1, num_frames // VIDEO_FRAMES_PER_TOKEN)

    def forward(self, items: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each item, pixels uint8 [G, F, S, S, 3] and features float32 [G, F, h, w, D], -> [G, M, H].

        The second result is a zero that every weight feeds. Every module runs equally often whatever the items are
        (none, too), and adding the zero makes the backward do so as well: ranks with other media stay in step.
        Raises DataError when S, F or the features do not fit.
        """
        for pixels, features in items:
            self._check(pixels, features)
        device, side = self.out.weight.device, self.grid * self.patch
        frames = [rearrange(pixels, "g f h w c -> (g f) c h w") for pixels, _ in items]
        images = torch.cat([torch.zeros((0, 3, side, side), dtype=torch.uint8, device=device), *frames])
        empty = torch.zeros((0, *self.feature_grid, self.cnn_in.in_channels), device=device)
        features = torch.cat([empty, *(feature.flatten(0, 1) for _, feature in items)])
        dtype = self.out.weight.dtype
        both = self._encode_frames(images.to(dtype) / 127.5 - 1.0, features.to(dtype))
        parts = both.split([len(part) for part in frames])
        shapes = [(pixels.shape[0], pixels.shape[1]) for pixels, _ in items]
        merged: dict[int, torch.Tensor] = {}
        for size in (1, VIDEO_FRAMES_PER_TOKEN):
            chosen = [part for part, (_, count) in zip(parts, shapes, strict=True) if (count == 1) == (size == 1)]
            merged[size] = self._merge(torch.cat([both[:0], *chosen]), size)
        return self._split(shapes, merged), 0.0 * torch.stack([tokens.sum() for tokens in merged.values()]).sum()

    def _check(self, pixels: torch.Tensor, features: torch.Tensor) -> None:
        frames, height, width = pixels.shape[1:4]
        if (height, width) != (self.grid * self.patch,) * 2:
            raise DataError(f"understanding: {height}x{width} pixels; this model reads {self.grid * self.patch} a side")
        if frames != 1 and frames % VIDEO_FRAMES_PER_TOKEN:
            raise DataError(f"understanding: {frames} frames; give 1 or a multiple of {VIDEO_FRAMES_PER_TOKEN}")
        expected = (*pixels.shape[:2], *self.feature_grid, self.cnn_in.in_channels)
        if tuple(features.shape) != expected:
            raise DataError(f"understanding: features of shape {tuple(features.shape)}; expected {expected}")

    def _encode_frames(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Images [frames, 3, S, S] and features [frames, h, w, D] -> both paths, [frames, 2, P, D]."""
        cnn = self.cnn_out(F.gelu(self.cnn_in(features.movedim(-1, 1))))
        # ours: the coarser grid of the tokenizer is repeated to the ViT's, so that both have K patches a token.
        cnn = F.interpolate(cnn, size=(self.grid, self.grid), mode="nearest").flatten(2).mT
        vit = self.vit_in(self._windows(images, self.patch))
        vit = vit + self.vit_position(torch.arange(self.grid**2, device=vit.device))
        for block in self.vit:
            vit = block(vit)
        return torch.stack([cnn, vit], dim=1)

    def _merge(self, both: torch.Tensor, frames: int) -> torch.Tensor:
        """[frames of items, 2, P, D] -> [tokens, H]: attention inside each group, then its mean."""
        side = self.grid // MERGE
        groups = rearrange(
            both, "(n f) s (h a w b) d -> (n h w) (s f a b) d", f=frames, h=side, a=MERGE, w=side, b=MERGE, s=2
        )
        place = self.merge_position(torch.arange(2 * frames * MERGE * MERGE, device=both.device))
        return self.out(self.merge_norm(self.merge(groups + place).mean(dim=1)))

    def _split(self, shapes: Sequence[tuple[int, int]], merged: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        start, tokens = dict.fromkeys(merged, 0), []
        for items, frames in shapes:
            size = 1 if frames == 1 else VIDEO_FRAMES_PER_TOKEN
            shape = (items, self.tokens_per_item(frames))
            end = start[size] + shape[0] * shape[1]
            tokens.append(merged[size][start[size] : end].unflatten(0, shape))
            start[size] = end
        return tokens

    def _windows(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """Every patch as a row: [items, patches, 3 * size * size]."""
        view = images.unfold(2, size, self.patch).unfold(3, size, self.patch)
        return rearrange(view, "n c h w a b -> n (h w) (c a b)")

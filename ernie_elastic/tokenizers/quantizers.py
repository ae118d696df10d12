"""Quantisers: multi-scale sign bits for images and residual codebooks for audio.

Shape letters: N items, H/W finest grid, h/w grid of one scale, D bits per position, S steps, Q levels,
V codebook size, C feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ernie_elastic.errors import ConfigError


@dataclass
class ScaleCodes:
    """All scales of N frames, as the next-scale model reads and predicts them.

    inputs: per scale k >= 1, float32 [N, h_k, w_k, D], the accumulated feature of scales < k (scale 0 has None:
    its input is the start token or the frame before). targets: per scale, float32 0/1 [N, h_k, w_k, D].
    total: float32 [N, H, W, D], the sum of all (possibly flipped) scales.
    """

    inputs: list[torch.Tensor | None]
    targets: list[torch.Tensor]
    total: torch.Tensor

    def first_bits(self, active: int) -> ScaleCodes:
        """The same codes with features of bits >= active at zero: what a model that runs on fewer bits reads.

        paper: section 2.2 (from low-bit to high-bit tokenizers); ours: the low-bit code is the prefix of the full one,
        so one projection serves all.
        """
        keep = (torch.arange(self.total.shape[-1], device=self.total.device) < active).to(self.total.dtype)
        inputs = [None if feature is None else feature * keep for feature in self.inputs]
        return ScaleCodes(inputs, self.targets, self.total * keep)


@dataclass(frozen=True)
class MultiScaleBits:
    """Residual multi-scale sign quantiser: scale k adds `amplitudes[k] * sign(residual)` up-sampled to the grid.

    scales: (h, w) per scale, coarse to fine, the last one is the full grid. paper: section 2.2 (bit-wise
    quantisation); ours: one amplitude per scale, since the report gives no code book.
    """

    scales: tuple[tuple[int, int], ...]
    amplitudes: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.amplitudes) or not self.scales:
            raise ConfigError(f"quantiser: {len(self.scales)} scales but {len(self.amplitudes)} amplitudes")

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the finest scale."""
        return self.scales[-1]

    def down(self, feature: torch.Tensor, scale: int) -> torch.Tensor:
        """[N, H, W, D] to [N, h, w, D] by area averaging."""
        return _resize(feature, self.scales[scale])

    def up(self, feature: torch.Tensor) -> torch.Tensor:
        """[N, h, w, D] to [N, H, W, D]: bilinear, and the identity at full size."""
        return _resize(feature, self.grid)

    def contribution(self, bits: torch.Tensor, scale: int) -> torch.Tensor:
        """Bits 0/1 [N, h, w, D] of one scale as the feature [N, H, W, D] that they add."""
        return self.up((bits * 2.0 - 1.0) * self.amplitudes[scale])

    def encode(
        self, latent: torch.Tensor, flip_rates: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> ScaleCodes:
        """Bits of every scale of `latent` float32 [N, H, W, D].

        flip_rates float32 [N, num_scales]: share of the bits of each scale that are flipped in the history that
        later scales read. The targets of later scales are re-quantised against that flipped history, so the
        targets depend on the flips: the model learns to repair. paper: section 2.4 (self-correction).
        """
        total = torch.zeros_like(latent)
        inputs: list[torch.Tensor | None] = []
        targets: list[torch.Tensor] = []
        for scale in range(len(self.scales)):
            inputs.append(self.down(total, scale) if scale else None)
            bits = (self.down(latent - total, scale) >= 0).to(latent.dtype)
            targets.append(bits)
            if flip_rates is not None:
                draw = torch.rand(bits.shape, generator=generator, dtype=bits.dtype)
                bits = torch.where(draw < flip_rates[:, scale, None, None, None], 1.0 - bits, bits)
            total = total + self.contribution(bits, scale)
        return ScaleCodes(inputs, targets, total)

    def replay(self, bits: list[torch.Tensor]) -> ScaleCodes:
        """Decided bits, per scale 0/1 float32 [N, h_k, w_k, D], as the codes that `encode` would have given."""
        total = bits[-1].new_zeros((len(bits[-1]), *self.grid, bits[-1].shape[-1]))
        inputs: list[torch.Tensor | None] = []
        for scale, scale_bits in enumerate(bits):
            inputs.append(self.down(total, scale) if scale else None)
            total = total + self.contribution(scale_bits, scale)
        return ScaleCodes(inputs, list(bits), total)


def _resize(feature: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(feature.shape[1:3]) == tuple(size):
        return feature
    moved = feature.movedim(-1, 1)
    if size[0] <= moved.shape[2] and size[1] <= moved.shape[3]:
        moved = F.adaptive_avg_pool2d(moved, size)
    else:
        moved = F.interpolate(moved, size=size, mode="bilinear", align_corners=False)
    return moved.movedim(1, -1)


def rvq_encode(features_SC: torch.Tensor, codebooks_QVC: torch.Tensor) -> torch.Tensor:
    """Residual nearest-neighbour codes int64 [S, Q] of features [S, C] under codebooks [Q, V, C]."""
    residual = features_SC
    codes = []
    for codebook_VC in codebooks_QVC:
        index = torch.cdist(residual[None], codebook_VC[None])[0].argmin(dim=1)
        codes.append(index)
        residual = residual - codebook_VC[index]
    return torch.stack(codes, dim=1)


def rvq_decode(codes_SQ: torch.Tensor, codebooks_QVC: torch.Tensor) -> torch.Tensor:
    """Sum of the chosen codebook rows, float32 [S, C]; codes int64 [S, Q]."""
    levels = torch.arange(codebooks_QVC.shape[0], device=codes_SQ.device)
    return codebooks_QVC[levels, codes_SQ].sum(dim=1)

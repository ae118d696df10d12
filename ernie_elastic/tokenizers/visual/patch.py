"""The small visual tokenizer: a patch encoder, the sign quantiser, and a decoder that sees neighbours.

Contract: `encode` gives latents, `quantizer.encode` their bits, `decode` pixels of the accumulated bits of any number
of scales; all deterministic. A video is coded frame by frame with the same tokenizer. paper: section 2.2 (bit-wise
quantisation over scales). ours: patch-wise networks small enough to train in about a minute on two CPU cores.

Shape letters: N pictures, H/W pixels of a side, h/w latent grid, D bits (and latent width), P values of a patch,
U hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.visual.base import VisualTokenizer

BATCH_PICTURES = 512  # pictures that are coded at once; bounds the memory of a long list
MOMENTUM = 0.02  # of the running mean and deviation of the latents


@dataclass(frozen=True)
class PatchVisualTokenizerConfig:
    """Sizes of the visual tokenizer.

    image_size: pixels of a side. patch: pixels of a patch's side; the latent grid has image_size / patch cells on a
    side. num_bits: D, bits of one position of one scale. scales: (h, w) per scale, coarse to fine, the last is the
    grid. amplitudes: what a bit of each scale adds; measured in training. width: U, hidden width. decoder_layers:
    hidden layers after the decoder's 3x3 layer.
    """

    image_size: int = 32
    patch: int = 8
    num_bits: int = 20
    scales: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 4), (4, 4))
    amplitudes: tuple[float, ...] = (0.35, 0.5, 0.8, 0.6)
    width: int = 256
    decoder_layers: int = 1

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image_size % self.patch:
            raise ConfigError(f"visual tokenizer: patch {self.patch} does not divide image_size {self.image_size}")
        side = self.image_size // self.patch
        if not self.scales or tuple(self.scales[-1]) != (side, side):
            raise ConfigError(
                f"visual tokenizer: scales {self.scales} must end with the grid ({side}, {side}) = image_size / patch"
            )
        if any(len(scale) != 2 or not all(1 <= length <= side for length in scale) for scale in self.scales):
            raise ConfigError(f"visual tokenizer: scales {self.scales} must be (height, width) pairs in 1..{side}")
        if len(self.amplitudes) != len(self.scales):
            raise ConfigError(f"visual tokenizer: {len(self.scales)} scales but {len(self.amplitudes)} amplitudes")
        if self.num_bits < 1 or self.width < 1 or self.decoder_layers < 0:
            raise ConfigError(
                f"visual tokenizer: num_bits {self.num_bits} and width {self.width} must be at least 1, "
                f"decoder_layers {self.decoder_layers} at least 0"
            )

    @property
    def grid(self) -> int:
        """Cells of a side of the latent grid."""
        return self.image_size // self.patch

    @property
    def patch_values(self) -> int:
        """P, numbers of one patch."""
        return self.patch * self.patch * 3

    @property
    def bits_per_picture(self) -> int:
        """Bits of all scales of one picture."""
        return self.num_bits * sum(height * width for height, width in self.scales)


class PatchVisualTokenizer(VisualTokenizer):
    """Codes square RGB pictures as bits. Trained by `training.tokenizer_visual_patch`."""

    architecture = "patch"
    config_class = PatchVisualTokenizerConfig
    config: PatchVisualTokenizerConfig

    def __init__(self, config: PatchVisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = MultiScaleBits(
            tuple((int(height), int(width)) for height, width in config.scales), tuple(config.amplitudes)
        )
        self.encoder = PatchEncoder(config)
        self.decoder = PatchDecoder(config)

    def patches(self, pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 pixels [N, H, W, 3] as float32 patches [N, h, w, P] in -1..1.

        Raises DataError for another dtype or size than the config's.
        """
        pixels = torch.as_tensor(pixels_NHW3, device=self.device)
        size, cells, patch = self.config.image_size, self.config.grid, self.config.patch
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (size, size, 3):
            raise DataError(
                f"visual tokenizer: pixels have dtype {pixels.dtype} and shape {list(pixels.shape)}; expected uint8 "
                f"[N, {size}, {size}, 3]"
            )
        blocks = (pixels.float() / 127.5 - 1.0).view(-1, cells, patch, cells, patch, 3)
        return blocks.permute(0, 1, 3, 2, 4, 5).reshape(-1, cells, cells, self.config.patch_values)

    def pixels(self, patches_NhwP: torch.Tensor) -> torch.Tensor:
        """Inverse of `patches`: float [N, h, w, P], clipped and rounded, as uint8 [N, H, W, 3]."""
        size, cells, patch = self.config.image_size, self.config.grid, self.config.patch
        blocks = patches_NhwP.view(-1, cells, cells, patch, patch, 3).permute(0, 1, 3, 2, 4, 5)
        values = (blocks.reshape(-1, size, size, 3).clamp(-1.0, 1.0) + 1.0) * 127.5
        return values.round().to(torch.uint8)

    @torch.no_grad()
    def encode(self, pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 latents [N, h, w, D] of uint8 pixels [N, H, W, 3]; the quantiser turns them into bits."""
        patches = self.patches(pixels_NHW3)
        return torch.cat([self.encoder(part) for part in patches.split(BATCH_PICTURES)])

    @torch.no_grad()
    def decode(self, feature_NhwD: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [N, H, W, 3] of accumulated bits float32 [N, h, w, D], the quantiser's `total`.

        The sum of the coarse scales alone decodes too, to a blurred picture. Raises DataError for another shape.
        """
        expected = (self.config.grid, self.config.grid, self.config.num_bits)
        if tuple(feature_NhwD.shape[1:]) != expected:
            raise DataError(
                f"visual tokenizer: a feature has shape {list(feature_NhwD.shape)}; expected [N, {expected[0]}, "
                f"{expected[1]}, {expected[2]}]"
            )
        feature = feature_NhwD.to(self.device, torch.float32)
        return torch.cat([self.pixels(self.decoder(part)) for part in feature.split(BATCH_PICTURES)])


class PatchEncoder(nn.Module):
    """Patches one by one to latents of mean 0 and deviation 1.

    ours: no view of neighbours, so that what changes in one patch changes the bits of one position only.
    """

    def __init__(self, config: PatchVisualTokenizerConfig) -> None:
        super().__init__()
        self.first = nn.Linear(config.patch_values, config.width)
        self.hidden = nn.Linear(config.width, config.width)
        self.last = nn.Linear(config.width, config.num_bits)
        # Not affine: a fixed scale is what gives the quantiser's amplitudes a meaning.
        self.normalise = nn.BatchNorm1d(config.num_bits, affine=False, momentum=MOMENTUM)

    def forward(self, patches_NhwP: torch.Tensor) -> torch.Tensor:
        """float32 latents [N, h, w, D] of patches float32 [N, h, w, P]."""
        hidden = F.gelu(self.first(patches_NhwP))
        hidden = hidden + F.gelu(self.hidden(hidden))
        latent = self.last(hidden)
        return self.normalise(latent.flatten(0, -2)).view(latent.shape)


class PatchDecoder(nn.Module):
    """Accumulated bits to patches; each patch sees the eight around it, since objects straddle patches."""

    def __init__(self, config: PatchVisualTokenizerConfig) -> None:
        super().__init__()
        self.spread = nn.Conv2d(config.num_bits, config.width, 3, padding=1)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.decoder_layers))
        self.last = nn.Linear(config.width, config.patch_values)

    def forward(self, feature_NhwD: torch.Tensor) -> torch.Tensor:
        """float32 patches [N, h, w, P] of features float32 [N, h, w, D]."""
        hidden = F.gelu(self.spread(feature_NhwD.movedim(-1, 1))).movedim(1, -1)
        for layer in self.hidden:
            hidden = hidden + F.gelu(layer(hidden))
        return self.last(hidden)

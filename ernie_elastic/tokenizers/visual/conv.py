"""The convolutional visual tokenizer: pictures of several shapes and clips to multi-scale bits and back.

Contract: `encode` gives latents of deviation 1, `quantizer_for(h, w)` their bits, `decode` pixels of the
accumulated bits of any number of scales, or of the first bits of all; all deterministic. A picture is a clip of one
frame. Clips coded in pieces give the codes of the whole clip; each latent frame is quantised on its own.
paper: section 2.2 (2-D multi-scale tokenizer, inflated to a causal 3-D one; bit-wise quantisation; from low-bit to
high-bit). peer: VideoAR (1 + F frames to 1 + F / 4 latent frames, inflation into the last temporal slice), Infinity and
BSQ (signs of a normalised vector). ours: the low-bit code is the prefix of the high-bit code; sizes.

Shape letters: N pictures or clips, F frames, H/W pixels of a side, f latent frames, h/w latent grid, D bits (and latent
width), C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.tokenizers.visual.causal_conv import StreamState
from ernie_elastic.tokenizers.visual.conv_config import ConvVisualTokenizerConfig, conv_visual_config
from ernie_elastic.tokenizers.visual.conv_layers import LatentNorm, make_decoder, make_encoder
from ernie_elastic.tokenizers.visual.scale_schedules import closest_schedule

PIXELS_AT_ONCE = 1 << 20  # of pictures that are coded together; bounds the memory of a long list
CHUNK_FRAMES = 16  # of a clip that are coded together

__all__ = ["ConvVisualTokenizer", "ConvVisualTokenizerConfig", "conv_visual_config", "inflate"]


class ConvVisualTokenizer(VisualTokenizer):
    """Codes RGB pictures and clips as bits. Trained by `training.tokenizer_visual_conv`."""

    architecture = "conv"
    config_class = ConvVisualTokenizerConfig
    config: ConvVisualTokenizerConfig

    def __init__(self, config: ConvVisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        channels = tuple(config.width * multiplier for multiplier in config.multipliers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = make_encoder(
                config.stem, channels, config.blocks, config.mid_blocks, config.num_bits, config.time_strides,
                config.feature_norm,
            )  # fmt: skip
            self.normalise = LatentNorm(config.num_bits, config.unit_length)
            self.decoder = make_decoder(
                config.stem, channels, config.decoder_blocks, config.mid_blocks, config.num_bits, config.time_strides,
                config.feature_norm,
            )  # fmt: skip
        self._make_quantizers()

    def _make_quantizers(self) -> None:
        self._quantizers = {
            tuple(schedule[-1]): MultiScaleBits(schedule, self.config.amplitudes) for schedule in self.config.schedules
        }
        self.quantizer = self.quantizer_for(self.config.grid, self.config.grid)

    @property
    def last_weight(self) -> torch.Tensor:
        """Weight [C, C', T, 3, 3] of the decoder's last convolution: what training balances gradients by."""
        return [parameter for parameter in self.decoder.parameters() if parameter.ndim == 5][-1]

    def set_amplitudes(self, amplitudes: Sequence[float]) -> None:
        """Replace the amplitudes of config and quantisers, one per scale. Raises ConfigError for another number."""
        self.config = dataclasses.replace(self.config, amplitudes=tuple(float(value) for value in amplitudes))
        self._make_quantizers()

    def quantizer_for(self, height: int, width: int) -> MultiScaleBits:
        """The quantiser of a latent grid of height x width cells. Raises DataError for a grid without a schedule."""
        found = self._quantizers.get((height, width))
        if found is None:
            raise DataError(
                f"visual tokenizer: no schedule has a latent grid of {height}x{width} cells; it has "
                f"{', '.join(f'{rows}x{columns}' for rows, columns in self._quantizers)}"
            )
        return found

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) in pixels that a picture of height x width is best resized to. Raises DataError for a side below 1."""
        rows, columns = closest_schedule(self.config.schedules, height, width)[-1]
        return rows * self.config.stride, columns * self.config.stride

    # Pixels to latents

    def pixels_in(self, pixels_NFHW3: torch.Tensor | np.ndarray, dimensions: int = 5) -> torch.Tensor:
        """uint8 [N, F, H, W, 3], or pictures [N, H, W, 3] (dimensions = 4), as float32 [N, 3, F, H, W] in -1..1.

        Raises DataError for another dtype or a size without a schedule.
        """
        pixels = torch.as_tensor(pixels_NFHW3, device=self.device)
        shape, sizes = tuple(pixels.shape), self.config.sizes
        if pixels.dtype != torch.uint8 or len(shape) != dimensions or shape[-3:-1] not in sizes or shape[-1] != 3:
            raise DataError(
                f"visual tokenizer: pixels have dtype {pixels.dtype} and shape {list(shape)}; expected uint8 "
                f"[..., H, W, 3] with HxW one of {', '.join(f'{rows}x{columns}' for rows, columns in sizes)}; resize "
                "to what `fitting_size` gives"
            )
        clips = pixels[:, None] if dimensions == 4 else pixels
        return (clips.float() / 127.5 - 1.0).movedim(-1, 1)

    def features_in(self, features_NfhwD: torch.Tensor, dimensions: int = 5) -> torch.Tensor:
        """float [N, f, h, w, D], or of pictures [N, h, w, D] (dimensions = 4), as float32 [N, D, f, h, w].

        Raises DataError for another width or a grid without a schedule.
        """
        shape = tuple(features_NfhwD.shape)
        if len(shape) != dimensions or shape[-3:-1] not in self._quantizers or shape[-1] != self.config.num_bits:
            raise DataError(
                f"visual tokenizer: a feature has shape {list(shape)}; expected [..., h, w, {self.config.num_bits}] "
                f"with hxw one of {', '.join(f'{rows}x{columns}' for rows, columns in self._quantizers)}"
            )
        clips = features_NfhwD[:, None] if dimensions == 4 else features_NfhwD
        return clips.to(self.device, torch.float32).movedim(-1, 1)

    @torch.no_grad()
    def encode(self, pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 latents [N, h, w, D] of uint8 pixels [N, H, W, 3] of the size of any schedule."""
        pixels = self.pixels_in(pixels_NHW3, 4)
        size = max(1, PIXELS_AT_ONCE // (pixels.shape[3] * pixels.shape[4]))
        return torch.cat(
            [self.normalise(self.encoder(part)).movedim(1, -1)[:, 0] for part in pixels.split(size)]
        ).contiguous()

    @torch.no_grad()
    def decode(self, feature_NhwD: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [N, H, W, 3] of accumulated bits float32 [N, h, w, D], a quantiser's `total`.

        The sum of the coarse scales alone, or of the first bits of all scales, decodes too, to a blurred picture.
        """
        feature = self.features_in(feature_NhwD, 4)
        size = max(1, PIXELS_AT_ONCE // (feature.shape[3] * feature.shape[4] * self.config.stride**2))
        return torch.cat([_pixels_out(self.decoder(part))[:, 0] for part in feature.split(size)])

    def reconstruct(self, pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 pixels [N, H, W, 3], same size, after encoding, quantising and decoding."""
        latent = self.encode(pixels_NHW3)
        return self.decode(self.quantizer_for(*latent.shape[1:3]).encode(latent).total)

    # Clips

    @property
    def frames_alone(self) -> bool:
        """True when a clip is coded frame by frame."""
        return self.config.temporal_stride == 1

    def latent_frames(self, num_frames: int) -> int:
        """f = 1 + (F - 1) / temporal_stride, rounded up. Raises DataError for a clip without frames."""
        return 1 + -(-(super().latent_frames(num_frames) - 1) // self.config.temporal_stride)

    @torch.no_grad()
    def encode_video(
        self, pixels_FHW3: torch.Tensor | np.ndarray, chunk_frames: int | None = CHUNK_FRAMES
    ) -> torch.Tensor:
        """float32 latents [f, h, w, D] of one clip uint8 [F, H, W, 3].

        chunk_frames: frames that are coded together, a multiple of temporal_stride (the first piece has one more);
        None: the whole clip at once. The last frame is held to fill the last latent frame. Raises DataError for a clip
        that cannot be coded, ConfigError for another chunk_frames.
        """
        clip = torch.as_tensor(pixels_FHW3)
        latent_frames = self.latent_frames(len(clip))
        pixels = self.pixels_in(clip[None])
        missing = 1 + (latent_frames - 1) * self.config.temporal_stride - len(clip)
        pixels = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        found, state = [], None
        for part in _pieces(pixels, chunk_frames, self.config.temporal_stride, self.config.temporal_stride):
            latent, state = self.encoder.step(part, state)
            found.append(self.normalise(latent).movedim(1, -1)[0])
        return torch.cat(found).contiguous()

    @torch.no_grad()
    def decode_video(
        self, feature_fhwD: torch.Tensor, num_frames: int | None = None, chunk_frames: int | None = CHUNK_FRAMES
    ) -> torch.Tensor:
        """uint8 clip [F, H, W, 3] of accumulated bits [f, h, w, D]; num_frames keeps the first F frames.

        chunk_frames: as in `encode_video`. Raises DataError without latent frames.
        """
        super().latent_frames(len(feature_fhwD))
        feature = self.features_in(feature_fhwD[None])
        found = []
        state: StreamState = None
        for part in _pieces(feature, chunk_frames, self.config.temporal_stride, 1):
            pixels, state = self.decoder.step(part, state)
            found.append(_pixels_out(pixels)[0])
        return torch.cat(found)[:num_frames]


def _pixels_out(pixels_NCFHW: torch.Tensor) -> torch.Tensor:
    values = (pixels_NCFHW.movedim(1, -1).clamp(-1.0, 1.0) + 1.0) * 127.5
    return values.round().to(torch.uint8)


def _pieces(clip_NCFHW: torch.Tensor, chunk_frames: int | None, temporal_stride: int, unit: int) -> list[torch.Tensor]:
    """The first frame with a chunk, then chunks; unit: frames of this clip for temporal_stride frames of pixels."""
    if chunk_frames is None:
        return [clip_NCFHW]
    if chunk_frames < 1 or chunk_frames % temporal_stride:
        raise ConfigError(
            f"visual tokenizer: chunk_frames {chunk_frames} must be a positive multiple of temporal_stride "
            f"{temporal_stride}"
        )
    size = chunk_frames // temporal_stride * unit
    first, rest = clip_NCFHW[:, :, : 1 + size], clip_NCFHW[:, :, 1 + size :]
    return [first, *(rest.split(size, dim=2) if rest.shape[2] else ())]


@torch.no_grad()
def inflate(tokenizer_2d: ConvVisualTokenizer, temporal_stride: int) -> ConvVisualTokenizer:
    """A tokenizer of clips that gives pictures the bits of `tokenizer_2d`, from whose weights it starts.

    Each 2-D kernel goes into the last temporal slice of a 3-D one. paper: section 2.2; peer: VideoAR, which draws the
    other slices; ours: they are zero, so that a picture keeps its bits exactly. Raises ConfigError when the tokenizer
    has temporal kernels already, or for temporal_stride below 2.
    """
    config = tokenizer_2d.config
    if config.temporal_stride != 1 or temporal_stride == 1:
        raise ConfigError(
            f"inflate: from temporal_stride {config.temporal_stride} to {temporal_stride}; it must go from 1 to 2 or 4"
        )
    made = ConvVisualTokenizer(dataclasses.replace(config, temporal_stride=temporal_stride))
    # RepeatFrames layers shift the numbers in the parameters' names; their order stays.
    for target, source in zip(made.parameters(), tokenizer_2d.parameters(), strict=True):
        if target.shape == source.shape:
            target.copy_(source)
        else:
            target.zero_()[:, :, -1] = source[:, :, 0]
    made.normalise.load_state_dict(tokenizer_2d.normalise.state_dict())
    return made.to(tokenizer_2d.device).train(tokenizer_2d.training)

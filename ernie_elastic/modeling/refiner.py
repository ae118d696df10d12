"""The refiner: a picture of the tokenizer's size to one 2 or 4 times larger, by a small conditional flow.

Contract: `refine` is a function of (picture, steps, seed, level), the same for a picture alone, in a batch or in tiles
(tiles: up to rounding). paper: section 2.2 (a cascaded diffusion refiner, trained apart from the backbone, adds
high-frequency detail only). Its architecture is not published; all below is ours.

The flow runs on the residual between the high-resolution and the bicubic picture, not on the picture: what the
low-resolution picture already says needs no learning, cannot drift, and one small deviation of noise fits. The network
predicts the flow's endpoint (the residual); velocity = (endpoint - state) / (1 - time), so that an endpoint of 0 gives
the bicubic picture exactly, after any number of steps.

Shape letters: N pictures, F frames, H/W pixels of the low-resolution picture, f the factor, Y/X pixels
of the large one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.modeling.refiner_layers import Unet
from ernie_elastic.tokenizers.saved import CONFIG_NAME, SavedModule, reading

KIND = "refiner"
MAX_STEPS = 1000


@dataclass(frozen=True)
class RefinerConfig:
    """Sizes and the flow of a refiner.

    factor: how many times larger a side becomes, 2 or 4. width: channels of the finest level. multipliers: of the
    width, a level each; each level has half the cells a side. blocks: of a level, on the way down and on the way up.
    residual_scale: pixels (-1..1) of one unit of the flow's state, about the residual's deviation. sigma: deviation of
    the noise that the flow starts from, in those units; small: near the likeliest picture, 1: much invented detail.
    steps: Euler steps unless `refine` gets others. temperature: share of the start noise that `refine` draws, unless it
    gets another: 1 draws from all that is possible, 0 follows the flow from its middle (ours: a whole draw is up to
    3 dB further from the truth than the mean, and a short training leaves some of its noise in the picture).
    max_level: highest degradation level that it learns (0..1).
    """

    factor: int = 2
    width: int = 40
    multipliers: tuple[int, ...] = (1,)
    blocks: int = 2
    residual_scale: float = 0.1
    sigma: float = 0.4
    steps: int = 8
    temperature: float = 0.3
    max_level: float = 1.0

    def __post_init__(self) -> None:
        if self.factor not in (2, 4):
            raise ConfigError(f"refiner: factor {self.factor} is not one of 2, 4")
        if not self.multipliers or min(self.width, self.blocks, *self.multipliers) < 1:
            raise ConfigError(
                f"refiner: width {self.width}, blocks {self.blocks} and multipliers {self.multipliers} must be at "
                "least 1, with at least one multiplier"
            )
        if self.residual_scale <= 0 or self.sigma < 0:
            raise ConfigError(
                f"refiner: residual_scale {self.residual_scale} must be above 0, sigma {self.sigma} 0 or more"
            )
        if not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"refiner: steps {self.steps} must lie in 1..{MAX_STEPS}")
        if not 0 <= self.max_level <= 1 or not 0 <= self.temperature <= 1:
            raise ConfigError(
                f"refiner: max_level {self.max_level} and temperature {self.temperature} must lie in 0..1"
            )


class Refiner(SavedModule):
    """Makes pictures and frames larger, with detail that the low-resolution picture does not have."""

    weights_name = "refiner.safetensors"
    config_class = RefinerConfig

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        self.config = config
        self.network = Unet(config.factor, config.width, config.multipliers, config.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.network.last.weight.device

    def forward(
        self, state_N3YX: torch.Tensor, condition_N3YX: torch.Tensor, time_N: torch.Tensor, level_N: torch.Tensor
    ) -> torch.Tensor:
        """The flow's endpoint, float [N, 3, Y, X] in units of residual_scale.

        state: in those units. condition: the bicubic picture in -1..1. time: 0 (noise) to 1. level: of the condition's
        degradation, 0..1. Y and X of any size; borders are repeated to the network's multiple.
        """
        height, width = state_N3YX.shape[2:]
        multiple = self.config.factor * self.network.stride
        missing = (0, -width % multiple, 0, -height % multiple)
        state, condition = (F.pad(part, missing, mode="replicate") for part in (state_N3YX, condition_N3YX))
        return self.network(state, condition, time_N, level_N)[:, :, :height, :width]

    def refine(
        self,
        pixels_NHW3: torch.Tensor | np.ndarray,
        steps: int | None = None,
        seed: int = 0,
        level: float = 0.0,
        tile: int = 256,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """uint8 [N, f * H, f * W, 3] of uint8 pictures [N, H, W, 3].

        steps: of Euler's method (default: the config's); one step gives about the mean of what is possible, many give
        one possibility. seed: of the noise, which is drawn per picture from the seed and the picture itself, so that
        neighbours in the batch do not matter. level: how degraded the pictures are (0 = only made small), which the
        network is told. tile: low-resolution pixels of a side that are computed at once, which bounds the memory.
        temperature: of the noise (default: the config's). Raises DataError for pictures of another dtype or shape,
        ConfigError for steps, level, tile or temperature out of range.
        """
        pixels = _checked(pixels_NHW3)
        heat = self._check(steps, level, tile, temperature)
        noises = (f"{seed}:{hashlib.blake2b(picture.numpy().tobytes()).hexdigest()}" for picture in pixels)
        # One by one: a convolution's rounding may depend on the size of the batch.
        pairs = zip(pixels, noises, strict=True)
        return torch.stack([self._refine_one(picture, steps, noise, level, tile, heat) for picture, noise in pairs])

    def refine_video(
        self,
        frames_FHW3: torch.Tensor | np.ndarray,
        steps: int | None = None,
        seed: int = 0,
        level: float = 0.0,
        tile: int = 256,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """uint8 [F, f * H, f * W, 3] of a clip uint8 [F, H, W, 3]; arguments and errors as of `refine`.

        ours: all frames start from the same noise, so that detail does not flicker where nothing moves.
        """
        frames = _checked(frames_FHW3)
        heat = self._check(steps, level, tile, temperature)
        made = [self._refine_one(frame, steps, f"{seed}:video", level, tile, heat) for frame in frames]
        return torch.stack(made)

    def _check(self, steps: int | None, level: float, tile: int, temperature: float | None) -> float:
        if steps is not None and not 1 <= steps <= MAX_STEPS:
            raise ConfigError(f"refiner: steps {steps} must lie in 1..{MAX_STEPS}")
        if not 0 <= level <= self.config.max_level:
            raise ConfigError(f"refiner: level {level} must lie in 0..{self.config.max_level}, what it was trained for")
        if tile < 1:
            raise ConfigError(f"refiner: tile {tile} must be at least 1 pixel")
        heat = self.config.temperature if temperature is None else temperature
        if not 0 <= heat <= 1:
            raise ConfigError(f"refiner: temperature {heat} must lie in 0..1")
        return heat

    @torch.inference_mode()
    def _refine_one(
        self, picture_HW3: torch.Tensor, steps: int | None, noise: str, level: float, tile: int, temperature: float
    ) -> torch.Tensor:
        condition = upsampled(picture_HW3[None].to(self.device), self.config.factor)
        digest = hashlib.blake2b(noise.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.randn(condition.shape, generator=generator).to(self.device)
        state = temperature * self.config.sigma * drawn
        count = self.config.steps if steps is None else steps
        levels = state.new_full((1,), level)
        for step in range(count):
            endpoint = self._tiled(state, condition, state.new_full((1,), step / count), levels, tile)
            # Euler: dt * (endpoint - state) / (1 - t), whose factor is 1 in the last step.
            state = endpoint if step + 1 == count else state + (endpoint - state) / (count - step)
        return to_pixels(condition + self.config.residual_scale * state)[0].cpu()

    def _tiled(
        self, state: torch.Tensor, condition: torch.Tensor, time: torch.Tensor, level: torch.Tensor, tile: int
    ) -> torch.Tensor:
        """`forward` in tiles, each with the surroundings that its pixels depend on."""
        multiple = self.config.factor * self.network.stride
        side = -(-tile * self.config.factor // multiple) * multiple
        margin = self.network.reach * self.config.factor
        height, width = state.shape[2:]
        if height <= side and width <= side:
            return self(state, condition, time, level)
        result = torch.empty_like(state)
        for top in range(0, height, side):
            for left in range(0, width, side):
                first_y, first_x = max(0, top - margin), max(0, left - margin)
                around = (..., slice(first_y, top + side + margin), slice(first_x, left + side + margin))
                part = self(state[around], condition[around], time, level)
                inner = part[..., top - first_y : top - first_y + side, left - first_x : left - first_x + side]
                result[..., top : top + side, left : left + side] = inner
        return result

    def _called(self) -> dict[str, str]:
        return {"kind": KIND}

    @staticmethod
    def load(directory: Path | str) -> Refiner:
        """Read what `save` wrote. Raises CheckpointError when a file is missing or damaged, or of another kind."""
        directory = Path(directory)
        with reading(directory, KIND, KIND):
            fields: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
            if not isinstance(fields, dict) or fields.get("kind") != KIND:
                found = fields.get("kind") if isinstance(fields, dict) else type(fields).__name__
                raise CheckpointError(
                    f"{directory / CONFIG_NAME} is no refiner's: kind is {found!r}, expected {KIND!r}; give the "
                    "directory that train-tokenizer refiner wrote"
                )
            return Refiner._read(directory, fields)


def upsampled(pixels_NHW3: torch.Tensor, factor: int) -> torch.Tensor:
    """The bicubic picture, float [N, 3, factor * H, factor * W] in -1..1, of uint8 pixels [N, H, W, 3]."""
    pixels = pixels_NHW3.movedim(-1, 1).float() / 127.5 - 1
    size = (pixels.shape[2] * factor, pixels.shape[3] * factor)
    # Clamped, since bicubic interpolation overshoots at edges and no picture does.
    return F.interpolate(pixels, size, mode="bicubic", align_corners=False).clamp(-1, 1)


def to_pixels(picture_N3HW: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] of floats [N, 3, H, W] in -1..1."""
    return ((picture_N3HW.movedim(1, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def bicubic(pixels_NHW3: torch.Tensor | np.ndarray, factor: int) -> torch.Tensor:
    """uint8 [N, factor * H, factor * W, 3]: what a refiner that adds nothing gives. Raises DataError as `refine`."""
    return to_pixels(upsampled(_checked(pixels_NHW3), factor))


def _checked(pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The pictures as a tensor on the CPU."""
    shape = tuple(pixels_NHW3.shape)
    if pixels_NHW3.dtype not in (np.uint8, torch.uint8) or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise DataError(
            f"refiner: pictures are {pixels_NHW3.dtype} {list(shape)}; expected uint8 [N, H, W, 3], none of them empty"
        )
    return torch.as_tensor(np.ascontiguousarray(pixels_NHW3.cpu() if torch.is_tensor(pixels_NHW3) else pixels_NHW3))

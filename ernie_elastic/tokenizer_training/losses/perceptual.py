"""Distances of pictures that follow what is seen: features of a vision model, a normalised pyramid, Frechet distance.

Contract: pixels are float in -1..1; distances are per picture and differentiable with respect to the pixels; every
network here is frozen and stays in evaluation mode. A checkpoint that leaves a weight at random is refused. paper:
section 2.2 (semantic regularisation against a large vision foundation model). VideoAR: a perceptual loss.

Shape letters: N pictures, H/W pixels, h/w cells of a feature map, C channels, T tokens, R rows of a factor.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.errors import CheckpointError, ConfigError, DataError, ErnieElasticError

DEFAULT_SIZE = 224  # pixels of a side, where neither preprocessor nor model says one
VISION_MODELS = "a vision model (ViT, DINOv2, CLIP, SigLIP, ResNet, ConvNeXt, ...)"
UNIT = 1e-8  # smallest squared length by which features are divided


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file. Raises CheckpointError when it cannot be read."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds {type(fields).__name__}, not an object; fetch it again")
    return fields


def frozen_model(
    directory: Path,
    class_name: str,
    what: str,
    read: str = "",
    unread: tuple[str, ...] = (),
    module: str = "transformers",
) -> Any:
    """The Transformers model of a directory in float32, frozen, in evaluation mode; only local files are read.

    class_name: its class in `module`. read: prefix of the weights that will be used, unread: prefixes among them that
    will not. Raises CheckpointError, naming `what`, when there is no model, it cannot be loaded, or weights in use are
    not in the files (Transformers leaves those random, with a warning only).
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{what}: {directory} has no config.json; give the directory of a Transformers model (save_pretrained)"
        )
    found = read_json(directory / "config.json").get("model_type")
    loader = getattr(importlib.import_module(module), class_name)
    try:
        model, report = loader.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise CheckpointError(
            f"{what}: {directory} (model_type {found!r}) cannot be loaded by Transformers' {class_name}: {error}"
        ) from error
    # A mismatched key comes with both shapes.
    names = [*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])]
    lost = sorted(name for name in names if name.startswith(read) and not name.startswith(unread or ("\n",)))
    if lost:
        raise CheckpointError(
            f"{what}: {directory} (model_type {found!r}) lacks {len(lost)} weights, first {lost[0]!r}; they would stay "
            "random: fetch or save the checkpoint again"
        )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class PictureFormat:
    """What a vision model reads: squares of `size` pixels, (value * scale - mean) / std of values 0..255."""

    size: int
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def read(cls, directory: Path, own_size: int | None) -> Self:
        """The settings of preprocessor_config.json (or the picture part of processor_config.json).

        Without: mean and std 0.5, and own_size, the model's. Raises CheckpointError for statistics of another form.
        """
        fields = read_json(directory / "preprocessor_config.json")
        fields = fields or read_json(directory / "processor_config.json").get("image_processor", {})
        side = _side(fields.get("crop_size")) or _side(fields.get("size")) or own_size or DEFAULT_SIZE
        normalise = fields.get("do_normalize", True)
        mean, std = (
            tuple(fields.get(name) or (0.5, 0.5, 0.5)) if normalise else (plain,) * 3
            for name, plain in (("image_mean", 0.0), ("image_std", 1.0))
        )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            text = f"mean {mean} and std {std}; expected three numbers each, std above 0"
            raise CheckpointError(f"vision teacher: the preprocessor of {directory} has {text}")
        scale = fields.get("rescale_factor", cls.scale) if fields.get("do_rescale", True) else 1.0
        return cls(side, scale, mean, std)


def _side(size: Any) -> int | None:
    """Pixels of a side from what a preprocessor calls a size: a number, or a mapping of height, width or an edge."""
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, list | tuple):
        size = size[0] if size else None
    return int(size) if isinstance(size, int | float) else None


class VisionTeacher(nn.Module):
    """A frozen vision model of Transformers that gives feature maps.

    Models of tokens (ViT, DINOv2, CLIP and SigLIP vision) lose class and register tokens and get their grid back;
    convolutional ones (ResNet, ConvNeXt) and those with reshaped states (Swin) have it. width: channels
    of the last map.
    """

    mean_1311: torch.Tensor
    std_1311: torch.Tensor

    def __init__(self, model: nn.Module, picture: PictureFormat, num_layers: int = 4) -> None:
        """model: its vision part; num_layers: how many feature maps are given, evenly spaced, the last always.

        Raises CheckpointError when the model gives no feature maps, ConfigError when num_layers is below 1.
        """
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"vision teacher: num_layers {num_layers} must be at least 1")
        self.model, self.picture, self.num_layers = model.eval().requires_grad_(False), picture, num_layers
        self.register_buffer("mean_1311", torch.tensor(picture.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_1311", torch.tensor(picture.std).view(1, 3, 1, 1), persistent=False)
        with torch.no_grad():
            self.width: int = self.features(torch.zeros(1, 3, picture.size, picture.size))[-1].shape[1]

    @classmethod
    def load(cls, directory: Path | str, num_layers: int = 4) -> Self:
        """The teacher of a directory that Transformers wrote; of CLIP and SigLIP the vision part.

        Raises CheckpointError when the directory is missing, holds no vision model, or lacks weights that are used
        (those of a pooling head are not).
        """
        directory, what = Path(directory), "vision teacher"
        config = read_json(directory / "config.json")
        whole = isinstance(config.get("vision_config"), dict)
        model = frozen_model(
            directory, "AutoModel", what, read="vision_model." if whole else "",
            unread=("pooler.", "head.", "vision_model.head."),
        )  # fmt: skip
        model = getattr(model, "vision_model", model) if whole else model
        if model.main_input_name != "pixel_values":
            raise CheckpointError(
                f"{what}: {directory} holds a model of type {config.get('model_type')!r}, which reads "
                f"{model.main_input_name}, not pixel_values; give {VISION_MODELS}"
            )
        try:
            own_size = _side(getattr(model.config, "image_size", None))
            return cls(model, PictureFormat.read(directory, own_size), num_layers)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # of the model's own code
            if isinstance(error, ErnieElasticError):
                raise
            raise CheckpointError(
                f"{what}: {directory} (model_type {config.get('model_type')!r}) gives no features: {error}; give "
                f"{VISION_MODELS}"
            ) from error

    def train(self, mode: bool = True) -> Self:
        """The teacher itself; it stays in evaluation mode, whatever mode says."""
        return super().train(False)

    def features(self, pixels_N3HW: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps float [N, C, h, w] of pixels float [N, 3, H, W] in -1..1, from early to late.

        Pictures of any size are stretched to the model's. The last map is the model's final, normalised output. Raises
        DataError for another shape.
        """
        if pixels_N3HW.ndim != 4 or pixels_N3HW.shape[1] != 3:
            raise DataError(f"vision teacher: pixels of shape {tuple(pixels_N3HW.shape)}; expected [N, 3, H, W]")
        size = (self.picture.size, self.picture.size)
        pixels_N3HW = pixels_N3HW.to(self.mean_1311)
        if tuple(pixels_N3HW.shape[2:]) != size:
            pixels_N3HW = F.interpolate(pixels_N3HW, size, mode="bilinear", antialias=True)
        values_N3HW = ((pixels_N3HW + 1.0) * (127.5 * self.picture.scale) - self.mean_1311) / self.std_1311
        output = self.model(pixel_values=values_N3HW, output_hidden_states=True, return_dict=True)
        return self._maps(output)

    def _maps(self, output: Mapping[str, Any]) -> list[torch.Tensor]:
        reshaped, states = output.get("reshaped_hidden_states"), output.get("hidden_states")
        final = output.get("last_hidden_state")
        if final is None or not states:
            raise CheckpointError(
                f"vision teacher: {type(self.model).__name__} gives no hidden states; give {VISION_MODELS}"
            )
        # Not the first state, the embedding of patches; the last one after the final norm.
        states = [*(reshaped or states)[1:-1], final]
        count = min(self.num_layers, len(states))
        chosen = [states[-1 - round(index * len(states) / count)] for index in range(count)][::-1]
        grid = tuple(reshaped[-1].shape[2:]) if reshaped else self._grid()
        return [self._map(state, grid) for state in chosen]

    def _grid(self) -> tuple[int, int] | None:
        patch = getattr(self.model.config, "patch_size", None)
        sides = (patch, patch) if isinstance(patch, int) else tuple(patch or ())
        return (self.picture.size // sides[0], self.picture.size // sides[1]) if len(sides) == 2 else None

    def _map(self, state: torch.Tensor, grid: tuple[int, ...] | None) -> torch.Tensor:
        if state.ndim == 4 and state.shape[2] == state.shape[3]:
            return state
        extra = -1 if grid is None or state.ndim != 3 else state.shape[1] - math.prod(grid)
        if grid is None or extra < 0:
            raise CheckpointError(
                f"vision teacher: {type(self.model).__name__} gives states of shape {tuple(state.shape)} for pictures "
                f"of {self.picture.size} pixels; neither a map [N, C, h, w] nor tokens of a grid {grid}"
            )
        # Class, distillation and register tokens come first.
        return state[:, extra:].transpose(1, 2).reshape(len(state), state.shape[2], *grid)

    def pooled(self, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        """float [N, C]: the last feature map's mean over space, as Frechet distances take it. Pixels as `features`."""
        return self.features(pixels_N3HW)[-1].mean(dim=(2, 3))


def feature_distance(teacher: VisionTeacher, a_N3HW: torch.Tensor, b_N3HW: torch.Tensor) -> torch.Tensor:
    """float [N], 0..4: how far two pictures are apart in a teacher's features, per picture.

    Per layer: each cell's features scaled to length 1, squared difference summed over channels, mean over space; then
    the mean over layers. background: LPIPS without its learned weights. Pixels as `VisionTeacher.features`.
    """
    parts = []
    for a_NChw, b_NChw in zip(teacher.features(a_N3HW), teacher.features(b_N3HW), strict=True):
        parts.append((_unit(a_NChw) - _unit(b_NChw)).square().sum(dim=1).mean(dim=(1, 2)))
    return torch.stack(parts).mean(dim=0)


def _unit(map_NChw: torch.Tensor) -> torch.Tensor:
    return map_NChw * (map_NChw.square().sum(dim=1, keepdim=True) + UNIT).rsqrt()


class PyramidDistance(nn.Module):
    """A distance of pictures without any weights: differences of Laplacian bands over the local contrast of both.

    ours: for use where no teacher is given. Like the normalised Laplacian pyramid of Laparra et al. 2016, the division
    masks errors where there is texture and shows them on smooth ground, and a change of brightness touches the coarsest
    band alone, so blur and blocks cost more than a brightness change of the same squared error. Both pictures share one
    contrast: each over its own would hide blur. Fixed, exactly reproducible and cheap, unlike random features;
    differences are absolute, so that small ones still have a slope.
    """

    taps_5: torch.Tensor

    def __init__(self, levels: int = 4, contrast_floor: float = 0.05) -> None:
        """levels: bands at most (fewer for small pictures); contrast_floor is added to the local contrast, in units of
        pixels -1..1. Raises ConfigError unless levels is at least 1 and contrast_floor above 0.
        """
        super().__init__()
        if levels < 1 or contrast_floor <= 0:
            raise ConfigError(f"pyramid distance: levels {levels} must be >= 1, contrast_floor {contrast_floor} > 0")
        self.levels, self.contrast_floor = levels, contrast_floor
        self.register_buffer("taps_5", torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0, persistent=False)

    def forward(self, a_NCHW: torch.Tensor, b_NCHW: torch.Tensor) -> torch.Tensor:
        """float [N]: mean over bands of the mean absolute difference; pixels float [N, C, H, W] in -1..1 each.

        Raises DataError for other shapes.
        """
        if a_NCHW.shape != b_NCHW.shape or a_NCHW.ndim != 4:
            raise DataError(
                f"pyramid distance: pictures of shapes {tuple(a_NCHW.shape)} and {tuple(b_NCHW.shape)}; expected one "
                "shape [N, C, H, W]"
            )
        *fine, (a_low, b_low) = zip(self.bands(a_NCHW), self.bands(b_NCHW), strict=True)
        parts = [(a_low - b_low).abs().mean(dim=(1, 2, 3))]
        for a, b in fine:
            contrast = self.contrast_floor + self._blur((a.abs() + b.abs()) / 2.0)
            parts.append(((a - b).abs() / contrast).mean(dim=(1, 2, 3)))
        return torch.stack(parts).mean(dim=0)

    def bands(self, pixels_NCHW: torch.Tensor) -> list[torch.Tensor]:
        """The bands [N, C, h, w] of pixels float [N, C, H, W], fine to coarse; the last is what is left."""
        bands: list[torch.Tensor] = []
        state = pixels_NCHW
        while len(bands) < self.levels and min(state.shape[2:]) >= 4:
            low = self._blur(state)[:, :, ::2, ::2]
            smooth = F.interpolate(low, state.shape[2:], mode="bilinear", align_corners=False)
            bands.append(state - smooth)
            state = low
        return [*bands, state]

    def _blur(self, state_NCHW: torch.Tensor) -> torch.Tensor:
        channels = state_NCHW.shape[1]
        taps_5 = self.taps_5.to(state_NCHW)
        padded = F.pad(state_NCHW, (2, 2, 2, 2), mode="replicate")
        rows = F.conv2d(padded, taps_5.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
        return F.conv2d(rows, taps_5.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


@torch.no_grad()
def frechet_distance(features_a_NC: torch.Tensor, features_b_NC: torch.Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians fitted to features [N, C] each; N may differ.

    |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), unbiased covariances, in float64. ours: the last
    trace is the sum of singular values of R_a R_b^T (centred rows X = QR): no root of a matrix, and fewer rows than
    channels will do. Raises DataError below 2 rows, for other shapes, or values not finite.
    """
    shapes = tuple(features_a_NC.shape), tuple(features_b_NC.shape)
    if features_a_NC.ndim != 2 or features_b_NC.ndim != 2 or shapes[0][1] != shapes[1][1] or min(shapes)[0] < 2:
        raise DataError(
            f"Frechet distance: features of shapes {shapes[0]} and {shapes[1]}; expected [N, C] each with one C and at "
            "least 2 rows"
        )
    means, factors = [], []
    for rows_NC in (features_a_NC.double(), features_b_NC.double()):
        if not bool(rows_NC.isfinite().all()):
            raise DataError("Frechet distance: features are not finite; check the pictures and the teacher")
        means.append(rows_NC.mean(dim=0))
        centred_NC = (rows_NC - means[-1]) / math.sqrt(len(rows_NC) - 1)
        factors.append(torch.linalg.qr(centred_NC, mode="r").R)
    shared = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    spread = factors[0].square().sum() + factors[1].square().sum() - 2.0 * shared
    return max(0.0, float((means[0] - means[1]).square().sum() + spread))


def semantic_loss(projected_NhwC: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """Scalar, 0..2: mean of 1 - cosine between projected latents [N, h, w, C] and a teacher's feature map.

    teacher_features: [N, C, h', w'] (`VisionTeacher.features(...)[-1]`), averaged or interpolated to the latent grid;
    no gradient flows to it. paper: section 2.2 (a semantic regularisation loss, no formula). ours: the cosine. Raises
    ConfigError when N or C differ.
    """
    if not projected_NhwC.ndim == teacher_features.ndim == 4 or projected_NhwC.shape[::3] != teacher_features.shape[:2]:
        raise ConfigError(
            f"semantic loss: projected latents {tuple(projected_NhwC.shape)} must be [N, h, w, C] and the teacher's "
            f"features {tuple(teacher_features.shape)} [N, C, h', w'] of one N and C; project to the teacher's width"
        )
    target_NChw = F.interpolate(teacher_features.detach(), projected_NhwC.shape[1:3], mode="bilinear", antialias=True)
    target_NhwC = target_NChw.permute(0, 2, 3, 1).to(projected_NhwC)
    return (1.0 - F.cosine_similarity(projected_NhwC, target_NhwC, dim=3, eps=1e-6)).mean()

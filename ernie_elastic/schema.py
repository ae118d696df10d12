"""The nouns that cross stages: Sample, Segment, PackedBatch, SubModelSpec, RouterOutput, Manifest.

Shape letters: B rows, T positions of a row, Q audio levels, D visual bits, N flattened positions,
E experts, K chosen experts, F frames, H/W pixels, G media items of one shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ernie_elastic.errors import ConfigError

if TYPE_CHECKING:  # manifests are read by commands that start without torch
    import torch

# What a position is for. Used by losses and analysis only: the router never sees it.
# paper: section 6 draws six task rows; audio understanding and generation share one there.
TASKS = (
    "text",
    "image_understanding",
    "video_understanding",
    "image_generation",
    "video_generation",
    "audio_understanding",
    "audio_generation",
)
TASK_ID = {name: index for index, name in enumerate(TASKS)}
PAD_TASK = -1

# The tasks that the demo judges: each is scored by a checker, beside its chance level.
JUDGED_TASKS = (
    "image_to_text",
    "text_to_image",
    "video_to_text",
    "text_to_video",
    "audio_to_text",
    "text_to_audio",
    "text",
)

SegmentKind = Literal["text", "image", "video", "audio"]
SegmentRole = Literal["input", "target"]


@dataclass(frozen=True)
class Segment:
    """One part of a document.

    kind "text": `text` is a string. kind "image": `array` is uint8 [H, W, 3]. kind "video": uint8
    [F, H, W, 3]. kind "audio": float32 mono [num_samples] in [-1, 1] at the tokenizer's sample rate.
    role "target": the model is trained to produce it. role "input": it is only read (no loss). speaker: float32
    [size], the voice that a generated sound is conditioned on (paper: section 2.6), or None.
    """

    kind: SegmentKind
    role: SegmentRole
    text: str | None = None
    array: np.ndarray | None = None
    speaker: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One document: segments in reading order, plus what a checker needs to score an answer to it.

    `task` is one of JUDGED_TASKS or another name that the source documents; `truth` is JSON-able.
    """

    key: str
    task: str
    segments: tuple[Segment, ...]
    truth: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SubModelSpec:
    """Which part of the elastic model runs: one frozen, hashable object.

    layers: kept layer indices, increasing. experts_per_layer: for each kept layer, the kept expert ids,
    increasing. top_k: experts per token. top_k_per_layer: where kept layers differ in it, the number of each; top_k is
    their largest. None: all the same. paper: section 4 (depth, width and sparsity elasticity); peer: Matryoshka-MoE
    (a number for each layer).
    """

    layers: tuple[int, ...]
    experts_per_layer: tuple[tuple[int, ...], ...]
    top_k: int
    top_k_per_layer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Equal numbers are no numbers of their own, so that equal sub-models are equal specs."""
        if self.top_k_per_layer is not None and set(self.top_k_per_layer) == {self.top_k}:
            object.__setattr__(self, "top_k_per_layer", None)

    @staticmethod
    def of(
        layers: tuple[int, ...], experts_per_layer: tuple[tuple[int, ...], ...], top_ks: Sequence[int]
    ) -> SubModelSpec:
        """A spec with the experts per token of each kept layer."""
        return SubModelSpec(layers, experts_per_layer, max(top_ks, default=0), tuple(top_ks))

    @property
    def top_ks(self) -> tuple[int, ...]:
        """Experts per token of each kept layer."""
        return self.top_k_per_layer or (self.top_k,) * len(self.layers)

    @staticmethod
    def full(num_layers: int, num_experts: int, top_k: int) -> SubModelSpec:
        """The whole model."""
        experts = tuple(range(num_experts))
        return SubModelSpec(tuple(range(num_layers)), (experts,) * num_layers, top_k)

    def is_full(self, num_layers: int, num_experts: int, top_k: int) -> bool:
        """True when this spec leaves nothing of such a model out."""
        return self == SubModelSpec.full(num_layers, num_experts, top_k)

    @property
    def num_experts(self) -> int:
        """Experts per layer; the largest count when layers differ."""
        return max(len(experts) for experts in self.experts_per_layer)

    def label(self) -> str:
        """Short name such as `d6-e8-k1`, or `d6-e8-k1to4`, as tables and served model names print it."""
        least = "" if self.top_k_per_layer is None else f"{min(self.top_ks)}to"
        return f"d{len(self.layers)}-e{self.num_experts}-k{least}{self.top_k}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back."""
        per_layer = {} if self.top_k_per_layer is None else {"top_k_per_layer": list(self.top_k_per_layer)}
        return {
            "layers": list(self.layers),
            "experts_per_layer": [list(experts) for experts in self.experts_per_layer],
            "top_k": self.top_k,
            **per_layer,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> SubModelSpec:
        """Inverse of `to_json`. Raises ConfigError when a field is missing."""
        try:
            return SubModelSpec(
                tuple(int(layer) for layer in data["layers"]),
                tuple(tuple(int(e) for e in experts) for experts in data["experts_per_layer"]),
                int(data["top_k"]),
                tuple(int(k) for k in data["top_k_per_layer"]) if "top_k_per_layer" in data else None,
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"sub-model spec: field {error} is missing or malformed in {data!r}") from error

    def validate(self, full: SubModelSpec, num_experts: int, required_layers: Sequence[int] = ()) -> None:
        """Raise ConfigError unless this spec lies inside a model of `full` with num_experts experts a layer.

        required_layers are those that carry audio heads: they may never be dropped (ours: the report is silent).
        """
        num_layers = len(full.layers)
        if not self.layers:
            raise ConfigError(f"sub-model spec: depth 0 of {num_layers} layers; keep at least 1 layer")
        if list(self.layers) != sorted(set(self.layers)) or not (0 <= self.layers[0] <= self.layers[-1] < num_layers):
            raise ConfigError(
                f"sub-model spec: layers {list(self.layers)} must increase and lie in 0..{num_layers - 1}"
            )
        missing = sorted(set(required_layers) - set(self.layers))
        if missing:
            raise ConfigError(
                f"sub-model spec: layers {missing} carry audio heads but are dropped by {list(self.layers)}; "
                "keep them, or drop the heads with --drop-modality audio"
            )
        if len(self.experts_per_layer) != len(self.layers):
            raise ConfigError(
                f"sub-model spec: {len(self.experts_per_layer)} expert lists for {len(self.layers)} layers"
            )
        self._validate_top_k(full)
        for layer, experts, top_k in zip(self.layers, self.experts_per_layer, self.top_ks, strict=True):
            if (
                list(experts) != sorted(set(experts))
                or not experts
                or not (0 <= experts[0] <= experts[-1] < num_experts)
            ):
                raise ConfigError(
                    f"sub-model spec: experts {list(experts)} of layer {layer} must increase, be at least one, "
                    f"and lie in 0..{num_experts - 1}"
                )
            if len(experts) < top_k:
                raise ConfigError(
                    f"sub-model spec: layer {layer} keeps {len(experts)} experts, fewer than top_k {top_k}; "
                    "keep more experts or lower top_k"
                )

    def _validate_top_k(self, full: SubModelSpec) -> None:
        if len(self.top_ks) != len(self.layers) or self.top_k != max(self.top_ks):
            raise ConfigError(
                f"sub-model spec: top_k {self.top_k}, {list(self.top_ks)} per layer, for {len(self.layers)} layers: "
                "give a number for each kept layer, and the largest as top_k"
            )
        for layer, top_k in zip(self.layers, self.top_ks, strict=True):
            if not 1 <= top_k <= full.top_ks[layer]:
                raise ConfigError(
                    f"sub-model spec: top_k {top_k} of layer {layer} must lie in 1..{full.top_ks[layer]}, the model's "
                    "own top_k there"
                )


@dataclass
class RouterOutput:
    """What one router decided for N positions.

    weights_NK: fp32 combine weights, without the selection bias, detached. experts_NK: int64 ids. valid_N: bool, False
    at padding; None = all valid. loss: weighted z-loss and orthogonality loss of this router; None while both are off.
    The counts are made when they are asked for: a decoding step that nobody traces does not pay for them.
    """

    weights_NK: torch.Tensor
    experts_NK: torch.Tensor
    num_experts: int
    valid_N: torch.Tensor | None = None
    loss: torch.Tensor | None = None

    @functools.cached_property
    def counts_E(self) -> torch.Tensor:
        """int64 [E], how many valid positions picked each expert."""
        ones_NK = self.experts_NK.new_ones(self.experts_NK.shape)
        ones_NK = ones_NK if self.valid_N is None else ones_NK * self.valid_N[:, None]
        return ones_NK.new_zeros(self.num_experts).scatter_add(0, self.experts_NK.reshape(-1), ones_NK.reshape(-1))

    @functools.cached_property
    def mass_E(self) -> torch.Tensor:
        """fp32 [E], the weight that valid positions gave each expert."""
        weights_NK = self.weights_NK.float()
        weights_NK = weights_NK if self.valid_N is None else weights_NK * self.valid_N[:, None]
        zeros_E = weights_NK.new_zeros(self.num_experts)
        return zeros_E.scatter_add(0, self.experts_NK.reshape(-1), weights_NK.reshape(-1))


@dataclass
class MediaInput:
    """Understanding inputs of one shape: pixels_GFHW3 uint8, the visual tokenizer's features, and where tokens go.

    features_GFhwD: float32 [G, F, h, w, D], latents before quantisation (frozen, made when the data is prepared).
    position_GM: int64 [G, tokens per item], index into the flattened [B * T] positions.
    """

    pixels_GFHW3: torch.Tensor
    features_GFhwD: torch.Tensor
    position_GM: torch.Tensor


@dataclass
class PackedBatch:
    """Rows of packed documents, raw inputs only (embedding tables, merger and ViT are trained).

    A sequence is a list of groups; a group is what is predicted in one step. Position i may see position j when both
    are of one document and group_j <= group_i, less the history that a video frame may not use: that is the whole mask
    (`modeling/masks.py`).

    text_ids_BT          int64, -1 where the input is not a text token
    audio_codes_BTQ      int64, -1 where the input is not an audio step
    visual_inputs_ND     float32, accumulated features fed at visual positions (bits of coarser scales)
    visual_index_N       int64, their flat positions in [B * T]
    visual_scale_N       int64, index of the scale that each visual input position predicts; the number of scales for
                         S_S, one more for the read-only group at full resolution
    media                understanding inputs, grouped by shape
    sound_features_NF    float32, continuous features of audio steps that are read, with flat positions in
                         sound_index_N and the number of the sound in sound_item_N, both int64
    speaker_NF           float32, speaker embeddings, with flat positions in speaker_index_N int64
    document_BT          int32, -1 for padding
    group_BT             int32, increasing along a document
    clip_BT, frame_BT    int32, number of the generated video in its document (-1: none) and of the frame in it
    dropped_BT           bool, True where later frames of the clip may not look
    position_BT3         float32 (t, h, w), Uni-RoPE
    task_BT              int8, index into TASKS, -1 for padding; analysis and loss weights only
    text_targets_BT      int64, -100 where the text head has no target
    next_codes_BTQ       int64, -1 where no audio step is predicted; level 0 may hold EOA (= codebook size)
    bit_targets_ND       float32 0/1 [N', D]; bit_index_N int64 flat positions; bit_weight_N float32 scale weights
    active_bits          only the first so many of the D bits are predicted; 0 = all
    """

    text_ids_BT: torch.Tensor
    audio_codes_BTQ: torch.Tensor
    visual_inputs_ND: torch.Tensor
    visual_index_N: torch.Tensor
    visual_scale_N: torch.Tensor
    media: list[MediaInput]
    sound_features_NF: torch.Tensor
    sound_index_N: torch.Tensor
    sound_item_N: torch.Tensor
    speaker_NF: torch.Tensor
    speaker_index_N: torch.Tensor
    document_BT: torch.Tensor
    group_BT: torch.Tensor
    clip_BT: torch.Tensor
    frame_BT: torch.Tensor
    dropped_BT: torch.Tensor
    position_BT3: torch.Tensor
    task_BT: torch.Tensor
    text_targets_BT: torch.Tensor
    next_codes_BTQ: torch.Tensor
    bit_targets_ND: torch.Tensor
    bit_index_N: torch.Tensor
    bit_weight_N: torch.Tensor
    active_bits: int = 0

    @property
    def num_positions(self) -> int:
        """Positions that hold data (padding left out)."""
        return int((self.document_BT >= 0).sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "media":
                value = [
                    MediaInput(m.pixels_GFHW3.to(device), m.features_GFhwD.to(device), m.position_GM.to(device))
                    for m in value
                ]
            elif hasattr(value, "to"):
                value = value.to(device)
            moved[item.name] = value
        return PackedBatch(**moved)


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a stage directory (design section 2)."""

    stage: str
    format_version: int
    config: dict[str, Any]
    fingerprint: str
    parent: dict[str, Any] | None
    package_version: str
    git_commit: str
    created_at: str
    files: dict[str, dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)

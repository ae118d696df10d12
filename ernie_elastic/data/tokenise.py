"""Samples to token segments: text ids, understanding pixels, visual latents and audio codes.

Latents (not bits) are kept for generated pictures, so that flips, targets and bit counts are decided at load time.
Letters: F frames, H/W pixels, h/w latent grid, D bits, S audio steps, Q levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ernie_elastic.data.tokens import Tokens
from ernie_elastic.data.world_facts import WorldConfig
from ernie_elastic.errors import CheckpointError, DataError
from ernie_elastic.schema import Sample, Segment
from ernie_elastic.tokenizers.audio import AudioTokenizer
from ernie_elastic.tokenizers.text import TextTokenizer
from ernie_elastic.tokenizers.visual import VisualTokenizer

TOKENIZER_NAMES: tuple[Literal["text", "visual", "audio"], ...] = ("text", "visual", "audio")


@dataclass(frozen=True)
class Tokenizers:
    """The three tokenizers that turn media and text into what the model reads, and back."""

    text: TextTokenizer
    visual: VisualTokenizer
    audio: AudioTokenizer

    @staticmethod
    def load(directory: Path | str) -> Tokenizers:
        """Read `text/`, `visual/` and `audio/` below `directory`; CheckpointError names the one that is missing."""
        directory = Path(directory)
        for name in TOKENIZER_NAMES:
            if not (directory / name).is_dir():
                raise CheckpointError(
                    f"{directory} has no {name}/; make it with `ernie-elastic train-tokenizer {name} "
                    f"--out {directory / name}`"
                )
        return Tokenizers(
            TextTokenizer.load(directory / "text"),
            VisualTokenizer.load(directory / "visual"),
            AudioTokenizer.load(directory / "audio"),
        )

    def save(self, directory: Path | str) -> None:
        """Write the three below `directory`."""
        directory = Path(directory)
        for name in TOKENIZER_NAMES:
            (directory / name).mkdir(parents=True, exist_ok=True)
            getattr(self, name).save(directory / name)


def world_of(tokenizers: Tokenizers) -> WorldConfig:
    """The embedded world at the picture size and sample rate that these tokenizers read."""
    size, rate = tokenizers.visual.config.image_size, tokenizers.audio.config.sample_rate
    return WorldConfig(image_size=size, video_size=size, sample_rate=rate)


def tokenise(samples: Sequence[Sample], tokenizers: Tokenizers) -> list[list[Tokens]]:
    """Token segments of each sample; pictures of the whole batch are encoded in one call.

    Sounds carry the audio tokenizer's components beside their codes. Raises DataError for what cannot be
    read.
    """
    frames: list[np.ndarray] = []
    waves: list[np.ndarray] = []
    for sample in samples:
        for segment in sample.segments:
            if segment.kind in ("image", "video"):
                frames.extend(_frames(sample, segment, tokenizers))
            elif segment.kind == "audio":
                waves.append(_array(sample, segment))
    visual = tokenizers.visual
    with torch.inference_mode():
        latents = visual.encode(torch.from_numpy(np.stack(frames))).half().numpy() if frames else None
        sounds = tokenizers.audio.encode_with_components(waves)
    next_frame, next_wave, documents = 0, 0, []
    for sample in samples:
        parts: list[Tokens] = []
        for segment in sample.segments:
            if segment.kind == "text":
                if segment.text is None:
                    raise DataError(f"record {sample.key}: a text segment without text")
                ids = np.asarray(tokenizers.text.encode(segment.text), dtype=np.int32)
                parts.append(Tokens("text", segment.role, ids=ids))
            elif segment.kind == "audio":
                codes, components = sounds[next_wave]
                next_wave += 1
                features = components.half().numpy()
                steps = np.asarray(codes, dtype=np.int16)
                parts.append(Tokens("audio", segment.role, codes=steps, features=features, speaker=segment.speaker))
            else:
                assert latents is not None
                frame_list = _frames(sample, segment, tokenizers)
                encoded = latents[next_frame : next_frame + len(frame_list)]
                next_frame += len(frame_list)
                if segment.kind == "video" and segment.role == "target" and not visual.frames_alone:
                    # What is read is read frame by frame (paper: section 2.3, features of neighbouring frames are
                    # merged by the model); what is drawn is the clip's own code.
                    with torch.inference_mode():
                        encoded = visual.encode_video(np.stack(frame_list)).half().numpy()
                pixels = np.stack(frame_list) if segment.role == "input" else None
                parts.append(Tokens(segment.kind, segment.role, pixels=pixels, latents=encoded))
        documents.append(parts)
    return documents


def _array(sample: Sample, segment: Segment) -> np.ndarray:
    if segment.array is None or segment.array.size == 0:
        raise DataError(f"record {sample.key}: its {segment.kind} segment is empty")
    return segment.array


def _frames(sample: Sample, segment: Segment, tokenizers: Tokenizers) -> list[np.ndarray]:
    array = _array(sample, segment)
    if array.dtype != np.uint8 or array.ndim != (3 if segment.kind == "image" else 4) or array.shape[-1] != 3:
        raise DataError(
            f"record {sample.key}: its {segment.kind} has dtype {array.dtype} and shape {array.shape}; expected uint8 "
            + ("[H, W, 3]" if segment.kind == "image" else "[F, H, W, 3]")
        )
    size = tokenizers.visual.config.image_size
    if array.shape[-3:-1] != (size, size):
        raise DataError(
            f"record {sample.key}: its {segment.kind} has {array.shape[-3]}x{array.shape[-2]} pixels; this visual "
            f"tokenizer reads {size}x{size} (data.decoding.fit_image makes them fit)"
        )
    return [array] if segment.kind == "image" else list(array)

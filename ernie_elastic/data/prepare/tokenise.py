"""Samples to token segments: text ids, understanding pixels, visual latents and audio codes.

Latents (not bits) are kept for generated pictures, so that flips, targets and bit counts are decided at load time.
Letters: F frames, H/W pixels, h/w latent grid, D bits, S audio steps, Q levels.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.world.facts import WorldConfig
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.schema import Sample, Segment
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.base import VisualTokenizer

TOKENIZER_NAMES: tuple[Literal["text", "visual", "audio"], ...] = ("text", "visual", "audio")
MAX_CODES = 1 << 15  # of a codebook: codes are kept as int16


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


def tokenise(
    samples: Sequence[Sample], tokenizers: Tokenizers, text_dropout: float = 0.0, seed: int = 0
) -> list[list[Tokens]]:
    """Token segments of each sample; pictures of the whole batch are encoded in one call.

    Sounds carry the audio tokenizer's components beside their codes. text_dropout: BPE dropout, for training only; the
    ids of a text are then a function of (record's key, place in it, seed). Raises DataError for what cannot be read.
    """
    for sample in samples:
        check_sample(sample, tokenizers)
    pictures, waves = [], []
    for sample in samples:
        for segment in sample.segments:
            if segment.kind in ("image", "video"):
                pictures.append(_frames(sample, segment, tokenizers))
            elif segment.kind == "audio":
                waves.append(_array(sample, segment))
    with torch.inference_mode():
        encoded = _encode_pictures(pictures, tokenizers)
        sounds = iter(tokenizers.audio.encode_with_components(waves))
    documents = []
    for sample in samples:
        parts: list[Tokens] = []
        for place, segment in enumerate(sample.segments):
            if segment.kind == "text":
                draw = text_seed(sample.key, place, seed) if text_dropout else None
                ids = tokenizers.text.encode(segment.text or "", dropout=text_dropout, seed=draw)
                parts.append(Tokens("text", segment.role, ids=np.asarray(ids, dtype=np.int32)))
            elif segment.kind == "audio":
                codes, components = next(sounds)
                steps, features = np.asarray(codes, dtype=np.int16), components.half().numpy()
                parts.append(Tokens("audio", segment.role, codes=steps, features=features, speaker=segment.speaker))
            else:
                frames, latents = next(encoded)
                parts.append(_visual(segment, frames, latents, tokenizers))
        documents.append(parts)
    return documents


def text_seed(key: str, place: int, seed: int) -> int:
    """Seed of the BPE dropout of one text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{place}:{key}".encode(), digest_size=8).digest(), "little")


def check_sample(sample: Sample, tokenizers: Tokenizers) -> None:
    """Raise DataError, which names the record, for a segment that the tokenizers cannot read; encodes nothing.

    Raises ConfigError for codebooks that int16 cannot number.
    """
    for segment in sample.segments:
        if segment.kind in ("image", "video"):
            _frames(sample, segment, tokenizers)
        elif segment.kind == "text":
            if segment.text is None:
                raise DataError(f"record {sample.key}: a text segment without text")
            try:
                segment.text.encode("utf-16-be")
            except UnicodeEncodeError as error:
                code = ord(segment.text[error.start])
                raise DataError(
                    f"record {sample.key}: its text has a lone surrogate U+{code:04X} at character {error.start}, "
                    "which is no Unicode text; repair it or leave it out"
                ) from error
        else:
            if tokenizers.audio.codebook_size > MAX_CODES:
                raise ConfigError(
                    f"the audio tokenizer has codebooks of {tokenizers.audio.codebook_size} codes; int16 holds "
                    f"{MAX_CODES}: train one with a smaller --model.codebook-size"
                )
            try:
                tokenizers.audio.check_wave(_array(sample, segment))
            except DataError as error:
                raise DataError(f"record {sample.key}: {error}") from error


def _encode_pictures(
    pictures: Sequence[list[np.ndarray]], tokenizers: Tokenizers
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """(frames, latents float16 [F, h, w, D]) of each picture or clip, every frame by itself."""
    if not pictures:
        return iter(())
    stacked = np.stack([frame for frames in pictures for frame in frames])
    latents = tokenizers.visual.encode(torch.from_numpy(stacked)).half().numpy()
    ends = np.cumsum([len(frames) for frames in pictures])
    parts = [latents[end - len(frames) : end] for frames, end in zip(pictures, ends, strict=True)]
    return iter(zip(pictures, parts, strict=True))


def _visual(segment: Segment, frames: list[np.ndarray], latents: np.ndarray, tokenizers: Tokenizers) -> Tokens:
    if segment.kind == "video" and segment.role == "target" and not tokenizers.visual.frames_alone:
        # What is read is read frame by frame (paper: section 2.3, features of neighbouring frames are merged by the
        # model); what is drawn is the clip's own code.
        with torch.inference_mode():
            latents = tokenizers.visual.encode_video(np.stack(frames)).half().numpy()
    pixels = np.stack(frames) if segment.role == "input" else None
    return Tokens(segment.kind, segment.role, pixels=pixels, latents=latents)


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


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """The same arithmetic in any process: the sums of several threads come in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)

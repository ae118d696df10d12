"""`generate`: one prompt, with media to read if any, to text, a picture, a video or a sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageSequence, UnidentifiedImageError

from ernie_elastic.data.tokenise import Tokenizers
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.modeling.answer import GenerationMode, answer
from ernie_elastic.modeling.generation import Sampling
from ernie_elastic.modeling.loading import load_model, load_tokenizers
from ernie_elastic.schema import Segment
from ernie_elastic.stages import disk_error, say

SUFFIX = {"image": (".png",), "video": (".png", ".gif"), "audio": (".wav",)}


def run_generate(
    source: Path | None,
    prompt: str | None,
    media: dict[str, Path],
    to: GenerationMode,
    out: Path | None,
    temperature: float,
    bit_temperature: float,
    seed: int,
    max_new_tokens: int,
) -> str | np.ndarray:
    """Answer one prompt and write or print the answer. Raises ConfigError or DataError for what cannot be used."""
    if prompt is None and not media:
        raise ConfigError("generate: give --prompt, --image, --video or --audio")
    if to != "text":
        if out is None:
            raise ConfigError(f"generate: --to {to} needs --out FILE ({' or '.join(SUFFIX[to])})")
        if out.suffix not in SUFFIX[to]:
            raise ConfigError(
                f"generate: --out {out} ends in {out.suffix!r}; --to {to} writes {' or '.join(SUFFIX[to])}"
            )
    tokenizers = load_tokenizers(source)
    segments = [read_media(kind, path, tokenizers) for kind, path in media.items()]
    if prompt is not None:
        segments.append(Segment("text", "input", text=prompt))
    model = load_model(source)
    sampling = Sampling(
        temperature=temperature, bit_temperature=bit_temperature, seed=seed, max_new_tokens=max_new_tokens
    )
    result = answer(model, tokenizers, [segments], to, sampling)[0]
    if isinstance(result, str):
        say(result)
    elif out is not None:
        write_media(result, out, tokenizers.audio.config.sample_rate)
        say(f"generate: wrote {out}")
    return result


def read_media(kind: str, path: Path, tokenizers: Tokenizers) -> Segment:
    """A media file as an input segment, at the size and rate that the tokenizers read; DataError names the file."""
    size = tokenizers.visual.config.image_size
    try:
        if kind == "audio":
            wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
            return Segment(
                "audio", "input", array=resample(wave.mean(axis=1), rate, tokenizers.audio.config.sample_rate)
            )
        with Image.open(path) as picture:
            if kind == "image":
                return Segment("image", "input", array=_square(picture, size))
            return Segment("video", "input", array=_frames(picture, size, path))
    except (OSError, UnidentifiedImageError, soundfile.LibsndfileError) as error:
        raise DataError(f"--{kind} {path} cannot be read: {error}") from error


def _square(picture: Image.Image, size: int) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BOX), dtype=np.uint8)


def _frames(picture: Image.Image, size: int, path: Path) -> np.ndarray:
    frames = [_square(frame, size) for frame in ImageSequence.Iterator(picture)]
    if len(frames) == 1:  # frames side by side
        count = picture.width // picture.height
        if count * picture.height != picture.width:
            raise DataError(
                f"--video {path} is {picture.width}x{picture.height}; a strip holds square frames side by side"
            )
        frames = [
            _square(picture.crop((i * picture.height, 0, (i + 1) * picture.height, picture.height)), size)
            for i in range(count)
        ]
    if len(frames) % 4:
        raise DataError(f"--video {path} has {len(frames)} frames; this model reads a multiple of 4")
    return np.stack(frames)


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """float32 [n] at `rate` Hz to `target` Hz by linear interpolation over a box-filtered signal."""
    if rate == target:
        return wave.astype(np.float32)
    if rate > target:
        width = -(-rate // target)
        wave = np.convolve(wave, np.ones(width) / width, mode="same")
    length = max(1, round(len(wave) * target / rate))
    return np.interp(np.arange(length) * rate / target, np.arange(len(wave)), wave).astype(np.float32)


def write_media(value: np.ndarray, out: Path, sample_rate: int) -> None:
    """Write a picture, strip or GIF, or sound as a whole file."""
    temporary = out.with_name(f".{out.stem}.tmp{out.suffix}")
    try:
        if value.dtype != np.uint8:
            soundfile.write(temporary, value, sample_rate, subtype="PCM_16")
        elif out.suffix == ".gif":
            frames = [Image.fromarray(frame) for frame in value]
            frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=250, loop=0)
        else:
            frames_array = value[None] if value.ndim == 3 else value
            Image.fromarray(np.concatenate(list(frames_array), axis=1)).save(temporary)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, out) from error

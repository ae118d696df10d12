"""`generate`: one prompt, with media to read if any, to text, a picture, a video or a sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from ernie_elastic.data.media.decoding import fit_frames, fit_image, read_audio, read_image, read_video
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.generation.answer import GenerationMode, answer
from ernie_elastic.generation.decoder import Sampling
from ernie_elastic.generation.loading import load_model, load_tokenizers
from ernie_elastic.modeling.refiner import Refiner
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
    refine: Path | None = None,
) -> str | np.ndarray:
    """Answer one prompt and write or print the answer. Raises ConfigError or DataError for what cannot be used.

    refine: directory of a refiner that makes what was drawn larger; CheckpointError when it holds none.
    """
    if prompt is None and not media:
        raise ConfigError("generate: give --prompt, --image, --video or --audio")
    if to != "text":
        if out is None:
            raise ConfigError(f"generate: --to {to} needs --out FILE ({' or '.join(SUFFIX[to])})")
        if out.suffix not in SUFFIX[to]:
            raise ConfigError(
                f"generate: --out {out} ends in {out.suffix!r}; --to {to} writes {' or '.join(SUFFIX[to])}"
            )
    if refine is not None and to not in ("image", "video"):
        raise ConfigError(f"generate: --refine {refine} makes pictures larger and --to is {to}; leave it out")
    refiner = None if refine is None else Refiner.load(refine)  # before the model: a wrong path shows at once
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
        if refiner is not None:
            result = refined(result, refiner, seed)
        write_media(result, out, tokenizers.audio.config.sample_rate)
        say(f"generate: wrote {out}: {described(result, tokenizers.audio.config.sample_rate)}")
    return result


def refined(value: np.ndarray, refiner: Refiner, seed: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] or a clip [F, H, W, 3] at the refiner's factor times its size, likewise."""
    if value.ndim == 3:
        return refiner.refine(value[None], seed=seed)[0].numpy()
    return refiner.refine_video(value, seed=seed).numpy()


def described(value: np.ndarray, sample_rate: int) -> str:
    """What a picture [H, W, 3], a clip [F, H, W, 3] (both uint8) or a sound [samples] (float) is, in a few words."""
    if value.dtype != np.uint8:
        return f"{len(value) / sample_rate:.2f} s of sound at {sample_rate} Hz"
    size = f"{value.shape[-2]}x{value.shape[-3]} pixels"
    return size if value.ndim == 3 else f"{len(value)} frames of {size}"


def read_media(kind: str, path: Path, tokenizers: Tokenizers) -> Segment:
    """A media file as an input segment, at the size and rate that the tokenizers read; DataError names the file."""
    size, name = tokenizers.visual.config.image_size, f"--{kind} {path}"
    if kind == "audio":
        return Segment("audio", "input", array=read_audio(path, tokenizers.audio.config.sample_rate, name))
    if kind == "image":
        return Segment("image", "input", array=fit_image(read_image(path, name), size))
    return Segment("video", "input", array=fit_frames(_frames(path, name), size))


def _frames(path: Path, name: str) -> np.ndarray:
    """uint8 [F, H, W, 3] of a video, or of a strip: one picture that holds square frames side by side."""
    frames = read_video(path, name=name)
    if len(frames) == 1:
        height, width = frames.shape[1:3]
        if width % height:
            raise DataError(f"{name} is {width}x{height}; a strip holds square frames side by side")
        frames = np.stack(np.split(frames[0], width // height, axis=1))
    if len(frames) % 4:
        raise DataError(f"{name} has {len(frames)} frames at even times; this model reads a multiple of 4")
    return frames


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
    except soundfile.LibsndfileError as error:  # no OSError, and it does not say what went wrong
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {out}: {error.error_string}; choose another --out whose directory exists"
        ) from error

"""Media files to arrays: pictures, sounds and videos, read as they are meant or refused with a DataError.

A source is a path, or the bytes of a file. Every reader either gives the whole of it or raises DataError with the
record's name; a reader never guesses, and never leaves frames, channels or a damaged rest out unsaid.

- Pictures (PICTURE_FORMATS): greyscale, palette, CMYK and 16-bit ones become 8-bit RGB as stored (no ICC profile is
  applied, 16-bit colour keeps its upper byte), transparent pixels lie on BACKGROUND, EXIF orientation is carried out.
- Sounds (SOUND_FORMATS): the mean of all channels, resampled.
- Videos: GIF, APNG and animated WebP by Pillow; MP4, WebM and other containers by PyAV where it is installed.

A file beyond the limits below is refused, not cut. Damage that a format cannot show (no checksums in JPEG, GIF and WAV;
no length in Ogg, MP3, AVI and WebM) may still decode, to other values.
Warnings are errors while a file is decoded, which is a setting of the process: decode in processes, not in threads.

Shape letters: N samples, C channels, F frames, H/W pixels.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, UnidentifiedImageError

from ernie_elastic.data.media.resampling import BACKGROUND, MAX_FRAMES, even_times, fit_frames, fit_image, resample
from ernie_elastic.errors import DataError

Source = Path | str | bytes

MAX_BYTES = 1 << 31  # of one file
MAX_PIXELS = 80_000_000  # of one picture; below the size at which Pillow warns
MAX_VIDEO_PIXELS = 400_000_000  # of all frames that one video gives, 1.2 GB
MAX_SAMPLES = 1 << 28  # over all channels of one sound, 1 GiB
SAMPLE_RATES = (1_000, 768_000)  # Hz, lowest and highest
# Lossy codecs overshoot full scale a little, and players clip that; beyond this the samples have another scale.
MAX_PEAK = 1.5
DEFAULT_MILLISECONDS = 100.0  # of a frame whose stored duration is 0, as browsers show it

# Named, because Pillow's other plugins start programs (EPS) or guess from no signature (TGA).
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
SOUND_FORMATS = ("WAV", "WAVEX", "AIFF", "FLAC", "OGG", "MP3")
TIMED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
ORIENTATION_TAG = 0x0112  # EXIF: what brings the stored pixels upright
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
UPRIGHT = {value: Image.Transpose[turn] for value, turn in enumerate(TURNS, start=2)}  # 1 is upright

__all__ = ["fit_frames", "fit_image", "read_audio", "read_image", "read_video"]


def read_image(source: Source, name: str | None = None) -> np.ndarray:
    """One picture, upright: uint8 [H, W, 3].

    name: what errors call the record (default: the path). Of a phone's multi-picture JPEG (MPO) the main picture is
    read. ours: the report does not say how pictures are read. Raises DataError for a file that is empty, damaged, of an
    unknown format, animated or of several pages, of floating-point pixels, or larger than MAX_PIXELS.
    """
    data, label = _content(source, name)
    with _decoding(label, "a picture"):
        picture = _open_picture(data, label)
        count = getattr(picture, "n_frames", 1)
        if count > 1 and picture.format != "MPO":
            raise DataError(
                f"{label} holds {count} pictures and one is wanted; read it as a video, or save the one that is meant"
            )
        return _pixels(picture, label)


def read_audio(source: Source, sample_rate: int, name: str | None = None) -> np.ndarray:
    """One sound at `sample_rate` Hz: float32 [N] in [-1, 1], the mean of its channels.

    name: what errors call the record (default: the path). Integer samples are divided by their full scale; an overshoot
    up to MAX_PEAK is clipped. ours: the report does not say how sounds are read. Raises DataError for a file that is
    empty, damaged, cut short or without samples, for NaN or infinite samples, for a peak above MAX_PEAK, for a rate
    outside SAMPLE_RATES, and for more than MAX_SAMPLES samples.
    """
    data, label = _content(source, name)
    with _decoding(label, "a sound"):
        _check_chunks(data, label)
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            rate, frames, channels = sound.samplerate, sound.frames, sound.channels
            low, *_, high = sorted((*SAMPLE_RATES, rate, sample_rate))
            size = f"{frames} samples of {channels} channels"
            for is_bad, problem in (
                (sound.format not in SOUND_FORMATS, f"{sound.format} files do not show cuts; save it as WAV or FLAC"),
                (frames == 0, "it has no samples; leave it out"),
                ((low, high) != SAMPLE_RATES, f"{rate} Hz to {sample_rate} Hz, rates must lie in {SAMPLE_RATES}"),
                (frames * channels > MAX_SAMPLES, f"its header says {size}, at most {MAX_SAMPLES} in all; cut it"),
            ):
                if is_bad:
                    raise DataError(f"{label} cannot be read as a sound: {problem}")
            samples_NC = sound.read(dtype="float32", always_2d=True)
        if len(samples_NC) != frames:
            raise DataError(f"{label} is cut short: it says {size}, {len(samples_NC)} are there; copy it anew")
        _check_samples(samples_NC, rate, label)
        wave_N = resample(samples_NC.mean(axis=1, dtype=np.float64), rate, sample_rate)
        return np.clip(wave_N, -1.0, 1.0)


def read_video(source: Source, num_frames: int | None = None, name: str | None = None) -> np.ndarray:
    """The pictures of one video: uint8 [F, H, W, 3], without its sound.

    num_frames: F, taken at even times (the middles of F equal parts), so that a frame shown longer is taken more often.
    None gives every stored frame, a held one as often as it lasts (`resampling.even_times`). A still picture is a video
    of one frame. name: what errors call the record (default: the path). ours: the report does not say how videos are
    read. Raises DataError for a file that is empty, damaged or cut short, for pages without times, for more than
    MAX_FRAMES frames or MAX_VIDEO_PIXELS pixels, and for a container when PyAV is not installed.
    """
    data, label = _content(source, name)
    with _decoding(label, "a video"):
        kind = _container(data)
        if kind is not None:
            return _container_frames(data, label, kind, num_frames)
        return _picture_frames(data, label, num_frames)


def _content(source: Source, name: str | None) -> tuple[bytes, str]:
    """A source's bytes, and what errors call it."""
    if isinstance(source, bytes):
        data, label = source, name or f"<{len(source)} bytes>"
    else:
        label = name or str(source)
        try:
            size = Path(source).stat().st_size
            if size > MAX_BYTES:
                raise DataError(f"{label} cannot be read: it has {size} bytes, at most {MAX_BYTES} are read; cut it")
            data = Path(source).read_bytes()
        except OSError as error:
            raise DataError(f"{label} cannot be read: {error.strerror or error}") from error
    if not data:
        raise DataError(f"{label} cannot be read: it is empty (0 bytes); copy it anew or leave it out")
    return data, label


@contextlib.contextmanager
def _decoding(label: str, kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises or warns of into a DataError that names the record."""
    try:
        with warnings.catch_warnings():
            # Pillow warns where it repairs or leaves out (bad EXIF, broken APNG, huge pictures) and then goes on.
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("error", RuntimeWarning)
            # Of an MPO the main picture alone is read, so that nothing depends on the others.
            warnings.filterwarnings("ignore", "Image appears to be a malformed MPO")
            yield
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        reason = f"it has more than {MAX_PIXELS} pixels, the most that are read; make it smaller"
        raise DataError(f"{label} cannot be read as {kind}: {reason}") from error
    except Exception as error:
        # Decoders meet bytes that anyone may have written, and raise what their parsers happen to: struct.error,
        # KeyError, ZeroDivisionError. All of it means that the file is damaged.
        reason = getattr(error, "error_string", None) or str(error) or type(error).__name__
        reason = " ".join(str(reason).split()).rstrip(".")
        raise DataError(f"{label} cannot be read as {kind}: {reason}; save it anew or leave it out") from error


def _open_picture(data: bytes, label: str) -> Image.Image:
    """The opened picture, its checksums (PNG), its end (GIF) and its size checked, its pixels not yet decoded."""
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    except UnidentifiedImageError as error:
        known = f"no whole picture of the formats {', '.join(PICTURE_FORMATS)}; save it as one of them"
        raise DataError(f"{label} cannot be read: it begins with {data[:12]!r} and is {known}") from error
    width, height = picture.size
    if not 1 <= width * height <= MAX_PIXELS:
        raise DataError(
            f"{label} cannot be read: it has {width}x{height} pixels; 1 to {MAX_PIXELS} are read; resize it"
        )
    if picture.format == "PNG":
        picture.verify()  # all chunks up to the last; decoding alone skips the checksums of pixels
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
    if picture.format == "GIF":
        stored, found = _gif_frames(data, label), getattr(picture, "n_frames", 1)
        if stored != found:
            raise DataError(f"{label} is damaged: {stored} frames are stored, {found} can be decoded; save it anew")
    return picture


def _gif_frames(data: bytes, label: str) -> int:
    """How many frames a GIF stores up to its end mark; Pillow takes a missing rest for the end.

    ours: a walk over the blocks of GIF89a (CompuServe's specification, sections 17 to 27).
    """

    def after_colours(flags: int, at: int) -> int:
        return at + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)

    count, at = 0, after_colours(data[10], 13)
    while at < len(data) and data[at] != 0x3B:
        if data[at] == 0x2C and at + 10 < len(data):
            count += 1
            at = after_colours(data[at + 9], at + 10) + 1
        elif data[at] == 0x21:
            at += 2
        elif data[at]:  # a stray 0 between blocks is common
            raise DataError(f"{label} is damaged: byte {at} of the GIF opens no block; save it anew")
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
    if at >= len(data):
        raise DataError(f"{label} is cut short: the GIF ends at byte {len(data)} without its end mark; copy it anew")
    return count


def _pixels(picture: Image.Image, label: str) -> np.ndarray:
    """The current frame, upright, as uint8 [H, W, 3] on BACKGROUND."""
    picture.load()  # first: the TIFF reader carries out the orientation itself while loading
    turn = UPRIGHT.get(picture.getexif().get(ORIENTATION_TAG, 1))
    upright: Image.Image = picture if turn is None else picture.transpose(turn)
    if upright.mode == "F":
        raise DataError(f"{label} has floating-point pixels, whose white is not stated; save it with 8 or 16 bits")
    if upright.mode.startswith("I"):
        values_HW = np.asarray(upright).astype(np.int64)
        if values_HW.min() < 0 or values_HW.max() > 65535:
            found = f"{values_HW.min()} to {values_HW.max()}"
            raise DataError(f"{label} has pixels from {found}; 0 to 65535 are read, save it with 16 bits")
        grey_HW3 = np.repeat(((values_HW * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
        if "transparency" in picture.info:
            grey_HW3[values_HW == picture.info["transparency"]] = BACKGROUND
        return grey_HW3
    if upright.has_transparency_data:
        canvas = Image.new("RGBA", upright.size, (*BACKGROUND, 255))
        upright = Image.alpha_composite(canvas, upright.convert("RGBA"))
    return np.array(upright.convert("RGB"))


def _picture_frames(data: bytes, label: str, num_frames: int | None) -> np.ndarray:
    """Frames by Pillow. Two passes, so that only chosen frames are held in memory."""
    picture = _open_picture(data, label)
    count, first = getattr(picture, "n_frames", 1), 0
    if count > 1 and picture.format not in TIMED_FORMATS:
        raise DataError(f"{label} cannot be read as a video: its {count} pictures have no times; save it as a GIF")
    if count > 1 and getattr(picture, "default_image", False):
        first = 1  # APNG's own rule: this picture is for viewers without animation, and no frame of it
    if count > MAX_FRAMES or count * picture.width * picture.height > 10 * MAX_VIDEO_PIXELS:
        raise DataError(f"{label} cannot be read as a video: it has {count} frames, too many to decode; cut it")
    durations = []
    for number in range(first, count):
        picture.seek(number)
        picture.load()
        durations.append(float(picture.info.get("duration") or DEFAULT_MILLISECONDS))
    chosen = even_times(durations, num_frames, label)
    _check_size(len(chosen), picture.width, picture.height, label)
    picture, frames = _open_picture(data, label), {}
    for number in sorted(set(chosen.tolist())):
        picture.seek(first + number)
        frames[number] = _pixels(picture, label)
    return _stack(frames, chosen, label)


def _check_chunks(data: bytes, label: str) -> None:
    """Raise DataError when a WAV or AIFF file holds less than its samples' chunk says; libsndfile reads on silently."""
    order, wanted = {b"RIFF": ("<", b"data"), b"RIFX": (">", b"data"), b"FORM": (">", b"SSND")}.get(data[:4], ("", b""))
    at = 12
    while order and at + 8 <= len(data):
        (size,) = struct.unpack_from(f"{order}I", data, at + 4)
        there = len(data) - at - 8
        # All ones is what programs write that stream a file and never learn its length.
        if data[at : at + 4] == wanted and size > there and size != 0xFFFFFFFF:
            raise DataError(f"{label} is cut short: its header says {size} bytes, {there} are there; copy it anew")
        at += 8 + size + size % 2


def _check_samples(samples_NC: np.ndarray, rate: int, label: str) -> None:
    bad_N = ~np.isfinite(samples_NC).all(axis=1)
    if bad_N.any():
        raise DataError(
            f"{label} cannot be read as a sound: {int(bad_N.sum())} of {len(bad_N)} samples are NaN or infinite, the "
            f"first at {int(bad_N.argmax()) / rate:.4f} s; repair it or leave it out"
        )
    peak = float(np.abs(samples_NC).max())
    if peak > MAX_PEAK:
        raise DataError(
            f"{label} cannot be read as a sound: its peak is {peak:g}, at most {MAX_PEAK} is read; divide its samples "
            "by their full scale"
        )


def _check_size(count: int, width: int, height: int, label: str) -> None:
    if count * width * height > MAX_VIDEO_PIXELS:
        raise DataError(
            f"{label} cannot be read as a video: {count} frames of {width}x{height} pixels; at most {MAX_VIDEO_PIXELS} "
            "pixels are read, ask for fewer frames with num_frames or make it smaller"
        )


def _stack(frames: dict[int, np.ndarray], chosen: np.ndarray, label: str) -> np.ndarray:
    shapes = sorted({frame.shape[:2] for frame in frames.values()})
    if len(shapes) > 1:
        raise DataError(f"{label} is damaged: its frames have sizes {shapes[0]} and {shapes[-1]}; save it anew")
    return np.stack([frames[number] for number in chosen.tolist()])


def _container(data: bytes) -> str | None:
    """What kind of video container these bytes open, or None. AVIF and HEIF pictures share MP4's first bytes."""
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "MP4"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "AVI"
    openings = {b"\x1a\x45\xdf\xa3": "WebM", b"\x00\x00\x01\xba": "MPEG", b"OggS": "Ogg", b"FLV\x01": "FLV"}
    return openings.get(data[:4])


def _container_frames(data: bytes, label: str, kind: str, num_frames: int | None) -> np.ndarray:
    """Frames of the first video track by PyAV. Two passes, so that only chosen frames are held in memory."""
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        raise DataError(
            f"{label} is a video in a {kind} container, which needs PyAV: run `pip install av`, or save it as a GIF"
        ) from error

    def each(visit: Callable[[int, Any], None]) -> int:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise DataError(f"{label} cannot be read as a video: its {kind} container has no pictures")
            stream = container.streams.video[0]
            _check_size(1, stream.width, stream.height, label)
            for number, frame in enumerate(container.decode(stream)):
                visit(number, frame)
            return int(stream.frames)

    times: list[float] = []
    promised = each(lambda number, frame: times.append(frame.time))
    if kind == "MP4" and promised > len(times):  # AVI counts the gaps between frames too
        raise DataError(f"{label} is cut short: it says {promised} frames, {len(times)} can be decoded; copy it anew")
    # The last frame's length is not stored in every container: it counts as the median of the others.
    steps = np.diff(np.asarray(times, dtype=np.float64))
    chosen = even_times([*steps, np.median(steps) if len(steps) else 1.0] if times else [], num_frames, label)
    wanted, frames = set(chosen.tolist()), {}

    def keep(number: int, frame: Any) -> None:
        if number in wanted:
            _check_size(len(chosen), frame.width, frame.height, label)
            pixels_HW3 = frame.to_ndarray(format="rgb24")
            # Phones store the picture as the sensor lies, and the turn (counter-clockwise, degrees) beside it.
            frames[number] = np.rot90(pixels_HW3, round(getattr(frame, "rotation", 0) / 90))

    each(keep)
    return _stack(frames, chosen, label)

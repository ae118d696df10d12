"""Pictures, video strips and sounds inside one HTML file: data URIs, and a waveform drawn as SVG.

A file that is not there becomes a box that says so; a file that is there and cannot be read is a DataError.
"""

from __future__ import annotations

import base64
import io
import itertools
from html import escape
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, UnidentifiedImageError

from ernie_elastic.errors import DataError

WAVE_COLUMNS = 96
AUDIO_TYPES = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg"}


def media_html(folder: Path, name: str, caption: str, alt: str) -> str:
    """A figure for one media file (`name` relative to `folder`): picture, strip of frames or sound, by its suffix.

    caption is HTML; alt is plain text. Pictures up to 64 pixels high are enlarged without smoothing.
    Raises DataError for a damaged file or an unknown suffix.
    """
    path = folder / name
    if not path.is_file():
        body = f'<div class="absent">missing: {escape(name)}</div>'
    elif path.suffix == ".png":
        body = picture_html(path, alt)
    elif path.suffix in AUDIO_TYPES:
        body = audio_html(path, alt)
    else:
        raise DataError(f"{path}: media of type {path.suffix!r}, the report shows .png and {', '.join(AUDIO_TYPES)}")
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{body}{caption}</figure>"


def picture_html(path: Path, alt: str) -> str:
    """An <img> with the file's own bytes; a picture at least twice as wide as high is shown as a strip of frames."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({error}); run the evaluation again") from error
    source = data_uri(data, "image/png")
    pixels = " pixels" if height <= 64 else ""
    size = f'width="{width}" height="{height}" alt="{escape(alt)}"'
    if width < 2 * height:
        return f'<img class="picture{pixels}" {size} src="{source}">'
    strip = f'<img class="{pixels.strip()}" {size} src="{source}">'
    return f'<span class="strip" style="--n:{round(width / height)}">{strip}</span>'


def figure_html(path: Path) -> str:
    """A <figure> for a large PNG; on a phone one more than 1200 pixels wide keeps its size and scrolls sideways."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            width = image.size[0]
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({error}); run the routing stage again") from error
    kind = ' class="large"' if width > 1200 else ""
    return f'<figure{kind}><img alt="{escape(path.stem)}" src="{data_uri(data, "image/png")}"></figure>'


def audio_html(path: Path, alt: str) -> str:
    """A waveform and a player with the file's own bytes."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise DataError(f"{path}: cannot be read as sound ({error}); run the evaluation again") from error
    mono = samples.mean(axis=1)
    seconds = len(mono) / rate
    source = data_uri(path.read_bytes(), AUDIO_TYPES[path.suffix])
    return (
        f"{waveform_svg(mono, f'waveform of {alt}, {seconds:.1f} s')}"
        f'<audio controls preload="metadata" aria-label="{escape(alt)}" src="{source}"></audio>'
    )


def waveform_svg(samples: np.ndarray, title: str) -> str:
    """Peaks of float samples [num_samples] in [-1, 1], one bar for each of WAVE_COLUMNS stretches."""
    peaks = np.zeros(WAVE_COLUMNS)
    if len(samples):
        edges = np.linspace(0, len(samples), WAVE_COLUMNS + 1).astype(int)
        spans = [samples[a : max(b, a + 1)] for a, b in itertools.pairwise(edges)]
        peaks = np.array([np.abs(span).max(initial=0.0) for span in spans])
    half = np.clip(np.nan_to_num(peaks), 0.02, 1.0) * 20
    bars = "".join(f"M{2 * i + 1} {22 - h:.1f}V{22 + h:.1f}" for i, h in enumerate(half))
    return (
        f'<svg class="wave" viewBox="0 0 {2 * WAVE_COLUMNS} 44" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}"><path d="{bars}"/></svg>'
    )


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a data URI of that media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

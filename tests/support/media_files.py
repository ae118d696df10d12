"""Small media files as bytes, drawn from a generator."""

from __future__ import annotations

import io

import numpy as np
import soundfile
from PIL import Image


def png(rng: np.random.Generator, height: int = 20, width: int = 30) -> bytes:
    """A picture of noise."""
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def gif(rng: np.random.Generator, frames: int) -> bytes:
    """A clip of noise, 16x12 pixels."""
    stream = io.BytesIO()
    pictures = [Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)) for _ in range(frames)]
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    return stream.getvalue()


def wav(rng: np.random.Generator, samples: int = 4000, rate: int = 16000) -> bytes:
    """A sound of noise."""
    stream = io.BytesIO()
    soundfile.write(stream, rng.uniform(-0.4, 0.4, samples), rate, format="WAV")
    return stream.getvalue()

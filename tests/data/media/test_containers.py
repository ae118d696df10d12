"""Videos in real containers, made and read by PyAV: variable frame rates, cuts, sound without pictures."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest

from ernie_elastic.data.media.decoding import read_video
from ernie_elastic.errors import DataError

av = pytest.importorskip("av")
SIDE = 64


def container(kind: str, codec: str, times_ms: list[int], level: int = 40) -> bytes:
    """A video of flat grey frames, frame i of grey level * i, shown at these times (ms)."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=25, options={"g": "1"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), level * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file.getvalue()


def numbers(frames: np.ndarray, level: int = 40) -> list[int]:
    """Which frames these are, by their grey."""
    return [round(float(frame.mean()) / level) for frame in frames]


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4")]
)
def test_a_constant_rate_gives_every_frame(kind: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    frames = read_video(container(kind, codec, [0, 40, 80, 120, 160]))
    assert frames.shape == (5, SIDE, SIDE, 3) and numbers(frames) == [0, 1, 2, 3, 4]
    assert numbers(read_video(container(kind, codec, [0, 40, 80, 120, 160]), num_frames=1)) == [2]


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_a_variable_rate_is_read_at_even_times(kind: str) -> None:
    # The last frame counts 200 ms, the median of the others: 1,100 ms in all, of which frame 1 is held for 600.
    data = container(kind, "mpeg4", [0, 200, 800, 900])
    assert numbers(read_video(data, num_frames=5)) == [0, 1, 1, 1, 3]
    assert numbers(read_video(data, num_frames=10)) == [0, 0, 1, 1, 1, 1, 1, 2, 3, 3]


def test_a_cut_file_is_refused_by_name() -> None:
    data = container("mp4", "mpeg4", [0, 40, 80, 120, 160])
    with pytest.raises(DataError, match=r"^clip-7 cannot be read as a video: "):
        read_video(data[: len(data) * 2 // 3], name="clip-7")


def test_sound_without_pictures_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    with pytest.raises(DataError, match=r"clip-8 cannot be read as a video: its MP4 container has no pictures"):
        read_video(file.getvalue(), name="clip-8")

"""Media files to arrays: what is read is exact, what cannot be read is a DataError that names the record."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import sys
import zlib
from types import ModuleType, SimpleNamespace

import hypothesis
import numpy as np
import pytest
import soundfile
from hypothesis import strategies
from PIL import Image

from ernie_elastic.data.media import decoding
from ernie_elastic.data.media.decoding import fit_frames, fit_image, read_audio, read_image, read_video
from ernie_elastic.data.media.resampling import BACKGROUND, even_times, resample
from ernie_elastic.errors import DataError
from ernie_elastic.pipeline.generate import read_media, write_media

RATE = 16000
rng = np.random.default_rng(7)
PIXELS = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
PAGES = {"save_all": True, "append_images": [Image.new("L", (2, 2))]}
READERS = {3: read_image, 4: read_video, 1: lambda source: read_audio(source, RATE)}  # by the axes of their arrays
LOSSLESS = {"WEBP": {"lossless": True}}


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def movie(count: int, kind: str = "GIF", durations: int | list[int] = 100, **options) -> bytes:
    """A video whose frame i is grey of level 40 * i + 10."""
    frames = [Image.fromarray(np.full((4, 6, 3), 40 * i + 10, dtype=np.uint8)) for i in range(count)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=durations, **options)


def levels(frames: np.ndarray) -> list[int]:
    """Which frames of `movie` these are."""
    return [(int(frame[0, 0, 0]) - 10) // 40 for frame in frames]


def wave_file(wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, subtype=subtype, format=kind)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one byte of it."""
    body = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")):
        body += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return body


def test_read_image_gives_the_stored_pixels(tmp_path):
    path = tmp_path / "picture.jpg"  # the content decides, not the name
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        path.write_bytes(encoded(PICTURE, kind))
        for source in (path.read_bytes(), path, str(path)):
            assert np.array_equal(read_image(source), PIXELS), kind
    grey = np.repeat(PIXELS[..., :1], 3, axis=2)
    assert np.array_equal(read_image(encoded(Image.fromarray(grey[..., 0]))), grey)
    assert np.array_equal(read_image(encoded(Image.fromarray(grey[..., 0] > 127))), np.where(grey > 127, 255, 0))
    palette = PICTURE.quantize(64)
    assert np.array_equal(read_image(encoded(palette)), np.asarray(palette.convert("RGB")))
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind, tolerance in (("TIFF", 0), ("JPEG", 4)):
        assert np.abs(read_image(encoded(red, kind)).astype(int) - [255, 0, 0]).max() <= tolerance
    assert read_image(encoded(Image.new("RGB", (1, 1), (3, 2, 1)))).tolist() == [[[3, 2, 1]]]
    assert read_image(encoded(Image.new("RGB", (20000, 3)))).shape == (3, 20000, 3)


def test_read_image_puts_transparent_pixels_on_the_background():
    alpha = np.full((5, 7, 1), 255, dtype=np.uint8)
    alpha[0], alpha[1] = 0, 128
    expected = np.rint((PIXELS * (alpha / 255.0)) + np.array(BACKGROUND) * (1 - alpha / 255.0))
    rgba = Image.fromarray(np.concatenate([PIXELS, alpha], axis=2))
    assert np.abs(read_image(encoded(rgba)) - expected).max() <= 1
    grey = read_image(encoded(Image.fromarray(np.concatenate([PIXELS[..., :1], alpha], axis=2))))
    assert np.abs(grey - np.repeat(expected[..., :1], 3, axis=2)).max() <= 1
    palette = Image.new("P", (2, 1), 1)
    palette.putpixel((0, 0), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    for transparency in (0, b"\x00\xff"):
        assert read_image(encoded(palette, transparency=transparency)).tolist() == [[list(BACKGROUND), [50, 60, 70]]]
    colour_key = encoded(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    assert read_image(colour_key).tolist() == [[list(BACKGROUND), [4, 5, 6]]]


def test_read_image_of_16_bits_keeps_the_whole_range():
    picture = Image.fromarray(np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        pixels = read_image(encoded(picture, kind))
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255] and (pixels == pixels[..., :1]).all()
    assert read_image(encoded(picture, transparency=257))[0, 2:4].tolist() == [[1] * 3, list(BACKGROUND)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_is_upright(orientation):
    turned = PIXELS.transpose(1, 0, 2)
    stored = [PIXELS, PIXELS[:, ::-1], PIXELS[::-1, ::-1], PIXELS[::-1]]
    stored += [turned, np.rot90(PIXELS), turned[::-1, ::-1], np.rot90(PIXELS, -1)]  # 6 is to be turned clockwise
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored[orientation - 1]))
    for kind in ("PNG", "TIFF", "WEBP"):
        assert np.array_equal(read_image(encoded(picture, kind, exif=exif, **LOSSLESS.get(kind, {}))), PIXELS), kind


@pytest.mark.parametrize("size", [(20000, 20000), (9000, 8889), (9460, 9460), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("error")
def test_read_image_refuses_bombs_without_a_warning(size):
    with pytest.raises(DataError, match=f"bomb.png.*{decoding.MAX_PIXELS}"):
        read_image(png_of_size(*size), name="bomb.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is text", "begins with b'hello"),
        (encoded(PICTURE)[:-30], "Truncated"),
        (encoded(PICTURE)[:-12], "truncated"),
        (encoded(PICTURE)[:20], "cannot be read"),
        (encoded(PICTURE)[:60] + bytes([encoded(PICTURE)[60] ^ 1]) + encoded(PICTURE)[61:], "broken PNG"),
        (encoded(PICTURE, "JPEG")[:-40], "truncated"),
        (png_of_size(3, 3), "truncated"),
        (movie(3), "holds 3 pictures"),
        (encoded(Image.new("L", (2, 2)), "TIFF", **PAGES), "holds 2"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point"),
        (encoded(Image.new("I", (2, 2), -5), "TIFF"), "pixels from -5 to -5"),
    ],
    ids=itertools.count(),
)
def test_read_image_refuses_by_name(data, message, tmp_path):
    path = tmp_path / "record.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert "record.png" in str(caught.value) and "\n" not in str(caught.value)


def test_sources_that_are_no_files_are_refused(tmp_path):
    for read in READERS.values():
        for path, reason in ((tmp_path / "nowhere.png", "No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(DataError, match=f"{path} cannot be read: {reason}"):
                read(path)


def test_read_audio_of_every_sample_format_is_the_mean_of_the_channels():
    wave = np.sin(np.arange(500) / 9) * 0.7
    for subtype, step in (("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("FLOAT", 2**-24)):
        read = read_audio(wave_file(wave, subtype=subtype), RATE)
        assert read.dtype == np.float32 and np.abs(read - wave).max() <= step + 1e-7, subtype
    for kind, subtype in (("FLAC", "PCM_16"), ("AIFF", "PCM_16"), ("WAV", "DOUBLE"), ("OGG", "VORBIS")):
        assert np.abs(read_audio(wave_file(wave, subtype=subtype, kind=kind), RATE) - wave).max() < 0.1
    for channels in (1, 2, 6):
        samples = rng.uniform(-0.9, 0.9, (100, channels)).astype(np.float32)
        read = read_audio(wave_file(samples, subtype="FLOAT"), RATE)
        assert np.abs(read - samples.mean(axis=1, dtype=np.float64)).max() < 1e-7


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 12345, 44101])
def test_resampled_sines_are_those_of_the_formula(rate):
    seconds = np.arange(rate // 2) / rate
    top = 0.85 * min(rate, RATE) / 2
    for hertz in (100.0, 997.0, top):
        result = resample(np.sin(2 * np.pi * hertz * seconds + 0.3), rate, RATE)
        assert len(result) == -(-len(seconds) * RATE // rate)
        truth = np.sin(2 * np.pi * hertz * np.arange(len(result)) / RATE + 0.3)
        inner = slice(200, -200)  # beyond the reach of the silence around the sound
        error = np.sqrt(np.mean((result[inner] - truth[inner]) ** 2) / np.mean(truth[inner] ** 2))
        assert 20 * np.log10(error) < -60, (hertz, 20 * np.log10(error))
    for hertz in (8050.0, 9000.0, 10900.0) if rate >= 22050 else ():  # above the new Nyquist frequency: would fold back
        result = resample(np.sin(2 * np.pi * hertz * seconds), rate, RATE)
        assert 20 * np.log10(np.sqrt(2 * np.mean(result[inner] ** 2))) < -60, hertz


def test_resampling_keeps_constants_identity_and_blocks(monkeypatch):
    wave = rng.standard_normal(3000).astype(np.float32)
    assert np.array_equal(resample(wave, RATE, RATE), wave)
    assert np.abs(resample(np.full(4000, 0.25), 48000, RATE)[150:-150] - 0.25).max() < 1e-7
    whole = resample(wave, 48000, RATE)
    monkeypatch.setattr("ernie_elastic.data.media.resampling.BLOCK_ROWS", 7)
    assert np.abs(resample(wave, 48000, RATE) - whole).max() < 1e-6
    assert len(resample(wave[:1], 48000, RATE)) == 1
    with pytest.raises(DataError, match="at least 1 Hz"):
        resample(wave, 0, RATE)


def test_read_audio_resamples_clips_an_overshoot_and_refuses_another_scale(monkeypatch):
    read = read_audio(wave_file(np.full((11025, 2), 0.5), 11025, "FLOAT"), RATE)
    assert read.shape == (RATE,) and np.abs(read - 0.5)[50:-50].max() < 1e-6
    assert read_audio(wave_file(np.array([0.5, -1.4]), subtype="FLOAT"), RATE).tolist() == [0.5, -1.0]
    with pytest.raises(DataError, match="its peak is 32000, at most 1"):
        read_audio(wave_file(np.array([0.5, 32000.0]), subtype="FLOAT"), RATE)
    monkeypatch.setattr(decoding, "MAX_SAMPLES", 99)
    with pytest.raises(DataError, match="50 samples of 2 channels"):
        read_audio(wave_file(np.zeros((50, 2))), RATE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"not a sound", "as a sound"),
        (wave_file(np.zeros(0)), "it has no samples"),
        (wave_file(np.array([0, 0, np.nan, np.inf]), subtype="FLOAT"), "2 of 4 samples are NaN or infinite, the first"),
        (wave_file(np.zeros(100), kind="CAF"), "CAF files do not show cuts"),
        (wave_file(np.zeros(100))[:-50], "cut short: its header says 200 bytes, 150 are there"),
        (wave_file(np.zeros(100), kind="AIFF")[:-50], "cut short"),
        (wave_file(np.zeros(100))[:30], "cannot be read as a sound"),
        (wave_file(rng.uniform(-1, 1, 9000), kind="FLAC")[:-5000], "cut short|cannot be read as a sound"),
        (wave_file(np.zeros(100), rate=100), "100 Hz to 16000 Hz"),
        (wave_file(np.zeros(100), rate=10**6), "1000000 Hz to 16000 Hz"),
    ],
    ids=itertools.count(),
)
def test_read_audio_refuses_by_name(data, message):
    with pytest.raises(DataError, match=message) as caught:
        read_audio(data, RATE, name="record 12")
    assert "record 12" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_read_video_gives_every_frame_and_takes_frames_at_even_times(kind):
    options = LOSSLESS.get(kind, {})
    frames = read_video(movie(5, kind, **options))
    assert frames.dtype == np.uint8 and frames.shape == (5, 4, 6, 3) and levels(frames) == [0, 1, 2, 3, 4]
    assert levels(read_video(movie(5, kind, **options), 2)) == [1, 3]
    assert levels(read_video(movie(2, kind, **options), 4)) == [0, 0, 1, 1]
    uneven = movie(3, kind, [200, 800, 200], **options)
    assert levels(read_video(uneven, 4)) == [0, 1, 1, 2] and levels(read_video(uneven, 1)) == [1]
    assert levels(read_video(uneven)) == [0, 1, 1, 1, 1, 2]


def test_read_video_gives_frames_again_that_the_gif_writer_joined(tmp_path):
    clip = np.stack([np.full((8, 8, 3), level, dtype=np.uint8) for level in (10, 90, 90, 90, 30, 30, 200, 10)])
    write_media(clip, tmp_path / "clip.gif", RATE)
    assert np.array_equal(read_video(tmp_path / "clip.gif"), clip)


def test_read_video_of_one_frame_of_no_durations_and_of_a_default_picture():
    assert read_video(movie(1)).shape == (1, 4, 6, 3)
    assert np.array_equal(read_video(encoded(PICTURE), num_frames=3), np.stack([PIXELS] * 3))
    assert levels(read_video(movie(3, durations=[0, 100, 0]))) == [0, 1, 2], "0 counts as a tenth of a second"
    frames = [Image.fromarray(np.full((4, 6, 3), 40 * i + 10, dtype=np.uint8)) for i in range(3)]
    default = Image.new("RGB", (6, 4), (255, 0, 0))
    data = encoded(default, save_all=True, append_images=frames, default_image=True, duration=50)
    assert levels(read_video(data)) == [0, 1, 2], "what viewers without animation show is no frame"


def test_a_gif_or_apng_that_is_cut_anywhere_is_refused():
    for kind in ("GIF", "PNG", "WEBP"):
        data = movie(4, kind)
        for length in range(0, len(data) - 4, 1 if kind == "GIF" else 5):  # a PNG ends in the checksum of nothing
            with pytest.raises(DataError, match="clip"):
                read_video(data[:length], name="clip")


def test_read_video_refuses_what_is_too_much(monkeypatch):
    with pytest.raises(DataError, match="0 frames at even times"):
        read_video(movie(3), num_frames=0)
    with pytest.raises(DataError, match="no times"):
        read_video(encoded(Image.new("L", (2, 2)), "TIFF", **PAGES))
    monkeypatch.setattr(decoding, "MAX_VIDEO_PIXELS", 71)
    assert len(read_video(movie(3), num_frames=2)) == 2
    with pytest.raises(DataError, match="3 frames of 6x4 pixels; at most 71"):
        read_video(movie(3))


def test_even_times_never_leave_a_frame_out_unless_asked():
    for durations in rng.uniform(1, 20, (200, 6)):
        assert set(even_times(durations, None, "clip").tolist()) == set(range(6))
    assert even_times([33, 34, 33, 33], None, "clip").tolist() == [0, 1, 2, 3]
    for bad in ([], [1.0, 0.0], [1.0, float("nan")], [1e-3, 1e6]):
        with pytest.raises(DataError, match="clip cannot be read as a video"):
            even_times(bad, None, "clip")


def test_a_container_without_pyav_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # what an import of a missing package sees
    for opening in (b"\0\0\0\x20ftypisom", b"\x1a\x45\xdf\xa3\0\0\0\0"):
        with pytest.raises(DataError, match=r"clip\.mp4 is a video .*pip install av"):
            read_video(opening + bytes(40), name="clip.mp4")


def fake_container(times: list[float], promised: int = 0, rotation: int = 0):
    """What PyAV's `open` gives: the frames of `movie` at these times (s), the right top pixel white."""

    def decode(_stream):
        for i, time in enumerate(times):
            pixels = np.full((4, 6, 3), 40 * i + 10, dtype=np.uint8)
            pixels[0, -1] = 255
            turn = lambda format, pixels=pixels: pixels
            yield SimpleNamespace(time=time, width=6, height=4, rotation=rotation, to_ndarray=turn)

    streams = SimpleNamespace(video=[SimpleNamespace(width=6, height=4, frames=promised)])
    return lambda _file: contextlib.nullcontext(SimpleNamespace(streams=streams, decode=decode))


def test_a_container_is_read_at_even_times_upright_and_whole(monkeypatch):
    module = ModuleType("av")
    monkeypatch.setitem(sys.modules, "av", module)
    data = b"\0\0\0\x20ftypisom" + bytes(40)
    module.open = fake_container([0.0, 0.2, 1.0])
    assert levels(read_video(data, num_frames=4)) == [0, 1, 1, 2]
    module.open = fake_container([0.0, 0.04, 0.08], rotation=90)
    turned = read_video(data)
    assert turned.shape == (3, 6, 4, 3) and turned[0, 0, 0].tolist() == [255] * 3, "the right top goes to the left"
    for times, promised, message in (([0.0, 0.1], 5, "says 5 frames, 2 can be"), ([], 0, "no increasing times")):
        module.open = fake_container(times, promised)
        with pytest.raises(DataError, match=f"clip .*{message}"):
            read_video(data, name="clip")


def test_fit_image_keeps_a_fitting_picture_and_averages_areas():
    square = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(fit_image(square, 8), square)
    means = square.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(fit_image(square, 4) - means).max() <= 1
    assert np.array_equal(fit_image(square, 16), square.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(("shape", "box"), [((10, 20), (16, 32)), ((20, 10), (32, 16)), ((3, 20000), (1, 32))])
def test_fit_image_keeps_the_aspect_and_pads_evenly(shape, box):
    fitted = fit_image(np.full((*shape, 3), 10, dtype=np.uint8), 32)
    expected = np.full((32, 32, 3), BACKGROUND, dtype=np.uint8)
    top, left = (32 - box[0]) // 2, (32 - box[1]) // 2
    expected[top : top + box[0], left : left + box[1]] = 10
    assert np.array_equal(fitted, expected)


def test_fit_frames_fits_each_frame():
    frames = rng.integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
    assert np.array_equal(fit_frames(frames, 6), np.stack([fit_image(frame, 6) for frame in frames]))
    for wrong in (np.zeros((0, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.float32)):
        with pytest.raises(DataError, match="expected"):
            fit_frames(wrong, 4)
    with pytest.raises(DataError, match="at least 1"):
        fit_image(frames[0], 0)


WHOLE = {
    "png": encoded(Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))),
    "gif": movie(4),
    "apng": movie(3, "PNG"),
    "wav": wave_file(rng.uniform(-0.5, 0.5, (60, 2)), 22050),
    "float wav": wave_file(rng.uniform(-0.5, 0.5, 40), RATE, "FLOAT"),
}
changes = strategies.lists(strategies.tuples(strategies.integers(0, 10**6), strategies.integers(0, 255)), max_size=4)


@hypothesis.settings(max_examples=300)
@hypothesis.given(strategies.sampled_from(sorted(WHOLE)), changes, strategies.integers(0, 10**6), strategies.booleans())
def test_damaged_files_decode_or_are_refused(kind, places, length, is_cut):
    damaged = bytearray(WHOLE[kind])
    for place, value in places:
        damaged[place % len(damaged)] = value
    data = bytes(damaged[: length % len(damaged)] if is_cut else damaged)
    for axes, read in READERS.items():
        try:
            array = read(data)
        except DataError as error:
            assert str(error).startswith(f"<{len(data)} bytes>") and "\n" not in str(error)
        else:
            assert array.ndim == axes and array.size > 0 and np.isfinite(array).all()


def test_generate_reads_strips_and_videos_by_these_readers(tmp_path):
    size = SimpleNamespace(config=SimpleNamespace(image_size=8))
    tokenizers = SimpleNamespace(visual=size, audio=SimpleNamespace(config=SimpleNamespace(sample_rate=RATE)))
    clip = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    write_media(clip, tmp_path / "strip.png", RATE)
    assert np.array_equal(read_media("video", tmp_path / "strip.png", tokenizers).array, clip)
    wide = fit_image(np.concatenate(list(clip), axis=1), 8)
    assert np.array_equal(read_media("image", tmp_path / "strip.png", tokenizers).array, wide)
    (tmp_path / "sound.wav").write_bytes(wave_file(np.zeros(48000), 48000))
    assert read_media("audio", tmp_path / "sound.wav", tokenizers).array.shape == (RATE,)
    for kind, data, message in (
        ("video", movie(3), "3 frames at even times; this model reads a multiple of 4"),
        ("video", encoded(PICTURE), "is 7x5; a strip holds square frames"),
        ("image", b"text", "cannot be read"),
    ):
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(DataError, match=f"--{kind} .*{message}"):
            read_media(kind, tmp_path / "bad.png", tokenizers)

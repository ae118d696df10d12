"""Records of folders and datasets: order, splits, media as they are stored, and every kind of bad input by name."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from ernie_elastic.data.sources.open import open_source
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import SegmentKind
from tests.data.media.test_containers import container

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's cache stays in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(stream, "PNG")
    return stream.getvalue()


def wav(samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype=subtype)
    return stream.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_a_folder_is_read_in_the_order_of_names_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    files = {"b.png": png(PIXELS), "a/c.PNG": png(PIXELS), ".hidden/x.png": b"", "a/.y.png": b"", "notes.txt": b"hi"}
    source = open_source(folder(tmp_path / "in", files), ("image",))
    assert [source.key(i) for i in range(len(source))] == ["a/c.PNG", "b.png"]
    assert np.array_equal(source[1].segments[0].array, PIXELS)
    assert [part.text for part in open_source(tmp_path / "in", ("text",))[0].segments] == ["hi"]
    again = pickle.loads(pickle.dumps(source))
    assert again.key(0) == "a/c.PNG" and np.array_equal(again[0].segments[0].array, PIXELS)


def test_a_split_is_stable_and_whole(tmp_path: Path) -> None:
    files = {f"{number}.txt": b"x" for number in range(200)}
    source = open_source(folder(tmp_path / "in", files), ("text",))
    train, held_out = source.split(0.2, False), source.split(0.2, True)
    keys = [{part.key(i) for i in range(len(part))} for part in (train, held_out)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 200 and 20 <= len(held_out) <= 60
    (tmp_path / "in" / "0.txt").unlink()
    after = open_source(tmp_path / "in", ("text",)).split(0.2, True)
    assert {after.key(i) for i in range(len(after))} == keys[1] - {"0.txt"}
    larger = source.split(0.5, True)
    assert keys[1] < {larger.key(i) for i in range(len(larger))}


GOOD: dict[SegmentKind, dict[str, tuple[bytes, Any]]] = {
    "image": {
        "alpha.png": (png(np.dstack([PIXELS, np.full((6, 9), 128, np.uint8)])), (6, 9, 3)),
        "palette.png": (png(PIXELS, "P"), (6, 9, 3)),
        "grey16.png": (png(rng.integers(0, 65536, (6, 9), dtype=np.uint16)), (6, 9, 3)),
        "one.png": (png(PIXELS[:1, :1]), (1, 1, 3)),
        "wide.png": (png(np.zeros((2, 20000, 3), np.uint8)), (2, 20000, 3)),
    },
    "audio": {
        "stereo.wav": (wav(rng.uniform(-0.5, 0.5, (600, 2)), 8000), (1200,)),
        "8bit.wav": (wav(rng.uniform(-0.5, 0.5, 300), 16000, "PCM_U8"), (300,)),
        "float.wav": (wav(rng.uniform(-0.5, 0.5, 300), 16000, "FLOAT"), (300,)),
        "odd.wav": (wav(rng.uniform(-0.5, 0.5, 441), 44101), (160,)),
        "short.wav": (wav(np.array([0.25]), 16000), (1,)),
    },
    "video": {"variable.mp4": (container("mp4", "mpeg4", [0, 200, 800, 900]), (None, 64, 64, 3))},
    "text": {"marked.txt": ("\ufeffzoë".encode(), "zoë")},
}
BAD: dict[SegmentKind, dict[str, tuple[bytes, str]]] = {
    "image": {
        "cut.png": (png(PIXELS)[:60], "cut.png"), "empty.jpg": (b"", "is empty"), "text.png": (b"hello", "text.png"),
    },
    "audio": {
        "zero.wav": (wav(np.zeros(0), 16000), "has no samples"),
        "nan.wav": (wav(np.full(20, np.nan, np.float32), 16000, "FLOAT"), "NaN or infinite"),
        "cut.wav": (wav(np.zeros(4000), 16000)[:3000], "is cut short"),
    },
    "video": {"cut.mp4": (container("mp4", "mpeg4", [0, 40, 80])[:400], "cut.mp4")},
    "text": {"latin1.txt": ("zoë".encode("latin-1"), "byte 2 is 0xeb"), "blank.txt": (b" \n", "holds no text")},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["image", "audio", "video", "text"])
def test_good_and_bad_files_are_told_apart_by_name(kind: SegmentKind, tmp_path: Path) -> None:
    files = {name: data for group in (GOOD, BAD) for name, (data, _) in group[kind].items()}
    source = open_source(folder(tmp_path / "in", files), (kind,), sample_rate=16000)
    assert len(source) == len(files)
    for index in range(len(source)):
        name = source.key(index)
        if name in BAD[kind]:
            with pytest.raises(DataError, match=BAD[kind][name][1]) as raised:
                source[index]
            assert name in str(raised.value)
        else:
            (segment,) = source[index].segments
            expected = GOOD[kind][name][1]
            if kind == "text":
                assert segment.text == expected
            else:
                assert segment.array is not None
                shape = segment.array.shape
                assert all(want in (None, have) for want, have in zip(expected, shape, strict=True)), (name, shape)


def test_a_gif_is_a_video_where_videos_are_wanted(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "GIF")
    folder(tmp_path / "in", {"still.gif": stream.getvalue()})
    kinds = [open_source(tmp_path / "in", kinds)[0].segments[0].kind for kinds in (("image",), ("image", "video"))]
    assert kinds == ["image", "video"]


def test_a_saved_dataset_keeps_its_bytes(tmp_path: Path) -> None:
    # A sound column as {bytes, path}: the library encodes its own Audio feature with torchcodec only.
    sound = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string"), "sound": sound})
    rows = {
        "picture": [{"bytes": png(PIXELS), "path": None}, {"bytes": b"broken", "path": None}],
        "caption": ["a", ""],
        "sound": [{"bytes": wav(np.zeros(100), 8000), "path": None}] * 2,
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    for name in ("saved", "splits"):
        source = open_source(tmp_path / name, ("image", "audio", "text"), sample_rate=16000)
        kinds = {part.kind: part for part in source[0].segments}
        assert set(kinds) == {"image", "audio", "text"} and kinds["text"].text == "a"
        assert np.array_equal(kinds["image"].array, PIXELS) and kinds["audio"].array.shape == (200,)
        with pytest.raises(DataError, match=rf"^{name}, row 1, column picture"):
            source[1]
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no whole saved dataset"):
        open_source(tmp_path / "saved", ("image",))


def test_parquet_and_csv_files_name_their_media(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"pictures/a.png": png(PIXELS)})
    datasets.Dataset.from_dict({"image": ["pictures/a.png", "pictures/gone.png"]}).to_parquet(
        str(root / "rows.parquet")
    )
    source = open_source(root, ("image",))
    assert np.array_equal(source[0].segments[0].array, PIXELS)
    with pytest.raises(DataError, match=r"in, row 1, column image cannot be read: No such file"):
        source[1]
    (tmp_path / "texts.csv").write_text("text,other\nhello,1\nyou,2\n")
    texts = open_source(tmp_path / "texts.csv", ("text",))
    assert [texts[i].segments[0].text for i in range(len(texts))] == ["hello", "you"]
    with pytest.raises(ConfigError, match=r"no column of audio: text \(large_string\), other \(int64\); name one of"):
        open_source(tmp_path / "texts.csv", ("audio",), sample_rate=16000)


def test_messages_with_typed_parts_in_both_spellings(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"a.png": png(PIXELS)})
    inside = "data:image/png;base64," + base64.b64encode(png(PIXELS)).decode()
    rows = [
        [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what ?"}]},
         {"role": "assistant", "content": "a cat"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": inside}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}],
        [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}],
        [{"role": "user", "content": "hello"}],
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = open_source(root / "rows.jsonl", ("image", "text"))
    first = source[0].segments
    assert [(part.kind, part.role) for part in first] == [("image", "input"), ("text", "input"), ("text", "target")]
    assert np.array_equal(first[0].array, PIXELS) and first[2].text == "a cat"
    assert np.array_equal(source[1].segments[0].array, PIXELS)
    for index, message in ((2, "nothing is fetched"), (3, "its type must be one of text, image")):
        with pytest.raises(DataError, match=rf"rows.jsonl, row {index}, message 0 .*{message}"):
            source[index]
    with pytest.raises(DataError, match="row 4 holds no image; leave it out"):
        open_source(root / "rows.jsonl", ("image",))[4]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        open_source(tmp_path / "nowhere", ("image",))
    folder(tmp_path / "in", {"a.xyz": b""})
    with pytest.raises(ConfigError, match=r"holds no image or video: no file ends in .png"):
        open_source(tmp_path / "in", ("image", "video"))
    with pytest.raises(ConfigError, match=r"a file must end in .parquet, .jsonl, .csv, .tar"):
        open_source(tmp_path / "in" / "a.xyz", ("image",))
    folder(tmp_path / "mixed", {"a.csv": b"text\nx\n", "b.jsonl": b'{"text": "x"}\n'})
    with pytest.raises(ConfigError, match=r"files of the types .csv, .jsonl; give one of them"):
        open_source(tmp_path / "mixed", ("text",))
    folder(tmp_path / "sound", {"a.wav": wav(np.zeros(10), 16000)})
    with pytest.raises(ConfigError, match="sounds are read at a sample rate"):
        open_source(tmp_path / "sound", ("audio",))[0]


def typed(column: Any, data: bytes) -> datasets.Dataset:
    """One row of a medium and a text; the library is not asked to encode or decode anything."""
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    text = datasets.Value("string")
    rows = {"medium": [{"bytes": data, "path": None}], "text": ["hello"]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"medium": stored, "text": text}))
    info = table.info.copy()
    info.features = datasets.Features({"medium": column, "text": text})
    return datasets.Dataset(table.data, info=info)


@pytest.mark.parametrize("column", [datasets.Audio(), datasets.Image(), datasets.Video()])
def test_columns_that_nobody_wants_are_not_decoded(column: Any, tmp_path: Path) -> None:
    typed(column, b"broken").save_to_disk(str(tmp_path / "saved"))
    assert [part.text for part in open_source(tmp_path / "saved", ("text",))[0].segments] == ["hello"]


def test_a_column_of_lists_gives_all_its_media(tmp_path: Path) -> None:
    several = [{"bytes": png(PIXELS), "path": None}, {"bytes": png(PIXELS[:2]), "path": None}]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    rows = {"images": [several, several[:1]], "caption": ["two", "one"]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    table.select_columns(["images"]).save_to_disk(str(tmp_path / "alone"))
    alone = open_source(tmp_path / "alone", ("image",))
    assert [len(alone[index].segments) for index in range(len(alone))] == [2, 1]
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "saved", ("image", "text"))))
    shapes = [part.text or part.array.shape for part in source[0].segments]
    assert shapes == [(6, 9, 3), (2, 9, 3), "two"]
    assert [part.kind for part in source[1].segments] == ["image", "text"]


def test_base64_sounds_and_file_urls_in_messages(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"my picture.png": png(PIXELS)})
    sound = {"data": base64.b64encode(wav(np.zeros(100), 8000)).decode(), "format": "wav"}
    parts = [
        {"type": "input_audio", "input_audio": sound},
        {"type": "input_audio", "input_audio": {"data": "no base64 !", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": (root / "my picture.png").as_uri()}},
    ]
    lines = [json.dumps({"messages": [{"role": "user", "content": [part]}]}) + "\n" for part in parts]
    (root / "rows.jsonl").write_text("".join(lines))
    source = open_source(root / "rows.jsonl", ("image", "audio"), sample_rate=16000)
    assert source[0].segments[0].array.shape == (200,)
    with pytest.raises(DataError, match=r"row 1, message 0 has data that is no base64"):
        source[1]
    assert np.array_equal(source[2].segments[0].array, PIXELS)


def test_datasets_as_hubs_keep_them(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"data/a.png": png(PIXELS), "data/._x.jsonl": b"\0", ".git/y.jsonl": b"\0"})
    (root / "data" / "rows.JSONL").write_text('{"text": "hi", "image": "a.png"}\n')
    segments = open_source(root, ("text",))[0].segments
    assert [part.text for part in segments] == ["hi"]
    # Media that lie there are what is asked for, unless the directory itself is given.
    assert open_source(root, ("image",)).key(0) == "data/a.png"
    assert np.array_equal(open_source(root / "data", ("image",))[0].segments[0].array, PIXELS)
    folder(root, {"more/b.jsonl": b'{"text": "x"}\n'})
    with pytest.raises(ConfigError, match=r"in .*data and .*more; give one directory"):
        open_source(root, ("text",))


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    folder(
        tmp_path, {"broken.jsonl": b'{"text": "x"}\n{"text": oops\n', "latin.jsonl": b'{"text":"x"}\n{"text":"\xff"}\n'}
    )
    for name, message in (("broken", "byte 14.*Expecting value"), ("latin", "byte 13.*'utf-8'.*0xff")):
        source = open_source(tmp_path / f"{name}.jsonl", ("text",))
        assert len(source) == 2 and source[0].segments[0].text == "x"
        with pytest.raises(DataError, match=rf"{name}.jsonl, row 1 \({name}.jsonl, {message}"):
            source[1]


def test_a_name_that_is_no_utf8_can_be_written(tmp_path: Path) -> None:
    folder(tmp_path / "in", {"ok.txt": b"x"})
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.txt")).write_bytes(b"\xfe")
    source = open_source(tmp_path / "in", ("text",))
    keys = [source.key(index) for index in range(2)]
    assert keys == ["ok.txt", "\\xff.txt"]
    with pytest.raises(DataError, match=r"xff\.txt is no UTF-8 text: byte 0 is 0xfe") as raised:
        source[1]
    str(raised.value).encode()
    assert len(source.split(0.5, True)) + len(source.split(0.5, False)) == 2


@pytest.mark.parametrize(
    ("path", "message"), [("a\0b.png", "has a null character"), ("file://[x/a.png", "which is no URL")]
)
def test_a_path_that_cannot_be_one_is_named(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": path}))
    with pytest.raises(DataError, match=rf"rows.jsonl, row 0, column image .*{message}"):
        open_source(tmp_path / "rows.jsonl", ("image",))[0]

"""Records of tars and JSONL files, messages in every spelling, and splits that names tell apart."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from ernie_elastic.data.sources.base import MESSAGES_TASK, TASK
from ernie_elastic.data.sources.open import open_source
from ernie_elastic.errors import ConfigError, DataError
from tests.support.media_files import gif, png, wav

ALL = ("text", "image", "video", "audio")
rng = np.random.default_rng(0)
PNG, GIF, WAV = png(rng), gif(rng, 3), wav(rng)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's cache stays in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def kinds(source: Any, index: int) -> list[tuple[str, str]]:
    return [(part.kind, part.role) for part in source[index].segments]


def test_members_of_one_name_are_one_record(tmp_path: Path) -> None:
    first = {"x/a.png": PNG, "x/a.txt": b"one", "b.seg.png": PNG, "b.cls": b"7", "b.json": b'{"caption": "two"}'}
    second = {"c.wav": WAV, "c.json": b'{"text": "three", "id": 4}', "d.gif": GIF, "e.json": b'{"id": 1}'}
    tar(tmp_path / "in" / "001.tar", second)
    tar(tmp_path / "in" / "000.tar", first)
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "in", ALL, 16000)))
    keys = [source.key(i) for i in range(len(source))]
    assert keys == ["000.tar/x/a", "000.tar/b", "001.tar/c", "001.tar/d", "001.tar/e"]
    target = [[("image", "target"), ("text", "target")]] * 2 + [[("audio", "target"), ("text", "target")]]
    assert [kinds(source, i) for i in range(4)] == [*target, [("video", "target")]]
    assert [source[i].segments[1].text for i in range(3)] == ["one", "two", "three"]
    assert source[0].segments[0].array.shape == (20, 30, 3) and source[0].task == TASK
    with pytest.raises(DataError, match="tar/e holds no text"):
        source[4]
    pictures = open_source(tmp_path / "in", ("image",))
    assert [pictures.key(i) for i in range(len(pictures))] == ["000.tar/x/a", "000.tar/b", "001.tar/d"]
    assert len(open_source(tmp_path / "in" / "000.tar", ALL, 16000)) == 2
    before = source.identity()
    tar(tmp_path / "in" / "001.tar", {**second, "f.png": PNG})
    assert open_source(tmp_path / "in", ALL, 16000).identity() != before


def test_messages_of_a_tar_place_its_media(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "see"}, {"type": "image"}, {"type": "audio"}]
    rows = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]}
    tar(tmp_path / "a.tar", {"r.png": PNG, "r.wav": WAV, "r.json": json.dumps(rows).encode()})
    source = open_source(tmp_path / "a.tar", ALL, 16000)
    expected = [("text", "input"), ("image", "input"), ("audio", "input"), ("text", "target")]
    assert kinds(source, 0) == expected and source[0].task == MESSAGES_TASK


def test_tars_that_cannot_be_read_by_offset_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "z.tar", {"a.png": PNG}, "w:gz")
    with pytest.raises(ConfigError, match=r"z.tar cannot be read as a tar without compression"):
        open_source(tmp_path / "z.tar", ALL, 16000)
    whole = tar(tmp_path / "a.tar", {"a.png": PNG, "b.png": PNG}).read_bytes()
    source = open_source(tmp_path / "a.tar", ("image",))
    (tmp_path / "a.tar").write_bytes(whole[:1600])
    with pytest.raises(DataError, match=r"a.tar/a.png is cut short: a.tar has \d+ of its \d+ bytes"):
        source[0]
    with pytest.raises(ConfigError, match=r"a.tar cannot be read as a tar"):
        open_source(tmp_path / "a.tar", ("image",))
    tar(tmp_path / "t.tar", {"a.xyz": b"1"})
    with pytest.raises(ConfigError, match=r"no member of its tars ends in \.png"):
        open_source(tmp_path / "t.tar", ("image",))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_messages_in_every_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    inline = base64.b64encode(PNG).decode()
    spellings: list[dict[str, Any]] = [
        {"type": "image", "image": "a.png"}, {"type": "image", "path": "a.png"}, {"type": "image", "base64": inline},
        {"type": "image", "url": f"data:image/png;base64,{inline}"}, {"type": "image", "image": {"path": "a.png"}},
        {"type": "image_url", "image_url": {"url": (tmp_path / "a.png").as_uri()}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}},
    ]  # fmt: skip
    word = {"type": "text", "text": "b"}
    path = lines(
        tmp_path / "rows.jsonl",
        {"messages": [{"role": "user", "content": [*spellings, word]}, {"role": "assistant", "content": "c"}]},
        {"messages": [{"content": "once"}, {"content": [spellings[0], word]}]},
        {"messages": [word, spellings[0], word]},
        {
            "images": ["a.png", "a.png"],
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
        },
        {"image": "a.png", "messages": [{"role": "user", "content": "what ?"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    )
    source = open_source(path, ALL, 16000)
    first = kinds(source, 0)
    assert first == [("image", "input")] * 6 + [("audio", "input"), ("text", "input"), ("text", "target")]
    assert len({source[0].segments[i].array.tobytes() for i in range(6)}) == 1
    assert kinds(source, 1) == [("text", "target"), ("image", "target"), ("text", "target")]
    assert kinds(source, 2) == [("text", "target"), ("image", "target"), ("text", "target")]
    assert source[2].task == MESSAGES_TASK
    assert kinds(source, 3) == [("image", "input")] * 2
    with pytest.raises(DataError, match=r"row 4 has 1 media in column image that no part of its messages stands for"):
        source[4]
    with pytest.raises(DataError, match=r"row 5, message 0 has neither bytes nor a path"):
        source[5]


def test_lines_are_found_by_offset_and_bad_ones_are_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": ["b", "c"], "n": 1}\n[1]\n{"text": "\xc3\xa9"}')
    source = pickle.loads(pickle.dumps(open_source(path, ("text",))))
    assert len(source) == 4
    assert [[part.text for part in source[i].segments] for i in (0, 1, 3)] == [["a"], ["b", "c"], ["é"]]
    with pytest.raises(DataError, match=r"row 2 is a JSON list; expected an object"):
        source[2]
    with pytest.raises(ConfigError, match="holds no record"):
        open_source(lines(tmp_path / "none.jsonl", ""), ("text",))
    with pytest.raises(ConfigError, match=r"no column of image: text \(str\), n \(int\); name one of them messages"):
        open_source(lines(tmp_path / "t.jsonl", {"text": "a", "n": 1}), ("image",))


def test_several_files_and_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation"):
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
    source = open_source(tmp_path, ("text",))
    assert [source[i].segments[0].text for i in range(len(source))] == ["train-00000-of-00002", "train-00001-of-00002"]
    (tmp_path / "plain").mkdir()
    for name in ("b", "a"):
        lines(tmp_path / "plain" / f"{name}.jsonl", {"text": name}, {"text": name * 2})
    found = open_source(tmp_path / "plain", ("text",))
    assert [found[i].segments[0].text for i in range(4)] == ["a", "aa", "b", "bb"]
    assert found.key(2) == "plain, row 2"


def test_one_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    source = open_source(tmp_path / "b.txt", ("text",))
    assert [source.key(0), source[0].segments[0].text, len(source)] == ["b.txt", "b", 1]
    with pytest.raises(ConfigError, match=r"b\.txt: a file must end in"):
        open_source(tmp_path / "b.txt", ("image",))


def test_identities_follow_the_files(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": "a"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    datasets.Dataset.from_dict({"images": [["a.png"]], "text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.jsonl", "texts", "saved"):
        source = open_source(tmp_path / name, ("text",))
        assert source.identity() == open_source(tmp_path / name, ("text",)).identity()
        assert source.identity() != source.split(0.5, True).identity()
    before = [open_source(tmp_path / name, ("text",)).identity() for name in ("rows.jsonl", "texts")]
    time.sleep(0.02)
    lines(path, {"text": "b"})
    (tmp_path / "texts" / "b.txt").write_text("b")
    after = [open_source(tmp_path / name, ("text",)).identity() for name in ("rows.jsonl", "texts")]
    assert before[0] != after[0] and before[1] != after[1]

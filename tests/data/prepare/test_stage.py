"""`prepare-data`: what becomes of every record, limits, media budgets, and going on with other settings."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.data.groups.layout import Layout, document_length
from ernie_elastic.data.packed.packing import pack_lengths
from ernie_elastic.data.packed.shards import PackedCorpus
from ernie_elastic.data.prepare import shard_pool
from ernie_elastic.data.prepare.shard_job import Job, ShardMaker
from ernie_elastic.data.prepare.stage import PrepareConfig, prepare_data
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.stages import read_manifest
from tests.support.media_files import gif, png, wav
from tests.support.tiny_tokenizers import WORDS, save_tiny_tokenizers


@dataclasses.dataclass
class Place:
    """A folder with tokenizers and records, and the runs in it."""

    root: Path
    layout: Layout

    def prepare(self, out: str, data: str = "data", **changes: Any) -> dict[str, Any]:
        base = {"num_records": 0, "row_length": 84, "records_per_shard": 5, "num_workers": 1, "max_reject_share": 1.0}
        config = PrepareConfig(**{**base, "data": str(self.root / data), **changes})  # type: ignore[arg-type]
        return prepare_data(self.root / "tokenizers", self.root / out, config, self.layout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("prepare")
    layout = save_tiny_tokenizers(root / "tokenizers")
    rng = np.random.default_rng(0)
    (root / "data").mkdir()
    for number in range(6):
        (root / "data" / f"{number}.png").write_bytes(png(rng, 10 + number))
        (root / "data" / f"{number}.gif").write_bytes(gif(rng, 1 + 2 * number))
        (root / "data" / f"{number}.wav").write_bytes(wav(rng, 4000 + number))
        (root / "data" / f"{number}.txt").write_text(" ".join([WORDS] * (1 + 3 * number)))
    (root / "data" / "broken.png").write_bytes(b"broken")
    (root / "data" / "long.wav").write_bytes(wav(rng, 200_000))
    picture = {"type": "image", "image": "../data/0.png"}
    (root / "chat").mkdir()
    rows: list[Any] = [
        [{"role": "user", "content": [picture] * n}, {"role": "assistant", "content": "a b"}] for n in (1, 2, 3)
    ]
    rows += [[{"role": "user", "content": "nothing follows"}]]
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (root / "chat" / "rows.jsonl").write_text(text + "{oops\n")
    return Place(root, layout)


def test_every_record_becomes_documents_or_a_reject_with_its_reason(place: Place) -> None:
    report = place.prepare("all")
    assert (report["records"], report["rejected"]) == (24, 2)
    assert report["rejected_because"] == {"cannot be read": 1, "too long for a row": 1}
    lines = (place.root / "all" / "rejects.txt").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("broken.png cannot be read")
    assert "record long.wav is too long: " in lines[1]
    corpus = PackedCorpus(place.root / "all")
    documents = [corpus.document(number) for number in range(corpus.num_documents)]
    lengths = [document_length(document, place.layout) for document in documents]
    assert len(documents) == report["documents"] > 24 and sum(lengths) == report["positions"]
    assert sum(report["positions_of"].values()) == report["positions"]
    assert report["tokens"]["image_target"] == 6 and report["tokens"]["video_target"] == 1 + 1 + 4 + 4 + 8 + 8
    placed = [number for row in range(corpus.num_rows) for number in corpus.row(row)]
    assert sorted(placed) == list(range(len(documents)))
    assert max(sum(lengths[number] for number in corpus.row(row)) for row in range(corpus.num_rows)) <= 84
    manifest = read_manifest(place.root / "all", verify=True)
    stored = json.loads((place.root / "all" / "report.json").read_text())
    assert stored.items() <= manifest.extra.items() and stored == report


def test_kinds_and_the_number_of_records_can_be_limited(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    report = place.prepare("texts", kinds=("text",), num_records=4)
    assert report["records"] == 4 and set(report["tokens"]) == {"text_target", "text_input"}
    assert report["tokens"]["text_input"] == 0, "the ends of pieces"
    assert "the first 4 records" in capsys.readouterr().out


def test_a_share_of_bad_records_stops_the_run_and_another_limit_goes_on(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        DataError, match=r"2 of 26 records cannot be used, more than the limit of 4%.*the first one: bro"
    ):
        place.prepare("strict", max_reject_share=0.04)
    names = place.root / "strict-rejects.txt"
    assert names.read_text().startswith("broken.png cannot be read") and not (place.root / "strict").exists()
    assert (place.root / ".strict.progress").is_dir()
    capsys.readouterr()
    place.prepare("strict", max_reject_share=0.1, num_workers=2)
    assert "going on with" in capsys.readouterr().out and not names.exists()
    place.prepare("strict-anew", max_reject_share=0.1)
    for name in (
        "shard-00000.safetensors",
        "shard-00005.safetensors",
        "rows.safetensors",
        "report.json",
        "rejects.txt",
    ):
        assert (place.root / "strict" / name).read_bytes() == (place.root / "strict-anew" / name).read_bytes()
    with pytest.raises(CheckpointError, match="strict exists already"):
        place.prepare("strict", max_reject_share=0.1)


def test_other_records_or_settings_begin_anew(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError):
        place.prepare("changed", max_reject_share=0.0)
    capsys.readouterr()
    for change in ({"row_length": 90}, {"text_dropout": 0.1}, {"video_frames": 4}, {"kinds": ("text", "image")}):
        with pytest.raises(DataError):
            place.prepare("changed", max_reject_share=0.0, **change)
        assert "going on" not in capsys.readouterr().out, change


def test_rows_keep_their_budget_of_frames(place: Place) -> None:
    report = place.prepare("chat-all", "chat", row_length=192)
    assert report["records"] == 3 and report["rows"] == 1
    because = {"cannot be read": 1, "the tokenizers cannot read it": 1}
    assert report["rejected_because"] == because
    two = place.prepare("chat-two", "chat", row_length=192, row_frames=2)
    assert two["records"] == 2 and two["rows"] == 2 and two["rejected_because"]["too long for a row"] == 1
    assert "3 frames to read, a row takes 2" in (place.root / "chat-two" / "rejects.txt").read_text()


def test_no_usable_record_is_said(place: Place) -> None:
    (place.root / "broken").mkdir()
    (place.root / "broken" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of 1 records of .* gave a document"):
        place.prepare("nothing", "broken")
    with pytest.raises(ConfigError, match="num_records 0 must be at least 1"):
        PrepareConfig(num_records=0)
    with pytest.raises(ConfigError, match=r"understanding_share 2 must lie in \[0, 1\]"):
        PrepareConfig(understanding_share=2)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=60), st.integers(5, 9))
def test_budgets_hold_and_no_row_could_take_the_next_one(documents: list[tuple[int, int]], budget: int) -> None:
    lengths, frames = [length for length, _ in documents], [count for _, count in documents]
    rows = pack_lengths(lengths, 40, frames, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(documents)))
    for number, row in enumerate(rows):
        assert sum(lengths[i] for i in row) <= 40 and sum(frames[i] for i in row) <= budget
        # A row is opened only for a document that no earlier row had place for.
        first = row[0]
        for earlier in rows[:number]:
            before = [i for i in earlier if (-lengths[i], i) < (-lengths[first], first)]
            assert sum(lengths[i] for i in before) + lengths[first] > 40 or (
                sum(frames[i] for i in before) + frames[first] > budget
            )
    with pytest.raises(DataError, match="document 0 has 9 frames to read, a row takes 8"):
        pack_lengths([1], 40, [9], 8)


class Dying(ShardMaker):
    """Makes no shard: its worker dies, or meets an error."""

    def make(self, job: Job, *_: object) -> None:
        if job.start == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("the second job fails")


@pytest.mark.parametrize("start", [0, 5])
def test_a_worker_that_dies_or_fails_ends_all(place: Place, start: int) -> None:
    maker = Dying(None, str(place.root / "tokenizers"), place.layout, None)  # type: ignore[arg-type]
    jobs = [Job(place.root / "x", place.root / "y", at, at + 5) for at in (start, start)]
    expected = (
        pytest.raises(shard_pool.WorkerError, match=r"exit code -9 at the records 0 to 4.*fewer --num-workers")
        if start == 0
        else pytest.raises(DataError, match="the second job fails")
    )
    with expected:
        list(shard_pool.run_jobs(maker, jobs, 2, lambda _: None))

"""The text tokenizer's trainer fits the world and measures what it says."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from ernie_elastic.data.sources.open import open_source
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.stages import read_manifest
from ernie_elastic.tokenizer_training.text.on_data import (
    TextRun,
    _texts,
    collapse_findings,
    load_segmenter,
    script_of,
    script_table,
    train_text_on_data,
)
from ernie_elastic.tokenizer_training.text.on_world import TextTrainingConfig, text_health, train_text_tokenizer
from ernie_elastic.tokenizer_training.train_on_world import TokenizerTrainingConfig, world_texts
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer


def test_the_worlds_words_become_tokens_and_test_texts_come_back() -> None:
    config = TokenizerTrainingConfig()
    tokenizer, health = train_text_tokenizer(world_texts(config, "train", 100))
    assert health["vocabulary"] == tokenizer.vocab_size <= 544 and health["train_texts"] >= 13 * 100
    measured = text_health(tokenizer, world_texts(config, "test", 50))
    assert measured["round_trip_share"] == 1.0 and measured["bytes_per_token"] > 4.2
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in ("circle", "yellow", "bottom", "small"))


def test_bytes_per_token_counts_utf8_bytes() -> None:
    tokenizer = TextTokenizer.train(["x"], 266)  # no merges: a token is a byte of UTF-16BE
    assert text_health(tokenizer, ["zoë", "a"]) == {
        "bytes_per_token": 0.625,
        "tokens_per_text": 4.0,
        "round_trip_share": 1.0,
    }


def test_no_text_and_too_small_a_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        train_text_tokenizer([""])
    with pytest.raises(DataError, match="no text"):
        text_health(TextTokenizer.train(["x"], 266), [])
    with pytest.raises(ConfigError, match=r"vocab_size 100 .* 266"):
        TextTrainingConfig(vocab_size=100)


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "then", "sleeps", "under", "old", "trees"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eighty short English texts and twenty Chinese ones."""
    folder, rng = tmp_path / "texts", random.Random(0)
    folder.mkdir()
    for number in range(80):
        (folder / f"{number}.txt").write_text(" ".join(rng.choices(WORDS, k=60)))
    for number in range(20):
        (folder / f"zh-{number}.txt").write_text("".join(rng.choices(("我来到", "北京", "清华大学", "上课"), k=40)))
    return folder


def run_on(texts: Path, **changes: Any) -> TextRun:
    settings = {"training": TextTrainingConfig(vocab_size=330), "held_out_share": 0.3, **changes}
    return TextRun(data=str(texts), **settings)


def test_a_text_directory_is_whole_and_measured(texts: Path, tmp_path: Path) -> None:
    health = train_text_on_data(run_on(texts, training=TextTrainingConfig(vocab_size=360)), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", ("train-tokenizer-text",), verify=True)
    assert manifest.extra["health"] == health == json.loads((tmp_path / "out" / "health.json").read_text())
    assert {"tokenizer.json", "samples.html", "report.html", "rejects.txt", "health.json"} <= set(manifest.files)
    assert health["train_texts"] + health["held_out_texts"] == 100 and health["round_trip_share"] == 1.0
    assert {row["script"] for row in health["scripts"]} == {"LATIN", "CJK"} and health["fertility"] >= 1
    assert sum(row["share"] for row in health["scripts"]) == pytest.approx(1, abs=1e-3)
    assert health["utf8_bpe_bytes_per_token"] > 1 and health["collapse"] == []
    page = (tmp_path / "out" / "samples.html").read_text()
    assert page.count("dropout 0<") == page.count("dropout 0.1<") == 6 and page.count("<span") > 200
    again = train_text_on_data(run_on(texts, training=TextTrainingConfig(vocab_size=360)), tmp_path / "again")
    assert again == health
    first, second = (tmp_path / name / "tokenizer.json" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_bad_texts_are_named_counted_and_limited(texts: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(texts) + b"/\xff.txt"))
    odd.write_bytes(b"zo\xeb")
    health = train_text_on_data(run_on(texts), tmp_path / "out")
    (line,) = (tmp_path / "out" / "rejects.txt").read_text().splitlines()
    assert health["rejected_records"] == 1 and line.startswith("\\xff.txt is no UTF-8 text: byte 2 is 0xeb")
    assert health["train_texts"] + health["held_out_texts"] == 100
    for number in range(12):
        (texts / f"bad-{number}.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"records cannot be read, more than the limit of 1%; the first one: bad-"):
        train_text_on_data(run_on(texts), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_budget_is_spread_over_the_source(texts: Path, tmp_path: Path) -> None:
    records = open_source(texts, ("text",))
    seen = list(_texts(records, run_on(texts, max_characters=1000), []))
    assert sum(map(len, seen)) <= 1000 and len(seen) > 90
    assert any("北" in text or "我" in text for text in seen) and any("fox" in text for text in seen)


def cut(run: str) -> list[str]:
    """A segmenter: every character is a word."""
    return list(run)


def swallow(run: str) -> list[str]:
    """A segmenter that loses a character."""
    return [run[1:]]


def test_a_segmenter_is_plugged_in_by_name(texts: Path, tmp_path: Path) -> None:
    whole = run_on(texts, compare=False, training=TextTrainingConfig(vocab_size=400))
    train_text_on_data(whole, tmp_path / "whole")
    train_text_on_data(dataclasses.replace(whole, segmenter=f"{__name__}:cut"), tmp_path / "cut")
    lengths = [len(TextTokenizer.load(tmp_path / name).encode("清华大学")) for name in ("whole", "cut")]
    assert lengths[0] < lengths[1] == 4
    with pytest.raises(DataError, match="must add up to the same text"):
        train_text_on_data(dataclasses.replace(whole, segmenter=f"{__name__}:swallow"), tmp_path / "bad")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere:cut", "cannot be imported"), ("json:nowhere", "cannot be imported"), ("json", "cannot be imported"),
     ("json:__name__", r"'json:__name__' is a str; name a function"),
     ("json:loads", r"'json:loads' failed on '.*' \(JSONDecodeError"), ("builtins:len", r"failed on .*TypeError"),
     ("builtins:bytearray", "failed on"), ("builtins:str.nowhere", "cannot be imported")],
)  # fmt: skip
def test_a_segmenter_that_does_not_work_is_a_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_segmenter(name)("北京")


def test_planted_collapses_are_found(texts: Path) -> None:
    english = [" ".join(WORDS)] * 20
    tokenizer = TextTokenizer.train(english, 330)
    healthy = {"round_trip_share": 1.0}
    assert collapse_findings(tokenizer, english, healthy, tokenizer.vocab_size) == []
    (strange,) = collapse_findings(tokenizer, ["清华大学北京"], healthy, tokenizer.vocab_size)
    assert "100% of the tokens of held-out texts are single bytes" in strange
    (lossy,) = collapse_findings(tokenizer, english, {"round_trip_share": 0.75}, tokenizer.vocab_size)
    assert lossy.startswith("25.00% of the held-out texts do not come back")
    (small,) = collapse_findings(tokenizer, english, healthy, 5000)
    assert f"no more than {tokenizer.vocab_size} of the 5000 ids" in small


def test_scripts_are_told_apart() -> None:
    assert [script_of(letter) for letter in "aяあ漢\u0e01"] == ["LATIN", "CYRILLIC", "HIRAGANA", "CJK", "THAI"]
    tokenizer = TextTokenizer.train(["x"], 266)  # a token is a byte of UTF-16BE: 2 for each, 2 for the space
    rows = script_table(tokenizer, ["abcd " * 100, "яяяя " * 100])["scripts"]
    assert {row["script"]: row["bytes_per_token"] for row in rows} == {"LATIN": 0.5, "CYRILLIC": 0.9}


def test_several_processes_are_refused(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, and one trains it"):
        train_text_on_data(TextRun(data=str(texts)), tmp_path / "out")


def test_a_segmenter_whose_import_fails_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"segmenter '\.x:y' cannot be imported"):
        load_segmenter(".x:y")

"""The text tokenizer's trainer fits the world and measures what it says."""

from __future__ import annotations

import pytest

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.text import TextTokenizer
from ernie_elastic.training.tokenizer_text import TextTrainingConfig, text_health, train_text_tokenizer
from ernie_elastic.training.train_tokenizer import TokenizerTrainingConfig, world_texts


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

"""Trains the text tokenizer and says how well it fits.

Contract: the result is a function of (texts, vocab_size). Texts come as any iterable of strings; nothing here knows
the embedded world.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.text.bpe import Segmenter
from ernie_elastic.tokenizers.text.special import SPECIAL_NAMES
from ernie_elastic.tokenizers.text.tokenizer import NUM_BYTES, TextTokenizer


@dataclass(frozen=True)
class TextTrainingConfig:
    """Size of the text tokenizer.

    vocab_size: ids at most, special tokens and bytes included; fewer when the texts hold no more pairs to merge. ours:
    the embedded world's words are whole at 563; 544 costs 1 % more tokens.
    """

    vocab_size: int = 544

    def __post_init__(self) -> None:
        if self.vocab_size < NUM_BYTES + len(SPECIAL_NAMES):
            raise ConfigError(
                f"text training: vocab_size {self.vocab_size} must be at least {NUM_BYTES + len(SPECIAL_NAMES)} "
                "(bytes and special tokens)"
            )


def train_text_tokenizer(
    texts: Iterable[str], training: TextTrainingConfig | None = None, segmenter: Segmenter | None = None
) -> tuple[TextTokenizer, dict[str, Any]]:
    """A text tokenizer fitted to `texts` and its health on them. Raises DataError when there is no text.

    segmenter: cuts runs of unspaced scripts into words, as for `TextTokenizer.train`.
    """
    given = list(texts)
    if not any(given):
        raise DataError("text tokenizer: no text to train on")
    training = training or TextTrainingConfig()
    tokenizer = TextTokenizer.train(given, training.vocab_size, segmenter)
    return tokenizer, {"train_texts": len(given), "vocabulary": tokenizer.vocab_size}


def text_health(tokenizer: TextTokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Numbers on `texts`: UTF-8 bytes per token, tokens per text, share of texts that come back unchanged."""
    given = list(texts)
    if not any(given):
        raise DataError("text tokenizer: no text to measure on")
    ids = [tokenizer.encode(text) for text in given]
    num_tokens = sum(len(item) for item in ids)
    same = sum(tokenizer.decode(item) == text for item, text in zip(ids, given, strict=True))
    return {
        "bytes_per_token": round(sum(len(text.encode()) for text in given) / num_tokens, 3),
        "tokens_per_text": round(num_tokens / len(given), 2),
        "round_trip_share": same / len(given),
    }

"""Text round trips for any Unicode text, special tokens stay out of text, files load elsewhere, errors are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.text import SPECIAL_NAMES, TextTokenizer, special_text

TEXTS = ["a red circle at the top", "a blue square below a red circle", "play c d e", "où est le carré ?"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 320)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces \n\t",
        "e\u0301 é",
        "\u200d👩‍🚀",
        "\x00\x7f",
        "Ġ▁##",
        "<|pad|>",
        "a<|eos|> b <|next_frame|>",
    ],
)
def test_hard_texts_come_back_without_special_ids(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(vars(tokenizer.special).values())


def test_special_ids_are_distinct_known_and_left_out_of_decoded_text(tokenizer: TextTokenizer) -> None:
    special = tokenizer.special
    ids = [getattr(special, name) for name in SPECIAL_NAMES]
    assert len(set(ids)) == len(SPECIAL_NAMES) and special.pad == 0
    assert tokenizer.decode([special.bos, *tokenizer.encode("a red"), special.boi, special.eos]) == "a red"
    assert (tokenizer.hf.pad_token_id, tokenizer.hf.bos_token_id, tokenizer.hf.eos_token_id) == tuple(ids[:3])
    assert tokenizer.hf.convert_tokens_to_ids(special_text("next_frame")) == special.next_frame


def test_training_merges_and_is_deterministic(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode(" circle")) == 1
    again = TextTokenizer.train(iter(TEXTS), 320)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.vocab_size <= 320 and TextTokenizer.train(TEXTS, 270).vocab_size == 270


def test_saved_and_loaded_is_the_same_and_transformers_reads_it(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path)
    text = "a red<|eos|> circle, zoë"
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.special == tokenizer.special
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer.encode(text)


def test_errors_name_the_value(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"265.*266"):
        TextTokenizer.train(TEXTS, 265)
    with pytest.raises(DataError, match=r"character 2 .*U\+D800"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match=str(tokenizer.vocab_size)):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(DataError, match="-1"):
        tokenizer.decode([-1])
    with pytest.raises(CheckpointError, match="does not exist"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        TextTokenizer.load(tmp_path)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"<\|pad\|>"):
        TextTokenizer.load(tmp_path)

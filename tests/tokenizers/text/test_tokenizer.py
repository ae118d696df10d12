"""Text round trips for any Unicode text, special tokens stay out of text, files load elsewhere, errors are told."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.text.special import SPECIAL_NAMES, special_text
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.text.utf16_bytes import BYTE_SYMBOLS, RESERVED

TEXTS = ["a red circle at the top", "a blue square below a red circle", "play c d e", "où est le carré ?"] * 5
WORLD = [
    "the quick brown fox jumps over the lazy dog",
    "où est le carré rouge ? à côté",
    "где красный круг под синим квадратом",
    "赤い丸は青い四角の上にある",
    "红色的圆在蓝色的方块上面一方",
    "สีแดงอยู่ด้านบนสีน้ำเงิน",
    "लाल वृत्त नीले वर्ग के ऊपर है",
    "الدائرة الحمراء فوق المربع",
    "👍🏽 👩‍🚀 𠀀𠀁 🇺🇦",
] * 4
MIXED = "a red 👍🏽 zoë<|eos|> 日本 𠀀! лад\u0301 \u2003x\U00100041 ก็\n"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 320)


@pytest.fixture(scope="module")
def many() -> TextTokenizer:
    """Knows several scripts, so that known and unknown code points alternate."""
    return TextTokenizer.train(WORLD, 460)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_every_code_point_comes_back(many: TextTokenizer, dropout: float) -> None:
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    assert len(points) == 1_112_064
    for start in range(0, len(points), 4096):
        text = "".join(points[start : start + 4096])
        assert many.decode(many.encode(text, dropout=dropout, seed=start)) == text


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
        BYTE_SYMBOLS,
        "a" + BYTE_SYMBOLS[0] + "\U00100100\U00100101b",
        "\u3c7c\u7061\u647c\u3e00",  # the bytes of <|pad|>
        MIXED,
    ],
)
def test_hard_texts_come_back_without_special_ids(tokenizer: TextTokenizer, text: str) -> None:
    for ids in (tokenizer.encode(text), tokenizer.encode(text, dropout=0.5, seed=1)):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(vars(tokenizer.special).values())


def test_special_ids_are_distinct_known_and_left_out_of_decoded_text(tokenizer: TextTokenizer) -> None:
    special = tokenizer.special
    ids = [getattr(special, name) for name in SPECIAL_NAMES]
    assert len(set(ids)) == len(SPECIAL_NAMES) and special.pad == 0
    assert tokenizer.decode([special.bos, *tokenizer.encode("a red"), special.boi, special.eos]) == "a red"
    assert (tokenizer.hf.pad_token_id, tokenizer.hf.bos_token_id, tokenizer.hf.eos_token_id) == tuple(ids[:3])
    assert tokenizer.hf.convert_tokens_to_ids(special_text("next_frame")) == special.next_frame


def test_unknown_code_points_are_their_utf16be_bytes(tokenizer: TextTokenizer) -> None:
    first = len(SPECIAL_NAMES)
    for text in ("日", "\u0100", "👍", "\ufffe", BYTE_SYMBOLS[65]):
        assert tokenizer.encode(text) == [first + byte for byte in text.encode("utf-16-be")]


def test_a_token_is_a_byte_or_whole_code_points(many: TextTokenizer) -> None:
    tokens = many.hf.get_vocab()
    plain = [token for token, index in tokens.items() if index >= len(SPECIAL_NAMES) + 256]
    assert len(plain) == many.vocab_size - 266 and not any(RESERVED.search(token) for token in plain)
    assert {"a", "的", "ส"} <= set(plain)
    # Every token is reached: encoding its text gives it back as one id. Marks need a letter before them.
    alone = [token for token in plain if not unicodedata.category(token[0]).startswith("M")]
    assert len(alone) > 150 and all(many.encode(token) == [tokens[token]] for token in alone)


def test_training_merges_and_is_deterministic(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode(" circle")) == 1
    again = TextTokenizer.train(iter(TEXTS), 320)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.vocab_size <= 320 and TextTokenizer.train(TEXTS, 270).vocab_size == 270
    # More room only adds tokens: those that are there keep their ids.
    small, large = (TextTokenizer.train(WORLD, size).hf.get_vocab() for size in (300, 340))
    assert small.items() <= large.items() and len(large) == 340


def test_a_segmenter_keeps_phrases_out_of_the_vocabulary() -> None:
    texts = ["赤い丸 red丸赤い一番, สีแดงเข้ม"] * 9
    words = ("赤い", "丸", "一番", "สี", "แดง", "เข้ม")

    def segment(run: str) -> list[str]:
        found = []
        while run:
            found.append(next(word for word in words if run.startswith(word)))
            run = run[len(found[-1]) :]
        return found

    def phrases(tokenizer: TextTokenizer) -> list[str]:
        tokens = [token.strip() for token in tokenizer.hf.get_vocab()]
        return [token for token in tokens if any(a + b in token for a in words for b in words)]

    cut = TextTokenizer.train(texts, 400, segmenter=segment)
    assert phrases(TextTokenizer.train(texts, 400)) and not phrases(cut)
    assert len(cut.encode("赤い丸")) == 2 and len(cut.encode(" red")) == 1 and cut.decode(cut.encode(MIXED)) == MIXED
    with pytest.raises(DataError, match=r"segmenter .*3 characters.* 2 characters"):
        TextTokenizer.train(["赤い丸"], 300, segmenter=lambda run: [run[:2]])


def test_dropout_varies_the_segmentation_and_never_the_text(many: TextTokenizer, tmp_path: Path) -> None:
    text = WORLD[0] + WORLD[4] + MIXED
    plain = many.encode(text)
    seen = {tuple(many.encode(text, dropout=0.1, seed=seed)) for seed in range(20)}
    assert len(seen) > 15 and all(many.decode(ids) == text for ids in seen)
    assert many.encode(text, dropout=0.1, seed=3) == many.encode(text, dropout=0.1, seed=3)
    assert many.encode(text) == plain and len(plain) < min(map(len, seen))
    assert len(many.encode(text, dropout=1.0, seed=0)) == len(text.encode("utf-16-be"))
    assert many.decode(many.encode("a" * 20_000, dropout=0.1, seed=0)) == "a" * 20_000  # linear time
    # The smallest rate drops nothing, so that the two ways of merging are seen to agree.
    assert many.encode(text, dropout=1e-12, seed=0) == plain
    many.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["dropout"] is None
    assert TextTokenizer.load(tmp_path).encode(text) == plain
    for dropout, seed in ((-0.1, 1), (1.5, 1), (0.1, None), (float("nan"), 1)):
        with pytest.raises(ConfigError, match=r"0\.\.1.*seed"):
            many.encode(text, dropout=dropout, seed=seed)


def test_decoding_survives_any_cut_and_any_ids(many: TextTokenizer) -> None:
    text = MIXED + "a"
    ids = many.encode(text)
    for cut in range(len(ids) + 1):
        decoder = many.stream_decoder()
        pieces = [decoder.push(ids[:cut]), decoder.push(ids[cut:]), decoder.finish()]
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
        start, end = many.decode(ids[:cut]), many.decode(ids[cut:])
        assert text.startswith(start.rstrip("\ufffd")) and text.endswith(end[-1:])
        assert "".join(many.decode_stream(ids[:cut])) == start
    half = many.encode("👍")[:3]
    assert many.decode(half) == "\ufffd" and list(many.decode_stream(half)) == ["\ufffd"]
    # A half is over as soon as a whole token follows.
    assert many.decode([*half, *many.encode("a")]) == "\ufffda"
    rng = random.Random(0)
    for _ in range(500):
        # Few different bytes, so that surrogates meet.
        noise = [rng.choice([10, 10 + 0xD8, 10 + 0xDC, 10 + 0x41, 1, 270, 300]) for _ in range(rng.randrange(12))]
        assert "".join(many.decode_stream(noise)) == many.decode(noise)


def test_transformers_gives_the_same_ids_and_text(many: TextTokenizer) -> None:
    texts = [*WORLD[:9], MIXED, "", "abc"]
    batch = many.hf(texts)
    assert batch.input_ids == [many.encode(text) for text in texts]
    assert many.hf.batch_decode(batch.input_ids) == texts
    assert many.hf.convert_tokens_to_string(many.hf.tokenize(MIXED)) == MIXED
    padded = many.hf(["a", MIXED], padding=True, return_tensors="pt", return_offsets_mapping=True)
    assert padded.input_ids.shape == padded.offset_mapping.shape[:2] and padded.attention_mask[0].sum() == 1
    assert many.hf.batch_decode(padded.input_ids, skip_special_tokens=True) == ["a", MIXED]
    assert many.hf(MIXED, truncation=True, max_length=7).input_ids == many.encode(MIXED)[:7]
    assert many.hf(MIXED, return_tensors="pt").input_ids.tolist() == [many.encode(MIXED)]
    known = many.hf(MIXED, split_special_tokens=False).input_ids
    assert known.count(many.special.eos) == 1 and many.hf.decode(known) == MIXED
    with pytest.raises(DataError, match=r"U\+D800"):
        many.hf(["ok", "a\ud800"])
    with pytest.raises(ConfigError, match=r"TextTokenizer\.train"):
        many.hf.train_new_from_iterator([["a"]], 300)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])), pair=st.sampled_from([None, "zoë 👍", "abc"]))
def test_offsets_cover_the_code_points_that_a_token_spells(many: TextTokenizer, text: str, pair: str | None) -> None:
    result = many.hf(text, pair, return_offsets_mapping=True)
    for index, (start, end) in enumerate(result.offset_mapping):
        source = pair if result.sequence_ids()[index] else text
        token = many.hf.convert_ids_to_tokens(result.input_ids[index])
        assert source is not None
        if token in BYTE_SYMBOLS:
            assert end == start + 1
            assert ord(token) & 0xFF in source[start:end].encode("utf-16-be")
        else:
            assert source[start:end] == token
        assert tuple(result.token_to_chars(index)) == (start, end)
    for place in range(len(text)):
        token_index = result.char_to_token(place)
        start, end = result.offset_mapping[token_index]
        assert start <= place < end and (token_index == 0 or result.offset_mapping[token_index - 1] != (start, end))


def test_offsets_of_windows_words_and_pickles(many: TextTokenizer) -> None:
    windows = many.hf(
        ["abc", MIXED], truncation=True, max_length=5, return_overflowing_tokens=True, return_offsets_mapping=True
    )
    whole = many.hf(MIXED, return_offsets_mapping=True)
    parts = [
        span
        for sample, spans in zip(windows["overflow_to_sample_mapping"], windows["offset_mapping"], strict=True)
        for span in spans
        if sample == 1
    ]
    assert parts == whole.offset_mapping and len(windows.input_ids) > 3
    words = many.hf(["日本", "a ж"], is_split_into_words=True, return_offsets_mapping=True)
    assert words.offset_mapping[:4] == [(0, 1), (0, 1), (1, 2), (1, 2)] and set(words.word_ids()) == {0, 1}
    assert words.offset_mapping[4] == (0, 1) and words.offset_mapping[-1][1] == 3
    assert pickle.loads(pickle.dumps(whole)).token_to_chars(9) == whole.token_to_chars(9)
    assert len(whole[0]) == len(whole.input_ids) and whole.word_to_chars(1) == (1, 5)
    assert whole.char_to_word(2) == 1


TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }} "
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
)


def test_chat_templates_write_special_tokens_and_messages_cannot(many: TextTokenizer) -> None:
    chat = [{"role": "user", "content": "日本 <|eos|> zoë"}]
    ids = many.hf.apply_chat_template(chat, chat_template=TEMPLATE, return_dict=False)
    assert ids == [many.special.bos, *many.encode("user 日本 "), *ids[-1 - len(many.encode("<|eos|> zoë")) :]]
    assert many.decode(ids) == "user 日本 <|eos|> zoë" and ids.count(many.special.eos) == 1
    result = many.hf.apply_chat_template(
        [{"role": "user", "content": "日本 a"}], chat_template=TEMPLATE, return_assistant_tokens_mask=True
    )
    said = [index for index, mark in zip(result["input_ids"], result["assistant_masks"], strict=True) if mark]
    assert many.decode(said) == "日本 a" and result["input_ids"][-1] == many.special.eos
    assert not many.hf(MIXED).input_ids.count(many.special.eos)  # the choice of the template does not stay


def test_saved_and_loaded_is_the_same_and_transformers_reads_it(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path)
    text = "a red<|eos|> circle, zoë"
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.special == tokenizer.special
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer.encode(text)


def test_a_process_that_does_not_import_us_loads_it_with_trust(many: TextTokenizer, tmp_path: Path) -> None:
    many.save(tmp_path)
    program = """
import json, sys
from transformers import AutoTokenizer
assert not any(name.startswith("ernie_elastic") for name in sys.modules)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer(sys.argv[2]).input_ids
tokenizer.save_pretrained(sys.argv[1] + "/again")
again = AutoTokenizer.from_pretrained(sys.argv[1] + "/again", trust_remote_code=True)
assert again(sys.argv[2]).input_ids == ids
print(json.dumps([ids, tokenizer.decode(ids)]))
"""
    command = [sys.executable, "-c", program, str(tmp_path), MIXED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [many.encode(MIXED), MIXED]
    shims = [path.name for path in (tmp_path / "again").glob("*.py")]
    assert shims == ["ernie_elastic_tokenizer_shim.py"]


def test_errors_name_the_value(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"265.*266"):
        TextTokenizer.train(TEXTS, 265)
    with pytest.raises(DataError, match=r"character 2 .*U\+D800"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match=r"character 3 .*U\+DFFF"):
        TextTokenizer.train(["ab👍\udfff"], 300)
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
    older = Tokenizer(models.BPE())
    older.add_special_tokens([special_text(name) for name in SPECIAL_NAMES])
    older.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"UTF-8.*train-tokenizer text"):
        TextTokenizer.load(tmp_path)


def test_a_smaller_vocabulary_is_what_training_for_it_gives() -> None:
    texts = ["the cat sat on the mat and the dog", "кот сидел на ковре и ковёр", "猫が座った。猫が。"] * 20
    large = TextTokenizer.train(texts, 330)
    for size in (266, 280, 310, 330):
        small, cut = TextTokenizer.train(texts, size), large.smaller(size)
        assert cut.vocab_size == small.vocab_size
        for text in [*texts[:3], "unknown words: zoë"]:
            assert cut.encode(text) == small.encode(text) and cut.decode(cut.encode(text)) == text
    for wrong in (265, 331):
        with pytest.raises(ConfigError, match=rf"vocab_size {wrong} must lie in 266\.\.330"):
            large.smaller(wrong)

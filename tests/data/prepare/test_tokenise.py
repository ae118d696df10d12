"""What a record must bring to become tokens; what is wrong is said with the record's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ernie_elastic.data.groups.layout import Layout
from ernie_elastic.data.packed.shards import PackedCorpus
from ernie_elastic.data.prepare.stage import PrepareConfig, prepare_data
from ernie_elastic.data.prepare.tokenise import Tokenizers, tokenise, world_of
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, Segment
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.special import SpecialTokens
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig


@pytest.fixture(scope="module")
def tokenizers() -> Any:
    config = PatchVisualTokenizerConfig(
        image_size=48, patch=16, scales=((1, 1), (3, 3)), amplitudes=(0.5, 0.5), width=8
    )
    audio = SimpleNamespace(encode_with_components=lambda waves: [], config=SimpleNamespace(sample_rate=24000))
    return SimpleNamespace(text=None, visual=PatchVisualTokenizer(config).eval(), audio=audio)


def _picture(key: str, *shape: int, kind: Any = "image") -> Sample:
    return Sample(key, "trial", (Segment(kind, "input", array=np.zeros(shape, np.uint8)),))


def test_pictures_keep_their_pixels_and_get_latents(tokenizers: Any) -> None:
    (image,), (video,) = tokenise([_picture("a", 48, 48, 3), _picture("b", 2, 48, 48, 3, kind="video")], tokenizers)
    assert image.pixels is not None and image.pixels.shape == (1, 48, 48, 3)
    assert video.latents is not None and video.latents.shape == (2, 3, 3, 20)


@pytest.mark.parametrize("shape", [(32, 32, 3), (48, 32, 3), (48, 48), (48, 48, 4)])
def test_a_picture_that_does_not_fit_is_named_among_others(tokenizers: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="record odd") as raised:
        tokenise([_picture("fine", 48, 48, 3), _picture("odd", *shape)], tokenizers)
    assert "48" in str(raised.value)


def _text(key: str, text: str) -> Sample:
    return Sample(key, "trial", (Segment("text", "input", text=text), Segment("text", "target", text=text)))


def test_dropout_is_a_function_of_the_record_and_the_seed() -> None:
    words = "a red circle above a blue square in the centre of the picture"
    own: Any = SimpleNamespace(
        text=TextTokenizer.train([words] * 20, 330), audio=SimpleNamespace(encode_with_components=lambda waves: [])
    )

    def ids(keys: tuple[str, ...], **settings: Any) -> list[list[list[int]]]:
        found = tokenise([_text(key, words) for key in keys], own, **settings)
        return [[part.array().tolist() for part in parts] for parts in found]

    plain = ids(("a", "b"))
    assert plain[0][0] == plain[0][1] == plain[1][0]
    first = ids(("a", "b"), text_dropout=0.3, seed=1)
    assert first[0][0] != first[0][1] and first[0] != first[1] and first[0][0] != plain[0][0]
    assert ids(("b",), text_dropout=0.3, seed=1)[0] == first[1], "neighbours do not matter"
    assert ids(("a",), text_dropout=0.3, seed=2)[0] != first[0]
    assert all(own.text.decode(part) == words for document in first for part in document)


def test_prepared_texts_do_not_depend_on_workers_or_shards(tmp_path: Path) -> None:
    text = TextTokenizer.train(["a red circle above a blue square in the centre of the picture"] * 20, 330)
    visual = PatchVisualTokenizer(
        PatchVisualTokenizerConfig(image_size=48, patch=16, scales=((1, 1), (3, 3)), amplitudes=(0.5, 0.5), width=8)
    )
    audio = SpectralAudioTokenizerConfig(num_components=8)
    Tokenizers(text, visual, SpectralAudioTokenizer(audio)).save(tmp_path / "tokenizers")
    special = SpecialTokens(0, *range(9))
    layout = Layout(special, quantizer=visual.quantizer, num_bits=20, num_levels=3, codebook_size=64,
                    understanding_grid=3)  # fmt: skip

    def prepared(name: str, **changes: Any) -> list[list[list[int]]]:
        config = PrepareConfig(num_records=8, task_weights={"text": 1.0}, **{"num_workers": 1, **changes})
        report = prepare_data(tmp_path / "tokenizers", tmp_path / name, config, layout)
        assert (report["records"], report["rejected"]) == (8, 0)
        corpus = PackedCorpus(tmp_path / name)
        return [[part.array().tolist() for part in corpus.document(number)] for number in range(8)]

    plain, first = prepared("plain"), prepared("first", text_dropout=0.2)
    assert first == prepared("again", text_dropout=0.2, num_workers=2, records_per_shard=3)
    assert all(a != b for a, b in zip(plain, first, strict=True))
    for a, b in zip(plain, first, strict=True):
        assert [text.decode(part) for part in a] == [text.decode(part) for part in b]
    with pytest.raises(ConfigError, match=r"text_dropout 1.0 must lie in \[0, 1\)"):
        prepared("odd", text_dropout=1.0)


def test_what_the_tokenizers_would_refuse_is_named(tokenizers: Any) -> None:
    spectral = SpectralAudioTokenizer(SpectralAudioTokenizerConfig())
    own: Any = SimpleNamespace(text=TextTokenizer.train(["x"], 266), visual=tokenizers.visual, audio=spectral)
    silent = Sample("mute", "trial", (Segment("audio", "target", array=np.full(4000, np.nan, np.float32)),))
    for sample, message in (
        (_text("odd", "a \ud800 b"), r"record odd: its text has a lone surrogate U\+D800 at character 2"),
        (silent, "record mute: audio tokenizer: a wave has values that are not finite"),
    ):
        with pytest.raises(DataError, match=message):
            tokenise([_text("fine", "x"), sample], own)


def test_the_world_is_drawn_for_the_tokenizers_at_hand(tokenizers: Any) -> None:
    world = world_of(tokenizers)
    assert (world.image_size, world.video_size, world.sample_rate) == (48, 48, 24000)


def test_codes_that_int16_cannot_hold_are_refused(tokenizers: Any) -> None:
    audio = SimpleNamespace(codebook_size=65536, check_wave=lambda wave: wave, encode_with_components=None)
    sample = Sample("r", "t", (Segment("audio", "target", array=np.zeros(800, np.float32)),))
    with pytest.raises(ConfigError, match=r"codebooks of 65536 codes; int16 holds 32768"):
        tokenise([sample], Tokenizers(tokenizers.text, tokenizers.visual, audio))  # type: ignore[arg-type]

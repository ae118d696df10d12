"""What a record must bring to become tokens; what is wrong is said with the record's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ernie_elastic.data.tokenise import tokenise, world_of
from ernie_elastic.errors import DataError
from ernie_elastic.schema import Sample, Segment
from ernie_elastic.tokenizers.visual_patch import PatchVisualTokenizer, PatchVisualTokenizerConfig


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


def test_the_world_is_drawn_for_the_tokenizers_at_hand(tokenizers: Any) -> None:
    world = world_of(tokenizers)
    assert (world.image_size, world.video_size, world.sample_rate) == (48, 48, 24000)

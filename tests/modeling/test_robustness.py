"""Bad values and odd sizes: what cannot be read is refused by name, what is merely extreme runs and stays separate."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from ernie_elastic.data.groups.augmentation import Augmentation, Flips
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.layout import Document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.errors import DataError
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import modality_sums
from ernie_elastic.schema import PackedBatch
from tests.modeling.common import DOCUMENTS, RICH, random_parts, random_tokens, tiny_model

MODEL = tiny_model(**RICH)
CONFIG, LAYOUT = MODEL.config, layout_of(MODEL.config)
# (kind, role, field that a float input comes in, the name that the message gives it)
FLOAT_INPUTS = [
    ("image", "target", "latents", "latents of a generated image"),
    ("video", "target", "latents", "latents of a generated video"),
    ("image", "input", "latents", "image that is read"),
    ("video", "input", "latents", "video that is read"),
    ("audio", "input", "features", "features of a sound that is read"),
    ("audio", "target", "speaker", "a speaker embedding"),
]


def segment(kind: str, role: str, seed: int = 0, **changes: object) -> Tokens:
    return dataclasses.replace(random_tokens(kind, role, np.random.default_rng(seed), CONFIG), **changes)


def text(*ids: int, role: str = "target") -> Tokens:
    return Tokens("text", role, ids=np.array(ids, dtype=np.int32))


def document(*parts: Tokens) -> Document:
    return build_document(list(parts), LAYOUT)


def hidden_of(batch: PackedBatch) -> torch.Tensor:
    """Hidden states [B, T, H], finite with finite losses."""
    with torch.inference_mode():
        output = MODEL.forward_packed(batch)
        sums, counts = modality_sums(output, batch)
    assert output.hidden_BTH.isfinite().all() and sums.isfinite().all() and counts.isfinite().all()
    return output.hidden_BTH


def assert_packed_as_alone(documents: list[Document], hidden_BTH: torch.Tensor, step: int = 1) -> None:
    """One row: every document gives what it gives by itself, at every `step`-th position and the last."""
    start, checked = 0, 0
    for part in documents:
        alone = hidden_of(collate([[part]]))[0]
        places = torch.tensor(sorted({*range(0, len(part), step), len(part) - 1}))
        torch.testing.assert_close(hidden_BTH[0, start + places], alone[places], rtol=0, atol=1e-5)
        start, checked = start + len(part), checked + len(places)
    assert start <= hidden_BTH.shape[1] and checked >= len(documents)


@pytest.mark.parametrize(("kind", "role", "field", "name"), FLOAT_INPUTS, ids=[f"{i[0]}_{i[1]}" for i in FLOAT_INPUTS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_name_and_number(kind, role, field, name, bad):
    part = segment(kind, role)
    values = np.array(getattr(part, field), dtype=np.float32)
    values.reshape(-1)[[0, values.size - 1]] = bad
    message = re.escape(f"hold 2 values that are NaN or infinite or beyond 65,504, of {values.size}")
    # As loading does, with flips and dropped conditions, and as prompts are made, without.
    training = Augmentation(Flips(0.3), frame_drop=0.5, speaker_dropout=0.0)
    for options in ((), (training, torch.Generator().manual_seed(0))):
        with pytest.raises(DataError, match=f"{re.escape(name)} {message}"):
            build_document([text(11), dataclasses.replace(part, **{field: values})], LAYOUT, *options)
    values[~np.isfinite(values)] = 0.0
    hidden_of(collate([[document(text(11), dataclasses.replace(part, **{field: values}))]]))


def test_a_half_precision_overflow_is_refused():
    part = segment("image", "target")
    with np.errstate(over="ignore"):
        latents = np.full(part.latents.shape, 1e5).astype(np.float16)
    with pytest.raises(DataError, match=f"hold {latents.size} values .* beyond 65,504, of {latents.size}"):
        document(dataclasses.replace(part, latents=latents))


@pytest.mark.parametrize("name", ["image_to_text", "text_to_image", "text_to_video", "text_to_audio", "audio_to_text"])
def test_other_documents_of_a_row_feel_nothing_of_large_values(name):
    """Large but finite values in one document leave the others as they are by themselves."""
    quiet = [document(*random_parts(task, 2, CONFIG)) for task in ("text", "mixed")]
    loud = [
        dataclasses.replace(
            part,
            **{
                field: 1e4 * np.asarray(value, dtype=np.float32)
                for field in ("latents", "features", "speaker")
                if (value := getattr(part, field)) is not None
            },
        )
        for part in random_parts(name, 1, CONFIG)
    ]
    documents = [quiet[0], document(*loud), quiet[1]]
    hidden = hidden_of(collate([documents]))
    first, last = len(quiet[0]), len(quiet[1])
    assert_packed_as_alone([quiet[0]], hidden[:, :first])
    assert_packed_as_alone([quiet[1]], hidden[:, -last:])


def test_an_empty_document_is_one_position_that_predicts_nothing():
    empty = document()
    assert len(empty) == 1 and (empty.text_targets < 0).all()
    batch = collate([[empty]])
    hidden_of(batch)
    with torch.inference_mode():
        sums, counts = modality_sums(MODEL.forward_packed(batch), batch)
    assert sums.tolist() == [0.0] * 5 and counts.tolist() == [0.0] * 5


def test_empty_documents_between_others_change_nothing():
    documents = [document(), document(text(11, 12)), document(), document(*random_parts("mixed", 3, CONFIG))]
    assert_packed_as_alone(documents, hidden_of(collate([documents, [document()]])))


def test_rows_without_documents_run_beside_others_and_a_batch_of_them_is_refused():
    part = document(text(11, 12, 13))
    hidden = hidden_of(collate([[], [part]]))
    assert_packed_as_alone([part], hidden[1:])
    for rows in ([[], []], [[]], []):
        with pytest.raises(DataError, match="every row is empty"):
            collate(rows)


@pytest.mark.parametrize(
    "parts",
    [[text()], [text(role="input")], [segment("image", "input")], [segment("audio", "input")]],
    ids=["no_text", "no_input_text", "picture", "sound"],
)
def test_documents_of_hardly_a_group_pack_like_others(parts):
    short, other = document(*parts), document(*random_parts("text_to_image", 4, CONFIG))
    assert_packed_as_alone([short, other, short], hidden_of(collate([[short, other, short]])))


def test_4096_groups_in_one_pack_stay_finite_and_separate():
    rng = np.random.default_rng(0)
    documents, groups = [], 0
    while groups < 4096:
        if len(documents) % 16 == 3:
            part = document(
                *random_parts(list(DOCUMENTS)[len(documents) // 16 % len(DOCUMENTS)], len(documents), CONFIG)
            )
        else:
            part = document(text(*rng.integers(10, CONFIG.vocab_size, min(95, 4096 - groups - 1)).tolist()))
        documents.append(part)
        groups += int(part.group[-1]) + 1
    batch = collate([documents])
    change = (batch.group_BT[0, 1:] != batch.group_BT[0, :-1]) | (batch.document_BT[0, 1:] != batch.document_BT[0, :-1])
    assert int(change.sum()) + 1 == groups >= 4096 and batch.document_BT.shape[1] > CONFIG.attention_block
    assert_packed_as_alone(documents, hidden_of(batch), step=11)


def test_an_unknown_kind_of_segment_is_refused():
    with pytest.raises(DataError, match="segment kind 'smell' is not one of text, image, video, audio"):
        document(Tokens("smell", "input", ids=np.array([11])))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            segment("audio", "target", speaker=np.zeros(4)),
            r"a speaker embedding has shape \(4,\); this model reads \[6\]",
        ),
        (segment("audio", "target", speaker=np.zeros((1, 6))), r"a speaker embedding has shape \(1, 6\)"),
        (segment("audio", "input", features=np.zeros((1, 3))), r"features of a sound have shape \(1, 3\).*, 9\]"),
        (segment("audio", "input", features=np.zeros((40, 9))), r"features of a sound have shape \(40, 9\)"),
        (segment("audio", "input", features=None), "features of a sound that is read are missing"),
        (segment("audio", "input", codes=None), "needs the codes of the audio tokenizer"),
        (segment("image", "target", latents=None), "latents of a generated image are missing"),
        (segment("image", "input", latents=None), "an understanding image needs pixels and"),
        (segment("video", "input", pixels=None), "an understanding video needs pixels and"),
    ],
)
def test_missing_or_misshapen_inputs_of_a_document_are_refused(part, message):
    with pytest.raises(DataError, match=message):
        document(part)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (segment("image", "input", pixels=np.zeros((1, 8, 8, 3), np.uint8)), "8x8 pixels; this model reads 16 a side"),
        (segment("image", "input", latents=np.zeros((1, 2, 4, 5))), r"features of shape \(1, 1, 2, 4, 5\); expected"),
        (segment("image", "input", latents=np.zeros((1, 4, 4, 7))), r"features of shape \(1, 1, 4, 4, 7\); expected"),
        (segment("video", "input", pixels=np.zeros((3, 16, 16, 3), np.uint8)), "3 frames; give 1 or a multiple of 4"),
    ],
)
def test_pictures_that_do_not_fit_the_reader_are_refused_by_the_model(part, message):
    with pytest.raises(DataError, match=message):
        MODEL.forward_packed(collate([[document(part)]]))


@pytest.mark.parametrize("role", ["input", "target"])
@pytest.mark.parametrize("wrong", [-5, CONFIG.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(role, wrong):
    with pytest.raises(DataError, match=f"text ids hold {wrong}; they must lie in 0..{CONFIG.vocab_size - 1}"):
        document(text(11, wrong, role=role))


@pytest.mark.parametrize("wrong", [-3, CONFIG.audio_codebook_size])
@pytest.mark.parametrize("role", ["input", "target"])
def test_codes_outside_the_codebook_are_refused(role, wrong):
    sound = segment("audio", role)
    codes = sound.codes.copy()
    codes[0, 1] = wrong
    with pytest.raises(DataError, match=f"audio codes hold {wrong}"):
        document(dataclasses.replace(sound, codes=codes))
    with pytest.raises(DataError, match=r"this model has .steps, 3."):
        document(dataclasses.replace(sound, codes=sound.codes[:, :2]))


def test_values_that_would_overflow_are_refused():
    speaker = np.full(CONFIG.speaker_embedding_size, 3e38, np.float32)
    with pytest.raises(DataError, match=r"a speaker embedding hold 6 values .* beyond 65,504, of 6"):
        document(segment("audio", "target", speaker=speaker))


@pytest.mark.parametrize("shape", [(0, 4, 4, 5), (1, 2, 2, 5), (1, 4, 4, 3)])
def test_latents_of_another_tokenizer_are_refused(shape):
    with pytest.raises(DataError, match=r"this model draws .frames, 4, 4, 5."):
        document(segment("image", "target", latents=np.zeros(shape, np.float32)))


def test_roles_and_layouts_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="segment role 'outpt'"):
        document(text(11, role="outpt"))
    other = build_document([text(11)], dataclasses.replace(LAYOUT, speaker_size=0))
    with pytest.raises(DataError, match="different layouts"):
        collate([[document(text(11)), other]])


def test_a_document_longer_than_its_row_is_refused():
    with pytest.raises(DataError, match="row 0 holds 6 positions, more than 5"):
        collate([[document(text(11, 12, 13, 14, 15))]], row_length=5)

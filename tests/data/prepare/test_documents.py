"""Records as documents: media that fit, roles of pairs, pieces of long documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.layout import IGNORE, Layout, document_length
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.prepare.documents import assign_roles, fit_sample, pieces_of
from ernie_elastic.data.sources.base import MESSAGES_TASK, TASK
from ernie_elastic.errors import DataError
from ernie_elastic.schema import Sample, Segment, SegmentRole
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.text.special import SpecialTokens

QUANTIZER = MultiScaleBits(((1, 1), (3, 3)), (0.5, 0.5))
LAYOUT = Layout(
    SpecialTokens(0, *range(9)), quantizer=QUANTIZER, num_bits=4, num_levels=2, codebook_size=8, understanding_grid=3
)


def sample(*segments: tuple[str, SegmentRole, Any], task: str = TASK, key: str = "k") -> Sample:
    made = [
        Segment(kind, role, text=value) if kind == "text" else Segment(kind, role, array=value)  # type: ignore[arg-type]
        for kind, role, value in segments
    ]
    return Sample(key, task, tuple(made))


def kinds(found: Sample) -> list[tuple[str, str]]:
    return [(segment.kind, segment.role) for segment in found.segments]


@pytest.mark.parametrize(("stored", "given"), [(1, 1), (3, 1), (4, 4), (7, 4), (8, 8), (200, 8)])
def test_clips_get_a_number_of_frames_that_the_model_reads(stored: int, given: int) -> None:
    clip = np.zeros((stored, 12, 16, 3), np.uint8) + np.arange(stored, dtype=np.uint8)[:, None, None, None]
    picture = np.zeros((30, 10, 3), np.uint8)
    fitted = fit_sample(sample(("video", "input", clip), ("image", "target", picture)), 24, 8, 4)
    frames, image = (segment.array for segment in fitted.segments)
    assert frames is not None and frames.shape == (given, 24, 24, 3) and image is not None
    assert image.shape == (24, 24, 3)
    times = frames[:, 12, 12, 0].astype(int)
    assert (np.diff(times) > 0).all() and abs(times.mean() - (stored - 1) / 2) <= 1


def test_pairs_are_read_or_drawn_by_their_share_and_their_key() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    pairs = [sample(("text", "target", "a"), ("image", "target", picture), key=str(i)) for i in range(400)]
    found = [kinds(assign_roles(pair, 0.25, 0)) for pair in pairs]
    understood, drawn = [("image", "input"), ("text", "target")], [("text", "input"), ("image", "target")]
    assert all(roles in (understood, drawn) for roles in found) and 60 <= found.count(understood) <= 140
    assert found == [kinds(assign_roles(pair, 0.25, 0)) for pair in pairs]
    assert found != [kinds(assign_roles(pair, 0.25, 1)) for pair in pairs]
    assert all(kinds(assign_roles(pair, 1.0, 0)) == understood for pair in pairs)
    assert all(kinds(assign_roles(pair, 0.0, 0)) == drawn for pair in pairs)


def test_messages_and_single_kinds_keep_their_roles() -> None:
    chat = sample(("image", "input", np.zeros((4, 4, 3), np.uint8)), ("text", "target", "a"), task=MESSAGES_TASK)
    assert assign_roles(chat, 0.0, 0) is chat
    texts = sample(("text", "target", "a"), ("text", "target", "b"))
    assert assign_roles(texts, 0.5, 0) is texts
    with pytest.raises(DataError, match=r"record k has no target.*assistant"):
        assign_roles(sample(("text", "input", "a"), task=MESSAGES_TASK), 0.5, 0)


def text(*ids: int, role: str = "target") -> Tokens:
    return Tokens("text", role, ids=np.asarray(ids, dtype=np.int32))


def picture(role: str = "target") -> Tokens:
    return Tokens("image", role, latents=np.zeros((1, 3, 3, 4), np.float16))


@given(st.lists(st.one_of(st.integers(1, 90), st.none()), min_size=1, max_size=6), st.integers(16, 40))
def test_pieces_fit_and_predict_every_token_once(shape: list[int | None], row: int) -> None:
    numbers = iter(range(9, 10_000))
    parts = [picture() if size is None else text(*(next(numbers) for _ in range(size))) for size in shape]
    pieces = pieces_of(parts, LAYOUT, row, "k")
    assert all(document_length(piece, LAYOUT) <= row for piece in pieces)
    documents = [build_document(piece, LAYOUT) for piece in pieces]
    assert [len(document) for document in documents] == [document_length(piece, LAYOUT) for piece in pieces]
    whole = build_document(parts, LAYOUT)

    def predicted(document: Any) -> list[int]:
        return [int(token) for token in document.text_targets if token != IGNORE]

    # All that the whole document predicts, in its order, its end once at the very end.
    assert [token for document in documents for token in predicted(document)] == predicted(whole)
    assert sum(len(document.bit_index) for document in documents) == len(whole.bit_index)
    full = [piece for piece in pieces[:-1] if all(part.kind == "text" for part in piece)]
    assert all(document_length(piece, LAYOUT) == row for piece in full) or None in shape


def test_what_cannot_be_cut_is_named() -> None:
    with pytest.raises(DataError, match="record k is too long: 32 positions, a row has 20; raise --row-length"):
        pieces_of([text(*[9] * 10, role="input"), text(*[9] * 21)], LAYOUT, 20, "k")
    with pytest.raises(DataError, match="record k is too long: 13 positions, a row has 12"):
        pieces_of([picture()], LAYOUT, 12, "k")
    kept = [text(9, role="input"), text(10)]
    assert pieces_of(kept, LAYOUT, 3, "k") == [kept]

"""Documents: lengths, groups, targets, flips; packing and shards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.data.groups.augmentation import Augmentation, Flips
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.layout import document_length, scale_positions
from ernie_elastic.data.packed.loader import PackedLoader
from ernie_elastic.data.packed.packing import collate, pack_lengths, packing_efficiency
from ernie_elastic.data.packed.shards import ROWS_FILE, PackedCorpus, write_rows, write_shard
from ernie_elastic.errors import DataError
from ernie_elastic.modeling.document_layout import layout_of
from tests.modeling.common import DOCUMENTS, random_parts, tiny_config

CONFIG = tiny_config()
LAYOUT = layout_of(CONFIG)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_length_is_known_before_the_document_is_made(name):
    for seed in range(5):
        parts = random_parts(name, seed, CONFIG)
        document = build_document(parts, LAYOUT)
        # A document that ends with a text target saves its EOS input; every marker is counted.
        assert len(document) == document_length(parts, LAYOUT)
        assert torch.equal(document.group, document.group.cummax(0).values), "groups never go back"


def test_image_layout_is_the_reports():
    parts = random_parts("text_to_image", 0, CONFIG)
    document = build_document(parts, LAYOUT)
    text = len(parts[0])
    boi = 1 + text
    assert document.text_ids[boi] == LAYOUT.special.boi and document.text_targets[boi - 1] == LAYOUT.special.boi
    sizes = [h * w for h, w in LAYOUT.quantizer.scales]
    groups = document.group[boi:].tolist()
    # BOI predicts the first scale; then one group per scale, then the pooled sum of all scales, then EOI.
    assert [groups.count(g) for g in sorted(set(groups))] == [1, *sizes[1:], 1, 1]
    closing = boi + sum(sizes[1:]) + 1
    assert document.text_targets[closing] == LAYOUT.special.eoi
    assert (
        document.text_ids[closing + 1] == LAYOUT.special.eoi
        and document.text_targets[closing + 1] == LAYOUT.special.eos
    )
    assert document.bit_index.tolist() == list(range(boi, closing))
    assert document.bit_weight.sum().item() == pytest.approx(1.0)


def test_video_frames_continue_at_the_pooled_sum():
    parts = random_parts("text_to_video", 0, CONFIG)
    document = build_document(parts, LAYOUT)
    frames = len(parts[1])
    decisions = [t for t in document.text_targets.tolist() if t in (LAYOUT.special.next_frame, LAYOUT.special.eov)]
    assert decisions == [LAYOUT.special.next_frame] * (frames - 1) + [LAYOUT.special.eov]
    carriers = [i for i in document.bit_index.tolist() if document.text_targets[i] == LAYOUT.special.next_frame]
    assert len(carriers) == frames - 1, "the position that decides to go on predicts the next frame's first scale"


def test_audio_ends_with_eoa_on_the_first_level_only():
    document = build_document(random_parts("text_to_audio", 0, CONFIG), LAYOUT)
    steps = document.next_codes[document.next_codes[:, 0] >= 0]
    assert steps[-1].tolist() == [CONFIG.audio_codebook_size, -1, -1]
    assert (steps[:-1] >= 0).all() and (steps[:-1] < CONFIG.audio_codebook_size).all()


def test_scales_are_centred_on_the_frame():
    places = scale_positions(LAYOUT.quantizer, 0)
    assert places == [(1.5, 1.5)]
    for scale in range(len(LAYOUT.quantizer.scales)):
        assert np.mean(scale_positions(LAYOUT.quantizer, scale)) == pytest.approx(1.5)


def test_flips_change_later_targets_and_no_flips_change_nothing():
    parts = random_parts("text_to_image", 1, CONFIG)
    plain = build_document(parts, LAYOUT)
    none = build_document(parts, LAYOUT, Augmentation(Flips(0.0)), torch.Generator().manual_seed(0))
    assert torch.equal(plain.bit_targets, none.bit_targets) and torch.equal(plain.visual_inputs, none.visual_inputs)
    flipped = build_document(parts, LAYOUT, Augmentation(Flips(0.5)), torch.Generator().manual_seed(0))
    again = build_document(parts, LAYOUT, Augmentation(Flips(0.5)), torch.Generator().manual_seed(0))
    assert torch.equal(flipped.bit_targets, again.bit_targets)
    assert torch.equal(flipped.bit_targets[:1], plain.bit_targets[:1]), "the first scale has no history"
    assert not torch.equal(flipped.bit_targets[1:], plain.bit_targets[1:])


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_packing_places_every_document_once_within_the_row(lengths):
    rows = pack_lengths(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert 0 < packing_efficiency(lengths, rows, 64) <= 1


def test_a_document_longer_than_a_row_is_named():
    with pytest.raises(DataError, match="document 1 has 70 positions, a row has 64"):
        pack_lengths([3, 70], 64)


def test_shards_give_back_every_segment(tmp_path):
    documents = [random_parts(name, seed, CONFIG) for seed in range(3) for name in DOCUMENTS]
    write_shard(tmp_path / "shard-00000.safetensors", documents[:10])
    write_shard(tmp_path / "shard-00001.safetensors", documents[10:])
    rows = pack_lengths([document_length(parts, LAYOUT) for parts in documents], 512)
    write_rows(tmp_path / ROWS_FILE, rows)
    corpus = PackedCorpus(tmp_path)
    assert [corpus.row(i) for i in range(corpus.num_rows)] == rows
    for number, parts in enumerate(documents):
        for ours, theirs in zip(corpus.document(number), parts, strict=True):
            assert (ours.kind, ours.role) == (theirs.kind, theirs.role)
            assert np.array_equal(ours.array(), theirs.array())
    with pytest.raises(DataError, match="holds no packed shards"):
        PackedCorpus(tmp_path / "nowhere")
    loader = PackedLoader(corpus, LAYOUT, 2, 512, seed=5, augmentation=Augmentation(Flips(0.2)))
    first, second = loader.step(3)[0], loader.step(3)[0]
    for item in dataclasses.fields(first):
        ours, theirs = getattr(first, item.name), getattr(second, item.name)
        assert not isinstance(ours, torch.Tensor) or torch.equal(ours, theirs)


def test_left_padding_ends_at_the_right_edge():
    documents = [build_document(random_parts("text", seed, CONFIG), LAYOUT) for seed in range(4)]
    batch = collate([[document] for document in documents], pad_left=True)
    assert (batch.document_BT[:, -1] == 0).all()
    assert batch.num_positions == sum(len(document) for document in documents)

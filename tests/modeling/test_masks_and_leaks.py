"""The compact mask lowers to the same thing everywhere, and no later group or other document leaks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_elastic.data.groups.augmentation import Augmentation, Flips
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.modeling.blocks import shift_left
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.inputs import embed_batch
from ernie_elastic.modeling.masks import Places, SequenceMask, cached_mask, column_bounds, flex_mask_mod
from ernie_elastic.modeling.positions import apply_rotary, axis_of_pair
from tests.modeling.common import DOCUMENTS, random_parts, random_tokens, tiny_config, tiny_model


@st.composite
def packs(draw):
    """Documents of random segments: names of kinds and roles, a seed, a window and a share of dropped frames."""
    segment = st.tuples(st.sampled_from(["text", "image", "video", "audio"]), st.sampled_from(["input", "target"]))
    documents = draw(st.lists(st.lists(segment, min_size=0, max_size=4), min_size=1, max_size=4))
    return documents, draw(st.integers(0, 10**6)), draw(st.integers(0, 2)), draw(st.sampled_from([0.0, 0.5, 1.0]))


def batch_of(pack, config, layout):
    documents, seed, _, drop = pack
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    augmentation = Augmentation(Flips(0.3), frame_drop=drop, condition_dropout=0.3)
    return collate(
        [
            [
                build_document([random_tokens(*part, rng, config) for part in parts], layout, augmentation, generator)
                for parts in documents
            ]
        ]
    )


@settings(max_examples=100, deadline=None)
@given(packs())
def test_dense_flex_bounds_and_cached_masks_agree(pack):
    config = tiny_config(ss_scale="full" if pack[1] % 2 else "first")
    places, window = Places.of(batch_of(pack, config, layout_of(config))), pack[2]
    dense = SequenceMask(places, window).dense()[0, 0]
    length, index = len(dense), torch.arange(len(dense))
    mod = flex_mask_mod(places, window)
    assert torch.equal(mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :]), dense)
    first, hole_start, hole_end, last = column_bounds(places, window)[0].long().unbind(-1)
    row = index[:, None]
    bounded = (row >= first) & (row < last) & ~((row >= hole_start) & (row < hole_end))
    assert torch.equal(bounded, dense)
    for start in range(0, length, 7):  # blocks of queries over the columns that they may see
        rows = slice(start, min(start + 7, length))
        columns = SequenceMask(places, window).columns_of(rows)
        assert torch.equal(SequenceMask(places, window).dense(rows, columns)[0, 0], dense[rows, columns])
        outside = torch.ones(length, dtype=torch.bool)
        outside[columns] = False
        assert not dense[rows][:, outside].any()
    group, document = places.group[0].tolist(), places.document[0].tolist()
    starts = [i for i in range(length) if i == 0 or (group[i], document[i]) != (group[i - 1], document[i - 1])]
    for start, stop in zip(starts, [*starts[1:], length], strict=True):  # group by group, as a cache grows
        new = places.map(lambda part, a=start, b=stop: part[:, a:b])
        keys = places.map(lambda part, b=stop: part[:, :b])
        assert torch.equal(cached_mask(new, keys, window)[0, 0], dense[start:stop, :stop])


def test_windows_and_dropped_frames_hide_history_and_nothing_else():
    config = tiny_config()
    clip = random_tokens("video", "target", np.random.default_rng(3), config)
    clip = dataclasses.replace(clip, latents=np.concatenate([clip.latents] * 2)[:4])
    text = random_tokens("text", "target", np.random.default_rng(4), config)
    batch = collate([[build_document([text, clip, text, clip], layout_of(config))]])
    places = Places.of(batch)
    frame, clips = places.frame[0], places.clip[0]
    dropped = places.dropped.clone()
    dropped[0, (clips == 0) & (frame == 1)] = True
    plain = SequenceMask(places).dense()[0, 0]
    hidden = plain & ~SequenceMask(dataclasses.replace(places, dropped=dropped)).dense()[0, 0]
    far = plain & ~SequenceMask(places, window=1).dense()[0, 0]
    assert hidden.any() and far.any()
    query, key = hidden.nonzero().unbind(-1)
    assert (clips[query] == 0).all() and (clips[key] == 0).all() and (frame[key] == 1).all()
    assert (frame[query] > 1).all() and set(frame[query].tolist()) == {2, 3, 4}
    query, key = far.nonzero().unbind(-1)
    assert (clips[query] == clips[key]).all() and (frame[query] - frame[key] > 1).all()
    after = (clips < 0) & (places.group[0] > places.group[0][clips == 0].max())
    assert plain[after][:, clips == 0].all(), "what follows a clip sees all of it"


LEAK_MODELS = {
    scale: tiny_model(num_hidden_layers=2, audio_num_levels=1, ss_scale=scale) for scale in ("first", "full")
}


@settings(max_examples=1000, deadline=None)
@given(packs(), st.integers(0, 10**6))
def test_no_gradient_from_a_later_group_or_another_document(pack, choice):
    model = LEAK_MODELS["full" if choice % 2 else "first"]
    batch = batch_of(pack, model.config, layout_of(model.config))
    embedded = embed_batch(model.model, batch).detach().requires_grad_()
    codes = batch.next_codes_BTQ[0]
    index = (codes[:, 0] >= 0).nonzero()[:, 0]
    mask = SequenceMask(Places.of(batch), pack[2]).dense()
    out = model.model.run_stack(
        embedded, batch.position_BT3, mask, next_codes=codes[index], audio_index_S=index, is_causal=False
    )
    target = choice % embedded.shape[1]
    (gradient,) = torch.autograd.grad(out.hidden[0, target].square().sum(), embedded)
    touched = gradient[0].abs().sum(-1) > 0
    # Two layers look through one another: what is seen by a position that is seen.
    seen = mask[0, 0].float()
    allowed = (seen @ seen)[target] > 0
    assert not (touched & ~allowed).any()
    assert touched[target] and touched[allowed].float().mean() > 0.9


def test_no_gradient_from_the_token_that_mtp_predicts():
    model = tiny_model(num_hidden_layers=2, audio_num_levels=1, num_nextn_predict_layers=1)
    layout = layout_of(model.config)
    documents = [build_document(random_parts(name, 9, model.config), layout) for name in DOCUMENTS if name != "mixed"]
    batch = collate([documents])
    embedded = embed_batch(model.model, batch).detach().requires_grad_()
    mask = SequenceMask(Places.of(batch)).dense()
    out = model.model.run_stack(embedded, batch.position_BT3, mask, is_causal=False)
    rotary = model.model.rotary_emb(batch.position_BT3)
    predicted = model.model.mtp(out.hidden, shift_left(embedded), rotary, mask, is_causal=False)
    index_N = model.forward_packed(batch).mtp_index_N.tolist()
    assert len(index_N) > 10
    for index in index_N:
        (gradient,) = torch.autograd.grad(predicted[0, index].square().sum(), embedded, retain_graph=True)
        touched = gradient[0].abs().sum(-1) > 0
        assert touched[index + 1], "the successor's embedding is an input"
        later = torch.arange(len(touched)) > index + 1
        assert not (touched & (later | (batch.document_BT[0] != batch.document_BT[0, index]))).any()


@torch.inference_mode()
def test_a_code_changes_only_later_levels_and_later_steps():
    model = tiny_model()
    layout = layout_of(model.config)
    document = build_document(random_parts("text_to_audio", 5, model.config), layout)
    batch = collate([[document]])
    base = model.forward_packed(batch)
    assert len(base.audio_index_S) >= 3
    changed = batch.next_codes_BTQ.clone()
    step, level = 1, 1
    where = base.audio_index_S[step]
    changed[0, where, level] = (changed[0, where, level] + 1) % model.config.audio_codebook_size
    other = model.forward_packed(batch, next_codes=changed)
    for q, (ours, theirs) in enumerate(zip(base.audio_logits, other.audio_logits, strict=True)):
        moved = (ours - theirs).abs().amax(-1) > 1e-7
        assert not moved[:step].any()
        assert bool(moved[step]) == (q > level)


@torch.inference_mode()
def test_the_router_never_sees_the_task():
    model = tiny_model()
    layout = layout_of(model.config)
    batch = collate([[build_document(random_parts("mixed", 1, model.config), layout)]])
    base = model.forward_packed(batch)
    batch.task_BT = torch.zeros_like(batch.task_BT)
    again = model.forward_packed(batch)
    assert torch.equal(base.hidden_BTH, again.hidden_BTH)


def test_equal_axes_are_plain_rope_and_the_first_scale_is_the_centre():
    torch.manual_seed(0)
    model = tiny_model()
    position = torch.rand(2, 7) * 50
    plain = model.model.rotary_emb(position)
    three = model.model.rotary_emb(position[..., None].expand(-1, -1, 3))
    assert torch.equal(plain[0], three[0]) and torch.equal(plain[1], three[1])
    x = torch.randn(2, 3, 7, 12)
    assert apply_rotary(x, *plain).norm() == pytest.approx(x.norm().item(), rel=1e-5)
    assert axis_of_pair([2, 2, 2], "sectioned").tolist() == [1, 2, 1, 2, 0, 0]
    assert axis_of_pair([2, 2, 2], "interleaved").tolist() == [1, 2, 0, 1, 2, 0]


def test_bias_moves_selection_and_never_weights():
    model = tiny_model()
    gate = model.model.layers[0].mlp.gate
    gate.e_score_correction_bias.zero_()
    x = torch.randn(50, model.config.hidden_size)
    _, weights, ids = gate(x)
    gate.e_score_correction_bias += torch.tensor([10.0, 10.0, 0, 0, 0, 0])
    logits, moved, forced = gate(x)
    assert (forced.sort(-1).values == torch.tensor([0, 1])).all() and not torch.equal(ids, forced)
    scores = logits.softmax(-1).gather(-1, forced)
    assert torch.allclose(moved, scores / scores.sum(-1, keepdim=True))
    assert torch.allclose(weights.sum(-1), torch.ones(50))

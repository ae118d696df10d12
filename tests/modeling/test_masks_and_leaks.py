"""The compact mask lowers to the same thing everywhere, and no later group or other document leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernie_elastic.data.grouping import build_document
from ernie_elastic.data.packing import collate
from ernie_elastic.modeling.generation import layout_of
from ernie_elastic.modeling.masks import cached_mask, dense_mask, flex_mask_mod
from ernie_elastic.modeling.positions import apply_rotary, axis_of_pair
from tests.modeling.common import DOCUMENTS, random_parts, tiny_model


def test_dense_flex_and_cached_masks_agree():
    rng = np.random.default_rng(0)
    for _ in range(20):
        length = int(rng.integers(5, 40))
        document = torch.from_numpy(np.sort(rng.integers(0, 3, (2, length)), axis=1))
        group = torch.from_numpy(np.cumsum(rng.integers(0, 2, (2, length)), axis=1))
        dense = dense_mask(document, group)[:, 0]
        mod = flex_mask_mod(document, group)
        index = torch.arange(length)
        for row in range(2):
            flex = mod(torch.tensor(row), torch.tensor(0), index[:, None], index[None, :])
            assert torch.equal(flex, dense[row])
            for position in range(length):  # the cache holds this document's groups up to the position's own
                seen = (document[row] == document[row, position]) & (group[row] <= group[row, position])
                assert torch.equal(dense[row, position], seen)
    valid = torch.tensor([[False, True, True], [True, True, True]])
    assert cached_mask(valid, 2).tolist() == [[[[False, True, True]] * 2], [[[True, True, True]] * 2]]
    assert cached_mask(valid[1:], 2) is None


@pytest.mark.parametrize("seed", range(3))
def test_no_gradient_from_a_later_group_or_another_document(seed, stress):
    model = tiny_model(num_hidden_layers=6)
    layout = layout_of(model.config)
    rng = np.random.default_rng(seed)
    names = list(DOCUMENTS)
    for trial in range(2 * stress):
        chosen = [names[i] for i in rng.integers(0, len(names), 3)]
        documents = [build_document(random_parts(n, 50 * trial + seed, model.config), layout) for n in chosen]
        batch = collate([documents])
        embedded = model.model.embed_batch(batch).detach().requires_grad_()
        codes = batch.next_codes_BTQ[0]
        index = (codes[:, 0] >= 0).nonzero()[:, 0]
        out = model.model.run_stack(
            embedded, batch.position_BT3, dense_mask(batch.document_BT, batch.group_BT),
            next_codes=codes[index], audio_index_S=index, is_causal=False,
        )  # fmt: skip
        target = int(rng.integers(0, embedded.shape[1]))
        (gradient,) = torch.autograd.grad(out.hidden[0, target].square().sum(), embedded)
        touched = gradient[0].abs().sum(-1) > 0
        document, group = batch.document_BT[0], batch.group_BT[0]
        allowed = (document == document[target]) & (group <= group[target])
        assert not (touched & ~allowed).any()
        assert touched[target] and touched[allowed].float().mean() > 0.9


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

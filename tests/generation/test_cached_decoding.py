"""Cached group-by-group decoding gives the logits of teacher forcing, for every modality and a mixed document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.generation.audio import decode_audio
from ernie_elastic.generation.decoder import GroupDecoder, Sampling
from ernie_elastic.generation.text import decode_text
from ernie_elastic.generation.visual import decode_visual
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.inputs import embed_batch
from ernie_elastic.modeling.masks import Places, cached_mask
from ernie_elastic.schema import SubModelSpec
from tests.modeling.common import DOCUMENTS, RICH, random_parts, tiny_model

TOLERANCE = 1e-5
MODELS = {"plain": {}, "rich": RICH}
SPECS = {"full": None, "cut": SubModelSpec((1, 3, 4, 5), ((0, 2, 5), (1, 2, 3, 4), (0, 1), (0, 1, 2, 3, 4, 5)), 1)}


def replay_cached(model, document, submodel):
    """Feed the groups of one document one by one through the cache; logits of every position and audio level."""
    batch = collate([[document]])
    embedded = embed_batch(model.model, batch)
    cache, hidden, audio = DynamicCache(config=model.config), [], [[] for _ in range(model.config.audio_num_levels)]
    groups, places = document.group.tolist(), Places.of(batch)
    start = 0
    while start < len(groups):
        end = start + groups[start:].count(groups[start])
        codes = document.next_codes[start:end]
        index = (codes[:, 0] >= 0).nonzero()[:, 0]
        out = model.model.run_stack(
            embedded[:, start:end],
            batch.position_BT3[:, start:end],
            cached_mask(
                places.map(lambda part, a=start, b=end: part[:, a:b]),
                places.map(lambda part, b=end: part[:, :b]),
                model.config.video_window,
            ),
            cache,
            submodel,
            next_codes=codes[index],
            audio_index_S=index,
            is_causal=False,
        )
        hidden.append(out.hidden)
        for level, logits in enumerate(out.audio_logits):
            audio[level].append(logits)
        start = end
    return torch.cat(hidden, dim=1), [torch.cat(level) for level in audio]


@torch.inference_mode()
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("name", DOCUMENTS)
def test_cached_groups_equal_teacher_forcing(name, spec, options):
    model = tiny_model(**options)
    document = build_document(random_parts(name, 4, model.config), layout_of(model.config))
    packed = model.forward_packed(collate([[document]]), submodel=spec)
    hidden, audio = replay_cached(model, document, spec)
    assert (packed.hidden_BTH - hidden).abs().max() <= TOLERANCE
    for ours, theirs in zip(packed.audio_logits, audio, strict=True):
        assert ours.shape == theirs.shape
        assert ours.numel() == 0 or (ours - theirs).abs().max() <= TOLERANCE
    assert packed.text_logits_NV.std() > 0.1, "logits of a collapsed model would agree trivially"


@torch.inference_mode()
def test_packing_with_other_documents_changes_nothing():
    model = tiny_model()
    layout = layout_of(model.config)
    documents = [build_document(random_parts(name, 7, model.config), layout) for name in DOCUMENTS]
    together = model.forward_packed(collate([documents[:4], documents[4:]])).hidden_BTH
    for row, members in enumerate((documents[:4], documents[4:])):
        start = 0
        for document in members:
            alone = model.forward_packed(collate([[document]])).hidden_BTH[0]
            assert (together[row, start : start + len(document)] - alone).abs().max() <= TOLERANCE
            start += len(document)


class Recorder(GroupDecoder):
    """A decoder that keeps every logit it chose from."""

    def choose(self, logits_BV, temperature=None):
        self.__dict__.setdefault("kept", []).append(logits_BV)
        return super().choose(logits_BV, temperature)

    def choose_bits(self, logits_BGD):
        self.__dict__.setdefault("kept_bits", []).append(logits_BGD)
        bits = super().choose_bits(logits_BGD)
        self.__dict__.setdefault("bits", []).append(bits)
        return bits


def prompts_of(model, marker):
    layout = layout_of(model.config)
    parts = [
        random_parts("text", 1, model.config)[:1],
        random_parts("image_to_text", 2, model.config)[:1],
        random_parts("audio_to_text", 3, model.config)[:1],
    ]
    prompts = [build_document(part, layout, opener=marker) for part in parts]
    assert len({len(prompt) for prompt in prompts}) > 1, "rows of different length exercise left padding"
    return parts, prompts


def test_generated_text_equals_teacher_forcing():
    model = tiny_model()
    parts, prompts = prompts_of(model, None)
    decoder = Recorder(model, layout_of(model.config), sampling=Sampling(max_new_tokens=5))
    decoder.prefill(prompts)
    for row, ids in enumerate(decode_text(decoder)):
        whole = [*parts[row], Tokens("text", "target", ids=np.array(ids, dtype=np.int32))]
        packed = model.forward_packed(collate([[build_document(whole, layout_of(model.config))]]))
        for step in range(len(ids)):
            assert (packed.text_logits_NV[step] - decoder.kept[step][row]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_generated_pictures_equal_teacher_forcing(kind, places):
    model = tiny_model(visual_place_embedding=places)
    layout = layout_of(model.config)
    parts, prompts = prompts_of(model, layout.special.bov if kind == "video" else layout.special.boi)
    decoder = Recorder(model, layout, sampling=Sampling(max_frames=3))
    decoder.prefill(prompts)
    totals = decode_visual(decoder, kind == "video")
    scales = len(layout.quantizer.scales)
    for row, total in enumerate(totals):
        frames = len(total)
        bits = [
            torch.stack(
                [decoder.bits[f * scales + k][row].unflatten(0, layout.quantizer.scales[k]) for f in range(frames)]
            )
            for k in range(scales)
        ]
        codes = layout.quantizer.replay(bits)
        assert torch.equal(codes.total, total)
        whole = [*parts[row], Tokens(kind, "target", scale_codes=codes)]
        packed = model.forward_packed(collate([[build_document(whole, layout)]]))
        chosen_from = torch.cat([logits[row] for logits in decoder.kept_bits[: frames * scales]])
        assert (packed.bit_logits_ND - chosen_from).abs().max() <= TOLERANCE


def test_generated_audio_equals_teacher_forcing_and_runs_each_layer_once():
    model = tiny_model()
    layout = layout_of(model.config)
    parts, prompts = prompts_of(model, layout.special.boa)
    calls = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(model.model.layers)]
    decoder = Recorder(model, layout, sampling=Sampling(max_audio_steps=4))
    decoder.prefill(prompts)
    codes = decode_audio(decoder)
    for hook in hooks:
        hook.remove()
    steps = len(decoder.kept) // model.config.audio_num_levels
    assert calls == list(range(6)) * steps, "every audio step runs each layer once, the first one with the prompt"
    for row, row_codes in enumerate(codes):
        whole = [*parts[row], Tokens("audio", "target", codes=row_codes.numpy().astype(np.int16))]
        packed = model.forward_packed(collate([[build_document(whole, layout)]]))
        for step in range(len(row_codes)):
            for level in range(model.config.audio_num_levels):
                ours = decoder.kept[step * model.config.audio_num_levels + level][row]
                theirs = packed.audio_logits[level][step, : len(ours)]
                assert (ours - theirs).abs().max() <= TOLERANCE

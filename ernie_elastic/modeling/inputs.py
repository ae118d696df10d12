"""Every input of a packed batch as embeddings: text, visual features, audio codes, read media, sounds, speakers.

Letters: B rows, T positions, H hidden, N positions of one kind, Q audio levels.
"""

from __future__ import annotations

import torch

from ernie_elastic.modeling.model import ErnieElasticModel
from ernie_elastic.schema import PackedBatch


def embed_batch(model: ErnieElasticModel, batch: PackedBatch) -> torch.Tensor:
    """Every input of a packed batch as [B, T, H]. Each table is used even when it has no row in this batch, so that
    every parameter gets a (zero) gradient on every rank and step."""
    shape_BT = batch.text_ids_BT.shape
    ids_N = batch.text_ids_BT.reshape(-1)
    text_N = (ids_N >= 0).nonzero()[:, 0]
    embedded = model.embed_tokens(ids_N[text_N])
    flat = embedded.new_zeros(ids_N.shape[0], embedded.shape[-1]).index_add(0, text_N, embedded)
    if model.visual is not None:
        visual = model.visual(batch.visual_inputs_ND, batch.visual_scale_N, batch.visual_index_N)
        flat = flat.index_add(0, batch.visual_index_N, visual)
    if model.audio is not None:
        codes_NQ = batch.audio_codes_BTQ.flatten(0, 1)
        audio_N = (codes_NQ[:, 0] >= 0).nonzero()[:, 0]
        flat = flat.index_add(0, audio_N, model.audio.embed_steps(codes_NQ[audio_N]))
    if model.understanding is not None:
        # Not by calling the module: ZeRO-3 hooks every tensor that a called module returns, and here their number
        # depends on the batch, so that ranks would part.
        items, zero = model.understanding.forward([(media.pixels_GFHW3, media.features_GFhwD) for media in batch.media])
        flat = flat + zero
        for media, tokens in zip(batch.media, items, strict=True):
            flat = flat.index_add(0, media.position_GM.reshape(-1), tokens.flatten(0, 1))
    if model.sound is not None:
        flat = flat.index_add(0, batch.sound_index_N, model.sound(batch.sound_features_NF, batch.sound_item_N))
    if model.speaker is not None:
        flat = flat.index_add(0, batch.speaker_index_N, model.speaker(batch.speaker_NF.to(model.speaker.weight.dtype)))
    return flat.view(*shape_BT, -1)

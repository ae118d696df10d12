"""One packed document of many positions, every modality in it, trains a step with activation checkpointing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.layout import document_length
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import modality_sums
from tests.modeling.common import random_tokens, tiny_config

KINDS = (("text", "target"), ("image", "input"), ("video", "target"), ("audio", "target"), ("image", "target"))


def long_document(positions, config):
    rng, layout, parts, total = np.random.default_rng(0), layout_of(config), [], 1
    while total < positions - 300:
        part = random_tokens(*KINDS[len(parts) % len(KINDS)], rng, config)
        total += document_length([part], layout) - 1
        parts.append(part)
    rest = rng.integers(10, config.vocab_size, positions - total).astype(np.int32)
    return build_document([*parts, Tokens("text", "target", ids=rest)], layout)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("positions", [3072, pytest.param(32768, marks=pytest.mark.slow)])
def test_a_long_document_trains_a_step(positions):
    config = tiny_config(
        num_hidden_layers=4, audio_num_levels=2, video_window=4, num_nextn_predict_layers=1, attention_block=1024
    )
    torch.manual_seed(0)
    model = ErnieElasticForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    batch = collate([[long_document(positions, config)]])
    assert batch.document_BT.shape == (1, positions) and (batch.document_BT == 0).all()
    sums, counts = modality_sums(model.forward_packed(batch), batch)
    assert (counts > 0).all(), "text, image, video, audio and MTP all have targets"
    before = (sums / counts).sum()
    before.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.model.layers[0].parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad.sign()
        sums, counts = modality_sums(model.forward_packed(batch), batch)
    assert (sums / counts).sum() < before

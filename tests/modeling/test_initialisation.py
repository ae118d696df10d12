"""At step 0 every head is as unsure as can be: each loss is that of a uniform guess.

Logits of a fresh head have the variance s^2 = hidden_size * initializer_range^2, which raises a cross-entropy by
s^2 / 2 and that of a bit by s^2 / 8: next to nothing in narrow models, the whole excess of wide ones.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import LOSSES, modality_sums
from tests.modeling.common import SCALES

VOCABULARY, CODES, BITS, LEVELS = 1024, 64, 8, 3


def first_losses(hidden_size: int, tied: bool, **changes: object) -> dict[str, float]:
    """Mean losses of a fresh model of default sizes on random tokens, pictures, clips and sounds."""
    torch.manual_seed(hidden_size)
    config = ErnieElasticConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        tie_word_embeddings=tied,
        visual_bits=BITS,
        visual_scales=SCALES,
        visual_amplitudes=[0.5, 0.4, 0.3, 0.2],
        understanding_patch=4,
        understanding_image_size=16,
        audio_num_levels=LEVELS,
        audio_codebook_size=CODES,
        num_nextn_predict_layers=1,
        **changes,
    )
    model, rng, documents = ErnieElasticForCausalLM(config), np.random.default_rng(0), []
    for _ in range(12):
        latents = rng.normal(size=(3, *SCALES[-1], BITS)).astype(np.float16)
        parts = [
            Tokens("text", "target", ids=rng.integers(10, VOCABULARY, 40).astype(np.int32)),
            Tokens("audio", "target", codes=rng.integers(0, CODES, (30, LEVELS)).astype(np.int16)),
            Tokens("image", "target", latents=latents[:1]),
            Tokens("video", "target", latents=latents[1:]),
        ]
        documents.append(build_document(parts, layout_of(config)))
    batch = collate([[document] for document in documents])
    with torch.no_grad():
        sums, counts = modality_sums(model.forward_packed(batch), batch)
    return dict(zip(LOSSES, (sums / counts).tolist(), strict=True))


def uniform(variance: float = 0.0) -> dict[str, float]:
    """The expected losses for logits of this variance; 0 = those of a uniform guess."""
    word, code, bit = math.log(VOCABULARY), math.log(CODES + 1), math.log(2)
    return {
        "text": word + variance / 2,
        "image": bit + variance / 8,
        "video": bit + variance / 8,
        "audio": code + variance / 2,
        "mtp": word + variance / 2,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden_size", [64, 128])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 1, "first_k_dense": 1, "ss_scale": "full", "router_scoring": "sigmoid"},
        {"qk_norm": False, "num_hidden_layers": 12},
    ],
    ids=["default", "shared_and_dense", "deep"],
)
def test_losses_of_a_fresh_model_are_those_of_a_uniform_guess(changes, hidden_size, tied):
    assert first_losses(hidden_size, tied, **changes) == pytest.approx(uniform(), rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("hidden_size", "deviation"), [(256, 0.02), (512, 0.02), (1024, 0.02), (128, 0.05)])
def test_losses_of_wide_models_exceed_it_by_the_variance_of_the_logits_alone(hidden_size, deviation, tied):
    losses = first_losses(hidden_size, tied, num_hidden_layers=4, initializer_range=deviation)
    variance = hidden_size * deviation**2
    assert losses == pytest.approx(uniform(variance), rel=0.03)
    assert losses["text"] == pytest.approx(uniform(variance)["text"], rel=0.02)
    if variance >= 0.3:
        assert all(losses[name] > guess for name, guess in uniform().items())

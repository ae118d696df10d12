"""Decode speed and resident bytes of a loaded model, as the demo's table states them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from ernie_elastic.compression import packed
from ernie_elastic.generation.decoder import GroupDecoder, Sampling
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of


@torch.inference_mode()
def decode_tokens_per_s(
    models: Sequence[ErnieElasticForCausalLM], num_tokens: int = 48, rounds: int = 7
) -> list[float]:
    """Text tokens per second of each model at batch 1 through the cache: the median of `rounds` runs of `num_tokens`
    steps. The models take turns, so that what else the machine does meets all of them."""
    rates: list[list[float]] = [[] for _ in models]
    for model in models:
        _decode_text(model, 4)
    for _ in range(rounds):
        for model, measured in zip(models, rates, strict=True):
            measured.append(num_tokens / _decode_text(model, num_tokens))
    return [statistics.median(measured) for measured in rates]


def _decode_text(model: ErnieElasticForCausalLM, num_tokens: int) -> float:
    """Seconds for so many steps after an empty document."""
    from ernie_elastic.data.groups.grouping import build_document

    layout = layout_of(model.config)
    decoder = GroupDecoder(model, layout, sampling=Sampling())
    decoder.prefill([build_document([], layout)])
    embedded, position = decoder.first_group()
    begun = time.perf_counter()
    for _ in range(num_tokens):
        out = decoder.step(embedded, position, "text")
        token_B = decoder.choose(model.lm_head(out.hidden[:, -1]))
        embedded, position = model.model.embed_tokens(token_B)[:, None], decoder.running_position()
    return time.perf_counter() - begun


def resident_weight_bytes(model: ErnieElasticForCausalLM) -> int:
    """Bytes that parameters and buffers take in memory; packed weights count as they are stored."""
    return packed.resident_weight_bytes(model)

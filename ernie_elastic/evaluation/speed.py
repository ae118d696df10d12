"""Decode speed and resident bytes of a loaded model, as the demo's table states them."""

from __future__ import annotations

import statistics
import time

import torch

from ernie_elastic.compression import packed
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.generation import GroupDecoder, Sampling, layout_of


@torch.inference_mode()
def decode_tokens_per_s(model: ErnieElasticForCausalLM, num_tokens: int = 48, repeats: int = 3) -> float:
    """Text tokens per second at batch 1 through the cache; the median of `repeats` runs of `num_tokens` steps."""
    from ernie_elastic.data.grouping import build_document

    layout = layout_of(model.config)
    rates = []
    for _ in range(repeats):
        decoder = GroupDecoder(model, layout, sampling=Sampling())
        decoder.prefill([build_document([], layout)])
        embedded, position = decoder.first_group()
        begun = time.perf_counter()
        for _ in range(num_tokens):
            out = decoder.step(embedded, position, "text")
            token_B = decoder.choose(model.lm_head(out.hidden[:, -1]))
            embedded, position = model.model.embed_tokens(token_B)[:, None], decoder.running_position()
        rates.append(num_tokens / (time.perf_counter() - begun))
    return statistics.median(rates)


def resident_weight_bytes(model: ErnieElasticForCausalLM) -> int:
    """Bytes that parameters and buffers take in memory; packed weights count as they are stored."""
    return packed.resident_weight_bytes(model)

"""The model against Transformers' Ernie4_5_Moe (training step on text) and cached against recomputed picture decoding.

Both models have equal dimensions, fp32, random weights, the same tokens; AdamW is left out (forward and backward).
`transformers_grouped` and `transformers_loop` are its two back ends; `recompute` runs all scales so far at every scale.

Letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from bench.common import Row, interleave
from ernie_elastic.data.grouping import build_document
from ernie_elastic.data.packing import collate
from ernie_elastic.data.tokens import Tokens
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.generation import GroupDecoder, Sampling, layout_of
from ernie_elastic.modeling.generation_visual import decode_visual

PEERS = ("transformers_grouped", "transformers_loop", "recompute")
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "moe_intermediate_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip
SCALES = [[1, 1], [2, 2], [4, 4], [6, 6], [8, 8], [12, 12], [16, 16]]


def training_models(quick: bool) -> dict[str, torch.nn.Module]:
    """Ours and Transformers' model by back end, at equal dimensions."""
    torch.manual_seed(0)
    experts, top_k = (16, 2) if quick else (64, 4)
    ours = ErnieElasticForCausalLM(
        ErnieElasticConfig(**SIZES, head_dim=32, num_experts=experts, num_experts_per_tok=top_k, qk_norm=False)
    )
    theirs = {}
    for name, back_end in (("transformers_grouped", "grouped_mm"), ("transformers_loop", "eager")):
        sizes: dict[str, Any] = {**SIZES, "head_dim": 32, "experts_implementation": back_end}
        config = Ernie4_5_MoeConfig(
            **sizes, moe_num_experts=experts, moe_k=top_k, moe_num_shared_experts=0, moe_layer_start_index=0
        )
        theirs[name] = Ernie4_5_MoeForCausalLM(config)
    return {"ours": ours.train(), **{name: model.train() for name, model in theirs.items()}}


def training_row(quick: bool) -> Row:
    """Seconds of one forward and backward on text."""
    models = training_models(quick)
    ids_BT = torch.randint(10, SIZES["vocab_size"], (2, 256) if quick else (8, 256))

    def step(model: torch.nn.Module) -> Callable[[int], Any]:
        def run_step(_: int) -> None:
            for parameter in model.parameters():
                parameter.grad = None
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()

        return run_step

    seconds = interleave({name: step(model) for name, model in models.items()}, 3 if quick else 5)
    tokens = ids_BT.numel()
    rates = {name: tokens / value for name, value in seconds.items()}
    experts = "16 experts, top-2" if quick else "64 experts, top-4"
    return Row(f"text step, {experts}, {tokens} tokens", rates.pop("ours"), rates, "tokens/s", True)


def decoding_row(quick: bool) -> Row:
    """Milliseconds to draw one picture of seven scales after a prompt, cached against recomputing every scale."""
    torch.manual_seed(0)
    prompt_length = 64 if quick else 512
    config = ErnieElasticConfig(
        **SIZES, head_dim=32, num_experts=16, num_experts_per_tok=2, visual_bits=16, visual_scales=SCALES,
        visual_amplitudes=[0.5] * len(SCALES), understanding_patch=4,
    )  # fmt: skip
    model, layout = ErnieElasticForCausalLM(config).eval(), layout_of(config)
    text = Tokens("text", "input", ids=torch.randint(10, 1024, (prompt_length,)).numpy().astype("int32"))
    prompt = build_document([text], layout, opener=layout.boi)

    def cached(_: int) -> None:
        decoder = GroupDecoder(model, layout, sampling=Sampling())
        decoder.prefill([prompt])
        decode_visual(decoder, video=False)

    @torch.inference_mode()
    def recompute(_: int) -> None:
        generator = torch.Generator().manual_seed(0)
        bits = [torch.randint(0, 2, (1, h, w, 16), generator=generator).float() for h, w in SCALES]
        picture = Tokens("image", "target", scale_codes=layout.quantizer.replay(bits))
        document = build_document([text, picture], layout)
        start = prompt_length + 2
        for scale in range(len(SCALES)):
            end = start + sum(h * w for h, w in SCALES[1 : scale + 1])
            batch = collate([[document]])
            mask = batch.group_BT[:, None, :end] <= batch.group_BT[:, :end, None]
            hidden = model.model.embed_batch(batch)[:, :end]
            out = model.model.run_stack(hidden, batch.position_BT3[:, :end], mask[:, None], is_causal=False)
            model.model.visual.bit_head(out.hidden)

    seconds = interleave({"ours": cached, "recompute": recompute}, 2 if quick else 5)
    case = f"draw one picture, 7 scales, prompt {prompt_length}"
    return Row(case, 1e3 * seconds["ours"], {"recompute": 1e3 * seconds["recompute"]}, "ms", False)


def run(quick: bool) -> list[Row]:
    """Both rows."""
    return [training_row(quick), decoding_row(quick)]

"""Transformers' ERNIE 4.5 with the same weights computes the same: the whole text model, its router, its 3-D RoPE."""

from __future__ import annotations

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeRotaryEmbedding, Ernie4_5_MoeTopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import apply_rotary_pos_emb as apply_plain
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as vl
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig

from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.positions import UniRotary, apply_rotary
from ernie_elastic.modeling.router import ErnieElasticTopKRouter

THETA = 10_000.0
# hidden, layers, heads, key/value heads, experts, chosen, expert width, dense width, vocabulary
SIZES = {
    "small": (32, 3, 4, 2, 6, 2, 24, 40, 48),
    "one_kv_head": (48, 2, 6, 1, 8, 3, 16, 64, 97),
    "every_expert": (64, 4, 4, 4, 4, 4, 32, 96, 130),
}


def both_models(
    size: str = "small", tied: bool = True, experts: str = "eager"
) -> tuple[ErnieElasticForCausalLM, Ernie4_5_MoeForCausalLM]:
    hidden, layers, heads, kv_heads, num_experts, chosen, width, dense, vocabulary = SIZES[size]
    shared = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "moe_intermediate_size": width,
        "intermediate_size": dense,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "experts_implementation": experts,
    }
    torch.manual_seed(0)
    theirs = Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(
            **shared, moe_num_experts=num_experts, moe_k=chosen, moe_num_shared_experts=2, moe_layer_start_index=1
        )
    )
    ours = ErnieElasticForCausalLM(
        ErnieElasticConfig(
            **shared,
            head_dim=hidden // heads,
            num_experts=num_experts,
            num_experts_per_tok=chosen,
            num_shared_experts=2,
            first_k_dense=1,
            qk_norm=False,
        )
    )
    assert ours.config._experts_implementation == theirs.config._experts_implementation == experts
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.12 * noise)
            if "correction_bias" in name:
                weight.copy_(0.2 * noise)
    renamed = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    for name in renamed:
        if "correction_bias" in name:
            renamed[name] = renamed[name][0]
    ours.load_state_dict(renamed, strict=True)
    return ours, theirs


def our_name(name: str) -> str:
    return name.replace(".moe_statics.", ".")


def ids_of(model: ErnieElasticForCausalLM, rows: int = 2, length: int = 17) -> torch.Tensor:
    """Ids above 0: their embedding gives the padding id 0 no gradient, ours treats it as any other."""
    return torch.randint(1, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_logits_are_those_of_ernie_4_5(size, tied, experts):
    ours, theirs = both_models(size, tied, experts)
    ids = ids_of(ours)
    expected = theirs(ids).logits
    assert expected.std() > 0.3
    assert (ours(ids).logits - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_the_selection_bias_is_felt_by_both_models_alike():
    ours, theirs = both_models()
    ids = ids_of(ours)
    with_bias = theirs(ids).logits
    for name, parameter in [*theirs.named_parameters(), *ours.named_buffers()]:
        if "correction_bias" in name:
            parameter.zero_()
    assert (theirs(ids).logits - with_bias).abs().max() > 1e-2
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_left_padded_rows_give_the_same_logits():
    ours, theirs = both_models()
    ids, mask = ids_of(ours), torch.ones(2, 17, dtype=torch.int64)
    mask[0, :5] = 0
    expected, found = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_of_a_training_step_are_those_of_ernie_4_5(tied, experts):
    ours, theirs = both_models(tied=tied, experts=experts)
    ids = ids_of(ours)
    labels = ids.clone()
    labels[0, :4] = -100
    losses = []
    for model in (ours.train(), theirs.train()):
        loss = model(ids, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    expected = {our_name(name): weight.grad for name, weight in theirs.named_parameters() if weight.requires_grad}
    found = {name: weight.grad for name, weight in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("num_experts", "chosen"), [(6, 2), (16, 1), (64, 8)])
@torch.no_grad()
def test_the_router_chooses_and_weighs_as_theirs(num_experts, chosen):
    generator = torch.Generator().manual_seed(num_experts)
    theirs = Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(hidden_size=32, moe_num_experts=num_experts, moe_k=chosen))
    ours = ErnieElasticTopKRouter(
        ErnieElasticConfig(hidden_size=32, num_experts=num_experts, num_experts_per_tok=chosen), 0
    )
    weight = 0.3 * torch.randn(num_experts, 32, generator=generator)
    bias = 0.2 * torch.randn(num_experts, generator=generator)
    for router in (ours, theirs):
        router.weight.copy_(weight)
    ours.e_score_correction_bias.copy_(bias)
    theirs.moe_statics.e_score_correction_bias.copy_(bias[None])
    hidden = torch.randn(200, 32, generator=generator)
    logits, weights, ids = ours(hidden)
    their_logits, their_weights, their_ids = theirs(hidden)
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights, their_weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-6)
    plain = logits.softmax(-1).topk(chosen).indices
    assert (plain.sort(-1).values != ids.sort(-1).values).any(), "the bias must change a choice"


def rotary_128() -> UniRotary:
    return UniRotary(
        ErnieElasticConfig(
            head_dim=128,
            mrope_section=[22, 22, 20],
            mrope_layout="sectioned",
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        )
    )


def queries_and_keys(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(rows, heads, length, 128, generator=generator) for heads in (4, 2))


@torch.no_grad()
def test_uni_rope_turns_queries_and_keys_as_their_three_axes_do():
    position = torch.randint(0, 300, (2, 40, 3), generator=torch.Generator().manual_seed(4))
    query, key = queries_and_keys(2, 40)
    parameters = {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [22, 22, 20]}
    theirs = vl.Ernie4_5_VLMoeTextRotaryEmbedding(
        Ernie4_5_VLMoeTextConfig(head_dim=128, hidden_size=512, num_attention_heads=4, rope_parameters=parameters)
    )
    expected = vl.apply_rotary_pos_emb(query, key, *theirs(query, position.permute(2, 0, 1)))
    rotary = rotary_128()(position)
    for x, rotated in zip((query, key), expected, strict=True):
        torch.testing.assert_close(apply_rotary(x, *rotary), rotated, rtol=0, atol=1e-5)
    swapped = rotary_128()(position[..., [0, 2, 1]])
    assert (apply_rotary(query, *swapped) - expected[0]).abs().max() > 0.1


@torch.no_grad()
def test_equal_axes_are_plain_rope():
    query, key = queries_and_keys(1, 50)
    position = torch.arange(50)[None] * 7
    config = Ernie4_5_MoeConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}
    )
    expected = apply_plain(query, key, *Ernie4_5_MoeRotaryEmbedding(config)(query, position))
    for form in (position, position[..., None].expand(1, 50, 3)):
        rotary = rotary_128()(form)
        for x, rotated in zip((query, key), expected, strict=True):
            torch.testing.assert_close(apply_rotary(x, *rotary), rotated, rtol=0, atol=1e-5)

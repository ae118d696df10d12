"""Ways to run the same model - checkpointed, compiled, with another attention, in blocks - give the same numbers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from ernie_elastic.data.groups.augmentation import Augmentation
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.back_ends import choose_attention, choose_experts_back_end
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import modality_sums
from ernie_elastic.modeling.masks import Places, SequenceMask
from ernie_elastic.modeling.model import ErnieElasticDecoderLayer
from ernie_elastic.schema import PackedBatch, SubModelSpec
from ernie_elastic.training.configuration import TrainingConfig
from tests.modeling.common import RICH, random_parts, random_tokens, tiny_config, tiny_model


def pack(config: ErnieElasticConfig, frame_drop: float = 0.5) -> PackedBatch:
    """Two rows: documents of every kind, a clip of four frames of which some are dropped, and padding."""
    rng, generator = np.random.default_rng(7), torch.Generator().manual_seed(1)
    grid = config.visual_scales[-1]
    clip = Tokens("video", "target", latents=rng.normal(size=(4, *grid, config.visual_bits)).astype(np.float16))
    parts = [
        [random_tokens("text", "input", rng, config), clip],
        random_parts("mixed", 3, config),
        random_parts("text_to_audio", 4, config),
        random_parts("video_to_text", 5, config),
    ]
    augmentation = Augmentation(flips=None, frame_drop=frame_drop, speaker_dropout=0.0)
    documents = [build_document(part, layout_of(config), augmentation, generator) for part in parts]
    return collate([documents[:2], documents[2:]])


def loss_and_gradients(
    model: ErnieElasticForCausalLM, batch: PackedBatch, submodel: SubModelSpec | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model.forward_packed(batch, submodel)
    sums, counts = modality_sums(output, batch)
    assert (counts > 0).all()
    loss = (sums / counts).sum() + (output.router_loss if output.router_loss is not None else 0.0)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), gradients


def assert_same_step(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]], expected: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def hidden_with(attention: str, batch: PackedBatch, **changes: object) -> torch.Tensor:
    model = tiny_model(**changes)
    model.set_attn_implementation(attention)
    assert model.model.layers[0].self_attn.config._attn_implementation == attention
    return model.forward_packed(batch).hidden_BTH


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("smaller", [False, True])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(smaller, experts):
    model = tiny_model(**RICH, router_z_loss=0.01, router_orthogonal_loss=0.1).train()
    model.config._experts_implementation = experts
    batch = pack(model.config)
    spec = SubModelSpec((1, 3, 4, 5), ((0, 2, 5),) * 4, 1) if smaller else None
    expected = loss_and_gradients(model, batch, spec)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[3].self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert_same_step(loss_and_gradients(model, batch, spec), expected)
    assert len(calls) == 2, "the layer must run again in the backward pass"
    assert len(expected[1]) == len(list(model.parameters()))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_compiles_without_graph_breaks(padded, dense):
    torch._dynamo.reset()
    config = tiny_config(num_shared_experts=1, router_z_loss=0.01, router_orthogonal_loss=0.01)
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    torch.manual_seed(2)
    layer = ErnieElasticDecoderLayer(config, 0, 40 if dense else None)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.2)
    batch = pack(config)
    rows, length = batch.document_BT.shape
    angles = torch.rand(rows, length, config.head_dim // 2)
    arguments = {
        "hidden_states": torch.randn(rows, length, config.hidden_size, requires_grad=True),
        "position_embeddings": (angles.cos(), angles.sin()),
        "attention_mask": SequenceMask(Places.of(batch), 1).dense(),
        "valid_N": (batch.document_BT >= 0).reshape(-1) if padded else None,
        "is_causal": False,
    }
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    results = []
    for run in (layer, compiled):
        hidden, decision = run(**arguments)
        (gradient,) = torch.autograd.grad(hidden.square().sum(), arguments["hidden_states"])
        results.append((hidden, gradient, decision))
    (hidden, gradient, decision), (other, other_gradient, other_decision) = results
    torch.testing.assert_close(other, hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    if dense:
        assert decision is None and other_decision is None
        return
    assert torch.equal(other_decision.counts_E, decision.counts_E)
    tokens = int((batch.document_BT >= 0).sum()) if padded else rows * length
    assert decision.counts_E.sum() == 2 * tokens
    torch.testing.assert_close(other_decision.loss, decision.loss)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("frame_drop", [0.0, 0.5])
def test_other_attention_functions_agree_with_sdpa(attention, window, frame_drop):
    changes = {"head_dim": 16, "video_window": window, "ss_scale": "full"}
    batch = pack(tiny_config(**changes), frame_drop)
    assert batch.dropped_BT.any() == (frame_drop > 0) and (batch.frame_BT > 2).any()
    expected = hidden_with("sdpa", batch, **changes)
    with torch.compiler.set_stance("force_eager"):  # FlexAttention's own definition, without a C++ compiler
        found = hidden_with(attention, batch, **changes)
    valid = batch.document_BT >= 0
    torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-5)
    assert found.isfinite().all()
    plain = hidden_with("sdpa", pack(tiny_config(**changes), 0.0), **{**changes, "video_window": 0})
    assert ((plain - expected).abs().max() > 1e-3) == (window > 0 or frame_drop > 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled FlexAttention needs a C++ compiler")
def test_compiled_flex_attention_agrees_with_sdpa():
    torch._dynamo.reset()
    changes = {"head_dim": 16, "video_window": 1, "num_hidden_layers": 3}
    batch = pack(tiny_config(**changes))
    valid = batch.document_BT >= 0
    expected, found = hidden_with("sdpa", batch, **changes), hidden_with("flex_attention", batch, **changes)
    torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-5)


def test_training_chooses_an_attention_that_can_train_here(monkeypatch):
    model = tiny_model(head_dim=16)
    choose_attention(model, "sdpa")
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="flex_attention trains on a GPU only, and torch sees none; choose sdpa"):
        choose_attention(model, "flex_attention")
    with pytest.raises(ConfigError, match="'flash' is not one of sdpa, flex_attention"):
        choose_attention(model, "flash")
    with pytest.raises(ConfigError, match="attention 'flash' is not one of sdpa, flex_attention"):
        TrainingConfig(attention="flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose_attention(model, "flex_attention")
    assert model.model.layers[0].self_attn.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [(None, "sorted_experts"), ((9, 0), "grouped_mm"), ((10, 3), "sorted_experts"), ((12, 0), "grouped_mm")],
)
def test_automatic_experts_avoid_a_product_that_leaves_gradients_unwritten(capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    model = tiny_model()
    choose_experts_back_end(model)
    assert model.config._experts_implementation == chosen
    choose_experts_back_end(model, "eager")
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("block", [16, 50])
def test_long_rows_run_in_blocks_with_the_same_loss_and_gradients(attention, block):
    model = tiny_model(**RICH).train()
    model.set_attn_implementation(attention)
    batch = pack(model.config)
    assert batch.document_BT.shape[1] > 2 * block
    expected = loss_and_gradients(model, batch)
    model.config.attention_block = block
    lengths = []
    attend = type(model.model.layers[0].self_attn)._attend
    layer = model.model.layers[0].self_attn
    layer._attend = lambda query, *args, **kwargs: (
        lengths.append(query.shape[2]) or attend(layer, query, *args, **kwargs)
    )
    assert_same_step(loss_and_gradients(model, batch), expected)
    assert max(lengths) == block and len(lengths) > 2


@torch.no_grad()
def test_blocks_agree_without_gradients_too():
    model = tiny_model(**RICH)
    batch = pack(model.config)
    expected = model.forward_packed(batch).hidden_BTH
    for block in (16, 1):
        model.config.attention_block = block
        valid = batch.document_BT >= 0
        torch.testing.assert_close(model.forward_packed(batch).hidden_BTH[valid], expected[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|sdpa"])
def test_an_attention_function_that_cannot_take_the_mask_is_refused(name):
    model = tiny_model()
    batch = pack(model.config)
    model.config._attn_implementation = name
    with pytest.raises(ConfigError, match="need attn_implementation sdpa, eager or flex_attention") as error:
        model.forward_packed(batch)
    assert repr(name) in str(error.value)

"""Three sub-models of a model of the demo's size, compressed: the same bits, and no more than the promised bytes."""

import copy

import pytest
import torch

from ernie_elastic.compression import compress_directory, model_bytes, resident_weight_bytes
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.elastic.extract import Request, extract_model, make_spec, save_model
from ernie_elastic.generation.loading import load_model
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from tests.modeling.common import DOCUMENTS, random_parts, tiny_config

# Widths that are no multiples of 64, and odd numbers of experts below.
WIDTHS = {"hidden_size": 136, "head_dim": 36, "moe_intermediate_size": 72, "num_hidden_layers": 8, "num_experts": 16}


@pytest.fixture(scope="module")
def source() -> ErnieElasticForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(**WIDTHS, vocab_size=512, understanding_width=64, initializer_range=0.05)
    return ErnieElasticForCausalLM(config).eval()


@torch.inference_mode()
@pytest.mark.parametrize(
    "request_",
    [Request(experts=13), Request(depth=6, experts=11, topk=1), Request(depth=7, experts=9)],
    ids=["13-experts", "6-layers-11-experts-top-1", "7-layers-9-experts"],
)
def test_the_same_bits_in_fewer_bytes(source, request_, tmp_path):
    mass_LE = torch.rand((8, 16), generator=torch.Generator().manual_seed(1))
    cut = extract_model(copy.deepcopy(source), make_spec(source, mass_LE, request_))
    save_model(cut, tmp_path / "cut")
    compress_directory(tmp_path / "cut", tmp_path / "small")
    assert model_bytes(tmp_path / "small") <= 0.725 * model_bytes(tmp_path / "cut")

    dense, small = load_model(tmp_path / "cut", experts="eager"), load_model(tmp_path / "small")
    in_bf16 = sum(p.numel() for p in dense.parameters()) * 2
    assert resident_weight_bytes(small) <= 0.75 * in_bf16
    layout = layout_of(dense.config)
    batch = collate([[build_document(random_parts(name, 0, dense.config), layout)] for name in DOCUMENTS])
    ours, theirs = dense.forward_packed(batch), small.forward_packed(batch)
    assert torch.equal(ours.text_logits_NV, theirs.text_logits_NV)
    assert torch.equal(ours.bit_logits_ND, theirs.bit_logits_ND)
    assert all(torch.equal(a, b) for a, b in zip(ours.audio_logits, theirs.audio_logits, strict=True))
    assert ours.text_logits_NV.numel() and ours.bit_logits_ND.numel() and ours.audio_logits[0].numel()

"""Masked and extracted sub-models choose the same experts and give the same logits."""

from __future__ import annotations

import random

import pytest
import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.elastic.extract import Request, extract_model, make_spec, parameter_counts, without_audio
from ernie_elastic.elastic.importance import choose_experts
from ernie_elastic.elastic.sampler import sample_spec
from ernie_elastic.elastic.search import Point, pareto, parse_bytes, spec_bytes
from ernie_elastic.elastic.space import ElasticConfig, check_space, choose_layers, droppable_layers
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.schema import SubModelSpec
from tests.modeling.common import DOCUMENTS, RICH, random_parts, tiny_config, tiny_model


def batch_of(model):
    layout = layout_of(model.config)
    return collate([[build_document(random_parts(name, i, model.config), layout)] for i, name in enumerate(DOCUMENTS)])


def random_spec(config, seed):
    rng = random.Random(seed)
    depth = rng.randint(len(config.audio_head_layers), config.num_hidden_layers)
    layers = choose_layers(config, depth, "random", rng)
    top_k = rng.randint(1, config.num_experts_per_tok)
    top_ks = [rng.randint(1, config.num_experts_per_tok) if seed % 2 else top_k for _ in layers]
    count = rng.randint(max(top_ks), config.num_experts)
    experts = tuple(tuple(sorted(rng.sample(range(config.num_experts), count))) for _ in layers)
    return SubModelSpec.of(layers, experts, top_ks)


def outputs(model, batch, spec=None):
    packed = model.forward_packed(batch, submodel=spec)
    return packed, [packed.text_logits_NV, packed.bit_logits_ND, packed.mtp_logits_NV, *packed.audio_logits]


def spec_rows(spec):
    return spec.layers, spec.experts_per_layer


@torch.inference_mode()
@pytest.mark.parametrize("options", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "sorted_experts"])
def test_masked_equals_extracted(experts, options, stress):
    model = tiny_model(**options)
    model.config._experts_implementation = experts
    batch = batch_of(model)
    for seed in range(4 * stress):
        spec = random_spec(model.config, seed)
        smaller = extract_model(model, spec)
        masked, logits = outputs(model, batch, spec)
        cut, cut_logits = outputs(smaller, batch)
        assert smaller.config.first_k_dense == (model.config.first_k_dense > 0 and 0 in spec.layers)
        mixtures = [kept for layer, kept in zip(*spec_rows(spec), strict=True) if layer in masked.layers]
        top_ks = dict(zip(spec.layers, spec.top_ks, strict=True))
        assert [decision.experts_NK.shape[1] for decision in masked.routing] == [top_ks[i] for i in masked.layers]
        for ours, theirs, kept in zip(masked.routing, cut.routing, mixtures, strict=True):
            assert torch.equal(ours.experts_NK, torch.tensor(kept)[theirs.experts_NK])
        for ours, theirs in zip(logits, cut_logits, strict=True):
            if experts == "eager":
                assert torch.equal(ours, theirs), spec
            else:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_layers_may_differ_in_top_k_when_saved_and_cut_again(tmp_path):
    model = tiny_model(num_experts_per_tok=4)
    batch = batch_of(model)
    spec = make_spec(model, torch.rand(6, 6), Request(topk_per_layer=(3, 1, 2, 2, 1, 3)))
    smaller = extract_model(model, spec)
    assert smaller.config.num_experts_per_tok == 3 and smaller.config.full_spec().top_ks == spec.top_ks
    smaller.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation=smaller.config._experts_implementation)
    assert loaded.config.full_spec() == smaller.config.full_spec()
    chosen = [decision.experts_NK.shape[1] for decision in outputs(loaded, batch)[0].routing]
    assert tuple(chosen) == spec.top_ks
    for ours, theirs in zip(outputs(model, batch, spec)[1], outputs(loaded, batch)[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    again = make_spec(loaded, torch.rand(6, 6), Request(topk=2))
    assert again.top_ks == (2, 1, 2, 2, 1, 2), "no layer uses more experts than the model has for it"
    assert extract_model(loaded, again).config.num_experts_per_tok_per_layer == [2, 1, 2, 2, 1, 2]
    one = extract_model(loaded, make_spec(loaded, torch.rand(6, 6), Request(topk=1)))
    assert one.config.num_experts_per_tok_per_layer is None and one.config.num_experts_per_tok == 1
    assert parameter_counts(one)[1] < parameter_counts(loaded)[1] < parameter_counts(model)[1]
    with pytest.raises(ConfigError, match=r"top_k 4 of layer 0 must lie in 1..3"):
        loaded.config.check_spec(model.config.full_spec())


def test_equal_numbers_per_layer_are_the_plain_spec():
    full = tiny_config().full_spec()
    assert SubModelSpec.of(full.layers, full.experts_per_layer, [2] * 6) == full
    mixed = SubModelSpec.of(full.layers, full.experts_per_layer, [2, 1, 2, 2, 2, 2])
    assert mixed != full and mixed.label() == "d6-e6-k1to2" and full.label() == "d6-e6-k2"
    assert SubModelSpec.from_json(mixed.to_json()) == mixed
    assert SubModelSpec.from_json(full.to_json()) == full and "top_k_per_layer" not in full.to_json()
    for wrong in ([2, 1], [2, 1, 2, 2, 2, 3], [1, 0, 1, 1, 1, 2]):
        with pytest.raises(ConfigError, match="num_experts_per_tok_per_layer"):
            tiny_config(num_experts_per_tok_per_layer=wrong)


@torch.inference_mode()
def test_full_spec_is_the_identity():
    model = tiny_model()
    same = extract_model(model, model.config.full_spec())
    assert all(torch.equal(same.state_dict()[name], value) for name, value in model.state_dict().items())


def test_sampled_shares_match_the_configuration():
    config, elastic = tiny_config(), ElasticConfig()
    specs = [sample_spec(elastic, config, 0, step) for step in range(4000)]
    assert specs == [sample_spec(elastic, config, 0, step) for step in range(4000)]
    full = config.full_spec()
    shares = [
        sum(len(s.layers) == len(full.layers) for s in specs) / 4000,
        sum(s.num_experts == config.num_experts for s in specs) / 4000,
        sum(s.top_k == config.num_experts_per_tok for s in specs) / 4000,
    ]
    # Five standard deviations of a binomial over 4,000 draws are below 0.035.
    assert shares == pytest.approx([0.75, 0.80, 0.80], abs=0.035)
    for spec in specs:
        config.check_spec(spec)


def test_the_first_steps_can_train_the_full_model():
    config, always, later = tiny_config(), ElasticConfig(full_depth=0), ElasticConfig(full_depth=0, start_share=0.5)
    specs = [sample_spec(later, config, 0, step, 6) for step in range(6)]
    assert specs[:3] == [config.full_spec()] * 3
    assert specs[3:] == [sample_spec(always, config, 0, step) for step in range(3, 6)]
    assert config.full_spec() not in specs[3:]
    with pytest.raises(ConfigError, match=r"elastic.start_share 1.5 must lie in 0..1"):
        ElasticConfig(start_share=1.5)


def test_audio_layers_stay_and_half_can_go():
    config = tiny_config()
    for policy in ("random", "prefix", "uniform"):
        for depth in range(3, 7):
            layers = choose_layers(config, depth, policy)
            assert len(layers) == depth and set(config.audio_head_layers) <= set(layers)
    assert droppable_layers(config) == [0, 1, 2]
    check_space(config)
    with pytest.raises(ConfigError, match="only 2 of 5 layers"):
        check_space(tiny_config(num_hidden_layers=5))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(depth=0), "--depth 0 must lie in 1..6"),
        (Request(depth=7), "--depth 7 must lie in 1..6"),
        (Request(depth=2), "--depth 2 is less than the 3 layers that carry audio heads"),
        (Request(experts=1), "--experts 1 is less than --topk 2"),
        (Request(experts=9), "--experts 9 must lie in 1..6"),
        (Request(topk=3), "--topk 3 must lie in 1..2"),
        (Request(layers=(0, 1, 2)), r"layers \[3, 4, 5\] carry audio heads"),
        (Request(layers=(0, 3, 4, 5, 6)), r"--layers \[0, 3, 4, 5, 6\] must name layers in 0..5"),
        (Request(topk_per_layer=(1, 2)), r"top_k 2, \[1, 2\] per layer, for 6 layers"),
        (Request(topk_per_layer=(1, 2, 1, 3, 1, 1)), r"top_k 3 of layer 3 must lie in 1..2"),
        (Request(topk_per_layer=(1, 2, 0, 1, 1, 1)), r"top_k 0 of layer 2 must lie in 1..2"),
        (Request(experts=1, topk_per_layer=(1, 2, 1, 1, 1, 1)), r"layer 1 keeps 1 experts, fewer than top_k 2"),
    ],
)
def test_a_spec_outside_the_model_is_refused(request_, message):
    model = tiny_model()
    with pytest.raises(ConfigError, match=message):
        make_spec(model, torch.rand(6, 6), request_)


def test_heaviest_experts_are_kept():
    mass = torch.tensor([[5.0, 1.0, 4.0, 2.0], [0.0, 9.0, 1.0, 8.0]])
    assert choose_experts(mass, (0, 1), 2) == ((0, 2), (1, 3))
    assert choose_experts(mass, (1,), 3, "first") == ((0, 1, 2),)
    assert choose_experts(mass, (0, 1), 2, "random", 1) == choose_experts(mass, (0, 1), 2, "random", 1)


@torch.inference_mode()
def test_audio_can_be_dropped():
    model = without_audio(tiny_model())
    spec = make_spec(model, torch.rand(6, 6), Request(depth=1))
    smaller = extract_model(model, spec)
    parts = random_parts("image_to_text", 0, model.config)
    batch = collate([[build_document(parts, layout_of(smaller.config))]])
    assert smaller.forward_packed(batch).text_logits_NV.shape[0] > 0


def test_bytes_of_a_spec_are_those_of_the_extracted_model():
    model = tiny_model()
    for seed in range(5):
        spec = random_spec(model.config, seed)
        assert spec_bytes(model, spec) == 2 * parameter_counts(extract_model(model, spec))[0]


def test_budget_texts_and_front():
    assert [parse_bytes(text) for text in ("4GiB", "900MB", "123", "1.5KiB")] == [2**32, 900 * 10**6, 123, 1536]
    with pytest.raises(ConfigError, match="is no size"):
        parse_bytes("lots")
    spec = tiny_config().full_spec()
    points = [Point(spec, 10, 3.0), Point(spec, 20, 3.5), Point(spec, 30, 1.0), Point(spec, 30, 2.0)]
    assert [(p.weight_bytes, p.loss) for p in pareto(points)] == [(10, 3.0), (30, 1.0)]

"""Loading: bit-equal logits, resident bytes, ties, dtypes, other classes, and damage while loading."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from ernie_elastic.compression import (
    PackedEmbedding,
    PackedLinear,
    PackedTensor,
    TbeConfig,
    compress_directory,
    directory_info,
    resident_weight_bytes,
    set_kernel,
)
from ernie_elastic.compression import packed as packed_module
from ernie_elastic.compression.container import SafetensorsFile
from ernie_elastic.compression.quantizer import TbeHfQuantizer
from ernie_elastic.compression.resident import TileLayout
from ernie_elastic.errors import ConfigError, FormatError
from ernie_elastic.kernels import zip_gemv
from tests.compression.conftest import CONFIGS, SIZES, Pair
from tests.compression.test_directory import change_byte

Pairs = Callable[[str], Pair]
MOE = [name for name in CONFIGS if not name.startswith("llama")]


def prompt() -> torch.Tensor:
    return torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(2))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_dense_model_bit_for_bit(pairs: Pairs, name: str, dtype: torch.dtype) -> None:
    pair = pairs(name)
    packed, info = pair.packed(dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "error_msgs"))
    assert logits(packed).dtype == dtype
    assert torch.equal(logits(packed), logits(pair.dense(dtype)))
    assert type(packed).__name__ == type(pair.dense(dtype)).__name__
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_resident_packed(pairs: Pairs, name: str) -> None:
    pair = pairs(name)
    packed, dense = pair.packed(), pair.dense()
    ratio = resident_weight_bytes(packed) / (2 * sum(p.numel() for p in dense.parameters()))
    print(f"{name}: resident {ratio:.4f} of BF16")
    assert ratio <= 0.75
    left = {n: tuple(p.shape) for n, p in packed.named_parameters() if p.ndim > 1}
    assert all("gate.weight" in n or "router" in n or "_bias" in n for n in left), left
    assert isinstance(packed.get_input_embeddings(), PackedEmbedding)
    assert isinstance(packed.get_output_embeddings(), PackedLinear)


def test_the_promised_ratios_on_a_model_of_millions(tmp_path: Path) -> None:
    """Odd expert count, widths that are no multiples of 64, one small tensor per expert on disk."""
    sizes = {**SIZES, "num_hidden_layers": 7, "intermediate_size": 200}
    experts = {"num_experts": 19, "num_experts_per_tok": 2, "moe_intermediate_size": 76, "mlp_only_layers": [0]}
    config = Qwen3MoeConfig(**sizes, **experts)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2.5e6 < count < 6e6
    model.save_pretrained(tmp_path / "source")
    report = compress_directory(tmp_path / "source", tmp_path / "out")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    resident = resident_weight_bytes(packed) / (2 * count)
    print(f"{count} parameters: stored {report['ratio']}, resident {resident:.4f} of BF16")
    assert report["ratio"] <= 0.725 and resident <= 0.75
    assert directory_info(tmp_path / "out")[-1]["bits_per_weight"] < 11.6
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    dense.set_experts_implementation("eager")
    assert torch.equal(logits(packed), logits(dense))


@pytest.mark.parametrize("name", MOE)
def test_experts_are_stacks_and_only_the_routed_ones_are_decoded(
    pairs: Pairs, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pairs(name).packed()
    stacks = [m for m in packed.modules() if isinstance(m, PackedTensor) and len(m.shape) == 3]
    assert len(stacks) == 4  # two layers, two weights
    seen: list[tuple[int, int | None]] = []
    decode = PackedTensor.decode
    monkeypatch.setattr(
        PackedTensor, "decode", lambda self, e=None, dtype=None: (seen.append((id(self), e)), decode(self, e, dtype))[1]
    )
    with torch.no_grad():
        packed(prompt()[:1, :1])
    of_stacks = [e for owner, e in seen if owner in {id(stack) for stack in stacks}]
    assert of_stacks and None not in of_stacks and len(of_stacks) <= 4 * 4


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_no_dense_copy_outlives_the_forward(pairs: Pairs, name: str) -> None:
    packed = pairs(name).packed()
    sizes = {m.shape[-2:].numel() for m in packed.modules() if isinstance(m, PackedTensor)}
    packed(prompt())  # with gradients enabled, as a careless caller has them
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    dense = [tuple(t.shape) for t in tensors if t.is_floating_point() and t.numel() in sizes]
    assert not dense


def test_tied_head_shares_the_packed_table(pairs: Pairs) -> None:
    packed = pairs("llama_tied").packed()
    assert packed.lm_head.packed is packed.model.embed_tokens.packed
    assert packed.config.tie_word_embeddings


@pytest.mark.parametrize("equal", [True, False])
def test_a_tie_with_both_tensors_stored_is_judged_as_for_a_dense_model(
    pairs: Pairs, equal: bool, tmp_path: Path
) -> None:
    folder = shutil.copytree(pairs("llama_tied").source, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if equal else table.flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compress_directory(folder, tmp_path / "out")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(packed), logits(dense))
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == equal
    assert isinstance(packed.lm_head, PackedLinear)
    assert (packed.lm_head.packed is packed.model.embed_tokens.packed) == equal


def test_generation_gives_the_same_tokens(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt())}
    assert torch.equal(pair.packed().generate(prompt(), **arguments), pair.dense().generate(prompt(), **arguments))


def test_the_base_model_loads_from_the_same_directory(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    packed = AutoModel.from_pretrained(pair.compressed, dtype=torch.float32)
    dense = AutoModel.from_pretrained(pair.source, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(packed(prompt())[0], dense(prompt())[0])


def test_the_default_experts_back_end_of_the_dense_model_is_close(pairs: Pairs) -> None:
    """The packed model runs the loop; grouped products of the dense one differ by rounding only."""
    pair = pairs("qwen3_moe")
    dense = AutoModelForCausalLM.from_pretrained(pair.source, dtype=torch.float32)
    torch.testing.assert_close(logits(pair.packed()), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "tiny_moe"])
def test_fused_kernel_is_close_and_decode_comes_back_exactly(pairs: Pairs, name: str) -> None:
    pair = pairs(name)
    packed = pair.packed()
    expected = logits(packed)
    assert set_kernel(packed, "fused") > 4
    one = packed(prompt()[:1, :1]).logits  # few rows: the fused path proper
    torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, pair.dense()(prompt()[:1, :1]).logits, rtol=1e-4, atol=1e-5)
    set_kernel(packed, "decode")
    assert torch.equal(logits(packed), expected)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def tile_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose layout is tiles: a GPU, or the CPU made to take them (with the kernels' references)."""
    monkeypatch.setattr(packed_module, "layout_for", lambda device: TileLayout)
    return request.param


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe", "olmoe", "mixtral", "gpt_oss", "tiny_moe"])
def test_weights_in_the_layout_of_gpus_give_the_same_bits(pairs: Pairs, name: str, tile_device: str) -> None:
    pair = pairs(name)
    packed, dense = pair.packed(torch.bfloat16).to(tile_device), pair.dense(torch.bfloat16).to(tile_device)
    layouts = {type(m.resident) for m in packed.modules() if isinstance(m, PackedTensor)}
    ids = prompt().to(tile_device)
    with torch.no_grad():
        expected = packed(ids).logits
        assert layouts == {TileLayout} and torch.equal(expected, dense(ids).logits)
    if name == "gpt_oss":
        return
    assert set_kernel(packed, "fused") > 4, "the fused kernel is in place: its bits may be those of the dense product"
    exact = logits(pair.dense(torch.float32))
    with torch.no_grad():
        fused = packed(ids).logits.cpu()
    # Another order of sums in BF16: most tokens are as far from the float32 model as those of the dense BF16 model are
    # (a router may choose another expert for one whose scores are almost equal).
    far, usual = ((found - exact).abs().mean(-1).median() for found in (fused, expected.cpu()))
    assert far <= 1.5 * usual


def test_fused_in_tiles_is_refused_where_it_cannot_run(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "layout_for", lambda device: TileLayout)
    with pytest.raises(ConfigError, match=r"in bfloat16, the model in torch\.float32"):
        set_kernel(pairs("llama").packed(torch.float32), "fused")
    packed = pairs("qwen3_moe").packed(torch.bfloat16)
    experts = next(module for module in packed.modules() if hasattr(module, "gate_up_proj"))
    experts.act_fn = torch.nn.GELU()
    with pytest.raises(ConfigError, match="SwiGLU"):
        set_kernel(packed, "fused")


@pytest.mark.skipif("native" not in zip_gemv.available_backends(), reason=zip_gemv.backend_reason())
def test_plain_swiglu_experts_run_in_one_call_and_others_do_not(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, calls = pairs("qwen3_moe").packed(), []
    real = zip_gemv.experts
    monkeypatch.setattr(zip_gemv, "experts", lambda *args: calls.append(args) or real(*args))
    set_kernel(packed, "fused")
    expected = packed(prompt()[:1, :1]).logits
    layers = packed.config.num_hidden_layers
    assert len(calls) == layers
    experts = [module for module in packed.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn")]
    assert len(experts) == layers
    own = type(experts[0])._apply_gate
    monkeypatch.setattr(type(experts[0]), "_apply_gate", lambda self, gate_up: own(self, gate_up))
    torch.testing.assert_close(packed(prompt()[:1, :1]).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == layers, "a gate of its own is not the one that C++ computes"


def test_fused_is_refused_where_it_cannot_run(pairs: Pairs) -> None:
    packed = pairs("gpt_oss").packed()
    with pytest.raises(ConfigError, match="is_transposed"):
        set_kernel(packed, "fused")
    assert all(m.kernel == "decode" for m in packed.modules() if isinstance(m, PackedTensor))
    with pytest.raises(ConfigError, match="known"):
        set_kernel(packed, "quick")
    with pytest.raises(ConfigError, match="no packed weight"):
        set_kernel(pairs("llama").dense(), "decode")


@pytest.mark.parametrize("layout", ["tca_tbe", "entropy_coded"])
def test_the_other_layouts_load_too(tmp_path: Path, layout: str) -> None:
    config = MixtralConfig(**{**SIZES, "hidden_size": 128, "intermediate_size": 128}, num_local_experts=3)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    assert compress_directory(tmp_path / "source", tmp_path / "out", layout=layout)["compressed"] > 20
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    dense.set_experts_implementation("eager")
    assert torch.equal(logits(packed), logits(dense))


def test_damage_is_an_error_while_loading(pairs: Pairs, tmp_path: Path) -> None:
    folder = shutil.copytree(pairs("llama").compressed, tmp_path / "copy")
    path = next(folder.glob("*.safetensors"))
    file = SafetensorsFile(path)
    start = path.stat().st_size - file.data.size
    for entry in [entry for entry in file.entries if entry.is_stream][::4]:
        change_byte(path, start + entry.end - 3)
        with pytest.raises(FormatError, match="checksum"):
            AutoModelForCausalLM.from_pretrained(folder)
        change_byte(path, start + entry.end - 3)
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_lost_tensor_is_reported_as_for_a_dense_model(pairs: Pairs, tmp_path: Path) -> None:
    """What the source lacks is missing in the report: the quantizer hides nothing but its own streams."""
    pair = pairs("llama")
    folder = shutil.copytree(pair.source, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compress_directory(folder, tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}
    assert not info["unexpected_keys"]


def test_what_loads_dense_is_said(pairs: Pairs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ernie_elastic.compression.quantizer"):
        pairs("qwen3_moe").packed()
    assert "2 tensors load dense first, such as model.layers.0.mlp.gate.weight" in caplog.text
    assert "weights are packed in memory" in caplog.text


def test_the_longest_prefix_of_a_device_map_places_a_weight() -> None:
    quantizer = TbeHfQuantizer(TbeConfig())
    quantizer._device_map = {"": "cpu", "model.layers.1": "cuda:1", "model.layers": "cuda:0"}
    assert quantizer._device_of("model.layers.1.mlp.weight") == "cuda:1"
    assert quantizer._device_of("model.layers.10.mlp.weight") == "cuda:0"
    assert quantizer._device_of("lm_head.weight") == "cpu"
    quantizer._device_map = None
    assert quantizer._device_of("lm_head.weight") == "cpu"
    for places in ({"": "disk"}, {"model": 0, "lm_head": "disk"}, {"model": torch.device("cuda", 1), "lm_head": "cpu"}):
        with pytest.raises(ConfigError, match="device_map places weights on"):
            quantizer.validate_environment(device_map=places)
    assert quantizer._device_map is None
    quantizer.validate_environment(device_map="auto")
    quantizer.validate_environment(device_map={"model": 0, "lm_head": 1})  # as Transformers resolved it
    assert quantizer._device_of("lm_head.weight") == 1


@pytest.mark.parametrize("places", ["auto", "balanced", "cpu", {"": "cpu"}])
def test_device_maps_of_transformers(pairs: Pairs, places: str | dict[str, str]) -> None:
    pytest.importorskip("accelerate")
    pair = pairs("qwen3_moe")
    assert torch.equal(logits(pair.packed(device_map=places)), logits(pair.dense()))


def test_packed_weights_have_their_size_before_they_are_read(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that "auto" maps place them: an empty weight would fit anywhere."""
    from transformers.integrations.accelerate import compute_module_sizes

    sizes: list[float] = []
    real = TbeHfQuantizer._process_model_before_weight_loading

    def measured(self: TbeHfQuantizer, model: torch.nn.Module, **kwargs: object) -> None:
        real(self, model, **kwargs)
        sizes.append(compute_module_sizes(model, self)[0][""])

    monkeypatch.setattr(TbeHfQuantizer, "_process_model_before_weight_loading", measured)
    packed = pairs("qwen3_moe").packed(torch.bfloat16)
    assert sizes[0] == pytest.approx(resident_weight_bytes(packed), rel=0.03)

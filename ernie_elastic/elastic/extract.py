"""Cut a physically smaller model out of an elastic one. Letters: L layers, E experts, I expert width, H hidden."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from ernie_elastic.compression import is_compressed
from ernie_elastic.elastic.importance import MASS_FILE, ExpertPolicy, choose_experts, measured_mass, stored_mass
from ernie_elastic.elastic.space import LayerPolicy, choose_layers
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.generation.loading import load_model
from ernie_elastic.model_directories import resolve_model_dir
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.schema import SubModelSpec
from ernie_elastic.stages import say, stage_output, write_json

STAGE = "extract"
ORIGIN_FILE = "elastic_origin.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What to keep; None means full. layers wins over depth, topk_per_layer (one for each kept layer) over topk.

    drop_audio removes the heads and frees their layers.
    """

    depth: int | None = None
    experts: int | None = None
    topk: int | None = None
    topk_per_layer: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    layer_policy: LayerPolicy = "uniform"
    expert_policy: ExpertPolicy = "mass"
    seed: int = 0
    drop_audio: bool = False


def extract_model(model: ErnieElasticForCausalLM, spec: SubModelSpec) -> ErnieElasticForCausalLM:
    """The sub-model of `spec` as a model of its own: layers renumbered, experts and router rows sliced.

    Gives the same logits as `model.forward_packed(batch, submodel=spec)`. Raises ConfigError for a spec outside the
    model, or with differing expert counts per layer (engines load one count for the whole model).
    """
    model.config.check_spec(spec)
    counts = {len(experts) for experts in spec.experts_per_layer}
    if len(counts) > 1:
        raise ConfigError(f"extract: layers keep {sorted(counts)} experts; every layer must keep the same number")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.num_experts, config.num_experts_per_tok = (
        len(spec.layers),
        counts.pop(),
        spec.top_k,
    )
    config.num_experts_per_tok_per_layer = None if spec.top_k_per_layer is None else list(spec.top_k_per_layer)
    config.first_k_dense = sum(layer < model.config.first_k_dense for layer in spec.layers)
    config.audio_head_layers = [spec.layers.index(layer) for layer in model.config.audio_head_layers or ()]
    config._experts_implementation = model.config._experts_implementation
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            state[name] = tensor
            continue
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(number) not in spec.layers:
            continue
        slot = spec.layers.index(int(number))
        if rest.startswith(("mlp.experts.", "mlp.gate.")):
            tensor = tensor[torch.tensor(spec.experts_per_layer[slot], device=tensor.device)]
        state[f"model.layers.{slot}.{rest}"] = tensor.clone()
    smaller = cast_weights(ErnieElasticForCausalLM(config), model.dtype)
    smaller.load_state_dict(state)
    smaller.tie_weights()
    return smaller.eval()


def without_audio(model: ErnieElasticForCausalLM) -> ErnieElasticForCausalLM:
    """The same model without audio embeddings and heads."""
    config = copy.deepcopy(model.config)
    config.audio_num_levels, config.audio_head_layers, config.audio_input = 0, [], "codes"
    gone = ("model.audio.", "model.sound.", "model.speaker.")
    config.speaker_embedding_size = 0
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(gone)}
    smaller = cast_weights(ErnieElasticForCausalLM(config), model.dtype)
    smaller.load_state_dict(state)
    smaller.tie_weights()
    return smaller.eval()


def cast_weights(model: ErnieElasticForCausalLM, dtype: torch.dtype) -> ErnieElasticForCausalLM:
    """Cast every parameter in place; buffers (the balance bias, rotary frequencies) keep fp32. Returns the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_spec(model: ErnieElasticForCausalLM, mass_LE: torch.Tensor, request: Request) -> SubModelSpec:
    """The spec that a request means for this model; ConfigError names the flag, both values and the fix."""
    config = model.config
    if request.layers is not None:
        layers = tuple(sorted(set(request.layers)))
        if not layers or not 0 <= layers[0] <= layers[-1] < config.num_hidden_layers:
            raise ConfigError(f"--layers {list(layers)} must name layers in 0..{config.num_hidden_layers - 1}")
    else:
        depth = config.num_hidden_layers if request.depth is None else request.depth
        layers = choose_layers(config, depth, request.layer_policy)
    topk = config.num_experts_per_tok if request.topk is None else request.topk
    topks = request.topk_per_layer or [min(topk, config.full_spec().top_ks[layer]) for layer in layers]
    experts = config.num_experts if request.experts is None else request.experts
    if not 1 <= topk <= config.num_experts_per_tok:
        raise ConfigError(f"--topk {topk} must lie in 1..{config.num_experts_per_tok}, the model's own top-k")
    if request.topk_per_layer is None and experts < topk:
        raise ConfigError(f"--experts {experts} is less than --topk {topk}; keep more experts or lower --topk")
    chosen = choose_experts(mass_LE, layers, experts, request.expert_policy, request.seed)
    spec = SubModelSpec.of(layers, chosen, topks)
    config.check_spec(spec)
    return spec


def parameter_counts(model: ErnieElasticForCausalLM) -> tuple[int, int]:
    """(total, active per token): experts count by top_k / E, everything else in full, embeddings included."""
    total = active = 0
    top_ks = model.config.full_spec().top_ks
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if ".mlp.experts." in name:
            layer = int(name.removeprefix("model.layers.").split(".", 1)[0])
            active += parameter.numel() * top_ks[layer] // model.config.num_experts
        else:
            active += parameter.numel()
    return total, active


def load_source(source: Path | str | None) -> tuple[Path, ErnieElasticForCausalLM]:
    """The uncompressed model that a user names; a compressed one is an error that names `decompress`."""
    directory = resolve_model_dir(source)
    if is_compressed(directory):
        raise CheckpointError(
            f"{directory} is compressed and cannot be cut; run `ernie-elastic decompress {directory} --out DIR` first"
        )
    return directory, load_model(directory)


def extract_submodel(
    source: Path | str | None,
    out: Path,
    request: Request,
    data: Path | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    spec: SubModelSpec | None = None,
) -> dict[str, dict[str, object]]:
    """Write the sub-model of `source` to `out` as a plain Hugging Face directory and print a table before/after.

    data: packed shards to measure expert importance on (default: the mass that the checkpoint carries). spec: an
    explicit spec instead of the request. Returns the table's two columns.
    """
    directory, model = load_source(source)
    mass_LE = measured_mass(model, data) if data is not None else stored_mass(directory)
    before = describe(model)
    if request.drop_audio:
        model = without_audio(model)
    spec = spec or make_spec(model, mass_LE, request)
    smaller = extract_model(model, spec)
    config = {"request": request, "spec": spec.to_json(), "dtype": dtype, "data": data}
    with stage_output(out, STAGE, config, parent=directory, overwrite=overwrite) as temporary:
        save_model(smaller, temporary, dtype)
        _copy_companions(directory, temporary)
        kept = torch.stack(
            [mass_LE[layer, list(experts)] for layer, experts in zip(spec.layers, spec.experts_per_layer, strict=True)]
        )
        save_file({"mass_LE": kept.contiguous()}, temporary / MASS_FILE)
        write_json(temporary / ORIGIN_FILE, _origin(directory, spec))
    after = {
        **describe(smaller),
        "kept layers": list(spec.layers),
        "kept top-k": list(spec.top_ks),
        "kept experts": [list(experts) for experts in spec.experts_per_layer],
    }
    print_table(before, after)
    size = sum(path.stat().st_size for path in out.glob("model*.safetensors"))
    say(
        f"extract_submodel: wrote {out}: {size:,} bytes of weights as {dtype} (the balance bias stays float32), "
        f"with the tokenizers of {directory}"
    )
    return {"before": before, "after": after}


def _origin(directory: Path, spec: SubModelSpec) -> dict[str, object]:
    origin: dict[str, object] = {"source": str(directory), "spec": spec.to_json()}
    if (directory / ORIGIN_FILE).exists():
        origin["source_origin"] = json.loads((directory / ORIGIN_FILE).read_text())
    return origin


def save_model(model: ErnieElasticForCausalLM, directory: Path, dtype: str = "bfloat16") -> None:
    """Write weights rounded to `dtype` (the balance bias stays fp32), config and shim."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    rounded = cast_weights(copy.deepcopy(model), DTYPES[dtype])
    transformers_logging.disable_progress_bar()
    rounded.save_pretrained(directory)


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizers and other files that belong to the model, unless already written."""
    for path in source.iterdir():
        skip = path.suffix == ".safetensors" or path.name in (
            "manifest.json",
            ORIGIN_FILE,
            "model.safetensors.index.json",
        )
        if skip or (target / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def describe(model: ErnieElasticForCausalLM) -> dict[str, object]:
    """Layers, experts, (largest) top-k, parameters and BF16 bytes of a model."""
    total, active = parameter_counts(model)
    return {
        "layers": model.config.num_hidden_layers,
        "experts per layer": model.config.num_experts,
        "top-k": model.config.num_experts_per_tok,
        "parameters": total,
        "active parameters": active,
        "bytes in BF16": 2 * total,
    }


def print_table(before: dict[str, object], after: dict[str, object]) -> None:
    """The two models side by side, one property a line."""
    say(f"{'':20}{'before':>14}{'after':>14}{'after/before':>14}")
    for name, old in before.items():
        new = after[name]
        assert isinstance(old, int) and isinstance(new, int)
        say(f"{name:20}{old:>14,}{new:>14,}{new / max(1, old):>14.3f}")
    layers, experts = after["kept layers"], after["kept experts"]
    assert isinstance(layers, list) and isinstance(experts, list)
    top_ks = after["kept top-k"]
    assert isinstance(top_ks, list)
    for slot, layer in enumerate(layers):
        shown = " ".join(str(expert) for expert in experts[slot])
        say(f"layer {slot} is layer {layer} of the source, top-{top_ks[slot]} of experts {shown}")

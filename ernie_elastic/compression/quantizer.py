"""The Transformers quantizer: `from_pretrained` of a compressed directory gives a model whose weights stay packed.

Contract: before the weights are loaded, every weight that can stay packed is replaced by an empty packed module, and
streams that no packed module takes are decoded into a temporary safetensors file that Transformers' own loader reads
(router weights, merges it knows and we do not). After loading, the packed modules are filled tensor by tensor. Only the
hooks that have been stable over Transformers 5 are used.
"""

from __future__ import annotations

import logging
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer

from ernie_elastic.compression import saving
from ernie_elastic.compression.config import TbeConfig
from ernie_elastic.compression.config_file import QUANT_METHOD
from ernie_elastic.compression.container import STREAM_PREFIX, SafetensorsWriter, Stored
from ernie_elastic.compression.packed import (
    PACKED_EXPERTS,
    PackedTensor,
    install,
    packable,
    packed_experts_forward,
    set_kernel,
)
from ernie_elastic.compression.plan import Checkpoint, Planned, Resolution, choose, read_checkpoint, resolve
from ernie_elastic.compression.shard import MIN_WEIGHTS
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.stages import progress

logger = logging.getLogger(__name__)
RESIDENT_BITS = 11.4  # of a weight that stays packed, roughly, for maps that are made before the weights are read


def _kind(place: Any) -> str:
    return "cpu" if str(place) == "cpu" else str(place)


class TbeHfQuantizer(HfQuantizer):
    """Loads compressed weights; `quantization_config` is a TbeConfig."""

    requires_calibration = True  # weights are compressed by `compress`, never while loading

    quantization_config: TbeConfig

    def __init__(self, quantization_config: TbeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._planned: list[Planned] = []
        self._checkpoint = Checkpoint([])
        self._resolution = Resolution()
        self._device_map: Any = None
        self._dtype = torch.float32
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Keep the device map: Transformers calls this with the caller's, and again when it has resolved "auto".

        ConfigError for one that puts weights on disk, or some on the CPU beside an accelerator: packed weights live in
        memory and compute where they lie.
        """
        device_map = kwargs.get("device_map")
        if device_map is None:
            return
        if isinstance(device_map, dict):
            kinds = {place if place in ("disk", "cpu") else "accelerator" for place in map(_kind, device_map.values())}
            if "disk" in kinds or kinds == {"cpu", "accelerator"}:
                raise ConfigError(
                    f"device_map places weights on {' and '.join(sorted(kinds))}; packed weights compute where they "
                    "lie: use accelerators alone (raise max_memory) or the CPU alone, or decompress the directory"
                )
        self._device_map = device_map

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element; the marker [] of a weight that stays packed stands for the whole of it."""
        path, _, name = param_name.rpartition(".")
        if name == "compute" and isinstance(model.get_submodule(path), PackedTensor):
            return model.get_submodule(path).shape.numel() * RESIDENT_BITS / 8
        return super().param_element_size(model, param_name, param)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """False: Transformers' writer knows no wrapper of config.json; `model.save_pretrained` is ours."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: the weights are exact copies of trained ones and are not updated."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        paths = kwargs.get("checkpoint_files")
        if not isinstance(paths, list) or not paths:
            raise CheckpointError("compressed checkpoint: no files given; load from the directory, not a state_dict")
        # The model's dtype is not handed on to this hook; while the model is built it is torch's default dtype.
        self._dtype = torch.get_default_dtype()
        self._checkpoint = read_checkpoint(paths)
        if not self._checkpoint.streams:
            raise CheckpointError(
                f"{Path(paths[0]).parent} says that it is compressed but holds no stream; fetch it anew"
            )
        self._resolution = resolve(model, self._checkpoint)
        taken = self._install(model)
        rest = [name for name in self._checkpoint.streams if name not in taken]
        if rest:
            paths.append(str(self._decode_rest(rest)))
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"(^|\.){STREAM_PREFIX}\d+$"}  # type: ignore[assignment]

    def _install(self, model: nn.Module) -> set[str]:
        """Replace what stays packed by empty packed modules; returns the checkpoint names they take."""
        skip = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        skip = skip if self._dtype in (torch.float16, torch.bfloat16) else []
        taken: set[str] = set()
        modules = dict(model.named_modules())
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        for keys, parts in choose(model, self._checkpoint, self._resolution, skip):
            packed = PackedTensor.standing_for(keys[0], tuple(model.get_parameter(keys[0]).shape))
            for key in keys:
                path, _, attribute = key.rpartition(".")
                parent, _, name = path.rpartition(".")
                install(modules[parent], name, modules[path], attribute, packed)
                tied.pop(key, None)
            self._planned.append(Planned(keys[0], packed, parts))
            taken.update(part.name for part in parts)
        return taken

    def _decode_rest(self, names: list[str]) -> Path:
        """Streams that the loader has to place, decoded into a temporary safetensors file, one at a time."""
        logger.info("compressed checkpoint: %d tensors load dense first, such as %s", len(names), names[0])
        self._scratch = tempfile.TemporaryDirectory(prefix="ernie_elastic_", ignore_cleanup_errors=True)
        path = Path(self._scratch.name) / "decoded.safetensors"
        headers = [self._checkpoint.streams[name].header for name in names]
        items = [Stored(header.name, "BF16", header.shape, 2 * header.weights) for header in headers]
        with SafetensorsWriter(path, [], items) as writer:
            for item in items:
                raw = self._checkpoint.streams[item.name].decode()
                writer.append(item, raw.reshape(-1).view(torch.uint8).numpy())
            writer.finish()
        return path

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for plan in progress(self._planned, desc="packing weights", unit="tensor"):
            plan.packed.fill(plan.dense(self._checkpoint), self._dtype, self._device_of(plan.key))
        if self._scratch is not None:
            pack_dense(model, self._dtype)
            self._scratch.cleanup()
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # else autograd would keep decoded weights for a backward pass
        packed = [module for module in model.modules() if isinstance(module, PackedTensor)]
        if packed:
            set_kernel(model, self.quantization_config.kernel)
        logger.info("compressed checkpoint: %d weights are packed in memory", len(packed))
        model.save_pretrained = types.MethodType(  # type: ignore[assignment]
            saving.saver(self._checkpoint, self._resolution), model
        )
        self._planned, self._checkpoint = [], Checkpoint([])  # closes the files
        return model

    def _device_of(self, key: str) -> torch.device | str:
        """The device that the map names for a key: its longest matching prefix, cpu without a map."""
        table = self._device_map if isinstance(self._device_map, dict) else {"": self._device_map or "cpu"}
        fitting = [name for name in table if not name or key == name or key.startswith(f"{name}.")]
        return table[max(fitting, key=len)] if fitting else "cpu"


def pack_dense(model: nn.Module, dtype: torch.dtype) -> int:
    """Pack the dense weights of a loaded model that can stay packed without loss and get smaller; returns how many.

    A weight qualifies when every value is a BF16 one. Weights that share a parameter share the packed one.
    """
    made: dict[int, PackedTensor] = {}
    done = 0
    for path, module in list(model.named_modules()):
        for attribute, parameter in list(module._parameters.items()):
            if parameter is None or parameter.numel() < MIN_WEIGHTS or not packable(module, attribute):
                continue
            packed = made.get(id(parameter)) or _packed_if_smaller(attribute, parameter, dtype)
            if packed is not None:
                made[id(parameter)] = packed
                parent, _, name = path.rpartition(".")
                install(model.get_submodule(parent), name, module, attribute, packed)
                done += 1
    return done


def _packed_if_smaller(attribute: str, parameter: nn.Parameter, dtype: torch.dtype) -> PackedTensor | None:
    brief = parameter.detach().to(torch.bfloat16)
    if not torch.equal(brief.to(parameter.dtype).view(torch.uint8), parameter.detach().contiguous().view(torch.uint8)):
        return None
    packed = PackedTensor.standing_for(attribute, tuple(parameter.shape))
    packed.fill(brief, dtype, parameter.device)
    return packed if packed.resident.nbytes < 2 * parameter.numel() else None


def register() -> None:
    """Make Transformers know the quantizer and the experts back end; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(TbeHfQuantizer)
    if PACKED_EXPERTS not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(PACKED_EXPERTS, packed_experts_forward)

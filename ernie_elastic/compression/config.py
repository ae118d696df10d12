"""The configuration side of the Transformers integration: what config.json of a compressed directory holds and means.

Contract: `AutoConfig.from_pretrained(compressed)` gives the ORIGINAL config object with a quantization_config attached,
so that the Auto classes pick the original model class; a process that has not imported this package cannot read the
config at all, and says why (docs/formats.md section 4).
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ernie_elastic.compression.config_file import INNER_KEY, MODEL_TYPE, ORIGINAL_KEY, QUANT_METHOD
from ernie_elastic.compression.format import LAYOUTS, VERSION, VERSIONS
from ernie_elastic.errors import ConfigError, FormatError

KERNELS = ("decode", "fused")


class TbeConfig(QuantizationConfigMixin):
    """quantization_config of a compressed checkpoint.

    layout: the stored layout. kernel: "decode" (weights are decoded to the compute dtype, outputs bit-equal to the
    dense model's) or "fused" (decode inside the product: faster for few rows on a CPU, another summation order).
    Raises ConfigError for an unknown value, FormatError for a format version that this package does not read.
    """

    def __init__(
        self,
        layout: str = "dense_plane",
        kernel: str = "decode",
        format_version: int = VERSION,
        quant_method: str = QUANT_METHOD,
        **_: Any,
    ) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(f"quantization_config: layout {layout!r} is not known; choose {' or '.join(LAYOUTS)}")
        if kernel not in KERNELS:
            raise ConfigError(f"quantization_config: kernel {kernel!r} is not known; choose {' or '.join(KERNELS)}")
        if format_version not in VERSIONS or quant_method != QUANT_METHOD:
            raise FormatError(
                f"quantization_config: {quant_method!r} version {format_version}, this package reads {QUANT_METHOD!r} "
                f"version 1 to {VERSION}; install a matching ernie_elastic"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # the base class lists in-tree methods only
        self.format_version = format_version
        self.layout = layout
        self.kernel = kernel


class CompressedConfig(PreTrainedConfig):
    """Stands in config.json for the original config; reading it gives the original config object."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The original config with quantization_config attached (a pair when return_unused_kwargs is passed).

        Raises FormatError when the original config is missing, ConfigError when its model type is unknown here.
        """
        original = copy.deepcopy((config_dict.get(ORIGINAL_KEY) or {}).get(INNER_KEY))
        if not isinstance(original, dict) or "model_type" not in original:
            raise FormatError(f"config.json: no {ORIGINAL_KEY} with a model_type in it; the directory is damaged")
        settings = config_dict.get("quantization_config") or {}
        original["quantization_config"] = {"quant_method": QUANT_METHOD, **settings}
        model_type = original["model_type"]
        if model_type not in CONFIG_MAPPING:
            raise ConfigError(
                f"config.json: the model inside is of type {model_type!r}, which Transformers does not know; import "
                "the package that defines it first, or pass trust_remote_code=True if the directory's code does"
            )
        return CONFIG_MAPPING[model_type].from_dict(original, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `from_dict`, reading the directory.

        trust_remote_code=True also imports the original config's own code from the directory, which makes its model
        type known from then on. AutoConfig comes here only after its caller has trusted the directory's code.
        """
        trusted = kwargs.pop("trust_remote_code", False) or kwargs.get("_from_auto", False)
        config_dict, unused = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        original = (config_dict.get(ORIGINAL_KEY) or {}).get(INNER_KEY) or {}
        reference = (original.get("auto_map") or {}).get("AutoConfig")
        if trusted and reference and original.get("model_type") not in CONFIG_MAPPING:
            config_class = get_class_from_dynamic_module(reference, pretrained_model_name_or_path)
            if original.get("model_type") not in CONFIG_MAPPING:
                AutoConfig.register(original["model_type"], config_class)
        return cls.from_dict(config_dict, **unused)


class _Registered(CompressedConfig):
    """What the Auto classes know the outer model type by.

    Transformers lets a registered class win over the directory's own code unless the class is one of its own. Here
    trust_remote_code=True must reach that code, since the original config may need it: hence the module's name.
    """

    __module__ = "transformers.ernie_elastic_compressed"


def register() -> None:
    """Make the Auto classes know the outer model type and the quantisation method; a second call changes nothing."""
    AutoConfig.register(MODEL_TYPE, _Registered, exist_ok=True)
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(TbeConfig)

"""What `compress` writes for Transformers: config.json around the original one, and the shim that it names.

Contract: nothing of Transformers is needed to write it; what it means is in `config.py` (docs/formats.md section 4).
"""

from __future__ import annotations

from typing import Any

from ernie_elastic.compression.format import VERSION

MODEL_TYPE = "ernie_elastic_compressed"
QUANT_METHOD = "ernie_elastic_tbe"
# One level deeper than Transformers looks: a config class takes a direct child with its own model_type for its config.
ORIGINAL_KEY, INNER_KEY = "original_config", "config"
SHIM_MODULE = "ernie_elastic_compressed_shim"
# Stands in place of a dtype: every Transformers config looks the name up in torch and fails, printing it.
GUARD = (
    "These weights are losslessly compressed: `pip install ernie-elastic`, `import ernie_elastic.compression`, then "
    "load with an Auto class (AutoModelForCausalLM.from_pretrained), or get the files back: `ernie-elastic decompress`."
)
SHIM_TEXT = '''"""Loads this checkpoint's compressed weights with the installed ernie_elastic package."""
try:
    from ernie_elastic.compression import CompressedConfig
except ImportError as error:
    raise ImportError(
        "this checkpoint is losslessly compressed and needs the package ernie_elastic: run `pip install ernie-elastic`"
    ) from error
'''


def outer_config(original: dict[str, Any], layout: str) -> dict[str, Any]:
    """config.json of a compressed directory, around the original one."""
    return {
        "model_type": MODEL_TYPE,
        "dtype": GUARD,
        "auto_map": {"AutoConfig": f"{SHIM_MODULE}.CompressedConfig"},
        # Without quant_method, which `from_dict` adds: Transformers skips a method that it does not know, but stops
        # where there is none. The second guard, for a config whose dtype was overridden. Else a `TbeConfig`.
        "quantization_config": {"format_version": VERSION, "layout": layout, "kernel": "decode"},
        ORIGINAL_KEY: {INNER_KEY: original},
    }

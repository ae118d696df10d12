"""Lossless compression of BF16 weights: files, directories, and models whose weights stay packed in memory.

Importing this room makes `AutoModel....from_pretrained(compressed_dir)` work. It imports neither torch nor
Transformers: names that need them are looked up when they are used (PEP 562), see `registration.py`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ernie_elastic.compression.registration import register_with_transformers

if TYPE_CHECKING:
    from ernie_elastic.compression.codec import Encoded
    from ernie_elastic.compression.config import CompressedConfig, TbeConfig
    from ernie_elastic.compression.container import model_bytes
    from ernie_elastic.compression.directory import compress_directory, is_compressed
    from ernie_elastic.compression.packed import (
        PackedEmbedding,
        PackedLinear,
        PackedTensor,
        packable,
        resident_weight_bytes,
        set_kernel,
    )
    from ernie_elastic.compression.restore import decompress_directory, directory_info
    from ernie_elastic.compression.tensors import decode, encode

__all__ = [
    "CompressedConfig",
    "Encoded",
    "PackedEmbedding",
    "PackedLinear",
    "PackedTensor",
    "TbeConfig",
    "compress_directory",
    "decode",
    "decompress_directory",
    "directory_info",
    "encode",
    "is_compressed",
    "model_bytes",
    "packable",
    "resident_weight_bytes",
    "set_kernel",
]
_FILES = {
    "codec": ("Encoded",),
    "config": ("CompressedConfig", "TbeConfig"),
    "container": ("model_bytes",),
    "directory": ("compress_directory", "is_compressed"),
    "packed": ("PackedEmbedding", "PackedLinear", "PackedTensor", "packable", "resident_weight_bytes", "set_kernel"),
    "restore": ("decompress_directory", "directory_info"),
    "tensors": ("decode", "encode"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()

"""Lossless compression of BF16 weights: files, directories, and models whose weights stay packed in memory.

Importing this room registers the quantizer, so that `AutoModel....from_pretrained(compressed_dir)` works.
"""

from ernie_elastic.compression import config, quantizer
from ernie_elastic.compression.codec import Encoded, decode, encode
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

config.register()
quantizer.register()

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

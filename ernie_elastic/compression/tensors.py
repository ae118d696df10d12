"""The codec for torch tensors, and tensors of safetensors files: what stands between BF16 words and torch."""

from __future__ import annotations

import numpy as np
import torch

from ernie_elastic.compression import codec
from ernie_elastic.compression.container import Entry, SafetensorsFile
from ernie_elastic.compression.format import Bytes
from ernie_elastic.errors import ConfigError, FormatError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def encode(weight: torch.Tensor, name: str = "", layout: str = codec.DEFAULT_LAYOUT) -> codec.Encoded:
    """Compress a BF16 tensor of any shape. The same tensor, name and layout always give the same bytes.

    source: paper: ZipServ, TCA-TBE (`tca_tbe`); ours: `dense_plane`, the same payload with one stream that varies in
    place of two, and `entropy_coded`, for storage. Raises ConfigError for another dtype or layout, FormatError beyond
    the format's limits.
    """
    if weight.dtype != torch.bfloat16:
        raise ConfigError(f"{name or 'tensor'}: dtype {weight.dtype}, only torch.bfloat16 is compressed; leave it")
    words_N = weight.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return codec.encode_words(words_N.reshape(-1), tuple(weight.shape), name, layout)


def decode(stream: Bytes, where: str = "stream", name: str | None = None) -> torch.Tensor:
    """The BF16 tensor of a stream u8 [bytes], in its original shape.

    name: what the stream must call itself (None = anything). Raises FormatError on any damage.
    """
    words, shape = codec.decode_words(stream, where, name)
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).reshape(shape)


def read_tensor(file: SafetensorsFile, entry: Entry) -> torch.Tensor:
    """A copy of one tensor, in its own shape and dtype. FormatError for a dtype that torch has no name for."""
    if entry.dtype not in TORCH_DTYPES:
        raise FormatError(f"{file.path}: {entry.name!r} has dtype {entry.dtype}, which cannot be read here")
    raw = torch.from_numpy(file.raw(entry).copy())
    return raw.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

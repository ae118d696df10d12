"""The dense-plane layout of BF16 weights in plain torch: the definition of `tbe_decode`.

Contract: `decode(encode(w))` has the bits of `w` for every BF16 pattern. Layout (ours: the payload of TCA-TBE with the
sign-and-mantissa bytes at fixed places, so that only fallbacks are looked up):

    low        u8  [n]               sign in bit 7, mantissa in bits 6..0
    planes     u8  [3, ceil(n/8)]    3-bit codes as bit planes: bit i of byte j of plane k is bit k of code 8 * j + i
    base       int, -1..248          exponent = base + code for codes 1..7; code 0 marks a fallback
    fallbacks  u8  [F]               exponents of the fallbacks in element order
    offsets    i64 [ceil(n/4096)+1]  fallbacks before each tile of 4096 elements

Legend: n elements, F fallbacks, T tiles of 4096 elements, R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError

TILE = 4096
WINDOW = 7


@dataclass(frozen=True, eq=False)
class DensePlanes:
    """BF16 weights [n] as in the module docstring, all tensors on one device. FormatError when the sizes disagree."""

    low: Tensor
    planes: Tensor
    base: int
    fallbacks: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        expected = {"planes": 3 * -(-self.count // 8), "offsets": -(-self.count // TILE) + 1}
        for name, size in expected.items():
            found = getattr(self, name).numel()
            if found != size:
                raise FormatError(f"dense planes of {self.count} weights: {name} has {found} elements, expected {size}")

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.low.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        tensors = (self.low, self.planes, self.fallbacks, self.offsets)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device | str) -> DensePlanes:
        """The same weights with all tensors on `device`; every shape stays the same."""
        return DensePlanes(
            self.low.to(device), self.planes.to(device), self.base, self.fallbacks.to(device), self.offsets.to(device)
        )


def encode(weight: Tensor) -> DensePlanes:
    """BF16 of any shape -> DensePlanes of its n elements in row order, window of maximal coverage. n >= 1.

    Raises ConfigError for another dtype or an empty tensor. paper: ZipServ, Alg. 1, for the window and the codes.
    """
    if weight.dtype != torch.bfloat16 or weight.numel() == 0:
        raise ConfigError(f"encode: got {weight.dtype} of shape {tuple(weight.shape)}; pass a BF16 tensor with weights")
    word_n = weight.detach().reshape(-1).view(torch.int16).int() & 0xFFFF
    exponent_n = word_n >> 7 & 0xFF
    cumulative = torch.cat((word_n.new_zeros(1), torch.bincount(exponent_n, minlength=256).cumsum(0)))
    base = int((cumulative[WINDOW:] - cumulative[:-WINDOW]).argmax()) - 1
    code_n = exponent_n - base
    code_n = torch.where((code_n >= 1) & (code_n <= WINDOW), code_n, 0)
    padded_8 = torch.nn.functional.pad(code_n, (0, -code_n.numel() % 8)).reshape(-1, 8)
    weights_8 = 1 << torch.arange(8, device=word_n.device)
    planes = torch.stack([((padded_8 >> k & 1) * weights_8).sum(1) for k in range(3)]).to(torch.uint8)
    missing_n = code_n == 0
    per_tile_T = torch.nn.functional.pad(missing_n, (0, -missing_n.numel() % TILE)).reshape(-1, TILE).sum(1)
    return DensePlanes(
        low=(word_n >> 8 & 0x80 | word_n & 0x7F).to(torch.uint8),
        planes=planes,
        base=base,
        fallbacks=exponent_n[missing_n].to(torch.uint8),
        offsets=torch.cat((per_tile_T.new_zeros(1), per_tile_T.cumsum(0))),
    )


def codes_of(planes: DensePlanes) -> Tensor:
    """The 3-bit codes: int32 [n]."""
    bits_8 = torch.arange(8, device=planes.low.device, dtype=torch.int32)
    plane_3n = (planes.planes.reshape(3, -1, 1).int() >> bits_8 & 1).reshape(3, -1)[:, : planes.count]
    return plane_3n[0] | plane_3n[1] << 1 | plane_3n[2] << 2


def decode(planes: DensePlanes) -> Tensor:
    """BF16 [n], bit-exact."""
    code_n = codes_of(planes)
    exponent_n = code_n + planes.base
    exponent_n[code_n == 0] = planes.fallbacks.int()
    low_n = planes.low.int()
    word_n = (low_n & 0x80) << 8 | exponent_n << 7 | low_n & 0x7F
    return torch.where(word_n > 0x7FFF, word_n - 0x10000, word_n).to(torch.int16).view(torch.bfloat16)

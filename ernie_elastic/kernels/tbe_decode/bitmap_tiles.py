"""The `tca_tbe` layout in plain torch: the definition of `tbe_decode` for the format as published.

Contract: `decode(encode(w))` has the bits of `w` for every BF16 pattern. A matrix is cut into BlockTiles of 64 x 64,
which hold their weights stripe by stripe (16 rows), TensorCoreTile by TensorCoreTile (16 columns), its four 8 x 8
FragTiles column by column. paper: ZipServ, section on TCA-TBE. Padded weights have the first exponent of the window.

    bitmaps  u8  [3, 512 * B]   bit k of the 3-bit codes, one bit a weight; code 0 marks a fallback
    low      u8  [A]            sign and mantissa of the weights with a code, each BlockTile's run padded to 16
    full     i16 [F]            whole words of the fallbacks, each BlockTile's run padded to 8
    ends     i64 [B, 2]         where each BlockTile's runs end in low and in full
    first    u8  [E]            exponent of code 1 of each matrix

Legend: E matrices, R rows, C columns, B BlockTiles of all matrices, N = 4096 weights of a BlockTile.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError

SIDE, WEIGHTS, WINDOW = 64, 4096, 7
LOW_ALIGN, FULL_ALIGN = 16, 8


@dataclass(frozen=True, eq=False)
class BitmapTiles:
    """BF16 matrices [E, R, C] as in the module docstring, all arrays on one device. FormatError for wrong sizes."""

    shape: tuple[int, int, int]
    bitmaps: Tensor
    low: Tensor
    full: Tensor
    ends: Tensor
    first: Tensor

    def __post_init__(self) -> None:
        expected = {"bitmaps": 3 * WEIGHTS // 8 * self.blocks, "ends": 2 * self.blocks, "first": self.shape[0]}
        for name, size in expected.items():
            found = getattr(self, name).numel()
            if found != size:
                raise FormatError(f"bitmap tiles of {self.shape}: {name} has {found} elements, expected {size}")

    @property
    def blocks(self) -> int:
        """BlockTiles of all matrices."""
        matrices, rows, columns = self.shape
        return matrices * -(-rows // SIDE) * -(-columns // SIDE)

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The arrays by name: bitmaps [3, 512 * B] and so on."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "shape"}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(array.numel() * array.element_size() for array in self.arrays.values())

    def to(self, device: torch.device | str) -> BitmapTiles:
        """The same matrices with all arrays on `device`; every shape stays the same."""
        return BitmapTiles(self.shape, **{name: array.to(device) for name, array in self.arrays.items()})


def _to_blocks(padded_ERC: Tensor) -> Tensor:
    """[E, R, C], sides multiples of 64, to [B, 4096] in the order of the module docstring."""
    matrices, rows, columns = padded_ERC.shape
    split = padded_ERC.reshape(matrices, rows // SIDE, 4, 2, 8, columns // SIDE, 4, 2, 8)
    return split.permute(0, 1, 5, 2, 6, 7, 3, 4, 8).reshape(-1, WEIGHTS)


def _from_blocks(word_BN: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Inverse of `_to_blocks`, without the padding: [E, R, C]."""
    matrices, rows, columns = shape
    down, across = -(-rows // SIDE), -(-columns // SIDE)
    split = word_BN.reshape(matrices, down, across, 4, 4, 2, 2, 8, 8)
    return split.permute(0, 1, 3, 6, 7, 2, 4, 5, 8).reshape(matrices, down * SIDE, across * SIDE)[:, :rows, :columns]


def _aligned(count: Tensor, size: int) -> Tensor:
    return -(-count // size) * size


def _places(inside_BN: Tensor, align: int) -> tuple[Tensor, Tensor]:
    """Where each marked weight lies among the padded runs [marked], and where the runs end [B]."""
    count_B = inside_BN.sum(1)
    end_B = _aligned(count_B, align).cumsum(0)
    start_B = end_B - _aligned(count_B, align)
    return (start_B[:, None] + inside_BN.cumsum(1) - 1)[inside_BN], end_B


def encode(weight_ERC: Tensor) -> BitmapTiles:
    """BF16 [E, R, C] -> BitmapTiles on its device, one window of maximal coverage a matrix.

    Raises ConfigError for other inputs and for empty ones. paper: ZipServ, Alg. 1.
    """
    if weight_ERC.dtype != torch.bfloat16 or weight_ERC.ndim != 3 or not weight_ERC.numel():
        found = f"{weight_ERC.dtype} {tuple(weight_ERC.shape)}"
        raise ConfigError(f"bitmap tiles: weights are {found}, expected bfloat16 [E, R, C] with weights")
    shape = (weight_ERC.shape[0], weight_ERC.shape[1], weight_ERC.shape[2])
    word_ERC = weight_ERC.detach().contiguous().view(torch.int16).int() & 0xFFFF
    firsts = [_window(word_RC >> 7 & 0xFF) for word_RC in word_ERC]
    pads = (0, -shape[2] % SIDE, 0, -shape[1] % SIDE)
    word_BN = torch.cat(
        [_to_blocks(torch.nn.functional.pad(word_RC, pads, value=first << 7)[None])
         for word_RC, first in zip(word_ERC, firsts, strict=True)]
    )  # fmt: skip
    first_E = torch.tensor(firsts, dtype=torch.uint8, device=word_BN.device)
    code_BN = (word_BN >> 7 & 0xFF) - first_E.int().repeat_interleave(len(word_BN) // shape[0])[:, None] + 1
    code_BN = torch.where((code_BN >= 1) & (code_BN <= WINDOW), code_BN, 0)
    bit_8 = 1 << torch.arange(8, device=word_BN.device)
    bitmaps = [((code_BN.reshape(-1, 8) >> k & 1) * bit_8).sum(1) for k in range(3)]
    inside_BN = code_BN != 0
    low_place, low_end_B = _places(inside_BN, LOW_ALIGN)
    full_place, full_end_B = _places(~inside_BN, FULL_ALIGN)
    low = torch.zeros(int(low_end_B[-1]), dtype=torch.uint8, device=word_BN.device)
    low[low_place] = (word_BN >> 8 & 0x80 | word_BN & 0x7F)[inside_BN].to(torch.uint8)
    full = torch.zeros(int(full_end_B[-1]), dtype=torch.int16, device=word_BN.device)
    full[full_place] = word_BN[~inside_BN].to(torch.int16)
    return BitmapTiles(
        shape, torch.stack(bitmaps).to(torch.uint8), low, full, torch.stack((low_end_B, full_end_B), 1), first_E
    )


def _window(exponent_RC: Tensor) -> int:
    """First exponent of the seven neighbours that cover most weights; the lowest of equals."""
    histogram = torch.bincount(exponent_RC.flatten(), minlength=256).cumsum(0)
    cumulative = torch.cat((histogram.new_zeros(1), histogram))
    return int((cumulative[WINDOW:] - cumulative[:-WINDOW]).argmax())


def decode(tiles: BitmapTiles) -> Tensor:
    """BF16 [E, R, C], bit-exact. Raises FormatError when the runs' ends disagree with the bitmaps."""
    bit_8 = torch.arange(8, device=tiles.low.device, dtype=torch.int32)
    plane_3BN = (tiles.bitmaps.reshape(3, -1, 1).int() >> bit_8 & 1).reshape(3, -1, WEIGHTS)
    code_BN = plane_3BN[0] | plane_3BN[1] << 1 | plane_3BN[2] << 2
    inside_BN = code_BN != 0
    low_place, low_end_B = _places(inside_BN, LOW_ALIGN)
    full_place, full_end_B = _places(~inside_BN, FULL_ALIGN)
    if not torch.equal(torch.stack((low_end_B, full_end_B), 1), tiles.ends):
        raise FormatError(f"bitmap tiles of {tiles.shape}: the ends disagree with the bitmaps; they are damaged")
    first_B = tiles.first.int().repeat_interleave(tiles.blocks // tiles.shape[0])
    exponent_BN = first_B[:, None] + code_BN - 1
    low = tiles.low[low_place].int()
    word_BN = torch.empty_like(code_BN)
    word_BN[inside_BN] = (low & 0x80) << 8 | exponent_BN[inside_BN] << 7 | low & 0x7F
    word_BN[~inside_BN] = tiles.full[full_place].int() & 0xFFFF
    word_ERC = _from_blocks(word_BN, tiles.shape)
    return torch.where(word_ERC > 0x7FFF, word_ERC - 0x10000, word_ERC).to(torch.int16).view(torch.bfloat16)

"""How a packed weight lies in memory: rows for a CPU (`kernels.zip_gemv`), tiles for a GPU (`kernels.lane_tiles`).

Contract: both hold the same bits and answer the same three questions: the dense weight, some of its rows, a product.
Which one a device gets is decided here and nowhere else.

Legend: E experts, R rows (outputs), C columns (inputs), M rows of the activations, N looked-up rows, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import lane_tiles, zip_gemm, zip_gemv, zip_moe

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RowLayout:
    """A weight [R, C] or [E, R, C] whose rows lie below each other in the layout of `zip_gemv`."""

    shape: Shape
    matrix: zip_gemv.PackedMatrix

    @classmethod
    def pack(cls, weight: Tensor, parts: int) -> RowLayout:
        """From BF16 [R, C] or [E, R, C], on its device. `parts` is for the other layout."""
        return cls(tuple(weight.shape), zip_gemv.pack(weight.reshape(-1, weight.shape[-1])))

    @classmethod
    def of(cls, shape: Shape, parts: int, tensors: Mapping[str, Tensor]) -> RowLayout:
        """From the arrays that `tensors` gave, for a weight [R, C] or [E, R, C]."""
        return cls(shape, zip_gemv.PackedMatrix((torch.Size(shape[:-1]).numel(), shape[-1]), dict(tensors)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name: low [R, C padded] and so on, as in `zip_gemv.reference`."""
        return self.matrix.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return self.matrix.nbytes

    def _rows_of(self, expert: int | None) -> tuple[int, int]:
        rows = self.shape[-2]
        return (0, self.matrix.shape[0]) if expert is None else (expert * rows, (expert + 1) * rows)

    def dense(self, expert: int | None, dtype: torch.dtype) -> Tensor:
        """[R, C] of one expert, or everything in its shape, bit-exact BF16 or float32."""
        start, stop = self._rows_of(expert)
        found = zip_gemv.unpack(self.matrix, dtype, start=start, stop=stop)
        return found if expert is not None else found.reshape(self.shape)

    def look_up(self, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows int64 [N] of a table [R, C]: [N, C], bit-exact BF16 or float32."""
        return zip_gemv.unpack_rows(self.matrix, rows_N, dtype)

    def product(self, x: Tensor, expert: int | None) -> Tensor:
        """x [..., C] times the transpose (of one expert): [..., R] in x's dtype, summed in float32."""
        if expert is None and x.dtype == torch.float32 and x.is_cpu and x.is_contiguous():
            columns = self.shape[-1]
            if x.shape[-1] == columns and x.numel() <= columns * zip_gemv.FUSED_MAX_ROWS:
                bound = zip_gemv.bind(self.matrix)
                if bound is not None:
                    return bound(x)
        start, stop = self._rows_of(expert)
        out = zip_gemv.matmul(x.reshape(-1, x.shape[-1]).float(), self.matrix, start=start, stop=stop)
        return out.to(x.dtype).reshape(*x.shape[:-1], stop - start)


@dataclass(frozen=True, eq=False)
class TileLayout:
    """A weight [R, C] or [E, R, C] in the tiles of `lane_tiles`, as `parts` matrices an expert (`zip_moe` wants 2)."""

    shape: Shape
    parts: int
    stack: lane_tiles.PackedStack

    @staticmethod
    def _matrices(shape: Shape, parts: int) -> tuple[int, int, int]:
        experts = shape[0] if len(shape) == 3 else 1
        return experts * parts, shape[-2] // parts, shape[-1]

    @classmethod
    def pack(cls, weight: Tensor, parts: int) -> TileLayout:
        """From BF16 [R, C] or [E, R, C], on its device."""
        shape: Shape = tuple(weight.shape)
        return cls(shape, parts, lane_tiles.pack(weight.reshape(cls._matrices(shape, parts))))

    @classmethod
    def of(cls, shape: Shape, parts: int, tensors: Mapping[str, Tensor]) -> TileLayout:
        """From the arrays that `tensors` gave, for a weight [R, C] or [E, R, C]."""
        return cls(shape, parts, lane_tiles.PackedStack(cls._matrices(shape, parts), **tensors))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name: low [T, 2, 128, 4] and so on, as in `lane_tiles.reference`."""
        return self.stack.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return self.stack.nbytes

    def dense(self, expert: int | None, dtype: torch.dtype) -> Tensor:
        """[R, C] of one expert, or everything in its shape, bit-exact BF16 or float32."""
        chosen = None if expert is None else range(expert * self.parts, (expert + 1) * self.parts)
        found = lane_tiles.unpack(self.stack, chosen)
        return found.reshape(self.shape if expert is None else self.shape[-2:]).to(dtype)

    def look_up(self, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows int64 [N] of a table [R, C]: [N, C], bit-exact BF16 or float32."""
        return lane_tiles.unpack_rows(self.stack, rows_N).to(dtype)

    def product(self, x: Tensor, expert: int | None) -> Tensor:
        """x BF16 [..., C] times the transpose of a matrix [R, C]: BF16 [..., R], summed in float32.

        ConfigError for another dtype, and for one expert: those are multiplied together, by `fused_experts`.
        """
        if expert is not None:
            raise ConfigError("kernel 'fused': experts in tiles are multiplied by zip_moe only; choose 'decode'")
        out_MR = zip_gemm.matmul(x.reshape(-1, x.shape[-1]), self.stack)
        return out_MR.to(x.dtype).reshape(*x.shape[:-1], self.shape[-2])


Resident = RowLayout | TileLayout


def layout_for(device: torch.device) -> type[RowLayout] | type[TileLayout]:
    """Tiles on CUDA devices, rows everywhere else."""
    return TileLayout if device.type == "cuda" else RowLayout


def fused_experts(x_MC: Tensor, gate_up: Resident, down: Resident, ids_MK: Tensor, weights_MK: Tensor) -> Tensor | None:
    """SwiGLU experts in one call: x [M, C] -> [M, C], the sum over k of weights_MK * down(silu(gate) * up).

    ids int64 [M, K]; those beyond the last expert contribute nothing. None where the caller must go expert by expert
    (rows, in the cases that `zip_gemv.experts` names). ConfigError for tiles with another dtype than BF16.
    """
    if isinstance(gate_up, RowLayout) and isinstance(down, RowLayout):
        return zip_gemv.experts(x_MC, gate_up.matrix, down.matrix, ids_MK, weights_MK)
    if isinstance(gate_up, TileLayout) and isinstance(down, TileLayout):
        return zip_moe.experts(x_MC, zip_moe.PackedExperts(gate_up.stack, down.stack), ids_MK, weights_MK)
    raise ConfigError("experts: gate_up and down lie in different layouts; keep a layer's experts on one device")

"""A mixture of SwiGLU experts with packed BF16 weights: `reference` (plain torch) and `triton` (GPU, or interpreted).

Contract: weights exact, sums in float32, no atomic additions: the same bits in every run. Up to FUSED_MAX_TOKENS the
Triton kernels decode inside the products (`experts_fused`), with outputs bit-identical to `experts_plain`, the same
kernels on plain weights. For more tokens the routed experts, and only they, are decoded and multiplied by torch's
grouped product (`experts_decoded`). `backend="auto"` means triton for CUDA tensors.

Letters: N tokens, K chosen, E experts, H hidden, I expert width (gate half first in the fused 2I).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import lane_tiles
from ernie_elastic.kernels.lane_tiles import PackedStack
from ernie_elastic.kernels.triton_backend import use_triton
from ernie_elastic.kernels.zip_moe import decoded, reference

if TYPE_CHECKING:
    from ernie_elastic.kernels.zip_moe.triton_impl import Tiles

__all__ = [
    "PackedExperts",
    "experts",
    "experts_decoded",
    "experts_fused",
    "experts_plain",
    "pack",
    "tile_choices",
    "unpack",
]
Backend = Literal["auto", "triton", "reference"]
# Up to here every expert has few tokens and reading its weights is the cost. ours: unmeasured; gpu_check measures it.
FUSED_MAX_TOKENS = 128


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """E experts. gate_up: matrices [2E, I, H], the gate and the up projection of each in turn; down: [E, H, I]."""

    gate_up: PackedStack
    down: PackedStack

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return self.gate_up.nbytes + self.down.nbytes

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same experts with all arrays on `device`; every shape stays the same."""
        return PackedExperts(self.gate_up.to(device), self.down.to(device))


def pack(gate_up_E2IH: Tensor, down_EHI: Tensor) -> PackedExperts:
    """BF16 gate_up [E, 2I, H] and down [E, H, I] -> PackedExperts on their device. ConfigError for other inputs."""
    _check_plain(gate_up_E2IH, down_EHI)
    experts, hidden, width = down_EHI.shape
    return PackedExperts(lane_tiles.pack(gate_up_E2IH.reshape(2 * experts, width, hidden)), lane_tiles.pack(down_EHI))


def unpack(packed: PackedExperts, experts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """BF16 gate_up [G, 2I, H] and down [G, H, I] of the listed experts (default: all), bit-exact."""
    chosen = list(range(packed.num_experts)) if experts is None else experts
    gates_and_ups = [matrix for expert in chosen for matrix in (2 * expert, 2 * expert + 1)]
    gate_up = lane_tiles.unpack(packed.gate_up, None if experts is None else gates_and_ups)
    down = lane_tiles.unpack(packed.down, None if experts is None else chosen)
    return gate_up.reshape(len(chosen), -1, gate_up.shape[2]), down


def experts(
    x_NH: Tensor, packed: PackedExperts, ids_NK: Tensor, weights_NK: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Sum over k of weights_NK * down(silu(gate) * up) of expert ids_NK: BF16 [N, H] -> BF16 [N, H].

    ids int64 [N, K], weights any float dtype. Ids outside of 0..E-1 contribute nothing. Raises ConfigError for inputs
    that do not fit, or a back end that is not known or cannot run.
    """
    if not use_triton(backend, "zip_moe", x_NH.device):
        reference.check(x_NH, ids_NK, weights_NK, packed.down.shape[1])

        def one(expert: int) -> tuple[Tensor, Tensor]:
            gate_up_12IH, down_1HI = unpack(packed, [expert])
            return gate_up_12IH[0], down_1HI[0]

        return reference.experts(x_NH, one, packed.num_experts, ids_NK, weights_NK)
    if x_NH.shape[0] <= FUSED_MAX_TOKENS:
        return experts_fused(x_NH, packed, ids_NK, weights_NK)
    return experts_decoded(x_NH, packed, ids_NK, weights_NK)


def experts_decoded(x_NH: Tensor, packed: PackedExperts, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """`experts` by decoding the routed experts and a grouped product: BF16 [N, H] -> BF16 [N, H]."""
    reference.check(x_NH, ids_NK, weights_NK, packed.down.shape[1])
    return decoded.experts(x_NH, lambda group: unpack(packed, group), packed.num_experts, ids_NK, weights_NK)


def experts_fused(
    x_NH: Tensor, packed: PackedExperts, ids_NK: Tensor, weights_NK: Tensor, tiles: Tiles | None = None
) -> Tensor:
    """`experts` with the decode inside the products: BF16 [N, H] -> BF16 [N, H]. Nothing waits for the host."""
    from ernie_elastic.kernels.zip_moe import triton_impl

    reference.check(x_NH, ids_NK, weights_NK, packed.down.shape[1])
    stacks = triton_impl.packed_stacks(packed.gate_up, packed.down)
    chosen = tiles or triton_impl.default_tiles(ids_NK.numel(), packed.num_experts)
    return triton_impl.run(x_NH, stacks, ids_NK, weights_NK, chosen)


def experts_plain(
    x_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, ids_NK: Tensor, weights_NK: Tensor, tiles: Tiles | None = None
) -> Tensor:
    """The twin of `experts_fused` on plain BF16 weights, same order of sums: BF16 [N, H] -> BF16 [N, H]."""
    from ernie_elastic.kernels.zip_moe import triton_impl

    _check_plain(gate_up_E2IH, down_EHI)
    experts, hidden, width = down_EHI.shape
    reference.check(x_NH, ids_NK, weights_NK, hidden)
    gate_up, down = (weight.contiguous().view(torch.int16) for weight in (gate_up_E2IH, down_EHI))
    stacks = triton_impl.plain_stacks(gate_up, down, experts, width)
    chosen = tiles or triton_impl.default_tiles(ids_NK.numel(), experts)
    return triton_impl.run(x_NH, stacks, ids_NK, weights_NK, chosen)


def tile_choices(pairs: int, experts: int) -> list[Tiles]:
    """Tiles worth trying for that many (token, choice) pairs of that many experts."""
    from ernie_elastic.kernels.zip_moe import triton_impl

    return triton_impl.tile_choices(pairs, experts)


def _check_plain(gate_up: Tensor, down: Tensor) -> None:
    """ConfigError unless the projections are BF16 [E, 2I, H] and [E, H, I]."""
    fits = gate_up.dtype == down.dtype == torch.bfloat16 and (gate_up.ndim, down.ndim) == (3, 3) and down.numel() > 0
    if not fits or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        found = f"gate_up {gate_up.dtype} {tuple(gate_up.shape)}, down {down.dtype} {tuple(down.shape)}"
        raise ConfigError(f"zip_moe: {found}; expected bfloat16 [E, 2I, H] and [E, H, I]")

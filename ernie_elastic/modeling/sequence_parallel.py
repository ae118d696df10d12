"""Sequence parallelism over ranks: each rank runs a share of the positions, attention trades positions for heads.

The exchange is DeepSpeed-Ulysses' (all-to-all before and after attention); an engine supplies it, since DeepSpeed is
imported by the training engine only. Letters: B rows, T positions, A heads, C head width, N flat positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ernie_elastic.errors import ConfigError

# (x [B, T, A, C], dimension to scatter, dimension to gather) -> all-to-all over the ranks that share a sequence
AllToAll = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class SequenceShard:
    """This rank's share [rank * T / ranks, (rank + 1) * T / ranks) of every row's positions, and the exchange."""

    rank: int
    ranks: int
    all_to_all: AllToAll

    def check(self, length: int, heads: int, key_heads: int) -> None:
        """Raise ConfigError unless the ranks divide positions and heads."""
        for name, value in (("row_length", length), ("num_attention_heads", heads), ("num_key_value_heads", key_heads)):
            if value % self.ranks:
                raise ConfigError(
                    f"sequence parallelism over {self.ranks} ranks needs {name} {value} to be a multiple of it; change "
                    f"{name}, or use fewer ranks per sequence"
                )

    def local(self, field: torch.Tensor) -> torch.Tensor:
        """This rank's positions of a field [B, T, ...]."""
        size = field.shape[1] // self.ranks
        return field[:, self.rank * size : (self.rank + 1) * size]

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, A, T / ranks, C] -> [B, A / ranks, T, C]."""
        return self.all_to_all(x.transpose(1, 2).contiguous(), 2, 1).transpose(1, 2)

    def join_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, A / ranks, C] -> [B, T / ranks, A, C]."""
        return self.all_to_all(x, 1, 2)

    def of_batch(self, shape_BT: torch.Size) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """A function from flat indices int64 [N] of the batch to (those that lie here, their local flat indices)."""
        length = shape_BT[1]
        size = length // self.ranks

        def here(index_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            row, column = index_N // length, index_N % length
            mine = column // size == self.rank
            return index_N[mine], (row * size + column - self.rank * size)[mine]

        return here

    def to_global(self, local_N: torch.Tensor, shape_BT: torch.Size) -> torch.Tensor:
        """Local flat indices int64 [N] as flat indices of the whole batch."""
        length = shape_BT[1]
        size = length // self.ranks
        return local_N // size * length + self.rank * size + local_N % size

"""Expert parallelism over ranks: each rank holds a share of every layer's experts, tokens travel to them and back.

An engine supplies the exchange (`training/engines/expert_parallel.py`). Letters: N positions, K chosen, S = N * K pairs
sent from here, M pairs received here, R ranks, E experts of the layer, e = E / R held here, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

# (rows [S, ...], rows sent to each rank, rows got from each rank) -> rows [M, ...]: differentiable all-to-all
Exchange = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class ExpertShard:
    """This rank holds the experts [rank * E / ranks, (rank + 1) * E / ranks) of every layer that has some."""

    rank: int
    ranks: int
    exchange: Exchange

    def run(
        self, experts: nn.Module, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """What `experts(hidden, ids, weights)` would give with all experts here: [N, H], ids int64 [N, K] of E.

        experts: a module with `num_experts` = E / ranks that takes ids of its own experts. Every rank must call this
        equally often, with any N. ours: a pair is sent per chosen expert and combined at home, in the order of K, so
        that weights never travel and the result does not depend on where experts lie.
        """
        choices, held = ids_NK.shape[1], cast(int, experts.num_experts)
        ids_S, order_S = ids_NK.reshape(-1).sort(stable=True)
        sent_Re = torch.bincount(ids_S, minlength=self.ranks * held)
        got_Re = self.exchange(sent_Re, [held] * self.ranks, [held] * self.ranks).view(self.ranks, held)
        sent = sent_Re.view(self.ranks, held).sum(1).tolist()
        got = got_Re.sum(1).tolist()
        rows_MH = self.exchange(hidden_NH[order_S // choices], sent, got)
        own_e = torch.arange(held, device=ids_NK.device)
        local_M1 = own_e.repeat(self.ranks).repeat_interleave(got_Re.reshape(-1))[:, None]
        mixed_MH = experts(rows_MH, local_M1, weights_NK.new_ones(local_M1.shape))
        # Ties the result to what came in: a rank without a pair must still take part in the exchanges of the backward.
        mixed_MH = mixed_MH + rows_MH[:0].sum()
        back_SH = self.exchange(mixed_MH, got, sent)
        home_NKH = back_SH[order_S.argsort()].view(*ids_NK.shape, -1)
        return (home_NKH * weights_NK[..., None]).sum(1)

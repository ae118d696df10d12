"""Residual codebooks that learn by moving averages: the quantiser of a neural codec, on one rank or many.

Contract: `quantise` is a pure function; only `initialise` and `learn` change the codebooks. Both see the vectors of all
ranks of torch.distributed when it runs, and leave bit-equal codebooks on every rank; the random numbers are those of
rank 0. The nearest code wins, the lowest of equally near ones.
paper: section 2.5 (residual vector quantisation, the first code semantic). background: moving averages, restart of
dead codes, quantiser dropout (EnCodec, DAC). peer: a semantic level beside the residual stack (Mimi).
ours: a code that nobody chooses keeps its place until it is restarted, so no smoothing constant is needed.

Shape letters: N sounds, S steps, Q levels, V codes of a level, C width of the features, D width of the codes,
M vectors (N * S), R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ernie_elastic.errors import ConfigError

START_ROUNDS = 10  # k-means rounds of the start
START_JITTER = 0.01  # of the spread: how far a repeated start vector is moved, when there are fewer vectors than codes


@dataclass(frozen=True)
class CodebookConfig:
    """What the codebooks are.

    width: C of the features. num_levels: Q. codebook_size: V. code_dim: D, to which each level projects before the
    search and from which it projects back (DAC); 0: no projection, D = C. split_semantic: level 0 is a quantiser of its
    own, with its own projection, beside the residual stack of the other levels (Mimi); False: it is the first residual
    level. decay: of the moving averages. restart_below: a code whose average count is below this share of the mean
    count of its level is restarted. Raises ConfigError for values out of range.
    """

    width: int
    num_levels: int
    codebook_size: int
    code_dim: int = 0
    split_semantic: bool = False
    decay: float = 0.99
    restart_below: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("num_levels", 1), ("codebook_size", 2), ("code_dim", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"codebooks: {name} is {getattr(self, name)}; it must be at least {least}")
        if self.split_semantic and self.num_levels < 2:
            raise ConfigError(
                "codebooks: split_semantic with 1 level leaves no level for the sound itself; "
                "give at least 2 levels or split_semantic=False"
            )
        if not 0 <= self.decay < 1 or not 0 <= self.restart_below < 1:
            raise ConfigError(
                f"codebooks: decay {self.decay} and restart_below {self.restart_below} must lie in [0, 1)"
            )


@dataclass(frozen=True)
class Quantised:
    """codes int64 [N, S, Q]; features float32 [N, S, C], the sum of the active levels, gradients straight through;
    semantic float32 [N, S, D], level 0 before its projection back, straight through; commitment, a scalar: mean square
    distance of active vectors to their codes; vectors float32 [Q, N * S, D], what each level looked up, detached.
    """

    codes: torch.Tensor
    features: torch.Tensor
    semantic: torch.Tensor
    commitment: torch.Tensor
    vectors: torch.Tensor


class ResidualCodebooks(nn.Module):
    """Q codebooks of V codes. Buffers: counts_QV and sums_QVD, the moving averages, and their ratio codebooks_QVD."""

    counts_QV: torch.Tensor
    sums_QVD: torch.Tensor
    codebooks_QVD: torch.Tensor
    started: torch.Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_levels, config.codebook_size, config.code_dim or config.width)
        self.register_buffer("counts_QV", torch.zeros(shape[:2]))
        self.register_buffer("sums_QVD", torch.zeros(shape))
        self.register_buffer("codebooks_QVD", torch.zeros(shape))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.into = nn.ModuleList([self._projection(level, config.width, shape[2]) for level in range(shape[0])])
        self.back = nn.ModuleList([self._projection(level, shape[2], config.width) for level in range(shape[0])])

    def _projection(self, level: int, width_in: int, width_out: int) -> nn.Module:
        if self.config.code_dim or (self.config.split_semantic and level == 0):
            return nn.Linear(width_in, width_out, bias=False)
        return nn.Identity()

    def quantise(self, latent_NSC: torch.Tensor, active_N: torch.Tensor | None = None) -> Quantised:
        """Codes of features float32 [N, S, C], and the features that they stand for.

        active_N: int64 [N], how many levels count for each sound (1..Q; quantiser dropout); None: all. Codes and
        vectors are always those of all levels.
        """
        total_NSC, rest_NSC = torch.zeros_like(latent_NSC), latent_NSC
        codes, vectors, semantic_NSD = [], [], None
        commitment = latent_NSC.new_zeros(())
        weight = latent_NSC.new_zeros(())
        for level in range(self.config.num_levels):
            vector_NSD = self.into[level](rest_NSC)
            code_NS = nearest(vector_NSD, self.codebooks_QVD[level])
            chosen_NSD = F.embedding(code_NS, self.codebooks_QVD[level])
            straight_NSD = vector_NSD + (chosen_NSD - vector_NSD).detach()
            part_NSC = self.back[level](straight_NSD)
            keep_N = vector_NSD.new_ones(len(vector_NSD)) if active_N is None else (level < active_N).to(vector_NSD)
            total_NSC = total_NSC + part_NSC * keep_N[:, None, None]
            commitment = commitment + ((vector_NSD - chosen_NSD).square().mean(dim=(1, 2)) * keep_N).sum()
            weight = weight + keep_N.sum()
            if not (self.config.split_semantic and level == 0):
                rest_NSC = rest_NSC - part_NSC
            codes.append(code_NS)
            vectors.append(vector_NSD.detach().flatten(0, 1))
            semantic_NSD = straight_NSD if semantic_NSD is None else semantic_NSD
        assert semantic_NSD is not None
        return Quantised(
            torch.stack(codes, dim=2), total_NSC, semantic_NSD, commitment / weight, torch.stack(vectors)
        )  # fmt: skip

    def encode(self, latent_SC: torch.Tensor) -> torch.Tensor:
        """int64 codes [S, Q] of features float32 [S, C]."""
        return self.quantise(latent_SC[None]).codes[0]

    def decode(self, codes_SQ: torch.Tensor) -> torch.Tensor:
        """Features float32 [S, C] of codes int64 [S, Q'], Q' <= Q levels."""
        parts = [
            self.back[level](F.embedding(codes_SQ[:, level], self.codebooks_QVD[level]))
            for level in range(codes_SQ.shape[1])
        ]
        return torch.stack(parts).sum(dim=0)

    @torch.no_grad()
    def initialise(self, latent_NSC: torch.Tensor, generator: torch.Generator) -> None:
        """Start every codebook by k-means on the features [N, S, C] of all ranks, level after level.

        With fewer vectors than codes, the other codes start beside drawn vectors with a count of zero, so that the next
        calls of `learn` restart them from vectors of their batches.
        """
        rest_NSC = latent_NSC
        for level in range(self.config.num_levels):
            vectors_MD = gather_rows(self.into[level](rest_NSC).flatten(0, 1))
            centres_VD, counts_V = _start(vectors_MD, self.config.codebook_size, generator)
            self.codebooks_QVD[level] = _from_rank_0(centres_VD)
            self.counts_QV[level] = _from_rank_0(counts_V)
            self.sums_QVD[level] = self.codebooks_QVD[level] * self.counts_QV[level, :, None]
            if not (self.config.split_semantic and level == 0):
                code_NS = nearest(self.into[level](rest_NSC), self.codebooks_QVD[level])
                rest_NSC = rest_NSC - self.back[level](F.embedding(code_NS, self.codebooks_QVD[level]))
        self.started.fill_(True)

    @torch.no_grad()
    def learn(self, found: Quantised, generator: torch.Generator) -> dict[str, list[float]]:
        """One step of the moving averages on what `quantise` gave, over all ranks, then restart of dead codes.

        counts = decay * counts + (1 - decay) * batch counts, sums likewise; a code is sums / counts. Returns, per
        level, of this batch: "perplexity", "used_share" and "restarted" (a number of codes).
        """
        config = self.config
        codes_QM = found.codes.flatten(0, 1).T
        batch_QVD1 = self.sums_QVD.new_zeros((*self.sums_QVD.shape[:2], self.sums_QVD.shape[2] + 1))
        for level in range(config.num_levels):
            ones_M1 = torch.ones_like(found.vectors[level, :, :1])
            batch_QVD1[level].index_add_(0, codes_QM[level], torch.cat([found.vectors[level], ones_M1], dim=1))
        _all_reduce(batch_QVD1)
        counts_QV = batch_QVD1[..., -1]
        self.counts_QV.mul_(config.decay).add_(counts_QV, alpha=1 - config.decay)
        self.sums_QVD.mul_(config.decay).add_(batch_QVD1[..., :-1], alpha=1 - config.decay)
        alive_QV1 = (self.counts_QV > 0)[..., None]
        ratio_QVD = self.sums_QVD / self.counts_QV.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        self.codebooks_QVD.copy_(torch.where(alive_QV1, ratio_QVD, self.codebooks_QVD))
        restarted = [self._restart(level, found.vectors[level], generator) for level in range(config.num_levels)]
        share_QV = counts_QV / counts_QV.sum(dim=1, keepdim=True)
        entropy_Q = -(share_QV * share_QV.clamp(min=1e-12).log()).sum(dim=1)
        return {
            "perplexity": entropy_Q.exp().tolist(),
            "used_share": (counts_QV > 0).float().mean(dim=1).tolist(),
            "restarted": [float(number) for number in restarted],
        }

    def _restart(self, level: int, vectors_MD: torch.Tensor, generator: torch.Generator) -> int:
        """Move the dead codes of a level to vectors drawn from all ranks' batch; how many were moved."""
        mean = self.counts_QV[level].mean()
        dead_V = self.counts_QV[level] < self.config.restart_below * mean
        number = int(dead_V.sum())
        if number:
            drawn_VD = draw_rows(vectors_MD, number, generator)
            # The mean count gives a new code the time of log(restart_below) / log(decay) steps to be chosen.
            self.codebooks_QVD[level, dead_V] = drawn_VD
            self.counts_QV[level, dead_V] = mean
            self.sums_QVD[level, dead_V] = drawn_VD * mean
        return number


def nearest(vectors_NSD: torch.Tensor, codebook_VD: torch.Tensor) -> torch.Tensor:
    """int64 [N, S]: the nearest code of each vector [N, S, D]; of equally near ones the lowest."""
    distance_NSV = codebook_VD.square().sum(dim=1) - 2 * (vectors_NSD @ codebook_VD.T)
    return distance_NSV.argmin(dim=2)


def draw_active(count: int, num_levels: int, dropout: float, generator: torch.Generator) -> torch.Tensor:
    """int64 [count]: how many levels count for each sound; with probability `dropout` uniform in 1..Q, else all Q."""
    some_N = torch.randint(1, num_levels + 1, (count,), generator=generator)
    dropped_N = torch.rand(count, generator=generator) < dropout
    return torch.where(dropped_N, some_N, num_levels)


def gather_rows(rows_MD: torch.Tensor) -> torch.Tensor:
    """The rows [M, D] of all ranks one after another; ranks may have different M."""
    if not _distributed():
        return rows_MD
    numbers_R = _row_counts(rows_MD)
    padded_MD = F.pad(rows_MD, (0, 0, 0, int(numbers_R.max()) - len(rows_MD))).contiguous()
    parts = [torch.empty_like(padded_MD) for _ in numbers_R]
    dist.all_gather(parts, padded_MD)
    return torch.cat([part[:number] for part, number in zip(parts, numbers_R.tolist(), strict=True)])


def draw_rows(rows_MD: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """`number` rows drawn from the rows [M, D] of all ranks, the same on every rank; repeated when they are few."""
    numbers_R = _row_counts(rows_MD)
    total = int(numbers_R.sum())
    order = [torch.randperm(total, generator=generator) for _ in range(math.ceil(number / total))]
    index_K = _from_rank_0(torch.cat(order)[:number].to(rows_MD.device))
    if not _distributed():
        return rows_MD[index_K]
    own_K = index_K - int(numbers_R[: dist.get_rank()].sum())
    mine_K = (own_K >= 0) & (own_K < len(rows_MD))
    drawn_KD = torch.where(mine_K[:, None], rows_MD[own_K.clamp(0, len(rows_MD) - 1)], 0.0)
    return _all_reduce(drawn_KD)  # one rank adds the row, the others zeros: exact


def _start(vectors_MD: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means: centres [count, D] and how many vectors [M, D] chose each [count]."""
    order = torch.cat(
        [torch.randperm(len(vectors_MD), generator=generator) for _ in range(count // len(vectors_MD) + 1)]
    )
    centres_VD = vectors_MD[order[:count].to(vectors_MD.device)]
    jitter_VD = torch.randn(centres_VD.shape, generator=generator).to(centres_VD) * START_JITTER * vectors_MD.std()
    repeated_V1 = (torch.arange(count, device=centres_VD.device) >= len(vectors_MD))[:, None]
    centres_VD = torch.where(repeated_V1, centres_VD + jitter_VD.nan_to_num(), centres_VD)
    for _ in range(START_ROUNDS):
        code_M = nearest(vectors_MD[None], centres_VD)[0]
        counts_V = torch.bincount(code_M, minlength=count).to(vectors_MD)
        sums_VD = torch.zeros_like(centres_VD).index_add_(0, code_M, vectors_MD)
        centres_VD = torch.where(counts_V[:, None] > 0, sums_VD / counts_V.clamp(min=1)[:, None], centres_VD)
    code_M = nearest(vectors_MD[None], centres_VD)[0]
    return centres_VD, torch.bincount(code_M, minlength=count).to(vectors_MD)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    if _distributed():
        dist.all_reduce(tensor)
    return tensor


def _from_rank_0(tensor: torch.Tensor) -> torch.Tensor:
    if _distributed():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def _row_counts(rows_MD: torch.Tensor) -> torch.Tensor:
    """int64 [R], how many rows each rank has."""
    own = torch.tensor([len(rows_MD)], device=rows_MD.device)
    if not _distributed():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)

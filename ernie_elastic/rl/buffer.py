"""U-RB, the unbiased replay buffer: answers grow in parallel, training keeps the order of the data.

Query i is the i-th of the data order; D_t, the queries of iteration t, is fixed as [t * train_batch,
(t + 1) * train_batch). A buffer that trains whatever is done first trains short answers first, so difficulty drifts;
here only D_t trains at iteration t, while the engine fills its idle slots with later queries. paper: section 6.1.

Policy version v is the weights after v iterations; iteration t starts from version t. Letters: G answers, T tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ernie_elastic.errors import ConfigError, DataError


@dataclass(frozen=True)
class BufferConfig:
    """Sizes of the buffer; each must be at least 1, else ConfigError.

    train_batch: queries of one iteration. buffer_size: the paper's N; P_infer holds train_batch * buffer_size queries
    and 1 means synchronous training. group_size: answers of one query. paper: section 6.1; the report gives no
    numbers, so the defaults are ours.
    """

    train_batch: int = 8
    buffer_size: int = 2
    group_size: int = 8

    def __post_init__(self) -> None:
        for name in ("train_batch", "buffer_size", "group_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rl.{name} {getattr(self, name)} must be at least 1")

    @property
    def capacity(self) -> int:
        """Queries that P_infer holds at most. paper: section 6.1."""
        return self.train_batch * self.buffer_size

    @property
    def max_staleness(self) -> int:
        """Iterations between the weights that made a token and those that train on it, at most. paper: section 6.1."""
        return self.buffer_size - 1


class RolloutId(NamedTuple):
    """Which answer: the query's place in the data order, and the answer's in its group. Sorts in data order."""

    query: int
    answer: int


@dataclass(frozen=True)
class Rollout:
    """A copy of one answer so far. An answer that was resumed with newer weights spans several policy versions.

    token_ids: ids, without the prompt. log_probs: nats, of each token under the engine that sampled it. versions: the
    policy version that sampled each token, never decreasing. finished: it ended, by EOS or by the length limit.
    """

    id: RolloutId
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    versions: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class TrainBatch:
    """D_t as it sits in P_train. groups: for each query in data order, its group_size finished answers.

    staleness: iterations between the oldest token's weights and those that train on it, at most buffer_size - 1.
    """

    iteration: int
    groups: tuple[tuple[Rollout, ...], ...]
    staleness: int


@dataclass(frozen=True)
class RolloutTensors:
    """Answers padded at the end to the longest: ids int64, log-probs float32 (nats), versions int32, mask bool, [G, T].

    Padding: id pad_id, log-prob 0, version -1, mask False.
    """

    token_ids_GT: torch.Tensor
    rollout_log_probs_GT: torch.Tensor
    versions_GT: torch.Tensor
    mask_GT: torch.Tensor


@dataclass
class _Answer:
    """One growing answer inside the buffer."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    running: bool = False
    finished: bool = False

    def copy_as(self, id: RolloutId) -> Rollout:
        return Rollout(id, tuple(self.token_ids), tuple(self.log_probs), tuple(self.versions), self.finished)


class UnbiasedReplayBuffer:
    """P_infer and P_train, driven by a loop; it starts no engine and touches no weights. paper: section 6.1.

    The loop: `next_rollouts` for free slots, `report` for what the engine made, `take_batch` until it gives D_t,
    `pause` before the weights change, `finish_training` after. The engine may go on while D_t trains, but queries of
    D_(t+N) are admitted only after `finish_training`, since they would train N versions late (ours: the paper stops
    the engine). Raises ConfigError unless start_iteration, where a resumed run goes on, lies in 0..num_iterations.
    """

    def __init__(self, config: BufferConfig, num_iterations: int, start_iteration: int = 0) -> None:
        if not 0 <= start_iteration <= num_iterations:
            raise ConfigError(
                f"rl: start_iteration {start_iteration} must lie in 0..{num_iterations}, the number of iterations"
            )
        self.config = config
        self.num_iterations = num_iterations
        self._version = start_iteration  # a resumed run starts with no partial answers: they belong to lost weights
        self._training = False
        self._admitted = start_iteration * config.train_batch
        self._answers: dict[RolloutId, _Answer] = {}
        self._unfinished: dict[int, int] = {}  # per query in P_infer, its answers that still grow
        self._waiting: list[RolloutId] = []  # heap: the oldest query first, so that D_t is never held up

    @property
    def policy_version(self) -> int:
        """Iterations trained so far; the version of the newest weights, and t of the D_t that trains next or now."""
        return self._version

    @property
    def done(self) -> bool:
        """True when every iteration has been trained."""
        return self._version >= self.num_iterations

    @property
    def room(self) -> int:
        """Queries that may enter P_infer now, under its capacity, the staleness bound and the end of the data."""
        limit = min(self._version + self.config.buffer_size, self.num_iterations) * self.config.train_batch
        return limit - self._admitted

    @property
    def occupancy(self) -> int:
        """Queries in P_infer, at most the capacity."""
        return len(self._unfinished)

    def next_rollouts(self, slots: int) -> list[Rollout]:
        """Up to `slots` answers to start (no tokens yet) or resume, in data order; they count as running from here on.

        Fewer come back only when no answer waits and P_infer has no room. Weights of `policy_version` must be in the
        engine first. ours: data order among the waiting, so that later queries only use slots that D_t leaves free.
        """
        while len(self._waiting) < slots and self.room > 0:
            self._admit()
        ids = [heapq.heappop(self._waiting) for _ in range(min(slots, len(self._waiting)))]
        for id in ids:
            self._answers[id].running = True
        return [self._answers[id].copy_as(id) for id in ids]

    def report(
        self, id: RolloutId, token_ids: Sequence[int], log_probs: Sequence[float], version: int, finished: bool = False
    ) -> None:
        """Append tokens that the engine sampled with the weights of `version`, and their log-probs in nats.

        Raises DataError, and keeps nothing, when the answer is not running, the two lengths differ, a log-prob is not
        finite, a finished answer is empty, or the version is unknown, older than the answer's last token, or so old
        that the token would train more than buffer_size - 1 iterations late.
        """
        answer = self._running_answer(id)
        self._check_tokens(id, answer, token_ids, log_probs, finished)
        self._check_version(id, answer, version)
        answer.token_ids.extend(token_ids)
        answer.log_probs.extend(log_probs)
        answer.versions.extend([version] * len(token_ids))
        if finished:
            answer.running, answer.finished = False, True
            self._unfinished[id.query] -= 1

    def pause(self) -> list[RolloutId]:
        """Stop every running answer; they wait, with the tokens reported so far, to be resumed with newer weights.

        Returns them in data order. What the engine made but did not report is lost: report first.
        """
        ids = sorted(id for id, answer in self._answers.items() if answer.running)
        for id in ids:
            self._answers[id].running = False
            heapq.heappush(self._waiting, id)
        return ids

    def take_batch(self) -> TrainBatch | None:
        """Move D_t to P_train and return it, or None while one of its answers still grows or when all is trained.

        Raises ConfigError while P_train is taken. paper: section 6.1 (data-ordering constraint).
        """
        if self._training:
            raise ConfigError(
                f"rl: P_train already holds D_{self._version}; call finish_training before the next take_batch"
            )
        first = self._version * self.config.train_batch
        queries = range(first, first + self.config.train_batch)
        if self.done or any(self._unfinished.get(query, 1) for query in queries):
            return None
        groups = tuple(tuple(self._answers[id].copy_as(id) for id in self._ids(query)) for query in queries)
        oldest = min(rollout.versions[0] for group in groups for rollout in group)
        staleness = self._version - oldest
        assert staleness <= self.config.max_staleness, (staleness, self.config.max_staleness)
        for query in queries:
            del self._unfinished[query]
            for id in self._ids(query):
                del self._answers[id]
        self._training = True
        return TrainBatch(self._version, groups, staleness)

    def finish_training(self) -> None:
        """D_t is trained: P_train empties, the policy version goes up by one. ConfigError when P_train is empty."""
        if not self._training:
            raise ConfigError(f"rl: P_train holds nothing at iteration {self._version}; call take_batch first")
        self._training = False
        self._version += 1

    def _ids(self, query: int) -> Iterable[RolloutId]:
        return (RolloutId(query, answer) for answer in range(self.config.group_size))

    def _admit(self) -> None:
        """Put the next query of the data order, and no other, into P_infer."""
        query, self._admitted = self._admitted, self._admitted + 1
        self._unfinished[query] = self.config.group_size
        assert self.occupancy <= self.config.capacity, (self.occupancy, self.config.capacity)
        for id in self._ids(query):
            self._answers[id] = _Answer()
            heapq.heappush(self._waiting, id)

    def _running_answer(self, id: RolloutId) -> _Answer:
        answer = self._answers.get(id)
        if answer is None or not answer.running:
            state = "unknown" if answer is None else "finished" if answer.finished else "waiting"
            raise DataError(
                f"rl: tokens for answer {id.answer} of query {id.query}, which is {state}, not running; report only "
                "what next_rollouts handed out since the last pause"
            )
        return answer

    def _check_tokens(
        self, id: RolloutId, answer: _Answer, token_ids: Sequence[int], log_probs: Sequence[float], finished: bool
    ) -> None:
        where = f"rl: answer {id.answer} of query {id.query}"
        if len(token_ids) != len(log_probs):
            raise DataError(f"{where}: {len(token_ids)} tokens but {len(log_probs)} log-probs; give one for each token")
        bad = [value for value in log_probs if not math.isfinite(value)]
        if bad:
            raise DataError(f"{where}: log-prob {bad[0]} of a sampled token must be finite; check the engine's sampler")
        if finished and not (answer.token_ids or token_ids):
            raise DataError(f"{where} is finished with 0 tokens, at least 1 is needed; count its EOS as a token")

    def _check_version(self, id: RolloutId, answer: _Answer, version: int) -> None:
        iteration = id.query // self.config.train_batch
        oldest = max(iteration - self.config.max_staleness, answer.versions[-1] if answer.versions else 0)
        if not oldest <= version <= self._version:
            raise DataError(
                f"rl: answer {id.answer} of query {id.query}: policy version {version} must lie in "
                f"{oldest}..{self._version}; give the engine the newest weights before it samples on"
            )


def stack_rollouts(rollouts: Sequence[Rollout], pad_id: int = 0) -> RolloutTensors:
    """Pad G answers to [G, T] tensors for the objective; the prompt is not part of them.

    Raises DataError without answers. ours: one shape for a whole group.
    """
    if not rollouts:
        raise DataError("rl: 0 answers to stack, at least 1 is needed; pass the groups of a TrainBatch")
    shape = (len(rollouts), max(len(rollout.token_ids) for rollout in rollouts))
    token_ids_GT = torch.full(shape, pad_id, dtype=torch.int64)
    log_probs_GT = torch.zeros(shape, dtype=torch.float32)
    versions_GT = torch.full(shape, -1, dtype=torch.int32)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        token_ids_GT[row, :length] = torch.tensor(rollout.token_ids, dtype=torch.int64)
        log_probs_GT[row, :length] = torch.tensor(rollout.log_probs, dtype=torch.float32)
        versions_GT[row, :length] = torch.tensor(rollout.versions, dtype=torch.int32)
    return RolloutTensors(token_ids_GT, log_probs_GT, versions_GT, versions_GT >= 0)

"""A clock for rollouts: an engine with slots, where each running answer grows by one token a tick.

Shared by the tests of the buffer. Decoding is bound by memory, so a tick costs the same for any number of busy slots.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ernie_elastic.rl.buffer import Rollout, RolloutId, TrainBatch, UnbiasedReplayBuffer

Lengths = Sequence[Sequence[int]]  # tokens of each answer of each query, in data order


@dataclass
class Trace:
    """What a run did. idle: ticks with a free slot although an answer within P_infer's capacity could have run.

    stopped: for each batch, the queries that were running when the engine stopped for its training.
    """

    batches: list[TrainBatch] = field(default_factory=list)
    ticks: int = 0
    idle: int = 0
    peak_occupancy: int = 0
    stopped: list[set[int]] = field(default_factory=list)


def log_prob_of(id: RolloutId, position: int) -> float:
    """A log-prob that names its token, so that a test can find it again."""
    return -(id.query + id.answer / 100 + position / 10000)


def run_buffer(buffer: UnbiasedReplayBuffer, lengths: Lengths, slots: int, overlap_ticks: int = 0) -> Trace:
    """Drive the buffer to its end; overlap_ticks: ticks that the engine goes on with old weights while D_t trains."""
    trace, running = Trace(), dict[RolloutId, Rollout]()
    made: dict[RolloutId, int] = {}

    def tick() -> int:
        for rollout in buffer.next_rollouts(slots - len(running)):
            running[rollout.id] = rollout
            assert made.setdefault(rollout.id, 0) == len(rollout.token_ids)
        could_run = [id for id in within_capacity(buffer) if made.get(id, 0) < lengths[id.query][id.answer]]
        trace.idle += len(running) < min(slots, len(could_run))
        trace.peak_occupancy = max(trace.peak_occupancy, buffer.occupancy)
        busy = len(running)
        advance(buffer, running, made, lengths)
        return busy

    while not buffer.done:
        while (batch := buffer.take_batch()) is None:
            assert tick(), "nothing runs, and yet D_t is not done"
            trace.ticks += 1
        trace.batches.append(batch)
        for _ in range(overlap_ticks):
            tick()
        assert {*buffer.pause()} == {*running}
        trace.stopped.append({id.query for id in running})
        running.clear()
        buffer.finish_training()
    return trace


def within_capacity(buffer: UnbiasedReplayBuffer) -> list[RolloutId]:
    """All answers of D_t to D_(t+N-1), counted here from the definition, not from the buffer's books."""
    config = buffer.config
    first = buffer.policy_version * config.train_batch
    last = min(first + config.train_batch * config.buffer_size, buffer.num_iterations * config.train_batch)
    return [RolloutId(query, answer) for query in range(first, last) for answer in range(config.group_size)]


def advance(
    buffer: UnbiasedReplayBuffer, running: dict[RolloutId, Rollout], made: dict[RolloutId, int], lengths: Lengths
) -> None:
    """One token for every running answer; those that are done leave their slots."""
    for id in list(running):
        position = made[id]
        made[id] += 1
        finished = made[id] == lengths[id.query][id.answer]
        buffer.report(id, [position], [log_prob_of(id, position)], buffer.policy_version, finished)
        if finished:
            del running[id]


def synchronous_ticks(lengths: Lengths, train_batch: int, slots: int) -> int:
    """Ticks of generation when a batch starts after the last one trained: answers in order, on the first free slot."""
    total = 0
    for start in range(0, len(lengths), train_batch):
        free = [0] * slots
        for tokens in (tokens for query in lengths[start : start + train_batch] for tokens in query):
            heapq.heappush(free, heapq.heappop(free) + tokens)
        total += max(free)
    return total


def versions_by_query(batch: TrainBatch) -> Mapping[int, set[int]]:
    """Policy versions that the answers of each query were made with."""
    return {group[0].id.query: {v for rollout in group for v in rollout.versions} for group in batch.groups}

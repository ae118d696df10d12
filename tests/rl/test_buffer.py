"""U-RB trains in data order whatever the lengths, stays within its staleness, leaves no slot idle, and is no slower."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.rl.buffer import BufferConfig, RolloutId, UnbiasedReplayBuffer, stack_rollouts
from tests.rl.simulator import log_prob_of, run_buffer, synchronous_ticks, versions_by_query


@st.composite
def workloads(draw):
    """A config, the lengths of all answers (short ones, with rare very long ones), and a number of slots."""
    config = BufferConfig(draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    queries = config.train_batch * draw(st.integers(1, 5))
    length = st.one_of(st.integers(1, 6), st.integers(1, 6), st.integers(20, 60))
    group = st.lists(length, min_size=config.group_size, max_size=config.group_size)
    lengths = draw(st.lists(group, min_size=queries, max_size=queries))
    return config, lengths, draw(st.integers(1, 2 * config.train_batch * config.group_size))


def run(config, lengths, slots, overlap_ticks=0):
    buffer = UnbiasedReplayBuffer(config, len(lengths) // config.train_batch)
    return run_buffer(buffer, lengths, slots, overlap_ticks)


@given(workloads(), st.integers(0, 5))
def test_training_order_is_the_data_order_and_nothing_is_lost(workload, overlap_ticks):
    config, lengths, slots = workload
    trace = run(config, lengths, slots, overlap_ticks)
    rollouts = [rollout for batch in trace.batches for group in batch.groups for rollout in group]
    in_order = [RolloutId(query, answer) for query in range(len(lengths)) for answer in range(config.group_size)]
    assert [rollout.id for rollout in rollouts] == in_order
    assert [batch.iteration for batch in trace.batches] == list(range(len(trace.batches)))
    assert all(len(batch.groups) == config.train_batch for batch in trace.batches)
    for rollout in rollouts:
        length = lengths[rollout.id.query][rollout.id.answer]
        assert rollout.finished and rollout.token_ids == tuple(range(length))
        assert rollout.log_probs == tuple(log_prob_of(rollout.id, position) for position in range(length))
        assert len(rollout.versions) == length


@given(workloads(), st.integers(0, 5))
def test_staleness_is_bounded_by_n_minus_1(workload, overlap_ticks):
    config, lengths, slots = workload
    trace = run(config, lengths, slots, overlap_ticks)
    for batch in trace.batches:
        oldest = min(min(versions) for versions in versions_by_query(batch).values())
        assert batch.staleness == batch.iteration - oldest <= config.buffer_size - 1
        for group in batch.groups:
            for rollout in group:
                assert list(rollout.versions) == sorted(rollout.versions)
                assert max(rollout.versions) <= batch.iteration


def test_the_staleness_bound_is_reached():
    # Query 1 starts with query 0, is done at once, and waits for its turn: its tokens are as old as they may get.
    trace = run(BufferConfig(train_batch=1, buffer_size=4, group_size=1), [[9]] + [[1]] * 3, slots=4)
    assert [batch.staleness for batch in trace.batches] == [0, 1, 2, 3]


@given(workloads(), st.integers(0, 5))
def test_no_slot_is_idle_while_p_infer_has_room(workload, overlap_ticks):
    config, lengths, slots = workload
    trace = run(config, lengths, slots, overlap_ticks)
    assert trace.idle == 0
    assert trace.peak_occupancy <= config.capacity
    ample = run(config, lengths, slots=len(lengths) * config.group_size)
    assert ample.peak_occupancy == min(config.capacity, len(lengths)), "P_infer fills when slots allow"


def test_short_of_slots_only_when_nothing_waits_and_the_room_is_used():
    config = BufferConfig(train_batch=2, buffer_size=2, group_size=3)
    buffer = UnbiasedReplayBuffer(config, num_iterations=5)
    ids = [rollout.id for rollout in buffer.next_rollouts(100)]
    assert ids == [RolloutId(query, answer) for query in range(4) for answer in range(3)]
    assert buffer.room == 0 and buffer.occupancy == config.capacity and buffer.next_rollouts(1) == []


@given(workloads())
def test_generation_takes_no_longer_than_synchronous(workload):
    config, lengths, slots = workload
    assert run(config, lengths, slots).ticks <= synchronous_ticks(lengths, config.train_batch, slots)


def test_buffer_of_1_is_synchronous_and_a_long_tail_is_what_a_larger_one_hides():
    lengths = [[40] if query % 4 == 3 else [5] for query in range(16)]
    sync = synchronous_ticks(lengths, 4, slots=4)
    assert run(BufferConfig(4, 1, 1), lengths, slots=4).ticks == sync == 160
    assert run(BufferConfig(4, 4, 1), lengths, slots=4).ticks < 0.7 * sync


def test_figure_5_trains_0_to_15_in_order_while_16_and_17_are_running():
    lengths = [[4]] * 20
    lengths[11], lengths[14], lengths[15] = [30], [34], [34]
    lengths[16:] = [[50]] * 4
    trace = run(BufferConfig(train_batch=4, buffer_size=3, group_size=1), lengths, slots=4)
    trained = [group[0].id.query for batch in trace.batches[:4] for group in batch.groups]
    assert trained == list(range(16)) and {16, 17} <= trace.stopped[3]


def test_an_answer_spans_the_versions_that_made_it():
    buffer = UnbiasedReplayBuffer(BufferConfig(train_batch=1, buffer_size=2, group_size=1), num_iterations=2)
    first, second = (rollout.id for rollout in buffer.next_rollouts(2))
    buffer.report(second, [7, 8], [-0.5, -0.25], version=0)
    buffer.report(first, [1], [-1.0], version=0, finished=True)
    assert buffer.take_batch().groups[0][0].token_ids == (1,)
    assert buffer.pause() == [second]
    buffer.finish_training()
    (resumed,) = buffer.next_rollouts(5)
    assert resumed.token_ids == (7, 8) and not resumed.finished
    buffer.report(second, [9], [-2.0], version=1, finished=True)
    batch = buffer.take_batch()
    (rollout,) = batch.groups[0]
    assert batch.staleness == 1 and rollout.versions == (0, 0, 1) and rollout.log_probs == (-0.5, -0.25, -2.0)
    buffer.finish_training()
    assert buffer.done and buffer.take_batch() is None and buffer.next_rollouts(1) == []


def test_an_engine_that_lags_keeps_its_own_version_within_the_bound():
    buffer = UnbiasedReplayBuffer(BufferConfig(train_batch=1, buffer_size=2, group_size=1), num_iterations=2)
    first, second = (rollout.id for rollout in buffer.next_rollouts(2))
    buffer.report(first, [1], [-1.0], version=0, finished=True)
    buffer.take_batch()
    buffer.finish_training()
    buffer.report(second, [2], [-1.0], version=0)  # no pause: the engine still has the old weights
    buffer.report(second, [3], [-1.0], version=1, finished=True)
    assert buffer.take_batch().groups[0][0].versions == (0, 1)


def test_a_resumed_run_goes_on_with_the_same_data():
    buffer = UnbiasedReplayBuffer(BufferConfig(2, 2, 1), num_iterations=4, start_iteration=2)
    trace = run_buffer(buffer, [[3]] * 8, slots=3)
    assert [group[0].id.query for batch in trace.batches for group in batch.groups] == [4, 5, 6, 7]
    assert [batch.iteration for batch in trace.batches] == [2, 3]


def test_p_train_holds_one_batch():
    buffer = UnbiasedReplayBuffer(BufferConfig(1, 2, 1), num_iterations=3)
    with pytest.raises(ConfigError, match="P_train holds nothing at iteration 0"):
        buffer.finish_training()
    for rollout in buffer.next_rollouts(2):
        buffer.report(rollout.id, [1], [-1.0], version=0, finished=True)
    assert buffer.take_batch() is not None
    with pytest.raises(ConfigError, match="P_train already holds D_0"):
        buffer.take_batch()
    assert buffer.room == 0, "a query admitted now would train 2 versions late"
    buffer.finish_training()
    assert buffer.room == 1


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ((RolloutId(5, 0), [1], [-1.0], 1), "query 5, which is unknown"),
        ((RolloutId(2, 0), [1, 2], [-1.0], 1), "2 tokens but 1 log-probs"),
        ((RolloutId(2, 0), [1], [float("nan")], 1), "log-prob nan"),
        ((RolloutId(2, 0), [], [], 1, True), "finished with 0 tokens"),
        ((RolloutId(2, 0), [1], [-1.0], 2), r"version 2 must lie in 1\.\.1"),
        ((RolloutId(2, 0), [1], [-1.0], 0), r"version 0 must lie in 1\.\.1"),
    ],
)
def test_wrong_reports_are_refused_and_leave_nothing(report, message):
    buffer = UnbiasedReplayBuffer(BufferConfig(1, 2, 1), num_iterations=4)
    for rollout in buffer.next_rollouts(2):
        buffer.report(rollout.id, [1], [-1.0], version=0, finished=True)
    buffer.take_batch()
    buffer.finish_training()
    (running,) = buffer.next_rollouts(4)
    with pytest.raises(DataError, match=message):
        buffer.report(*report)
    assert buffer.pause() == [running.id]
    assert buffer.next_rollouts(1)[0].token_ids == ()
    buffer.pause()
    with pytest.raises(DataError, match="query 2, which is waiting"):
        buffer.report(running.id, [1], [-1.0], 1)


def test_stacked_answers_are_padded_behind():
    buffer = UnbiasedReplayBuffer(BufferConfig(1, 1, 2), num_iterations=1)
    for rollout, tokens in zip(buffer.next_rollouts(2), ([4, 5, 6], [7]), strict=True):
        buffer.report(rollout.id, tokens, [-0.5] * len(tokens), version=0, finished=True)
    stacked = stack_rollouts(buffer.take_batch().groups[0], pad_id=9)
    assert stacked.token_ids_GT.tolist() == [[4, 5, 6], [7, 9, 9]]
    assert stacked.mask_GT.tolist() == [[True, True, True], [True, False, False]]
    assert stacked.rollout_log_probs_GT.tolist() == [[-0.5] * 3, [-0.5, 0.0, 0.0]]
    assert stacked.versions_GT.tolist() == [[0, 0, 0], [0, -1, -1]] and stacked.versions_GT.dtype == torch.int32
    with pytest.raises(DataError, match="0 answers to stack"):
        stack_rollouts([])


def test_sizes_are_checked():
    with pytest.raises(ConfigError, match="buffer_size 0 must be at least 1"):
        BufferConfig(buffer_size=0)
    with pytest.raises(ConfigError, match=r"start_iteration 3 must lie in 0\.\.2"):
        UnbiasedReplayBuffer(BufferConfig(), num_iterations=2, start_iteration=3)

"""Engine output as a trace, and a cut model's counts in its parent's numbering."""

from __future__ import annotations

import numpy as np
import pytest

from ernie_elastic.analysis.convert import in_parent_numbering, trace_from_arrays
from ernie_elastic.analysis.trace import TraceHeader, counts_from_trace
from ernie_elastic.errors import DataError

HEADER = TraceHeader("engine", "full", 300, 2, (0, 1))


def test_requests_become_one_trace():
    first = np.array([[[0, 299], [5, 6]]], dtype=np.int32)
    second = np.array([[[1, 2], [3, 4]], [[2, 1], [4, 3]]], dtype=np.int64)
    trace = trace_from_arrays([first, second, first], ["text", "audio", "text"], HEADER)
    assert trace.expert_ids.dtype == np.uint16 and trace.task_names == ("text", "audio")
    assert trace.task.tolist() == [0, 1, 1, 0] and trace.expert_ids[0, 0].tolist() == [0, 299]
    assert counts_from_trace(trace).tokens.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("arrays", "tasks", "message"),
    [
        ([], [], "0 arrays for 0 tasks"),
        ([np.zeros((1, 2, 2), int)], ["a", "b"], "1 arrays for 2 tasks"),
        ([np.zeros((1, 3, 2), int)], ["a"], r"request 0 has shape \[1, 3, 2\]"),
        ([np.full((1, 2, 2), 300)], ["a"], r"300\.\.300, expected 0\.\.299"),
        ([np.full((1, 2, 2), -1)], ["a"], r"-1\.\.-1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, tasks, message):
    with pytest.raises(DataError, match=message):
        trace_from_arrays(arrays, tasks, HEADER)


def test_a_cut_model_is_counted_under_its_parents_ids(make_trace):
    counts = counts_from_trace(make_trace(experts=4, top_k=2, layers=2, tokens=20))
    wide = in_parent_numbering(counts, [(1, 3, 5, 7), (0, 2, 4, 6)], 8, layers=(0, 5))
    assert wide.header.num_experts == 8 and wide.header.layers == (0, 5)
    assert np.array_equal(wide.counts[:, 0, 1::2], counts.counts[:, 0]) and not wide.counts[:, 0, ::2].any()
    assert np.array_equal(wide.counts[:, 1, ::2], counts.counts[:, 1])
    assert wide.header.available().sum(-1).tolist() == [4, 4]
    with pytest.raises(DataError, match=r"lists of \[3, 4\] ids, expected 2 lists of 4"):
        in_parent_numbering(counts, [(1, 3, 5), (0, 2, 4, 6)], 8)

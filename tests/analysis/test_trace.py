"""Traces and counts: what they accept, that files survive a round trip, and that damage is noticed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ernie_elastic.analysis.trace import (
    RoutingCounts,
    RoutingTrace,
    TraceHeader,
    counts_from_trace,
    load_counts,
    load_trace,
    merge,
    save_trace,
)
from ernie_elastic.errors import CheckpointError, DataError, FormatError


def tiny() -> RoutingTrace:
    """Four tokens, two layers, k = 2 of 4 experts; the last token is padding."""
    ids = np.array([[[0, 1], [2, 3]], [[0, 2], [3, 2]], [[1, 3], [0, 1]], [[0, 1], [0, 1]]], dtype=np.uint8)
    header = TraceHeader("tiny", "d2-e4-k2", 4, 2, (1, 3), "by hand")
    return RoutingTrace(
        ids,
        np.array([0, 0, 1, -1], dtype=np.int8),
        ("text", "audio"),
        header,
        phase=np.array([0, 1, 1, 0], dtype=np.uint8),
    )


def test_counts_of_a_trace_written_by_hand():
    counts = counts_from_trace(tiny())
    assert counts.tokens.tolist() == [2, 1]
    assert counts.counts.tolist() == [[[2, 1, 1, 0], [0, 0, 2, 2]], [[0, 1, 0, 1], [1, 1, 0, 0]]]
    decode = counts_from_trace(tiny(), phase="decode")
    assert decode.tokens.tolist() == [1, 1]
    assert decode.counts[0].tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]


def test_counting_in_chunks_equals_counting_at_once(make_trace, monkeypatch):
    trace = make_trace(tokens=37)
    whole = counts_from_trace(trace)
    monkeypatch.setattr("ernie_elastic.analysis.trace._CHUNK_CHOICES", 50)
    assert np.array_equal(counts_from_trace(trace).counts, whole.counts)
    assert (whole.counts.sum(-1) == 2 * whole.tokens[:, None]).all() and whole.tokens.tolist() == [37] * 7


def test_a_token_that_names_an_expert_twice_is_refused():
    trace = tiny()
    trace.expert_ids[2, 1] = [1, 1]
    with pytest.raises(DataError, match=r"token 2 names one expert twice in layer 3: \[1, 1\]"):
        counts_from_trace(trace)


def test_an_unknown_phase_names_those_there_are():
    with pytest.raises(DataError, match=r"'draft'.*prefill, decode"):
        counts_from_trace(tiny(), phase="draft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": np.zeros((4, 2, 2), np.int64)}, "expert_ids is int64"),
        ({"expert_ids": np.zeros((4, 2, 3), np.uint8)}, r"\[4, 2, 3\].*= \[4, 2, 2\]"),
        ({"expert_ids": np.full((4, 2, 2), 4, np.uint8)}, "expert id 4, the header has 4 experts"),
        ({"task": np.array([0, 0, 2, -1], np.int8)}, r"task holds -1\.\.2, expected -1\.\.1"),
        ({"task": np.zeros(4, np.int64)}, "task is int64"),
        ({"task_names": ("text", "text")}, "different names"),
        ({"phase": np.array([0, 1, 2, 0], np.uint8)}, r"phase holds 0\.\.2"),
        ({"phase": np.zeros(3, np.uint8)}, "3 phases for 4 tokens"),
        ({"weights": np.zeros((4, 2, 2), np.float32)}, "weights are float32"),
    ],
)
def test_a_trace_that_does_not_fit_itself_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(tiny(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "top_k 5 of 4"),
        ({"top_k": 0}, "top_k 0"),
        ({"layers": ()}, "non-empty"),
        ({"layers": (3, 1)}, r"\[3, 1\] must be"),
        ({"kept_experts": ((0, 1),)}, "1 kept-expert lists for 2"),
        ({"kept_experts": ((0, 1), (2,))}, r"layer 3 keeps experts \[2\]; need at least top_k = 2"),
        ({"kept_experts": ((0, 1), (2, 4))}, r"0\.\.3"),
    ],
)
def test_a_header_that_does_not_fit_itself_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(tiny().header, **change)


def test_counts_that_do_not_add_up_are_refused():
    counts = counts_from_trace(tiny())
    wrong = counts.counts.copy()
    wrong[1, 0, 1] = 0
    with pytest.raises(DataError, match=r"'audio' has 1 choices in layer 1, expected tokens \* k = 2"):
        replace(counts, counts=wrong)
    with pytest.raises(DataError, match=r"outside of 0\.\.tokens"):
        replace(counts, counts=counts.counts + np.array([[[9, -9, 0, 0]]]))
    with pytest.raises(DataError, match="layer 1 chose expert 3, which is not kept"):
        replace(counts, header=replace(counts.header, kept_experts=((0, 1, 2), (0, 1, 2, 3))))


@pytest.mark.parametrize("experts", [16, 300])
def test_round_trip_of_a_trace(make_trace, tmp_path, experts):
    trace = make_trace(experts=experts, top_k=3, layers=2, tokens=20, weights=True)
    save_trace(tmp_path / "t.npz", trace)
    again = load_trace(tmp_path / "t.npz")
    for name in ("expert_ids", "task", "phase", "weights"):
        before, after = getattr(trace, name), getattr(again, name)
        assert before.dtype == after.dtype and np.array_equal(before, after), name
    assert again.header == trace.header and again.task_names == trace.task_names
    assert again.expert_ids.dtype == (np.uint8 if experts <= 256 else np.uint16)
    assert np.array_equal(load_counts(tmp_path / "t.npz").counts, counts_from_trace(trace).counts)


def test_round_trip_of_counts_with_kept_experts(tmp_path):
    header = TraceHeader("m", "half", 4, 1, (0, 2), "", 1, ((0, 1), (1, 3)))
    counts = RoutingCounts(np.array([[[1, 2, 0, 0], [0, 3, 0, 0]]]), np.array([3]), ("text",), header)
    save_trace(tmp_path / "c.npz", counts)
    again = load_counts(tmp_path / "c.npz")
    assert again.header == header and np.array_equal(again.counts, counts.counts)
    with pytest.raises(FormatError, match=r"holds counts.*load_counts"):
        load_trace(tmp_path / "c.npz")


def test_saving_twice_gives_the_same_bytes_and_leaves_no_other_file(tmp_path):
    save_trace(tmp_path / "a.npz", tiny())
    save_trace(tmp_path / "b.npz", tiny())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def same(first: RoutingTrace, second: RoutingTrace) -> bool:
    return (
        np.array_equal(first.expert_ids, second.expert_ids)
        and np.array_equal(first.task, second.task)
        and first.phase is not None
        and np.array_equal(first.phase, second.phase)
        and first.header == second.header
        and first.task_names == second.task_names
    )


def test_every_changed_byte_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "t.npz"
    save_trace(path, tiny())
    whole, noticed = path.read_bytes(), 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(bytes(data))
        try:
            again = load_trace(path)
        except FormatError as error:
            noticed += str(path) in str(error)
        else:  # a byte that carries nothing, such as a time stamp of the archive
            assert same(again, tiny()), place
    assert noticed > len(whole) / 2


def test_every_cut_is_noticed(tmp_path):
    save_trace(tmp_path / "t.npz", tiny())
    whole = (tmp_path / "t.npz").read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"cut\.npz is not a valid routing trace"):
            load_trace(tmp_path / "cut.npz")


def test_a_missing_file_a_pickle_and_another_archive_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file"):
        load_trace(tmp_path / "none.npz")
    np.savez(tmp_path / "pickle.npz", header=np.array([{"a": 1}], dtype=object), expert_ids=np.zeros(3))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("pickle", "other"):
        with pytest.raises(FormatError, match="not a valid routing trace"):
            load_counts(tmp_path / f"{name}.npz")


def test_token_counts_and_version_of_the_header_are_compared(tmp_path):
    save_trace(tmp_path / "t.npz", tiny())
    with np.load(tmp_path / "t.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays["header"].tobytes())
    wrong_tokens = {"token_counts": {"text": 2, "audio": 9}}
    for change, message in ((wrong_tokens, r"hold \[2, 1\] tokens"), ({"version": 9}, "version 9")):
        changed = json.dumps(header | change).encode()
        np.savez(tmp_path / "u.npz", **(arrays | {"header": np.frombuffer(changed, np.uint8)}))
        with pytest.raises(FormatError, match=message):
            load_trace(tmp_path / "u.npz")


def test_merging_parts_equals_the_whole(make_trace):
    trace = make_trace(tokens=30, weights=True)
    parts = [
        replace(
            trace,
            expert_ids=trace.expert_ids[part],
            task=trace.task[part],
            phase=trace.phase[part],
            weights=trace.weights[part],
        )
        for part in (slice(0, 50), slice(50, 51), slice(51, None))
    ]
    assert same(merge(parts), trace) and np.array_equal(merge(parts).weights, trace.weights)
    summed = merge([counts_from_trace(part) for part in parts])
    assert np.array_equal(summed.counts, counts_from_trace(trace).counts)
    assert summed.counts.dtype == np.int64 and summed.tokens.tolist() == [30] * 7


def test_merging_what_differs_is_refused(make_trace):
    with pytest.raises(DataError, match="num_experts differs: 16 and 8"):
        merge([make_trace(tokens=2), make_trace(experts=8, tokens=2)])
    with pytest.raises(DataError, match="weights differs: False and True"):
        merge([make_trace(tokens=2), make_trace(tokens=2, weights=True)])
    with pytest.raises(DataError, match="nothing to merge"):
        merge([])

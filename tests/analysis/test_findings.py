"""Sentences follow the numbers, and the report's findings are judged by them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ernie_elastic.analysis import findings
from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.trace import RoutingCounts, TraceHeader, counts_from_trace


def from_frequencies(rows: dict[str, list[list[int]]]) -> RoutingCounts:
    """k = 1; per task one list of counts per layer."""
    counts = np.array(list(rows.values()), dtype=np.int64)
    layers = tuple(range(10, 10 + counts.shape[1]))
    return RoutingCounts(counts, counts[:, 0].sum(-1), tuple(rows), TraceHeader("m", "s", counts.shape[2], 1, layers))


def test_the_printed_overlaps_are_the_reports():
    first, last = findings.paper_iou("first"), findings.paper_iou("last")
    row = {name: i for i, name in enumerate(findings.PAPER_ORDER)}
    assert np.array_equal(first, first.T) and np.diag(first).tolist() == [1.0] * 6
    assert first[row["image_understanding"], row["video_understanding"]] == 0.98
    assert last[row["text"], row["audio"]] == 0.40 and last[row["video_generation"], row["image_generation"]] == 0.78
    assert findings.paper_iou("middle")[row["video_generation"], row["audio"]] == 0.10


def test_sentences_name_the_tasks_layers_and_values():
    counts = from_frequencies(
        {
            "text": [[50, 50, 50, 50], [60, 40, 50, 50]],
            "image_generation": [[10, 5, 180, 5], [0, 0, 200, 0]],
            "audio": [[20, 120, 30, 30], [120, 20, 30, 30]],
        }
    )
    assert findings.specialization_sentence(counts) == (
        "The strongest specialist is expert 2 of layer 11: 100 % of the Image Generation tokens choose it, where an "
        "even router would send 25.0 %; the tallest bar of Text is 30 %."
    )
    assert findings.overlap_sentence(counts) == (
        "The busiest experts of Text and Audio overlap most (mean IoU 0.50), those of Text and Image Generation least "
        "(0.00); two random quarters would give 0.25."
    )
    sentence = findings.entropy_sentence(counts)
    assert sentence.startswith("Text is routed most evenly (mean 1.00) and Image Generation least")
    assert sentence.endswith("the lowest point is Image Generation in layer 11 (0.00).")
    assert "Of 8 experts in 2 layers, 3 are" in findings.heat_map_sentence(counts)


def test_one_task_alone_has_sentences_too():
    counts = from_frequencies({"text": [[4, 4]], "audio": [[0, 0]]})
    assert "no pair of tasks" in findings.overlap_sentence(counts)
    assert findings.entropy_sentence(counts) == (
        "Text is routed most evenly (mean 1.00); the lowest point is Text in layer 10 (1.00)."
    )


def test_cautions_name_tasks_with_no_or_few_tokens():
    counts = from_frequencies({"text": [[100, 100]], "audio": [[0, 0]], "image_generation": [[3, 4]]})
    none, few = findings.cautions(counts)
    assert none == "No tokens of Audio in this trace; their numbers are missing, not zero."
    assert "Image Generation (3.5)" in few and "Text" not in few


def test_difference_sentence_names_what_moved_most():
    here = from_frequencies({"text": [[5, 5]], "audio": [[9, 1]]})
    there = from_frequencies({"text": [[5, 5]], "audio": [[1, 9]]})
    sentence = findings.difference_sentence(st.compare_counts(here, there))
    assert sentence.startswith("80.0 % of the Audio assignments") and sentence.endswith("for Text it is 0.0 %.")


def paper_like(depth_overlap: bool) -> RoutingCounts:
    """Eight experts, three layers: text meets audio everywhere, and vision at the last layer if asked to."""

    def layer(*top: int, base: int = 10, high: int = 100) -> list[int]:
        return [high if e in top else base for e in range(8)]

    rows = {
        "text": [layer(0, 1, high=30), layer(0, 1, high=30), layer(0, 2 if depth_overlap else 1, high=60)],
        "image_understanding": [layer(2, 3)] * 3,
        "video_understanding": [layer(2, 3)] * 3,
        "image_generation": [layer(4, 5, base=1)] * 3,
        "video_generation": [layer(4, 5, base=1)] * 3,
        "audio": [layer(0, 6, base=2)] * 3,
    }
    # every layer of a task needs the same number of choices: expert 7, in no quarter, takes what is missing
    for layers in rows.values():
        most = max(sum(values) for values in layers)
        for index, values in enumerate(layers):
            layers[index] = [*values[:7], values[7] + most - sum(values)]
    return from_frequencies(rows)


def test_a_tie_or_no_overlap_is_not_the_closest():
    def one_expert(**expert: int) -> RoutingCounts:
        rows = {}
        for name in findings.PAPER_ORDER:
            rows[name] = [[9 if e == expert.get(name, 7) else 0 for e in range(8)]] * 3
        return from_frequencies(rows)

    apart = findings.paper_findings(one_expert(text=0))[0]
    assert apart["agrees"] is False and apart["here"] == "IoU 0.00, 0.00, 0.00; closest to text: none, none, none"
    tied = findings.paper_findings(one_expert(text=0, audio=0, image_generation=0))[0]
    assert tied["agrees"] is False and tied["here"].endswith("closest to text: " + ", ".join(["Image G = Audio"] * 3))
    alone = findings.paper_findings(one_expert(text=0, audio=0))[0]
    assert alone["agrees"] is True and alone["here"] == "IoU 1.00, 1.00, 1.00; closest to text: Audio, Audio, Audio"


@pytest.mark.parametrize("depth_overlap", [True, False])
def test_verdicts_follow_the_numbers(depth_overlap):
    verdicts = {row["finding"]: row["agrees"] for row in findings.paper_findings(paper_like(depth_overlap))}
    assert verdicts["Overlap of text and vision grows with depth"] is depth_overlap
    assert verdicts["Overlap of understanding and generation stays low"] is True
    assert verdicts["Generation and audio are more concentrated than text and understanding"] is True


def test_findings_about_missing_tasks_are_not_judged(make_trace):
    counts = st.paper_rows(counts_from_trace(make_trace(tokens=20)))
    tokens = counts.tokens.copy()
    tokens[-1] = 0
    table = counts.counts.copy()
    table[-1] = 0
    rows = findings.paper_findings(replace(counts, counts=table, tokens=tokens))
    assert rows[0]["agrees"] is None and rows[0]["here"] == "no tokens of Audio"
    assert rows[1]["agrees"] in (True, False)
    short = counts_from_trace(make_trace(tokens=20, layers=2))
    assert all(row["agrees"] is None for row in findings.paper_findings(st.paper_rows(short)))

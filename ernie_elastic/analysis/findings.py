"""Plain sentences that a routing's numbers support, and the report's findings beside the same numbers here.

Every sentence is computed from counts; none is fixed text with a number in it. Rows are those of
`statistics.paper_rows`.

Shape letters: M tasks, L layers with a router, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.drawing import task_label
from ernie_elastic.analysis.trace import RoutingCounts

PAPER_ORDER = (
    "text",
    "image_understanding",
    "video_understanding",
    "image_generation",
    "video_generation",
    st.AUDIO_ROW,
)
# paper: figure 9, the printed IoU values above the diagonal, for the first, middle and last layer.
PAPER_IOU = {
    "first": (0.03, 0.03, 0.06, 0.06, 0.12, 0.98, 0.22, 0.22, 0.31, 0.22, 0.23, 0.32, 0.64, 0.31, 0.27),
    "middle": (0.21, 0.28, 0.03, 0.03, 0.32, 0.52, 0.22, 0.21, 0.25, 0.18, 0.19, 0.27, 0.83, 0.11, 0.10),
    "last": (0.29, 0.38, 0.09, 0.08, 0.40, 0.64, 0.25, 0.24, 0.63, 0.22, 0.20, 0.55, 0.78, 0.25, 0.23),
}
UNDERSTANDING, GENERATION = PAPER_ORDER[1:3], PAPER_ORDER[3:5]
FEW_HITS = 20  # ours: below this many expected choices per expert, sampling noise shows in every figure


def paper_iou(word: str) -> np.ndarray:
    """float64 [6, 6]: the report's figure 9 for the "first", "middle" or "last" layer, rows in `PAPER_ORDER`."""
    full = np.eye(len(PAPER_ORDER))
    full[np.triu_indices(len(PAPER_ORDER), 1)] = PAPER_IOU[word]
    return np.maximum(full, full.T)


def _seen(counts: RoutingCounts) -> list[int]:
    return [i for i in range(len(counts.task_names)) if counts.tokens[i] > 0]


def specialization_sentence(counts: RoutingCounts) -> str:
    """Figure 8 in words: the strongest specialist of the shown layers, and the most even task."""
    frequency, fair = st.specialization(counts), st.fair_share(counts)
    rows = [layer for layer, _ in st.shown_layers(len(counts.header.layers))]
    part = np.nan_to_num(frequency[:, rows], nan=-1.0)
    task, layer, expert = (int(i) for i in np.unravel_index(int(part.argmax()), part.shape))
    peaks = {i: float(part[i].max()) for i in _seen(counts)}
    flattest = min(peaks, key=lambda i: peaks[i])
    return (
        f"The strongest specialist is expert {expert} of layer {counts.header.layers[rows[layer]]}: "
        f"{part[task, layer, expert]:.0f} % of the {task_label(counts.task_names[task])} tokens choose it, where an "
        f"even router would send {fair[rows[layer]]:.1f} %; the tallest bar of "
        f"{task_label(counts.task_names[flattest])} is {peaks[flattest]:.0f} %."
    )


def _pairs(counts: RoutingCounts, layers: list[int]) -> list[tuple[float, int, int]]:
    """(mean IoU over the layers, task, task) of every pair with tokens, lowest first."""
    mean, seen = st.quarter_iou(counts)[layers].mean(0), _seen(counts)
    return sorted((float(mean[a, b]), a, b) for i, a in enumerate(seen) for b in seen[i + 1 :])


def overlap_sentence(counts: RoutingCounts) -> str:
    """Figure 9 in words: the pairs that overlap most and least, beside chance."""
    layers = [layer for layer, _ in st.shown_layers(len(counts.header.layers))]
    pairs, chance = _pairs(counts, layers), float(st.chance_per_layer(counts)[layers].mean())
    if not pairs:
        return "Only one task has tokens, so there is no pair of tasks to compare."
    (low, a, b), (high, c, d) = pairs[0], pairs[-1]
    name = [task_label(task) for task in counts.task_names]
    sentence = f"The busiest experts of {name[c]} and {name[d]} overlap most (mean IoU {high:.2f})"
    if len(pairs) > 1:
        sentence += f", those of {name[a]} and {name[b]} least ({low:.2f})"
    return f"{sentence}; two random quarters would give {chance:.2f}."


def entropy_sentence(counts: RoutingCounts) -> str:
    """Figure 10 in words: the most and least even task, and the deepest point."""
    entropy, seen = st.normalized_entropy(counts), _seen(counts)
    mean = {i: float(entropy[i].mean()) for i in seen}
    even, uneven = max(seen, key=lambda i: mean[i]), min(seen, key=lambda i: mean[i])
    filled = np.nan_to_num(entropy, nan=2.0)
    task, layer = (int(i) for i in np.unravel_index(int(filled.argmin()), filled.shape))
    name = [task_label(n) for n in counts.task_names]
    start = f"{name[even]} is routed most evenly (mean {mean[even]:.2f})"
    if len(seen) > 1:
        start += f" and {name[uneven]} least ({mean[uneven]:.2f})"
    place = f"layer {counts.header.layers[layer]}"
    return f"{start}; the lowest point is {name[task]} in {place} ({filled[task, layer]:.2f})."


def heat_map_sentence(counts: RoutingCounts) -> str:
    """The heat maps in words: how many experts serve one task, all tasks, or are never used."""
    served = st.tasks_served(counts).sum(0)
    unused = int(st.dead_experts(st.all_tasks(counts)).sum())
    total, tasks = int(counts.header.available().sum()), len(_seen(counts))
    return (
        f"Of {total:,} experts in {len(counts.header.layers)} layers, {served[1]:,} are at or above their fair share "
        f"for exactly one task, {served[tasks]:,} for all {tasks} and {unused:,} were never chosen."
    )


def difference_sentence(comparison: st.Comparison) -> str:
    """The comparison in words: which task's routing moved most."""
    with_tokens = [i for i in range(len(comparison.task_names)) if np.isfinite(comparison.distance[i]).all()]
    if not with_tokens:
        return "No task has tokens on both sides, so nothing can be compared."
    mean = {i: float(comparison.distance[i].mean()) for i in with_tokens}
    most, least = max(mean, key=lambda i: mean[i]), min(mean, key=lambda i: mean[i])
    name = [task_label(n) for n in comparison.task_names]
    return (
        f"{100 * mean[most]:.1f} % of the {name[most]} assignments would have to move to match the other routing, "
        f"the most of all tasks; for {name[least]} it is {100 * mean[least]:.1f} %."
    )


def cautions(counts: RoutingCounts) -> list[str]:
    """What a reader should know before trusting the figures: tasks with no or few tokens."""
    expected = counts.tokens * counts.header.top_k / counts.header.available().sum(-1).max()
    none = [task_label(n) for n, tokens in zip(counts.task_names, counts.tokens, strict=True) if tokens == 0]
    few = [
        f"{task_label(name)} ({expected[i]:.1f})"
        for i, name in enumerate(counts.task_names)
        if 0 < expected[i] < FEW_HITS
    ]
    lines = []
    if none:
        lines.append(f"No tokens of {', '.join(none)} in this trace; their numbers are missing, not zero.")
    if few:
        lines.append(
            f"Few choices per expert, on average, of {', '.join(few)}: below {FEW_HITS} the noise of sampling shows, "
            "and entropy reads too low."
        )
    return lines


def paper_findings(counts: RoutingCounts) -> list[dict[str, Any]]:
    """The report's findings: {"finding", "paper", "here", "agrees"} each; agrees is None where tasks are missing.

    paper: section 6. ours: each test in numbers, since the report states its findings in words.
    """
    checks: list[tuple[str, tuple[str, ...], Callable[[RoutingCounts], tuple[str, str, bool]]]] = [
        ("Text shares most experts with audio", PAPER_ORDER, _text_with_audio),
        ("Overlap of text and vision grows with depth", PAPER_ORDER[:5], _text_with_vision),
        ("Overlap of understanding and generation stays low", PAPER_ORDER[1:5], _understanding_with_generation),
        ("Generation and audio are more concentrated than text and understanding", PAPER_ORDER, _concentration),
        ("Text is even, with a dip in the last layer", PAPER_ORDER[:1], _text_dip),
        ("Some experts serve every task, others a single one", PAPER_ORDER[:2], _generalists),
    ]
    rows: list[dict[str, Any]] = []
    for finding, needed, check in checks:
        have = {counts.task_names[i] for i in _seen(counts)}
        missing = [task_label(name) for name in needed if name not in have]
        if missing:
            rows.append({"finding": finding, "paper": "", "here": f"no tokens of {', '.join(missing)}", "agrees": None})
            continue
        if len(counts.header.layers) < 3:
            rows.append({"finding": finding, "paper": "", "here": "fewer than three layers", "agrees": None})
            continue
        paper, here, agrees = check(counts)
        rows.append({"finding": finding, "paper": paper, "here": here, "agrees": bool(agrees)})
    return rows


def _iou_of_shown(counts: RoutingCounts) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, int]]:
    """IoU matrices of the shown layers here and in the report, and the row of each task here."""
    shown, iou = st.shown_layers(len(counts.header.layers)), st.quarter_iou(counts)
    row = {name: i for i, name in enumerate(counts.task_names)}
    return [iou[layer] for layer, _ in shown], [paper_iou(word) for _, word in shown], row


def _mean_pairs(matrix: np.ndarray, row: dict[str, int], first: tuple[str, ...], second: tuple[str, ...]) -> float:
    return float(np.mean([matrix[row[a], row[b]] for a in first for b in second]))


def _triple(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


_PAPER_ROW = {name: i for i, name in enumerate(PAPER_ORDER)}


def _text_with_audio(counts: RoutingCounts) -> tuple[str, str, bool]:
    here, paper, row = _iou_of_shown(counts)
    others = [name for name in PAPER_ORDER if name != "text"]
    closest: list[list[str]] = []
    for matrix in here:
        overlap = {name: float(matrix[row["text"], row[name]]) for name in others}
        highest = max(overlap.values())
        closest.append([name for name in others if highest > 0 and overlap[name] == highest])
    values = [float(m[row["text"], row[st.AUDIO_ROW]]) for m in here]
    partners = ", ".join(" = ".join(task_label(name, short=True) for name in names) or "none" for names in closest)
    published = _triple([float(m[0, -1]) for m in paper])
    agrees = all(names == [st.AUDIO_ROW] for names in closest)
    return f"IoU {published}", f"IoU {_triple(values)}; closest to text: {partners}", agrees


def _text_with_vision(counts: RoutingCounts) -> tuple[str, str, bool]:
    here, paper, row = _iou_of_shown(counts)
    vision = UNDERSTANDING + GENERATION
    values = [_mean_pairs(m, row, ("text",), vision) for m in here]
    published = _triple([_mean_pairs(m, _PAPER_ROW, ("text",), vision) for m in paper])
    return f"mean IoU {published}", f"mean IoU {_triple(values)}", values[0] < values[-1]


def _understanding_with_generation(counts: RoutingCounts) -> tuple[str, str, bool]:
    here, paper, row = _iou_of_shown(counts)
    across = [_mean_pairs(m, row, UNDERSTANDING, GENERATION) for m in here]
    within = [
        (float(m[row[UNDERSTANDING[0]], row[UNDERSTANDING[1]]]) + float(m[row[GENERATION[0]], row[GENERATION[1]]])) / 2
        for m in here
    ]
    published = _triple([_mean_pairs(m, _PAPER_ROW, UNDERSTANDING, GENERATION) for m in paper])
    text = f"mean IoU {_triple(across)}; inside understanding and inside generation {_triple(within)}"
    return f"mean IoU {published}", text, all(a < w for a, w in zip(across, within, strict=True))


def _concentration(counts: RoutingCounts) -> tuple[str, str, bool]:
    mean = dict(zip(counts.task_names, st.normalized_entropy(counts).mean(-1), strict=True))
    made = float(np.mean([mean[name] for name in (*GENERATION, st.AUDIO_ROW)]))
    read = float(np.mean([mean[name] for name in ("text", *UNDERSTANDING)]))
    return "in words", f"mean entropy {made:.2f} against {read:.2f}", made < read


def _text_dip(counts: RoutingCounts) -> tuple[str, str, bool]:
    text = st.normalized_entropy(counts)[counts.task_names.index("text")]
    before, lowest, last = float(text[:-1].mean()), float(text[:-1].min()), float(text[-1])
    here = f"entropy {before:.3f} on average before the last layer (lowest {lowest:.3f}), {last:.3f} in it"
    return "in words", here, last < lowest


def _generalists(counts: RoutingCounts) -> tuple[str, str, bool]:
    served, tasks = st.tasks_served(counts).sum(0), len(_seen(counts))
    text = f"{served[tasks]:,} serve all {tasks} tasks, {served[1]:,} one"
    return "in words", text, bool(served[tasks] > 0 and served[1] > 0)

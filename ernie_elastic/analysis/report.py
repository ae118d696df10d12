"""A routing trace as a directory that people and programs read: page, figures, tables, JSON.

`write_report` leaves index.html (one file, opens offline, readable without script), statistics.json, counts.npz, and in
figures/ a PNG, an SVG and a CSV per figure. The directory appears whole or not at all.

Shape letters: M tasks, L layers with a router, E experts per layer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ernie_elastic.analysis import figures, findings
from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.drawing import Panel, render
from ernie_elastic.analysis.page import Section, build_page
from ernie_elastic.analysis.trace import RoutingCounts, RoutingTrace, counts_from_trace, save_trace
from ernie_elastic.errors import DataError
from ernie_elastic.stages import stage_output, write_atomic, write_json

STAGE = "routing"
PAPER_NOTES = {
    "figure8": "some experts serve all modalities, others a single one; image, video and audio are more concentrated "
    "than text, whose axis ends at 4 % in the first layer, where the others end at 20 to 32 %.",
    "figure9": "text overlaps most with audio, text and vision overlap more with depth, understanding and generation "
    "little at any depth (two random quarters give about 0.14).",
    "figure10": "text is high and flat with a dip in the last layer; visual understanding is less even at both ends; "
    "generation and audio start moderate, dip, recover in part and fall towards the top.",
}


def write_report(
    data: RoutingTrace | RoutingCounts,
    out_dir: Path | str,
    title: str,
    compare: RoutingTrace | RoutingCounts | None = None,
    *,
    parent: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the report of `data` into `out_dir` as the output of stage `routing`.

    compare: another routing of the same experts; adds maps of this one minus the other. parent: the stage directory
    the routed model came from. Tasks named audio_* share one row (paper: section 6); counts.npz keeps them apart.
    Returns {"index": path of the page, "figures": paths, "sentences": {figure: text}, "statistics": what
    statistics.json holds}. Raises DataError when no task has tokens, ConfigError when `compare` cannot be compared,
    CheckpointError when `out_dir` exists or the disk is full.
    """
    raw = _as_counts(data)
    if not raw.tokens.any():
        raise DataError(f"routing report: no token of any task in the trace of {raw.header.model!r}; trace some first")
    counts = st.paper_rows(raw)
    other = None if compare is None else st.paper_rows(_as_counts(compare))
    comparison = None if other is None else st.compare_counts(counts, other)
    sentences = _sentences(counts, comparison)
    statistics = statistics_json(counts, comparison) | {"sentences": sentences}
    if other is not None:
        statistics["comparison"]["with"] = asdict(other.header)
    config = {"title": title, "header": asdict(raw.header), "compare": None if other is None else asdict(other.header)}
    out_dir = Path(out_dir)
    with stage_output(out_dir, STAGE, config, parent=parent, overwrite=overwrite) as folder:
        (folder / "figures").mkdir()
        sections = _sections(counts, comparison, sentences)
        written = _write_figures(folder / "figures", counts, sections)
        _write_tables(folder / "figures", counts, comparison)
        write_json(folder / "statistics.json", statistics)
        save_trace(folder / "counts.npz", raw)
        name = None if other is None else f"{other.header.model}, spec {other.header.spec}"
        page = build_page(
            title, counts, sections, statistics["paper_findings"], statistics["cautions"], comparison, name
        )
        write_atomic(folder / "index.html", page)
    return {
        "index": out_dir / "index.html",
        "figures": [out_dir / "figures" / name for name in written],
        "sentences": sentences,
        "statistics": statistics,
    }


def _as_counts(data: RoutingTrace | RoutingCounts) -> RoutingCounts:
    return counts_from_trace(data) if isinstance(data, RoutingTrace) else data


def _numbers(values: np.ndarray) -> Any:
    """Nested lists rounded to 6 digits, NaN as None, so that the JSON is valid for every reader."""
    if values.ndim:
        return [_numbers(row) for row in values]
    value = values.item()
    return value if isinstance(value, int) else None if np.isnan(value) else round(value, 6)


def statistics_json(counts: RoutingCounts, comparison: st.Comparison | None = None) -> dict[str, Any]:
    """Every statistic but the frequencies of single experts (those are in the CSV files), as JSON values.

    Keys by task hold one number per layer, in the order of header.layers; missing numbers are None.
    """
    whole = st.all_tasks(counts)

    def by_task(values: np.ndarray, names: Sequence[str] = counts.task_names) -> dict[str, Any]:
        return {name: _numbers(row) for name, row in zip(names, values, strict=True)}

    result: dict[str, Any] = {
        "header": asdict(counts.header),
        "tokens": dict(zip(counts.task_names, counts.tokens.tolist(), strict=True)),
        "fair_share_percent": _numbers(st.fair_share(counts)),
        "normalized_entropy": by_task(st.normalized_entropy(counts)),
        "entropy_floor": _numbers(st.entropy_floor(counts)),
        "max_over_mean": by_task(st.max_over_mean(counts)),
        "unused_experts": by_task(st.dead_experts(counts)),
        "all_tasks": {
            "normalized_entropy": _numbers(st.normalized_entropy(whole)[0]),
            "max_over_mean": _numbers(st.max_over_mean(whole)[0]),
            "unused_experts": _numbers(st.dead_experts(whole)[0]),
        },
        "quarter_iou": {"tasks": list(counts.task_names), "layers": _numbers(st.quarter_iou(counts))},
        "chance_iou": _numbers(st.chance_per_layer(counts)),
        "experts_by_tasks_served": _numbers(st.tasks_served(counts)),
        "paper_findings": findings.paper_findings(counts),
        "cautions": findings.cautions(counts),
        "comparison": None,
    }
    if comparison is not None:
        names = comparison.task_names
        result["comparison"] = {
            "layers": list(comparison.layers),
            "entropy_difference": by_task(comparison.entropy, names),
            "share_moved": by_task(comparison.distance, names),
            "iou_of_same_task": by_task(comparison.same_quarter, names),
        }
    return result


def _sentences(counts: RoutingCounts, comparison: st.Comparison | None) -> dict[str, str]:
    sentences = {
        "figure8": findings.specialization_sentence(counts),
        "figure9": findings.overlap_sentence(counts),
        "figure10": findings.entropy_sentence(counts),
        "heatmap": findings.heat_map_sentence(counts),
    }
    return sentences if comparison is None else sentences | {"difference": findings.difference_sentence(comparison)}


def _sections(counts: RoutingCounts, comparison: st.Comparison | None, sentences: dict[str, str]) -> list[Section]:
    """The page's sections in order, each drawn for light and for dark screens."""

    def files(stems: Iterable[str], table: str) -> list[str]:
        return [f"figures/{stem}.{kind}" for stem in stems for kind in ("png", "svg")] + [f"figures/{table}.csv"]

    shown = {style: figures.specialization_panels(counts, style) for style in ("light", "dark")}
    overlap = {style: figures.overlap_panels(counts, style) for style in ("light", "dark")}
    entropy = {style: [figures.entropy_panel(counts, style)] for style in ("light", "dark")}
    maps = {style: figures.heat_map_panels(counts, style) for style in ("light", "dark")}
    sections = [
        Section(
            "Which experts each task uses (figure 8)",
            sentences["figure8"],
            PAPER_NOTES["figure8"],
            shown["light"],
            shown["dark"],
            files(["figure8"], "figure8"),
        ),
        Section(
            "Which tasks share experts (figure 9)",
            sentences["figure9"],
            PAPER_NOTES["figure9"],
            overlap["light"],
            overlap["dark"],
            files(["figure9"], "figure9"),
        ),
        Section(
            "How even the routing is (figure 10)",
            sentences["figure10"],
            PAPER_NOTES["figure10"],
            entropy["light"],
            entropy["dark"],
            files(["figure10"], "figure10"),
            single=True,
        ),
        Section(
            "Every layer and expert",
            sentences["heatmap"],
            "",
            maps["light"],
            maps["dark"],
            files([panel.name for panel in maps["light"]], "heatmap"),
        ),
    ]
    if comparison is not None:
        moved = {style: figures.difference_panels(comparison, style) for style in ("light", "dark")}
        names = [panel.name for panel in moved["light"]]
        sections.append(
            Section(
                "Difference to the other routing",
                sentences["difference"],
                "",
                moved["light"],
                moved["dark"],
                files(names, "difference"),
            )
        )
    return sections


def _write_figures(folder: Path, counts: RoutingCounts, sections: Sequence[Section]) -> list[str]:
    """PNG and SVG of the two wide figures and of every panel that stands for itself; returns the file names."""
    drawn: dict[str, Figure] = {"figure8": figures.figure_8(counts), "figure9": figures.figure_9(counts)}
    alone: list[Panel] = [panel for section in sections[2:] for panel in section.panels]
    drawn |= {panel.name: panel.figure for panel in alone}
    names = []
    for stem, figure in drawn.items():
        for kind in ("png", "svg"):
            (folder / f"{stem}.{kind}").write_bytes(render(figure, kind))
            names.append(f"{stem}.{kind}")
    return names


def _write_tables(folder: Path, counts: RoutingCounts, comparison: st.Comparison | None) -> None:
    """The CSV beside each figure; an empty cell is a number that does not exist."""
    header, names = counts.header, counts.task_names
    frequency, fair = st.specialization(counts), st.fair_share(counts)
    shown = dict(st.shown_layers(len(header.layers)))
    tasks, experts = range(len(names)), range(header.num_experts)
    usage = [
        (
            names[m],
            header.layers[row],
            e,
            int(counts.counts[m, row, e]),
            frequency[m, row, e],
            frequency[m, row, e] / fair[row],
            row,
        )
        for m in tasks
        for row in range(len(header.layers))
        for e in experts
    ]
    columns = ["task", "layer", "expert", "tokens", "percent", "times_fair_share"]
    _write_csv(folder / "figure8.csv", columns, (line[:-1] for line in usage if line[-1] in shown))
    _write_csv(folder / "heatmap.csv", columns, (line[:-1] for line in usage))
    iou, chance = st.quarter_iou(counts), st.chance_per_layer(counts)
    overlap = (
        (header.layers[row], names[a], names[b], iou[row, a, b], chance[row])
        for row in range(len(header.layers))
        for a in tasks
        for b in tasks
    )
    _write_csv(folder / "figure9.csv", ["layer", "task", "other_task", "iou", "chance"], overlap)
    entropy = st.normalized_entropy(counts)
    lines = ((names[m], header.layers[row], entropy[m, row]) for m in tasks for row in range(len(header.layers)))
    _write_csv(folder / "figure10.csv", ["task", "layer", "normalized_entropy"], lines)
    if comparison is not None:
        moved = (
            (name, layer, e, comparison.frequency[m, row, e])
            for m, name in enumerate(comparison.task_names)
            for row, layer in enumerate(comparison.layers)
            for e in experts
        )
        _write_csv(folder / "difference.csv", ["task", "layer", "expert", "percentage_points"], moved)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow(["" if v != v else f"{v:.6g}" if isinstance(v, float) else v for v in row])
    path.write_text(text.getvalue())

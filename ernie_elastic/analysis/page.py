"""The HTML page of a routing report: one file that opens offline and can be read without script.

Pictures are inline PNGs in a light and a dark version; a small script of ours adds the number under the pointer. The
page refers to nothing outside its own directory.

Shape letters: M tasks, L layers with a router, E experts per layer.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.drawing import Panel, render, scope_note, task_label
from ernie_elastic.analysis.trace import RoutingCounts

_HERE = Path(__file__).parent
_MISSING = 65535  # a number that does not exist, in the 16-bit tables that the script reads

DEFINITIONS = (
    "Modality specialization: 100 * (tokens of the task whose top-k contains the expert) / (tokens of the task). Its "
    "mean over the experts of a layer is the fair share, 100 * k / N.",
    "Overlap: of each task the ceil(N / 4) most used experts are taken, the lower id first where two are used equally, "
    "and never an expert that the task did not use; then intersection over union of the two sets. Chance is the "
    "expected value for two random quarters of the same size.",
    "Normalised entropy: -sum p log p / log N, p the share of the task's assignments that an expert receives. 1 = "
    "even. A router that always takes the same k experts has log k / log N.",
    "Load: tokens of the busiest expert divided by the mean over the experts of the layer.",
    "Shared experts, which every token uses, are in no number of this page. Padding is left out.",
)


@dataclass(frozen=True)
class Section:
    """One heading of the page with its sentence, the report's finding to compare with, and its panels.

    panels: light panels; dark: the same panels in the same order for dark screens. files: names for download.
    """

    title: str
    sentence: str
    paper: str
    panels: Sequence[Panel]
    dark: Sequence[Panel]
    files: Sequence[str]
    single: bool = False


def packed_table(values: np.ndarray, scale: float, base: float, digits: int, unit: str) -> dict[str, Any]:
    """A float array as base64 little-endian uint16 that the page's script turns back into base + scale * number.

    NaN becomes "none". Raises ValueError when a value does not fit, so that no number on the page is silently clipped.
    """
    finite = np.isfinite(values)
    steps = np.rint((np.where(finite, values, base) - base) / scale)
    if steps.min(initial=0) < 0 or steps.max(initial=0) >= _MISSING:
        low, high = np.nanmin(values), np.nanmax(values)
        raise ValueError(f"page table: values {low}..{high} do not fit base {base} scale {scale}")
    codes = np.where(finite, steps, _MISSING).astype("<u2")
    data = base64.b64encode(codes.tobytes()).decode()
    return {"data": data, "scale": scale, "base": base, "digits": digits, "unit": unit}


def hover_tables(counts: RoutingCounts, comparison: st.Comparison | None) -> dict[str, dict[str, Any]]:
    """The numbers behind the figures' regions, by table name."""
    tables = {
        "frequency": packed_table(st.specialization(counts), 0.01, 0.0, 2, " %"),
        "iou": packed_table(st.quarter_iou(counts), 1e-4, 0.0, 3, ""),
        "entropy": packed_table(st.normalized_entropy(counts), 1e-4, 0.0, 3, ""),
    }
    if comparison is not None:
        tables["difference"] = packed_table(comparison.frequency, 0.01, -100.0, 2, " points")
    return tables


def _data_uri(panel: Panel) -> str:
    return "data:image/png;base64," + base64.b64encode(render(panel.figure, "png")).decode()


def _figure(light: Panel, dark: Panel) -> str:
    """One <figure>: both pictures and the regions that the script reads."""
    regions = html.escape(json.dumps([asdict(region) for region in light.regions]))
    width, height = (int(side * 160) for side in light.figure.get_size_inches())
    return (
        f'<figure data-regions="{regions}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" width="{width}" height="{height}" alt="{html.escape(light.caption)}">'
        "</picture></figure>"
    )


def _section(section: Section) -> str:
    links = ", ".join(f'<a href="{html.escape(name)}">{html.escape(Path(name).name)}</a>' for name in section.files)
    figures = "\n".join(_figure(light, dark) for light, dark in zip(section.panels, section.dark, strict=True))
    paper = f'<p class="soft">In the paper: {html.escape(section.paper)}</p>' if section.paper else ""
    return (
        f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.sentence)}</p>{paper}"
        f'<div class="panels{" one" if section.single else ""}">{figures}</div>'
        f'<p class="soft">Files: {links}</p></section>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A table that becomes a list of cards on a phone. Cells are HTML."""
    kinds = [' class="n"' if is_number else "" for is_number in numeric]
    top = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = ""
    for row in rows:
        cells = "".join(
            f'<td{kind} data-name="{html.escape(name)}">{cell}</td>'
            for name, kind, cell in zip(head[1:], kinds[1:], row[1:], strict=True)
        )
        body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'
    return f'<div class="wide"><table class="stack"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(counts: RoutingCounts) -> str:
    """The table that needs neither pictures nor script: one row per task, and one for all tasks together."""
    entropy, load = st.normalized_entropy(counts), st.max_over_mean(counts)
    unused, overlap = st.dead_experts(counts), st.quarter_iou(counts).mean(0)
    whole = st.all_tasks(counts)
    rows = []
    for task, name in enumerate(counts.task_names):
        if counts.tokens[task] == 0:
            rows.append([html.escape(task_label(name)), "0", *["none"] * 4])
            continue
        others = np.nan_to_num(np.delete(overlap[task], task), nan=-1.0)
        partner, best = "none", others.max(initial=-1.0)
        if best >= 0:
            label = task_label([n for n in counts.task_names if n != name][int(others.argmax())])
            partner = f"{html.escape(label)} ({best:.2f})"
        rows.append(
            [
                html.escape(task_label(name)),
                f"{counts.tokens[task]:,}",
                f"{entropy[task].mean():.3f} ({entropy[task].min():.2f} to {entropy[task].max():.2f})",
                f"{load[task].mean():.2f}",
                f"{unused[task].mean():.1f}",
                partner,
            ]
        )
    everything = st.normalized_entropy(whole)[0]
    rows.append(
        [
            "All tasks",
            f"{int(whole.tokens[0]):,}",
            f"{everything.mean():.3f} ({everything.min():.2f} to {everything.max():.2f})",
            f"{st.max_over_mean(whole)[0].mean():.2f}",
            f"{st.dead_experts(whole)[0].mean():.1f}",
            "none",
        ]
    )
    head = (
        "Task",
        "Tokens",
        "Normalised entropy (range over layers)",
        "Load, max / mean",
        "Unused experts per layer",
        "Overlaps most with (mean IoU)",
    )
    return _table(head, rows, (False, True, True, True, True, False))


def _findings(rows: Sequence[Mapping[str, Any]]) -> str:
    marks = {True: '<span class="yes">agrees</span>', False: '<span class="no">differs</span>', None: "not measured"}
    cells = [
        [html.escape(row["finding"]), html.escape(row["paper"]), html.escape(row["here"]), marks[row["agrees"]]]
        for row in rows
    ]
    head = ("Finding of the ERNIE 5.0 report", "There (first, middle, last layer)", "Here", "Verdict")
    return _table(head, cells, (False,) * 4)


def build_page(
    title: str,
    counts: RoutingCounts,
    sections: Sequence[Section],
    findings: Sequence[Mapping[str, Any]],
    cautions: Sequence[str],
    comparison: st.Comparison | None,
    other: str | None,
) -> str:
    """The whole page as HTML text. other: what `comparison` compares with, in words."""
    header = counts.header
    about = [
        f"Model {header.model}, spec {header.spec}",
        scope_note(counts),
        f"layers {header.layers[0]} to {header.layers[-1]} ({len(header.layers)} with a router)",
        f"{int(counts.tokens.sum()):,} tokens",
    ]
    about += [header.source] if header.source else []
    about += [f"compared with {other}"] if other else []
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in cautions)
    tables = json.dumps(hover_tables(counts, comparison))
    meaning = "".join(f"<li>{html.escape(line)}</li>" for line in DEFINITIONS)
    return (
        "\n".join(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
                f"<title>{html.escape(title)}</title><style>{(_HERE / 'report.css').read_text()}</style></head>",
                "<body><main>",
                f'<h1>{html.escape(title)}</h1><p class="soft">{html.escape("; ".join(about))}.</p>',
                f"<h2>Summary</h2>{_summary(counts)}",
                f"<ul>{notes}</ul>" if notes else "",
                f"<h2>Beside the paper</h2>{_findings(findings)}",
                *[_section(section) for section in sections],
                f'<h2>How the numbers are made</h2><ul class="soft">{meaning}</ul>',
                '<p class="soft">All numbers: <a href="statistics.json">statistics.json</a>, '
                '<a href="counts.npz">counts.npz</a>.</p>',
                f'</main><script type="application/json" id="tables">{tables}</script>',
                f"<script>{(_HERE / 'report.js').read_text()}</script></body></html>",
            ]
        )
        + "\n"
    )

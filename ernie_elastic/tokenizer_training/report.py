"""The page of a trained tokenizer: `report.html`, one file with its findings, numbers, curves and samples.

It opens offline and reads without script. Curves are medians over windows of steps, so that a long run stays readable.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ernie_elastic.stages import write_atomic

WINDOWS = 120  # points of a curve
COLUMNS = 3
SKIPPED = ("step", "step_s")
INK, SOFT, LINE = "#1c2430", "#5b6675", "#0072b2"
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } tr { border-bottom: 1px solid #d9dee5; }
img { max-width: 100%; height: auto; }
.bad { border-left: 4px solid #d55e00; padding-left: .8rem; }
.good { border-left: 4px solid #009e73; padding-left: .8rem; }
.note { color: #5b6675; } audio { height: 2rem; } .wide { overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { color: #e6eaf0; background: #161b22; } tr { border-color: #333b47; }
  img { background: #fff; } .note { color: #a3adba; } }
"""


@dataclass(frozen=True)
class SampleSheet:
    """What to look at or listen to. picture: a file of the directory; sounds: (label, file) in the order of playing;
    page: an HTML file beside the report."""

    sentence: str
    picture: str | None = None
    sounds: tuple[tuple[str, str], ...] = ()
    page: str | None = None


def write_report(
    directory: Path, title: str, health: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], sheet: SampleSheet
) -> None:
    """Write `report.html` into `directory`, which holds the files that `sheet` names.

    health: numbers, nested tables of numbers, and `collapse` where it was looked for: sentences, none if healthy.
    metrics: the records of metrics.jsonl, none for a tokenizer that is not trained in steps.
    """
    # Nothing is said where nothing was looked for: a refiner has no bits or codes that could collapse.
    parts = [f"<h1>{html.escape(title)}</h1>", *([_findings(health["collapse"])] if "collapse" in health else [])]
    parts += ["<h2>Samples</h2>", _samples(directory, sheet)]
    parts += ["<h2>Health</h2>", _table({key: value for key, value in health.items() if key != "collapse"})]
    if metrics:
        picture = base64.b64encode(curves(metrics)).decode()
        parts += ["<h2>Training</h2>", f'<img alt="training curves" src="data:image/png;base64,{picture}">']
        parts.append('<p class="note">Median of each part of the run; the same numbers are in metrics.jsonl.</p>')
    page = "".join(
        ['<!doctype html><html lang="en"><meta charset="utf-8">',
         '<meta name="viewport" content="width=device-width, initial-scale=1">',
         f"<title>{html.escape(title)}</title><style>{CSS}</style><body>", "\n".join(parts), "</body></html>\n"]
    )  # fmt: skip
    write_atomic(directory / "report.html", page)


def _findings(collapse: Sequence[str]) -> str:
    if not collapse:
        return '<p class="good">No sign of collapse.</p>'
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in collapse)
    return f'<div class="bad"><p>Signs of collapse:</p><ul>{lines}</ul></div>'


def _samples(directory: Path, sheet: SampleSheet) -> str:
    parts = [f'<p class="note">{html.escape(sheet.sentence)}</p>']
    if sheet.picture is not None:
        data = base64.b64encode((directory / sheet.picture).read_bytes()).decode()
        parts.append(f'<img alt="originals and reconstructions" src="data:image/png;base64,{data}">')
    if sheet.sounds:
        rows = "".join(
            f'<tr><td>{html.escape(label)}</td><td><audio controls preload="none" src="{html.escape(file)}"></audio>'
            "</td></tr>"
            for label, file in sheet.sounds
        )
        parts.append(f"<table>{rows}</table>")
    if sheet.page is not None:
        parts.append(f'<p><a href="{html.escape(sheet.page)}">{html.escape(sheet.page)}</a></p>')
    return "\n".join(parts)


def _table(values: Mapping[str, Any]) -> str:
    rows = []
    for name, value in values.items():
        rows.append(f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{_cell(value)}</td></tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return _table(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
        names = list(dict.fromkeys(name for item in value for name in item))
        head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{_cell(item.get(name, ''))}</td>" for name in names) + "</tr>"
                       for item in value)  # fmt: skip
        return f"<table><tr>{head}</tr>{body}</table>"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return html.escape(str(value))


def curves(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with one small panel for each metric of the records, over the step."""
    steps = np.array([record["step"] for record in metrics])
    names = [name for name in dict.fromkeys(key for record in metrics for key in record) if name not in SKIPPED]
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.1 * rows), layout="constrained", facecolor="white")
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        values = np.array([float(record.get(name, math.nan)) for record in metrics])
        places, medians = _windows(steps, values)
        axes.plot(places, medians, color=LINE, linewidth=1.2)
        if len(medians) and medians.min() > 0 and medians.max() > 20 * medians.min():
            axes.set_yscale("log")
        axes.set_title(name.replace("_", " "), fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7, colors=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _windows(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = np.isfinite(values)
    parts = np.array_split(np.arange(int(there.sum())), min(WINDOWS, max(1, int(there.sum()))))
    steps, values = steps[there], values[there]
    parts = [part for part in parts if len(part)]
    return np.array([steps[part].mean() for part in parts]), np.array([np.median(values[part]) for part in parts])


__all__ = ["SampleSheet", "curves", "write_report"]

"""The numbers of the demo's report: the table of the models, the plots, and the time that each stage took."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ernie_elastic.pipeline.demo.charts import Point, Series, line_chart, megabytes, scatter_chart, smooth

Row = Mapping[str, Any]
ABSENT = '<span class="soft">not measured</span>'


def count(value: float | None) -> str:
    """A number of parameters, three digits."""
    if value is None:
        return ABSENT
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def percent(share: float | None) -> str:
    """A share in 0..1 as percent."""
    return ABSENT if share is None else f"{100 * share:.1f} %"


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share seen in n trials (Wilson's score interval)."""
    if n <= 0:
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def spec_text(spec: Any) -> str:
    """A sub-model spec in words: from its JSON form or its label (`d6-e8-k1`); any other text as it is."""
    if isinstance(spec, Mapping) and "layers" in spec and "experts_per_layer" in spec:
        experts = sorted({len(kept) for kept in spec["experts_per_layer"]})
        width = str(experts[0]) if len(experts) == 1 else f"{experts[0]}-{experts[-1]}"
        return f"{len(spec['layers'])} layers, {width} experts, top-{spec['top_k']}"
    if isinstance(spec, Mapping):
        return escape(str(spec.get("label", spec)))
    if label := re.fullmatch(r"d(\d+)-e(\d+)-k(\d+)", str(spec)):
        return f"{label[1]} layers, {label[2]} experts, top-{label[3]}"
    return ABSENT if spec is None else escape(str(spec))


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Judged tasks in the order in which the rows name them."""
    return list(dict.fromkeys(task for row in rows for task in row.get("accuracy") or {}))


def accuracy_of(row: Row, task: str) -> Mapping[str, Any] | None:
    """{"value", "chance", "n"} of one model and task; None when it was not measured."""
    entry = (row.get("accuracy") or {}).get(task)
    return entry if entry and entry.get("value") is not None else None


def above_chance(row: Row) -> tuple[int, int]:
    """(tasks whose 95 % interval lies above chance, tasks measured) of one model."""
    entries = [entry for task in row.get("accuracy") or {} if (entry := accuracy_of(row, task))]
    return sum(wilson(e["value"], int(e["n"]))[0] > e["chance"] for e in entries), len(entries)


def model_table(rows: Sequence[Row]) -> str:
    """One column a model: what it is, what it weighs, how fast it decodes, and every accuracy beside chance and n."""
    facts = [
        ("kept part", lambda row: spec_text(row.get("spec"))),
        ("parameters<small>active for a token</small>", _parameters),
        ("weights on disk<small>safetensors, BF16</small>", lambda row: _bytes(row, "model_bytes")),
        ("weights in memory", lambda row: _bytes(row, "resident_weight_bytes")),
        ("kernel", lambda row: f"<code>{escape(str(row['kernel']))}</code>" if row.get("kernel") else ABSENT),
        ("decoding", _speed),
    ]
    body = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell(row)}</td>" for row in rows)}</tr>'
        for name, cell in facts
    ]
    tasks = tasks_of(rows)
    if tasks:
        body.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(rows) + 1}">Accuracy on the held-out split</th></tr>'
        )
    for task in tasks:
        entries = [accuracy_of(row, task) for row in rows]
        known = {(e["chance"], e["n"]) for e in entries if e}
        common = f"<small>{_chance(next(iter(known)))}</small>" if len(known) == 1 else ""
        cells = "".join(f"<td>{_accuracy_cell(entry, not common)}</td>" for entry in entries)
        body.append(f'<tr><th scope="row">{escape(task.replace("_", " "))}{common}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(str(row["model"]))}</th>' for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _parameters(row: Row) -> str:
    return f"{count(row.get('total_params'))}<small>{count(row.get('active_params'))} active</small>"


def _bytes(row: Row, field: str) -> str:
    value = row.get(field)
    return ABSENT if value is None else f"{megabytes(value)}<small>{value:,} bytes</small>"


def _speed(row: Row) -> str:
    speed = row.get("decode_tokens_per_s")
    return ABSENT if speed is None else f"{speed:,.0f} tokens/s"


def _chance(pair: tuple[float, int]) -> str:
    share, n = f"chance {100 * pair[0]:.1f} %", f"n = {pair[1]}"
    return ", ".join(text.replace(" ", "\N{NO-BREAK SPACE}") for text in (share, n))


def _accuracy_cell(entry: Mapping[str, Any] | None, with_chance: bool) -> str:
    """The share, and a bar with chance (upright line) and the 95 % interval (thin line)."""
    if entry is None:
        return ABSENT
    value, chance, n = float(entry["value"]), float(entry["chance"]), int(entry["n"])
    low, high = wilson(value, n)
    title = f"{100 * value:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %, {_chance((chance, n))}"
    bar = (
        f'<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" aria-label="{title}">'
        f'<title>{title}</title><rect class="back" y="2" width="100" height="8"/>'
        f'<rect class="value" y="2" width="{100 * value:.1f}" height="8"/>'
        f'<path class="span" d="M{100 * low:.1f} 6H{100 * high:.1f}"/>'
        f'<path class="chance" d="M{100 * chance:.1f} 0V12" vector-effect="non-scaling-stroke"/></svg>'
    )
    return f"{percent(value)}{bar}" + (f"<small>{_chance((chance, n))}</small>" if with_chance else "")


def model_plot(rows: Sequence[Row], bit_equal: bool | None) -> str:
    """Mean accuracy over the judged tasks against bytes of weights, only for models that were judged on all of them."""
    tasks = tasks_of(rows)
    points, chances = [], []
    for index, row in enumerate(rows):
        entries = [accuracy_of(row, task) for task in tasks]
        if not tasks or not all(entries) or row.get("model_bytes") is None:
            continue
        mean = sum(e["value"] for e in entries if e) / len(tasks)
        chances.append(sum(e["chance"] for e in entries if e) / len(tasks))
        points.append(Point(str(row["model"]), float(row["model_bytes"]), mean, index % 7 + 1))
    base = sum(chances) / len(chances) if chances else None
    arrow = ("submodel-half", "compressed") if bit_equal else None
    return scatter_chart(points, "mean accuracy against bytes of weights", "bytes of weights on disk", base, arrow)


def legend(series: Sequence[Series], digits: int = 3) -> str:
    """Names of the lines with their last value."""
    items = "".join(
        f'<li class="s{s.colour}"><span>{escape(s.name)} <span class="soft">{s.y[-1]:.{digits}g}</span></span></li>'
        for s in series
    )
    return f'<ul class="legend">{items}</ul>'


def loss_chart(metrics: Sequence[Row]) -> str:
    """Smoothed loss of each modality over the steps, logarithmic. Steps without one leave its line as it was."""
    half_life = max(1.0, len(metrics) / 40)
    names = list(dict.fromkeys(name for m in metrics for name in m.get("losses") or {}))
    series: list[Series] = []
    for name in names:
        pairs = [(float(m["step"]), m["losses"].get(name)) for m in metrics if m.get("losses")]
        kept = [(x, float(y)) for x, y in pairs if y is not None and math.isfinite(y)]
        if kept:
            ys = smooth([y for _, y in kept], half_life)
            series.append(Series(name.replace("_", " "), [x for x, _ in kept], ys, len(series) % 7 + 1))
    if not series:
        return ""
    return legend(series) + line_chart(
        series, "loss of each modality over the steps", "step", "loss (log scale)", log_y=True
    )


def load_chart(metrics: Sequence[Row]) -> str:
    """Load of the busiest expert over the mean load, over the steps: mean of the layers, band from best to worst."""
    # A layer that was dropped in a step has no load there.
    loads = [[float(v) for v in m.get("load_max_over_mean") or [] if v is not None] for m in metrics]
    kept = [m for m, load in zip(metrics, loads, strict=True) if load]
    loads = [load for load in loads if load]
    if not kept:
        return ""
    half_life = max(1.0, len(metrics) / 40)
    mean = smooth([sum(v) / len(v) for v in loads], half_life)
    low, high = smooth([min(v) for v in loads], half_life), smooth([max(v) for v in loads], half_life)
    line = Series("mean of the layers", [float(m["step"]) for m in kept], mean, 1, list(zip(low, high, strict=True)))
    return legend([line]) + line_chart(
        [line], "load of the busiest expert over the mean", "step", "max / mean load", base=1.0
    )


def spec_sentence(metrics: Sequence[Row]) -> str:
    """How many steps trained the full model and how many a smaller one."""
    specs = [m["spec"] for m in metrics if m.get("spec")]
    if not specs:
        return ""
    fields = ("num_layers", "num_experts", "top_k")
    largest = tuple(max(s[f] for s in specs) for f in fields)
    full = sum(tuple(s[f] for f in fields) == largest for s in specs)
    kinds = len({tuple(s[f] for f in fields) for s in specs})
    if kinds == 1:
        return f"All of the {full:,} steps trained the full model."
    sizes = "1 other size" if kinds == 2 else f"{kinds - 1} other sizes"
    return (
        f"{full:,} of {len(specs):,} steps trained the full model, the others a smaller part of it ({sizes}: fewer "
        "layers, fewer experts, or fewer experts for a token)."
    )


def stage_times(seconds: Mapping[str, float]) -> str:
    """One bar a stage, as long as its share of the longest one."""
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = "".join(
        f'<span>{escape(stage)}</span><i style="width:{100 * value / longest:.1f}%"></i><span>{duration(value)}</span>'
        for stage, value in seconds.items()
    )
    return f'<div class="stages">{rows}</div>'


def duration(seconds: float) -> str:
    """Seconds below two minutes, minutes and seconds above."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def detail_table(details: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> str:
    """Finer scores {model: {task: {part: {"value", "n"}}}}: a row for each part, a column for each model."""
    parts = dict.fromkeys(
        (task, part) for tasks in details.values() for task, entries in tasks.items() for part in entries
    )
    if not parts:
        return ""
    rows = []
    for task, part in parts:
        entries = [tasks.get(task, {}).get(part) for tasks in details.values()]
        sizes = sorted({str(entry["n"]) for entry in entries if entry and "n" in entry})
        cells = "".join(f"<td>{percent(entry.get('value')) if entry else ABSENT}</td>" for entry in entries)
        name = f"{escape(part.replace('_', ' '))}<small>n = {' or '.join(sizes) or 'not given'}</small>"
        rows.append(f'<tr><th scope="row">{escape(task.replace("_", " "))}</th><td>{name}</td>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("task", "part", *details))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    summary = "<summary>Finer scores: what each checker looks at</summary>"
    return f'<details>{summary}<div class="scroll">{table}</div></details>'


def health_table(health: Mapping[str, Mapping[str, Any]]) -> str:
    """The numbers of each tokenizer's health file, nested ones under joined names. Empty without numbers."""
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(key.replace("_", " "))}</td><td>{text}</td></tr>'
        for name, values in health.items()
        for key, text in _numbers(values)
    ]
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("tokenizer", "measure", "value"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of the numbers in a nested dict; short lists of numbers on one line, everything else left out."""
    for key, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}, ")
        elif 0 < len(parts) <= 16 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in parts):
            yield f"{prefix}{key}", ", ".join(f"{v:,}" if isinstance(v, int) else f"{v:,.4g}" for v in parts)

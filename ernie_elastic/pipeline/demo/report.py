"""The demo's report: `write_demo_report(run_dir)` turns what a run left into one HTML file that opens offline.

It reads summary.json, metrics.jsonl, evaluation/<model>/{results,samples}.json with their media, and, where they are,
tokenizers/*/health.json, routing/statistics.json and routing/figures/*.png. Nothing is loaded from a network: pictures
and sounds are data URIs, charts are inline SVG, there is no script. What is not there is named as missing; a file that
cannot be read is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ernie_elastic.errors import CheckpointError
from ernie_elastic.pipeline.demo import tables
from ernie_elastic.pipeline.demo.charts import megabytes
from ernie_elastic.pipeline.demo.media import figure_html
from ernie_elastic.pipeline.demo.samples import DRAWN, READ, Answers, SampleSection, sample_section
from ernie_elastic.stages import write_atomic

REPORT_NAME = "report.html"
# Opening of the two sample sections, by what the models did there.
INTRODUCTIONS = {
    "makes": (
        "The trained models were given captions of the held-out split: combinations of attributes that never occur in "
        "training. A checker, which is no model, reads each result back from its pixels or samples; "
        "<span class='yes'>right</span> or <span class='no'>wrong</span> is its verdict. <b>full</b> is the trained "
        "model, the other names are those of the table below, and an equals sign joins identical results."
    ),
    "understands": (
        "Pictures, videos, sounds and texts of the held-out split went in, text came out; the checker compares it with "
        "what is true of the scene."
    ),
}
# What a routing figure shows, by the start of its file name.
ROUTING_SENTENCES = {
    "figure8": "How often the tokens of each task pick each expert, in the first, a middle and the last layer: bars "
    "above the dashed line are picked more often than an even share.",
    "figure9": "How far two tasks share their most used quarter of the experts (intersection over union): 1 means the "
    "same experts, the red mark is what chance would give.",
    "figure10": "How evenly each task spreads over the experts, layer by layer: 1 is perfectly even, low means that "
    "few experts do the work.",
    "heatmap": "Every layer and expert for one task: red is picked more often than an even share, blue less often.",
}


@dataclass
class Inputs:
    """What was found in a run directory; `missing` collects the names of what was not."""

    run_dir: Path
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    health: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)
    routing: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the summary's table, one for each model."""
        return list(self.summary.get("rows", []))


def write_demo_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files of a demo run and return its path.

    Raises CheckpointError when run_dir is not a directory or one of its JSON files is damaged, DataError when the media
    of a sample cannot be shown. Missing files are named in the page.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is not a directory; expected the output of `ernie-elastic demo`")
    inputs = read_inputs(run_dir)
    here = Path(__file__).parent
    page = Template((here / "report.html").read_text(encoding="utf-8"))
    style = (here / "report.css").read_text(encoding="utf-8")
    write_atomic(run_dir / REPORT_NAME, page.substitute(css=style, body=_body(inputs)))
    return run_dir / REPORT_NAME


def read_inputs(run_dir: Path) -> Inputs:
    """Read everything that the report shows; see the module docstring for the files."""
    inputs = Inputs(run_dir)
    inputs.summary = _read_json(run_dir / "summary.json", dict, inputs.missing) or {}
    inputs.metrics = read_metrics(run_dir / "metrics.jsonl")
    if not inputs.metrics:
        inputs.missing.append("metrics.jsonl")
    order = [str(row.get("model")) for row in inputs.rows]
    found = sorted(path.name for path in run_dir.glob("evaluation/*") if path.is_dir())
    for model in sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name)):
        folder = run_dir / "evaluation" / model
        samples = _read_json(folder / "samples.json", list, inputs.missing)
        inputs.answers += [Answers(model, folder, samples)] if samples else []
        results = _read_json(folder / "results.json", dict, inputs.missing)
        if results and results.get("detail"):
            inputs.details[model] = results["detail"]
    inputs.missing += [f"evaluation/{model}" for model in order if model not in found]
    for path in sorted(run_dir.glob("tokenizers/*/health.json")):
        inputs.health[path.parent.name] = _read_json(path, dict, inputs.missing) or {}
    inputs.figures = sorted((run_dir / "routing" / "figures").glob("*.png"))
    if not inputs.figures:
        inputs.missing.append("routing/figures")
    inputs.routing = _read_json(run_dir / "routing" / "statistics.json", dict, inputs.missing) or {}
    return inputs


def _read_json(path: Path, kind: type, missing: list[str]) -> Any:
    """The value of a JSON file; None, with its name in `missing`, when there is none."""
    if not path.is_file():
        parts = path.parts[-3:] if "evaluation" in path.parts[-3:] else path.parts[-1:]
        missing.append("/".join(parts))
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); run the demo's evaluation again") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a {kind.__name__}; run the demo again")
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl, one for each step in order; of a step written twice (after a resume) the last counts.

    A last line that was cut off is left out. Raises CheckpointError for a damaged line anywhere else.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise CheckpointError(f"{path}, line {number} is damaged ({error}); run the training again") from error
    return [records[step] for step in sorted(records)]


def _body(inputs: Inputs) -> str:
    parts = [_head(inputs)]
    parts.append(_samples(inputs, "makes", DRAWN))
    parts.append(_samples(inputs, "understands", READ))
    parts += [_models(inputs), _training(inputs), _routing(inputs), _tokenizers(inputs), _time(inputs), _foot(inputs)]
    return "\n".join(parts)


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _missing(what: str) -> str:
    return f'<p class="missing">Missing: {what}.</p>'


def _head(inputs: Inputs) -> str:
    """Title, one sentence, and the facts that sum the run up; only what was measured is claimed."""
    names = {str(row.get("model")) for row in inputs.rows}
    sentence = "One small mixture of experts, trained from scratch, reads and makes text, pictures, videos and sounds"
    if any(name.startswith("submodel") for name in names):
        sentence += "; smaller models were cut out of it without further training"
    if "compressed" in names and inputs.summary.get("logits_bit_equal"):
        sentence += ", and one of them was compressed without losing a bit"
    boxes = "".join(f"<div><b>{value}</b><span>{text}</span></div>" for value, text in _facts(inputs))
    facts = f'<div class="facts">{boxes}</div>' if boxes else _missing("summary.json, so nothing can be summed up here")
    return f'<header><h1>ernie_elastic: what the demo made</h1><p class="lead">{sentence}.</p>{facts}</header>'


def _facts(inputs: Inputs) -> list[tuple[str, str]]:
    """(figure, what it is) for the boxes at the top."""
    rows = {str(row.get("model")): row for row in inputs.rows}
    facts = []
    if full := rows.get("full"):
        active = tables.count(full.get("active_params"))
        facts.append((tables.count(full.get("total_params")), f"parameters, {active} active for a token"))
        good, measured = tables.above_chance(full)
        values = [entry["value"] for task in tables.tasks_of([full]) if (entry := tables.accuracy_of(full, task))]
        if values:
            mean, clear = sum(values) / len(values), f"{good} of {measured} clear of chance (95 % interval)"
            facts.append((f"{100 * mean:.0f} %", f"of held-out records right, mean of the tasks; {clear}"))
    saved = _saving(rows)
    if saved is not None:
        size = megabytes(rows["compressed"]["model_bytes"])
        change = f"{100 * saved:+.1f} %".replace("-", "\N{MINUS SIGN}")
        facts.append((change, f"bytes of the compressed weights ({size}) against the same model in BF16"))
    if inputs.summary.get("logits_bit_equal") is not None:
        equal = "bit-equal" if inputs.summary["logits_bit_equal"] else "not bit-equal"
        facts.append((equal, "logits of the compressed model against its BF16 source"))
    if seconds := inputs.summary.get("seconds"):
        facts.append((tables.duration(sum(seconds.values())), "for the whole pipeline on this machine"))
    return facts


def _saving(rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Relative change of bytes from submodel-half to compressed; None when one of them was not measured."""
    before, after = (rows.get(name, {}).get("model_bytes") for name in ("submodel-half", "compressed"))
    return None if not before or after is None else after / before - 1


def _samples(inputs: Inputs, verb: str, sections: Sequence[SampleSection]) -> str:
    """The sample cards of several tasks; verb is a key of INTRODUCTIONS."""
    bodies = [
        sample_section(section, inputs.answers) or _missing(f"samples of {section.task} (evaluation/*/samples.json)")
        for section in sections
    ]
    return _section(f"What it {verb}", f"<p>{INTRODUCTIONS[verb]}</p>", *bodies)


def _models(inputs: Inputs) -> str:
    """The table, the plot and the finer scores."""
    rows = inputs.rows
    if not rows:
        return _section("The models", _missing("the rows of summary.json"))
    same = "; <b>compressed</b> is submodel-half in the compressed format" if len(rows) > 1 else ""
    intro = (
        f"<p>All models use weights rounded to BF16{same}. In each bar the upright line is chance, the thin line is "
        "the 95 % interval of the measured share.</p>"
    )
    plot = tables.model_plot(rows, inputs.summary.get("logits_bit_equal"))
    plot = plot or _missing("a model with its bytes and every accuracy, for the plot")
    details = tables.detail_table(inputs.details)
    return _section(
        "The models", intro, tables.model_table(rows), "<h3>Mean accuracy against bytes</h3>", plot, details
    )


def _training(inputs: Inputs) -> str:
    """Loss and load curves."""
    metrics = inputs.metrics
    if not metrics:
        return _section("Training", _missing("metrics.jsonl"))
    intro = f"<p>{len(metrics):,} steps, all modalities in one run. {tables.spec_sentence(metrics)}</p>"
    losses = (
        "<h3>Loss of each modality</h3><p class='soft'>Moving average; beside each name its last value. Losses of "
        "different modalities measure different things: compare a line with itself.</p>"
    )
    loads = (
        "<h3>Balance of the experts</h3><p class='soft'>Tokens of the busiest expert over the mean; 1 (dashed) is "
        "perfectly even. The line is the mean of the layers, the band reaches from the most to the least even one.</p>"
    )
    losses += tables.loss_chart(metrics) or _missing("losses in metrics.jsonl")
    loads += tables.load_chart(metrics) or _missing("load_max_over_mean in metrics.jsonl")
    return _section("Training", intro, losses, loads)


def _routing(inputs: Inputs) -> str:
    """The routing figures: a sentence for each kind, then its pictures; heat maps behind a fold."""
    if not inputs.figures:
        return _section("Routing", _missing("routing/figures"))
    kinds: dict[str, list[str]] = {}
    for path, sentence in choose_figures(inputs.figures):
        kinds.setdefault(sentence, []).append(figure_html(path))
    blocks = []
    for sentence, pictures in kinds.items():
        kind = next((name for name, text in ROUTING_SENTENCES.items() if text == sentence), "")
        found = str((inputs.routing.get("sentences") or {}).get(kind, ""))
        text = f"<p class='soft'>{escape(f'{sentence} {found}'.strip())}</p>"
        block = f"{text}<div class='routing'>{''.join(pictures)}</div>"
        if kind == "heatmap":
            block = f"<details><summary>Heat maps, one for each task ({len(pictures)})</summary>{block}</details>"
        blocks.append(block)
    intro = "<p>Which experts a token goes to, measured on packed data. The router never sees the task of a token.</p>"
    cautions = "".join(f"<p class='soft'>{escape(str(text))}</p>" for text in inputs.routing.get("cautions") or [])
    return _section("Routing", intro, cautions, *blocks)


def choose_figures(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Figures with their sentence: dark twins left out, and single layers too where the whole figure is there."""
    names = {path.stem.replace("_", "", 1) if path.stem.startswith("figure_") else path.stem: path for path in paths}
    chosen: list[tuple[Path, str]] = []
    for start, sentence in ROUTING_SENTENCES.items():
        group = {name: path for name, path in names.items() if name == start or name.startswith(f"{start}_")}
        group = {name: path for name, path in group.items() if not name.endswith("_dark")}
        chosen += [(group[name], sentence) for name in ([start] if start in group else group)]
    known = tuple(ROUTING_SENTENCES)
    others = [path for name, path in names.items() if not name.startswith(known) and not name.endswith("_dark")]
    return chosen + [(path, f"{path.stem.replace('_', ' ')} (as the routing stage wrote it).") for path in others]


def _tokenizers(inputs: Inputs) -> str:
    """The plain numbers of each tokenizer's health file."""
    if not inputs.health:
        return _section("Tokenizers", _missing("tokenizers/*/health.json"))
    table = tables.health_table(inputs.health)
    return _section("Tokenizers", table or _missing("numbers in tokenizers/*/health.json"))


def _time(inputs: Inputs) -> str:
    seconds = inputs.summary.get("seconds")
    return _section(
        "Time of each stage", tables.stage_times(seconds) if seconds else _missing("seconds in summary.json")
    )


def _foot(inputs: Inputs) -> str:
    """What the page does and does not show, and everything that was missing."""
    lines = (
        "<footer><p class='soft'>What this shows: that every stage of the pipeline does its job, from raw records to a "
        "compressed model. What it does not show: quality at scale. The world is tiny and drawn by a program, the "
        "cells of its 3x3 grid are the cells of the picture code, and the model is small. Samples are the first ones "
        "that the evaluation kept of the held-out split, right or wrong.</p>"
    )
    if inputs.missing:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in sorted(set(inputs.missing)))
        lines += f'<p class="missing">Not found in this run, so not shown: {names}.</p>'
    return lines + "</footer>"

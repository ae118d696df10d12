"""The tables, the figure and the page's text of `study elastic`, from its results alone.

Losses are means over the seeds; the spread is the lowest and the highest. Percentages compare runs of the same seed,
then their mean and spread are taken. Sub-models are named by their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ernie_elastic.stages import write_atomic

TABLE_FILE, FIGURE_FILE = "tables.md", "losses.png"
# What each panel of the figure and each table compares: title, arms, and for "alone" which size such a model has.
Losses = dict[str, dict[str, list[dict[str, float]]]]
COLOURS = {"fixed": "#7a7a7a", "one": "#0072b2", "all": "#d55e00", "alone": "#111111"}
WORDS = {
    "fixed": "not elastic", "depth": "elastic depth", "width": "elastic width", "sparsity": "elastic sparsity",
    "all": "elastic in all three", "all_sandwich": "all three, sandwich", "depth_prefix": "depth, first layers",
    "depth_uniform": "depth, evenly spaced layers", "sparsity_per_layer": "sparsity, a top-k for each layer",
}  # fmt: skip


def mean_and_spread(values: Sequence[dict[str, float]], key: str = "loss") -> tuple[float, float, float]:
    """Mean, lowest and highest of one loss over the seeds."""
    numbers = [value[key] for value in values]
    return sum(numbers) / len(numbers), min(numbers), max(numbers)


def axes_of(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """What is compared along each axis: sub-model labels from the full one down, and the models trained alone.

    sizes: layers, experts, top_k of the full model.
    """
    layers, experts, top_k = sizes["layers"], sizes["experts"], sizes["top_k"]
    ks = [k for k in sorted({max(1, top_k // share) for share in (2, 4, 8)}, reverse=True) if k < top_k]
    return [
        {
            "arm": "depth", "title": "layers", "sizes": [layers, layers * 3 // 4, layers // 2],
            "labels": ["full", f"depth_{layers * 3 // 4}", f"depth_{layers // 2}"],
            "alone": {layers * 3 // 4: "alone_depth", layers // 2: "alone_half_depth"},
        },
        {
            "arm": "width", "title": "experts", "sizes": [experts, experts // 2],
            "labels": ["full", f"experts_{experts // 2}"], "alone": {experts // 2: "alone_width"},
        },
        {
            "arm": "sparsity", "title": "experts per token", "sizes": [top_k, *ks],
            "labels": ["full", *(f"k_{k}" for k in ks)],
            "alone": {max(1, top_k // 2): "alone_half_k", 1: "alone_k1"},
        },
    ]  # fmt: skip


def write_report(losses: Losses, sizes: dict[str, int], seeds: int, directory: Path) -> str:
    """Write tables.md and losses.png into `directory`; returns the tables."""
    parts = [_table(losses, axis) for axis in axes_of(sizes) if axis["arm"] in losses]
    parts += [_variants(losses, sizes, *variant) for variant in VARIANTS]
    parts += [_modalities(losses)]
    text = (
        f"Held-out loss, mean of {seeds} seed{'s' if seeds != 1 else ''} (lowest to highest).\n\n"
        + "\n\n".join(filter(None, parts))
        + "\n"
    )
    write_atomic(directory / TABLE_FILE, text)
    figure = draw(losses, sizes)
    canvas = FigureCanvasAgg(figure)
    temporary = directory / f".{FIGURE_FILE}.tmp.png"
    canvas.print_png(temporary)
    temporary.replace(directory / FIGURE_FILE)
    return text


def over_fixed(losses: Losses, arm: str, label: str) -> list[float]:
    """Per cent by which each seed's loss is above the full model that is not elastic, trained with the same seed."""
    pairs = zip(losses[arm][label], losses["fixed"]["full"], strict=True)
    return [100 * (ours["loss"] / base["loss"] - 1) for ours, base in pairs]


def _cell(losses: Losses, arm: str, label: str) -> str:
    values = losses.get(arm, {}).get(label)
    if not values:
        return ""
    mean, low, high = mean_and_spread(values)
    spread = f" ({low:.4f} to {high:.4f})" if len(values) > 1 else ""
    if "fixed" not in losses:
        return f"{mean:.4f}{spread}"
    more = over_fixed(losses, arm, label)
    apart = f" ({min(more):+.1f} to {max(more):+.1f})" if len(values) > 1 else ""
    return f"{mean:.4f}{spread}, {sum(more) / len(more):+.1f} %{apart}"


def _table(losses: Losses, axis: dict[str, Any]) -> str:
    """One row per way of training, one column per size; in per cent of the full model that is not elastic."""
    title = axis["title"]
    head = " | ".join(f"{size} {title}" for size in axis["sizes"])
    lines = [f"| training | {head} |", "| --- |" + " --- |" * len(axis["sizes"])]
    for arm in ("fixed", axis["arm"], "all", "all_sandwich"):
        if arm in losses:
            cells = " | ".join(_cell(losses, arm, label) for label in axis["labels"])
            lines.append(f"| {WORDS[arm]} | {cells} |")
    alone = " | ".join(_cell(losses, axis["alone"].get(size, ""), "full") for size in axis["sizes"])
    return "\n".join([*lines, f"| trained alone at that size | {alone} |"])


# Ways to train one axis: title of the table, the axis' place in `axes_of`, arms and their words.
VARIANTS: tuple[tuple[str, int, dict[str, str]], ...] = (
    ("layers dropped while training", 0,
     {"depth": "at random", "depth_uniform": "evenly spaced layers", "depth_prefix": "first layers"}),
    ("top-k drawn while training", 2, {"sparsity": "one for all layers", "sparsity_per_layer": "one for each layer"}),
)  # fmt: skip


def _variants(losses: Losses, sizes: dict[str, int], title: str, axis: int, arms: dict[str, str]) -> str:
    """Ways to train one axis, beside each other; nothing when fewer than two were trained."""
    labels = axes_of(sizes)[axis]["labels"]
    if sum(arm in losses for arm in arms) < 2:
        return ""
    lines = [f"| {title} | {' | '.join(labels)} |", "| --- |" + " --- |" * len(labels)]
    for arm, name in arms.items():
        if arm in losses:
            lines.append(f"| {name} | {' | '.join(_cell(losses, arm, label) for label in labels)} |")
    return "\n".join(lines)


def _modalities(losses: Losses) -> str:
    """The full models' losses by modality."""
    names = [name for name in next(iter(losses.values()))["full"][0] if name != "loss"]
    lines = [f"| full model | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for arm in losses:
        if arm in WORDS:
            cells = " | ".join(f"{mean_and_spread(losses[arm]['full'], name)[0]:.4f}" for name in names)
            lines.append(f"| {WORDS[arm]} | {cells} |")
    return "\n".join(lines)


def draw(losses: Losses, sizes: dict[str, int]) -> Figure:
    """One panel per axis: loss over the size of the sub-model, with the spread over the seeds."""
    axes = [axis for axis in axes_of(sizes) if axis["arm"] in losses]
    figure = Figure(figsize=(4.2 * max(1, len(axes)), 3.6), layout="constrained")
    for number, axis in enumerate(axes):
        _panel(figure.add_subplot(1, len(axes), number + 1), losses, axis)
    return figure


def _panel(plot: Axes, losses: Losses, axis: dict[str, Any]) -> None:
    for arm, kind in (("fixed", "fixed"), (axis["arm"], "one"), ("all", "all")):
        points = [(size, mean_and_spread(losses[arm][label])) for size, label in
                  zip(axis["sizes"], axis["labels"], strict=True) if label in losses.get(arm, {})]  # fmt: skip
        if points:
            _line(plot, points, WORDS[arm], COLOURS[kind], "-")
    alone = [(size, mean_and_spread(losses[arm]["full"])) for size, arm in sorted(axis["alone"].items())
             if arm in losses]  # fmt: skip
    if alone:
        _line(plot, alone, "trained alone", COLOURS["alone"], "")
    plot.set_xlabel(axis["title"])
    plot.set_xscale("log", base=2)
    plot.set_xticks(axis["sizes"], [str(size) for size in axis["sizes"]])
    plot.minorticks_off()
    plot.set_ylabel("held-out loss")
    plot.grid(alpha=0.25)
    plot.legend(fontsize=8, frameon=False)
    plot.spines[["top", "right"]].set_visible(False)


def _line(
    plot: Axes, points: list[tuple[int, tuple[float, float, float]]], label: str, colour: str, style: str
) -> None:
    sizes = [size for size, _ in points]
    means = [mean for _, (mean, _, _) in points]
    spread = [[mean - low for _, (mean, low, _) in points], [high - mean for _, (mean, _, high) in points]]
    plot.errorbar(
        sizes, means, yerr=spread, label=label, color=colour, linestyle=style or "none", marker="o", capsize=3
    )

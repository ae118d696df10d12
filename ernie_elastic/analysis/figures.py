"""Matplotlib figures of a routing: the report's figures 8, 9 and 10, and a layer by expert heat map for each task.

Functions named `..._panel(s)` return `Panel`s, narrow enough to be read on a phone; `figure_8` and `figure_9` are the
one wide figure that papers print. Heat maps use viridis and blue-red, which colour-blind readers can tell apart.

Shape letters: M tasks, L layers with a router, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.drawing import (
    MARKERS,
    Panel,
    Region,
    axes_box,
    lay_out,
    layer_title,
    scope_note,
    task_colour,
    task_label,
    theme,
)
from ernie_elastic.analysis.trace import RoutingCounts


def _frequency_bars(axes: Axes, counts: RoutingCounts, task: int, layer: int, colours: dict[str, str]) -> None:
    """One cell of figure 8: how often each expert is among the k of a token of this task."""
    experts = counts.header.num_experts
    values = st.specialization(counts)[task, layer]
    axes.set_xlim(-0.5, experts - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if counts.tokens[task] == 0:
        axes.text(0.5, 0.5, "no tokens", transform=axes.transAxes, ha="center", va="center", color=colours["soft"])
        axes.set_yticks([])
        return
    colour = task_colour(counts.task_names[task], task, colours)
    # One outline for all bars draws faster than a patch for each; gaps between bars only where pixels allow them.
    half = 0.42 if experts <= 64 else 0.5
    edges = (np.arange(experts)[:, None] + [-half, half]).ravel()
    heights = np.stack([np.nan_to_num(values), np.zeros(experts)], axis=-1).ravel()[:-1]
    axes.stairs(heights, edges, fill=True, color=colour, linewidth=0)
    axes.axhline(st.fair_share(counts)[layer], color=colours["soft"], linewidth=1, linestyle=(0, (4, 2)))
    axes.set_ylim(0, max(float(np.nanmax(values)), float(st.fair_share(counts)[layer])) * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))


def specialization_panels(counts: RoutingCounts, style: str = "light") -> list[Panel]:
    """Figure 8, one panel per shown layer: a bar chart for each task, one below the other. paper: figure 8."""
    panels, experts, tasks = [], counts.header.num_experts, len(counts.task_names)
    for layer, word in st.shown_layers(len(counts.header.layers)):
        with theme(style) as colours:
            figure = Figure(figsize=(4.3, 1.05 * tasks + 0.75))
            grid = figure.subplots(tasks, 1, squeeze=False, sharex=True)[:, 0]
            for task, axes in enumerate(grid):
                _frequency_bars(axes, counts, task, layer, colours)
                name = task_label(counts.task_names[task])
                axes.set_title(f"{name} · {counts.tokens[task]:,} tokens", loc="left", pad=3)
            grid[-1].set_xlabel("expert id")
            figure.supylabel("modality specialization (%)", fontsize=9, x=0.015)
            title = layer_title(counts, layer, word)
            note = f"{title}: {scope_note(counts)}\ndashed: fair share k/N"
            height = figure.get_size_inches()[1]
            figure.suptitle(note, fontsize=9, color=colours["soft"], y=1 - 0.05 / height, va="top")
            lay_out(figure, (0.55, 0.1, 0.42, 0.62), 0.55)
        stride = len(counts.header.layers) * experts
        regions = tuple(
            Region(
                axes_box(axes),
                "frequency",
                title,
                (task_label(counts.task_names[task]),),
                experts,
                task * stride + layer * experts,
                0,
            )
            for task, axes in enumerate(grid)
        )
        panels.append(Panel(f"figure8_{word}", f"Modality specialization, {title}", figure, regions))
    return panels


def figure_8(counts: RoutingCounts) -> Figure:
    """The whole of figure 8 as papers print it: tasks down, first, middle and last layer across."""
    shown, tasks = st.shown_layers(len(counts.header.layers)), len(counts.task_names)
    with theme("light") as colours:
        figure = Figure(figsize=(3.6 * len(shown) + 0.4, 1.25 * tasks + 0.8))
        grid = figure.subplots(tasks, len(shown), squeeze=False, sharex=True)
        for column, (layer, word) in enumerate(shown):
            grid[-1, column].set_xlabel("expert id")
            for task in range(tasks):
                _frequency_bars(grid[task, column], counts, task, layer, colours)
                name, place = task_label(counts.task_names[task]), layer_title(counts, layer, word)
                title = f"{name} · {place} · {counts.tokens[task]:,} tokens"
                grid[task, column].set_title(title, loc="left", fontsize=8)
        width, height = figure.get_size_inches()
        figure.supylabel("modality specialization (%)", fontsize=10, x=0.08 / width)
        note = f"{counts.header.model}, {scope_note(counts)}; dashed: k/N"
        figure.suptitle(note, fontsize=10, y=1 - 0.06 / height, va="top")
        lay_out(figure, (0.6, 0.12, 0.45, 0.55), 0.5)
    return figure


def _iou_cells(axes: Axes, values: np.ndarray, names: Sequence[str]) -> Any:
    """One heat map of figure 9 with its numbers; a pair without tokens stays blank and says so."""
    image = axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="viridis")
    size = len(names)
    axes.set_xticks(range(size), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row in range(size):
        for column in range(size):
            value = values[row, column]
            text = "none" if np.isnan(value) else f"{value:.2f}"
            ink = "#808080" if np.isnan(value) else "white" if value < 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    return image


def overlap_panels(counts: RoutingCounts, style: str = "light") -> list[Panel]:
    """Figure 9, one heat map per shown layer: IoU of the most used quarters of two tasks. paper: figure 9."""
    panels, iou, chance = [], st.quarter_iou(counts), st.chance_per_layer(counts)
    short = [task_label(name, short=True) for name in counts.task_names]
    full = tuple(task_label(name) for name in counts.task_names)
    for layer, word in st.shown_layers(len(counts.header.layers)):
        with theme(style) as colours:
            figure = Figure(figsize=(4.3, 4.3), layout="constrained")
            axes = figure.subplots()
            image = _iou_cells(axes, iou[layer], short)
            bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.75, aspect=28, pad=0.02)
            bar.ax.axvline(chance[layer], color="#ff5c5c", linewidth=2)
            bar.set_label(f"IoU of the top-25 % experts (red: chance, {chance[layer]:.3f})")
            bar.outline.set_visible(False)
            title = layer_title(counts, layer, word)
            note = f"{title}: {scope_note(counts)}\n{int(counts.tokens.sum()):,} tokens"
            axes.set_title(note, color=colours["soft"], fontsize=9)
            lay_out(figure)
        size = len(full)
        region = Region(axes_box(axes), "iou", title, full, full, layer * size * size, size)
        panels.append(Panel(f"figure9_{word}", f"Expert overlap of the tasks, {title}", figure, (region,)))
    return panels


def figure_9(counts: RoutingCounts) -> Figure:
    """The whole of figure 9: the heat maps of the first, middle and last layer side by side."""
    shown, iou, chance = st.shown_layers(len(counts.header.layers)), st.quarter_iou(counts), st.chance_per_layer(counts)
    short = [task_label(name, short=True) for name in counts.task_names]
    with theme("light"):
        figure = Figure(figsize=(3.9 * len(shown) + 0.6, 4.4), layout="constrained")
        grid = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (layer, word) in zip(grid, shown, strict=True):
            image = _iou_cells(axes, iou[layer], short)
            axes.set_title(f"{layer_title(counts, layer, word)}, chance {chance[layer]:.3f}")
        figure.colorbar(image, ax=list(grid), shrink=0.8, label="IoU of the top-25 % experts")
        tokens = f"{int(counts.tokens.sum()):,} tokens"
        figure.suptitle(f"{counts.header.model}, {scope_note(counts)}, {tokens}", fontsize=10)
        lay_out(figure)
    return figure


def entropy_panel(counts: RoutingCounts, style: str = "light") -> Panel:
    """Figure 10: normalised entropy of the routing per layer, one line per task. paper: figure 10."""
    values, layers = st.normalized_entropy(counts), counts.header.layers
    floor = float(st.entropy_floor(counts).max())
    with theme(style) as colours:
        figure = Figure(figsize=(4.8, 3.8), layout="constrained")
        axes = figure.subplots()
        for task, name in enumerate(counts.task_names):
            if counts.tokens[task] == 0:
                continue
            axes.plot(
                range(len(layers)),
                values[task],
                color=task_colour(name, task, colours),
                linewidth=1.6,
                markersize=4,
                marker=MARKERS[task % len(MARKERS)] if len(layers) <= 32 else None,
                label=f"{task_label(name)} ({counts.tokens[task]:,})",
            )
        lowest = float(np.nanmin(values)) if counts.tokens.any() else 0.0
        bottom = max(0.0, min(0.6, lowest - 0.03))
        if bottom < floor < 1:
            bottom = max(0.0, min(bottom, floor - 0.09))  # no line can go below the floor, so its label stands there
            axes.axhline(floor, color=colours["soft"], linewidth=1, linestyle=(0, (1, 2)))
            axes.text(
                0.99,
                floor - 0.022,
                "lowest possible: the same k experts always",
                ha="right",
                va="top",
                transform=axes.get_yaxis_transform(),
                fontsize=8,
                color=colours["soft"],
            )
        axes.set_ylim(bottom, 1.01)
        axes.set_xlim(-0.5, len(layers) - 0.5)
        ticks = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 9)).round().astype(int))
        axes.set_xticks(ticks, [str(layers[i]) for i in ticks])
        axes.grid(axis="y", color=colours["grid"], linewidth=0.6)
        axes.set(xlabel="layer", ylabel="normalised entropy")
        axes.set_title(f"{scope_note(counts)}; tokens in brackets", color=colours["soft"], fontsize=9)
        if counts.tokens.any():
            figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
        lay_out(figure)
    names = tuple(task_label(name) for name in counts.task_names)
    columns = tuple(f"layer {layer}" for layer in layers)
    region = Region(axes_box(axes), "entropy", "", names, columns, 0, len(layers), series=True)
    return Panel("figure10", "Normalised entropy of the routing per layer", figure, (region,))


def _cell_map(
    layers: Sequence[int],
    values: np.ndarray,
    norm: Normalize,
    ticks: Sequence[float],
    tick_labels: Sequence[str],
    bar_label: str,
    title: str,
    style: str,
) -> tuple[Figure, Axes]:
    """A layer by expert heat map with its colour bar; masked cells stay in the background colour."""
    with theme(style) as colours:
        rows = values.shape[0]
        figure = Figure(figsize=(4.4, float(np.clip(0.16 * rows + 1.5, 2.5, 5.0))), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            np.ma.masked_invalid(values), aspect="auto", norm=norm, cmap="RdBu_r", interpolation="nearest"
        )
        axes.set_facecolor(colours["grid"])
        shown = np.unique(np.linspace(0, rows - 1, min(rows, 9)).round().astype(int))
        axes.set_yticks(shown, [str(layers[i]) for i in shown])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set(xlabel="expert id", ylabel="layer")
        axes.set_title(title, loc="left")
        bar = figure.colorbar(image, ax=axes, ticks=list(ticks), pad=0.02)
        bar.ax.set_yticklabels(list(tick_labels))
        bar.ax.minorticks_off()
        bar.set_label(bar_label)
        bar.outline.set_visible(False)
        lay_out(figure)
    return figure, axes


def heat_map_panels(counts: RoutingCounts, style: str = "light") -> list[Panel]:
    """A layer by expert map for each task with tokens: activation frequency as a multiple of its fair share k / N.

    The scale is logarithmic, the same for all tasks, and ends at 8 times (or N / k where that is less). ours.
    """
    panels, header = [], counts.header
    ratio = st.specialization(counts) / st.fair_share(counts)[:, None]
    widest = float(np.clip(header.num_experts / header.top_k, 2, 8))
    ticks = [1 / widest, 1.0, widest]
    names = [f"≤ 1/{widest:g}", "k/N", f"≥ {widest:g}"]
    layers, experts = len(header.layers), header.num_experts
    for task, name in enumerate(counts.task_names):
        if counts.tokens[task] == 0:
            continue
        title = f"{task_label(name)} · {counts.tokens[task]:,} tokens"
        values = np.clip(ratio[task], 1 / widest, widest)
        norm = LogNorm(1 / widest, widest)
        figure, axes = _cell_map(
            header.layers,
            values,
            norm,
            ticks,
            names,
            "activation / fair share (k/N)",
            f"{title}\n{scope_note(counts)}",
            style,
        )
        labels = tuple(f"layer {layer}" for layer in header.layers)
        offset = task * layers * experts
        region = Region(axes_box(axes), "frequency", task_label(name), labels, experts, offset, experts)
        panels.append(Panel(f"heatmap_{name}", f"Layer by expert activation, {title}", figure, (region,)))
    return panels


def difference_panels(comparison: st.Comparison, style: str = "light") -> list[Panel]:
    """A layer by expert map for each common task: frequency here minus frequency in the other routing, in points."""
    panels = []
    finite = comparison.frequency[np.isfinite(comparison.frequency)]
    limit = max(1.0, float(np.abs(finite).max()) if finite.size else 1.0)
    rows, experts = comparison.frequency.shape[1:]
    for task, name in enumerate(comparison.task_names):
        values = comparison.frequency[task]
        if not np.isfinite(values).any():
            continue
        norm = TwoSlopeNorm(0.0, -limit, limit)
        ticks = [-limit, 0.0, limit]
        figure, axes = _cell_map(
            comparison.layers,
            values,
            norm,
            ticks,
            [f"{t:+.0f}" if t else "0" for t in ticks],
            "percentage points",
            f"{task_label(name)}: this minus the other",
            style,
        )
        labels = tuple(f"layer {layer}" for layer in comparison.layers)
        region = Region(axes_box(axes), "difference", task_label(name), labels, experts, task * rows * experts, experts)
        panels.append(Panel(f"difference_{name}", f"Change of activation, {task_label(name)}", figure, (region,)))
    return panels

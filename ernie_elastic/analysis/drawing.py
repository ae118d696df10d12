"""What all routing figures share: themes, colours, labels, rendering, and the panels that the page makes hoverable.

Figures are drawn without a display and without matplotlib's global state; colours are safe for colour-blind readers
(Okabe-Ito for tasks).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from ernie_elastic.analysis.trace import RoutingCounts

PALETTES = {
    "light": {"ink": "#1c2430", "soft": "#5b6675", "paper": "#ffffff", "grid": "#d9dee5", "text_line": "#1c2430"},
    "dark": {"ink": "#e6eaf0", "soft": "#a3adba", "paper": "#161b22", "grid": "#333b47", "text_line": "#e6eaf0"},
}
# Okabe-Ito: blues understand, oranges generate, green is sound; text takes the ink colour of the theme.
TASK_COLOURS = {
    "image_understanding": "#0072b2",
    "video_understanding": "#56b4e9",
    "image_generation": "#d55e00",
    "video_generation": "#e69f00",
    "audio": "#009e73",
    "audio_understanding": "#009e73",
    "audio_generation": "#cc79a7",
}
OTHER_COLOURS = ("#cc79a7", "#999999", "#f0e442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
SHORT_WORDS = {"understanding": "U", "generation": "G"}


@dataclass(frozen=True)
class Region:
    """An axes area in which a pointer position names a number.

    box: left, top, right, bottom as fractions of the picture from its upper left corner. table: a name in the page's
    data. offset, row_stride, col_stride: cell (row, column) is number offset + row * row_stride + column * col_stride.
    series: with it, all rows belong to one column and are listed by these names.
    """

    box: tuple[float, float, float, float]
    table: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...] | int
    offset: int
    row_stride: int
    col_stride: int = 1
    series: bool = False


@dataclass(frozen=True)
class Panel:
    """One drawn figure: file stem, what it shows in words, the figure and its regions."""

    name: str
    caption: str
    figure: Figure
    regions: tuple[Region, ...] = ()


def task_label(name: str, short: bool = False) -> str:
    """`image_understanding` as `Image Understanding`, or as `Image U` where room is scarce."""
    words = name.split("_")
    return " ".join(SHORT_WORDS.get(w, w.capitalize()) if short and i else w.capitalize() for i, w in enumerate(words))


def scope_note(counts: RoutingCounts) -> str:
    """The line that every figure carries: number of experts, k, and what is left out."""
    header = counts.header
    note = f"N = {header.num_experts} experts, k = {header.top_k}"
    if header.kept_experts is not None:
        sizes = sorted({len(kept) for kept in header.kept_experts})
        note += f", {'-'.join(str(size) for size in (sizes[0], sizes[-1])[: len(sizes)])} kept"
    if header.shared_experts:
        note += f", {header.shared_experts} shared not shown"
    return note


@contextlib.contextmanager
def theme(name: str) -> Iterator[dict[str, str]]:
    """Draw inside this block with the colours of "light" or "dark"; matplotlib's settings are restored after it."""
    colours = PALETTES[name]
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "axes.edgecolor": colours["soft"],
        "xtick.color": colours["soft"],
        "ytick.color": colours["soft"],
        "xtick.labelcolor": colours["ink"],
        "ytick.labelcolor": colours["ink"],
        "figure.facecolor": colours["paper"],
        "axes.facecolor": colours["paper"],
        "legend.frameon": False,
        "svg.hashsalt": "ernie-elastic",
    }
    with matplotlib.rc_context(settings):
        yield colours


def render(figure: Figure, kind: Literal["png", "svg"], dpi: int = 160) -> bytes:
    """The bytes of a figure that is laid out; the same figure gives the same bytes.

    A PNG has a palette of 256 colours, which is a third of the size and looks the same. The canvases are called
    directly, since `Figure.savefig` draws everything twice.
    """
    buffer = io.BytesIO()
    figure.set_dpi(dpi)
    if kind == "svg":
        with matplotlib.rc_context({"svg.hashsalt": "ernie-elastic"}):
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        return buffer.getvalue()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", dpi=(dpi, dpi))
    return buffer.getvalue()


def lay_out(figure: Figure, edges: tuple[float, float, float, float] | None = None, gap: float = 0.0) -> None:
    """Place everything once and for all: regions stay true at every resolution, and rendering need not do it again.

    edges: left, right, bottom, top margin in inches, with `gap` of an axes' height between rows; for grids of many
    axes, where measuring every label takes longer than drawing. None: the figure's own layout engine measures.
    """
    if edges is None:
        engine = figure.get_layout_engine()
        if engine is None:
            raise ValueError("a figure without margins needs layout='constrained'")
        engine.execute(figure)
        figure.set_layout_engine("none")
        return
    width, height = figure.get_size_inches()
    left, right, bottom, top = edges
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, 0.2, gap)


def axes_box(axes: Axes) -> tuple[float, float, float, float]:
    """The axes area from the upper left corner. The figure must be laid out already."""
    place = axes.get_position()
    left, top, right, bottom = place.x0, 1 - place.y1, place.x1, 1 - place.y0
    return round(left, 5), round(top, 5), round(right, 5), round(bottom, 5)


def task_colour(name: str, index: int, colours: dict[str, str]) -> str:
    """Colour of the task at this index of its trace; colours: the palette that `theme` yields."""
    return colours["text_line"] if name == "text" else TASK_COLOURS.get(name, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def layer_title(counts: RoutingCounts, layer: int, word: str) -> str:
    """`layer 11 (middle)` for a row of the layer axis."""
    return f"layer {counts.header.layers[layer]} ({word})"

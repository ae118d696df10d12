"""Charts of the demo's report as inline SVG: no script, no network, colours from the page's CSS variables.

Every chart is drawn twice, for a wide page and for a phone, so that its letters keep their size; CSS shows one of the
two. Coordinates are pixels of that drawing. Series are named in a legend beside the chart, written in HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = 1000, 350
MAX_POINTS = 240
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in data units; `colour` is a number of the page's palette; band = (low, high) per x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    band: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Point:
    """One labelled dot in data units; `note` is what its tooltip adds."""

    name: str
    x: float
    y: float
    colour: int = 1
    note: str = ""


@dataclass(frozen=True)
class Frame:
    """Where data lies in a drawing of width x height pixels."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False

    def px(self, x: float) -> float:
        """Pixel column of a data x."""
        low, high = self.x_range
        return LEFT + (x - low) / (high - low) * (self.width - LEFT - RIGHT)

    def py(self, y: float) -> float:
        """Pixel row of a data y; it grows downwards."""
        low, high = self.y_range
        if self.log_y:
            y, low, high = math.log10(max(y, 1e-12)), math.log10(low), math.log10(high)
        return self.height - BOTTOM - (y - low) / (high - low) * (self.height - TOP - BOTTOM)


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average, corrected for its start; half_life in values."""
    decay = 0.5 ** (1 / max(half_life, 1e-9))
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = total * decay + value * (1 - decay), weight * decay + 1 - decay
        result.append(total / weight)
    return result


def thin(count: int, limit: int = MAX_POINTS) -> list[int]:
    """Indices of at most about `limit` of `count` values, evenly spaced, first and last included."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers between low and high."""
    raw = max(high - low, 1e-12) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade between low and high; only powers of ten where that would be more than ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return fine if len(fine) <= 10 else [10.0**d for d in decades if low <= 10.0**d <= high]


def number(value: float) -> str:
    """A tick label: no more digits than it needs, thousands as k."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def line_chart(
    series: Sequence[Series], title: str, x_label: str, y_label: str, log_y: bool = False, base: float | None = None
) -> str:
    """Lines over a common x. base: a dashed horizontal line, which the y axis then includes. Empty without points."""
    series = [s for s in series if len(s.x)]
    if not series:
        return ""
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in s.y] + [v for s in series for pair in s.band for v in pair]
    ys += [] if base is None else [base]
    x_range = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    if log_y:
        positive = [max(y, 1e-6) for y in ys]
        y_range = (min(positive) / 1.1, max(positive) * 1.1)
    else:
        low, high = (min(ys) if base is None else base), max(ys)
        y_range = (low, high + (high - low) * 0.06 + 1e-9)

    def draw(width: int, height: int) -> str:
        frame = Frame(width, height, x_range, y_range, log_y)
        parts = [_axes(frame, x_label, y_label, number, number)]
        if base is not None:
            parts.append(_rule(frame, base))
        parts += [_band(frame, s) for s in series if s.band]
        parts += [_line(frame, s) for s in series]
        return "".join(parts)

    return _both(draw, title, 330, 270)


def scatter_chart(
    points: Sequence[Point], title: str, x_label: str, base: float | None, arrow: tuple[str, str] | None = None
) -> str:
    """Labelled dots; x in bytes, y a share in 0..1. base: a dashed line at chance. arrow: from one dot to another."""
    if not points:
        return ""
    x_range = (0.0, max(p.x for p in points) * 1.18 + 1e-9)

    def draw(width: int, height: int) -> str:
        frame = Frame(width, height, x_range, (0.0, 1.0))
        parts = [_axes(frame, x_label, "", megabytes, lambda v: f"{100 * v:.0f} %")]
        if base is not None:
            parts.append(_rule(frame, base))
            parts.append(f'<text class="soft" x="{LEFT + 6}" y="{frame.py(base) - 5:.1f}">chance</text>')
        by_name = {p.name: p for p in points}
        if arrow and arrow[0] in by_name and arrow[1] in by_name:
            parts.append(_arrow(frame, by_name[arrow[0]], by_name[arrow[1]]))
        parts += [_dot(frame, p) for p in points]
        parts += _labels(frame, points)
        return "".join(parts)

    return _both(draw, title, 340, 300)


def megabytes(value: float) -> str:
    """Bytes as kB, MB or GB (powers of ten), three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _both(draw: Callable[[int, int], str], title: str, wide_height: int, narrow_height: int) -> str:
    """The drawing at both widths; `title` is what a screen reader says."""
    drawings = ((WIDE, wide_height, "wide"), (NARROW, narrow_height, "narrow"))
    return "".join(
        f'<svg class="chart {name}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{draw(width, height)}</svg>"
        for width, height, name in drawings
    )


def _axes(
    frame: Frame, x_label: str, y_label: str, x_format: Callable[[float], str], y_format: Callable[[float], str]
) -> str:
    """Grid lines, tick labels and axis names."""
    wide, bottom = frame.width >= WIDE, frame.height - BOTTOM
    parts = []
    ticks = log_ticks(*frame.y_range) if frame.log_y else linear_ticks(*frame.y_range, 5)
    for tick in ticks:
        y = frame.py(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_format(tick)}</text>')
    for tick in linear_ticks(*frame.x_range, 8 if wide else 4):
        x = frame.px(tick)
        anchor = "middle" if x < frame.width - 24 else "end"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{x_format(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    x_middle = (LEFT + frame.width - RIGHT) / 2
    parts.append(
        f'<text class="soft" x="{x_middle:.0f}" y="{frame.height - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if y_label:
        parts.append(f'<text class="soft" x="{LEFT + 4}" y="{TOP + 2}">{escape(y_label)}</text>')
    return "".join(parts)


def _rule(frame: Frame, y: float) -> str:
    row = frame.py(y)
    return f'<line class="rule" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>'


def _line(frame: Frame, series: Series) -> str:
    pairs = " ".join(f"{frame.px(series.x[i]):.1f},{frame.py(series.y[i]):.1f}" for i in thin(len(series.x)))
    last = f"{escape(series.name)}: {series.y[-1]:.3g} at the end"
    return f'<polyline class="line s{series.colour}" points="{pairs}"><title>{last}</title></polyline>'


def _band(frame: Frame, series: Series) -> str:
    kept = thin(len(series.x))
    upper = [f"{frame.px(series.x[i]):.1f},{frame.py(series.band[i][1]):.1f}" for i in kept]
    lower = [f"{frame.px(series.x[i]):.1f},{frame.py(series.band[i][0]):.1f}" for i in reversed(kept)]
    return f'<polygon class="band s{series.colour}" points="{" ".join(upper + lower)}"/>'


def _dot(frame: Frame, point: Point) -> str:
    note = escape(f"{point.name}: {100 * point.y:.1f} %, {megabytes(point.x)}{point.note}")
    return (
        f'<circle class="dot s{point.colour}" cx="{frame.px(point.x):.1f}" cy="{frame.py(point.y):.1f}" r="6">'
        f"<title>{note}</title></circle>"
    )


def _arrow(frame: Frame, start: Point, end: Point) -> str:
    """A thin arrow between two dots, short of both."""
    x1, y1, x2, y2 = frame.px(start.x), frame.py(start.y), frame.px(end.x), frame.py(end.y)
    length = math.hypot(x2 - x1, y2 - y1)
    if length < 28:
        return ""
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    x1, y1, x2, y2 = x1 + 9 * ux, y1 + 9 * uy, x2 - 9 * ux, y2 - 9 * uy
    left = f"{x2 - 7 * ux + 4 * uy:.1f},{y2 - 7 * uy - 4 * ux:.1f}"
    right = f"{x2 - 7 * ux - 4 * uy:.1f},{y2 - 7 * uy + 4 * ux:.1f}"
    return (
        f'<line class="arrow" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        f'<polyline class="arrow" points="{left} {x2:.1f},{y2:.1f} {right}"/>'
    )


def _labels(frame: Frame, points: Sequence[Point]) -> list[str]:
    """Names beside the dots: for each, the first place that covers no dot and no earlier name."""
    taken = [(frame.px(p.x) - 8, frame.py(p.y) - 8, frame.px(p.x) + 8, frame.py(p.y) + 8) for p in points]
    parts = []
    for point in points:
        x, y, width = frame.px(point.x), frame.py(point.y), 7.2 * len(point.name)
        places = [(x - width / 2, y - 14), (x - width / 2, y + 24), (x + 12, y + 4), (x - 12 - width, y + 4)]
        places += [(x - width / 2, y + sign * step) for step in (32, 46, 60) for sign in (-1, 1.2)]

        def is_free(place: tuple[float, float], width: float = width) -> bool:
            box = (place[0], place[1] - 11, place[0] + width, place[1] + 3)
            inside = box[0] >= LEFT and box[2] <= frame.width and box[1] >= 0 and box[3] <= frame.height - BOTTOM
            return inside and not any(
                box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
            )

        left, base = next((place for place in places if is_free(place)), places[0])
        taken.append((left, base - 11, left + width, base + 3))
        parts.append(f'<text class="name" x="{left:.1f}" y="{base:.1f}">{escape(point.name)}</text>')
    return parts

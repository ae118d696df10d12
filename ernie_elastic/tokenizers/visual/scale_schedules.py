"""Scale schedules: which grids the scales of a picture have, for pictures of several shapes.

Contract: pure functions of integers. All schedules made together have the same number of scales, so that one amplitude
per scale serves all, and about the same number of cells. paper: section 2.2 (multi-scale bits); peer: Infinity's public
lists per aspect ratio; ours: the numbers, since the report gives none.

Letters: h/w cells of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ernie_elastic.errors import ConfigError, DataError

Schedule = tuple[tuple[int, int], ...]  # (h, w) per scale, coarse to fine; the last one is the full grid
SQUARE = (1, 1)
ASPECT_RATIOS = (SQUARE, (3, 4), (4, 3), (9, 16), (16, 9))  # height to width


def default_num_scales(side: int) -> int:
    """Scales for a square grid of `side` cells: three for every fourfold side, as in Infinity's list for 256 pixels."""
    return max(2, round(1.5 * math.log2(side)) + 1) if side > 1 else 1


def scale_schedules(
    side: int, aspect_ratios: Sequence[tuple[int, int]] = ASPECT_RATIOS, num_scales: int | None = None
) -> tuple[Schedule, ...]:
    """One schedule for each (height, width) ratio, each of about side x side cells; the square one comes first.

    num_scales: default `default_num_scales(side)`; sides grow by a constant factor from 1 to the full grid. Ratios that
    come to the same grid are kept once. Raises ConfigError for a side or number of scales below 1, and for ratios that
    are not positive.
    """
    if side < 1 or (num_scales is not None and num_scales < 1):
        raise ConfigError(f"scale schedules: side {side} and num_scales {num_scales} must be at least 1")
    if any(len(ratio) != 2 or min(ratio) < 1 for ratio in aspect_ratios):
        raise ConfigError(f"scale schedules: aspect ratios {list(aspect_ratios)} must be pairs of positive integers")
    count = num_scales or default_num_scales(side)
    grids = [_grid(side, height / width) for height, width in (SQUARE, *aspect_ratios)]
    return tuple(_schedule(grid, side, count) for grid in dict.fromkeys(grids))


def _grid(side: int, ratio: float) -> tuple[int, int]:
    """Cells (h, w) nearest to h / w = ratio and h * w = side * side, both errors on a logarithmic axis."""

    def error(grid: tuple[int, int]) -> tuple[float, float]:
        shape, area = abs(math.log(grid[0] / grid[1] / ratio)), abs(math.log(grid[0] * grid[1] / side**2))
        return round(shape + area, 9), round(shape, 9)  # rounded, so that a shape and its transpose tie alike

    height, width = side * ratio**0.5, side / ratio**0.5
    rows, columns = ({max(1, math.floor(length)), math.ceil(length)} for length in (height, width))
    return min(((row, column) for row in sorted(rows) for column in sorted(columns)), key=error)


def _schedule(grid: tuple[int, int], side: int, count: int) -> Schedule:
    shares = [side ** (number / (count - 1)) / side if count > 1 else 1.0 for number in range(count)]
    scales = [(max(1, round(grid[0] * share)), max(1, round(grid[1] * share))) for share in shares]
    return (*scales[:-1], grid)


def closest_schedule(schedules: Sequence[Schedule], height: int, width: int) -> Schedule:
    """The schedule whose grid has the shape nearest to a picture of height x width, then the nearest area.

    Both are measured in any unit (pixels or cells) on a logarithmic axis; of equals the first. Raises DataError for a
    side below 1, ConfigError without schedules.
    """
    if height < 1 or width < 1:
        raise DataError(f"a picture of {height}x{width} pixels has no content; each side must be at least 1")
    if not schedules:
        raise ConfigError("scale schedules: there are none to choose from")

    def distance(schedule: Schedule) -> tuple[float, float]:
        rows, columns = schedule[-1]
        shape = abs(math.log(rows / columns * width / height))
        return round(shape, 9), abs(math.log(rows * columns / (height * width)))

    return min(schedules, key=distance)

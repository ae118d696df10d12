"""Reads scenes and clips back from pixels, without a model: least-squares fit of rendered shapes in each grid cell.

Contract: any picture gets a reading, none raises except for a wrong shape or dtype. A picture is first area-averaged
to 32x32. In each cell the (shape, size, colour, offset) is sought whose rendering leaves the least squared error; it
is an object when it explains enough. A cell that differs strongly from the background but looks like no shape holds
an `UNCLEAR` object, so that a smear counts as a wrong object. ours: the checkers; they know the palette and sizes.

Shape letters: P pixels of a cell window, V template variants, K colours, C cells, F frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ernie_elastic.data.world.draw import PALETTE, RADIUS, shape_coverage
from ernie_elastic.data.world.facts import COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES
from ernie_elastic.errors import DataError

SIDE = 32
CELL_EDGES = (0, 11, 21, 32)  # pixels whose middle lies in the cell
WINDOW = 11
OFFSETS = np.arange(-1.5, 1.51, 0.5)  # pixels; the world's jitter is at most 1
FAINT_ENERGY = 1.0e5  # squared grey levels; the faintest object of the world has 4e5
STRONG_ENERGY = 3.0e5  # a cell with this much holds something, whether or not it looks like a shape
PRESENT_GAIN = 0.25  # of a template's own energy; an object of amplitude a gains 2a - 1
CLEAR_SHARE = 0.4  # of a cell's energy that the best fit has to explain
UNCLEAR = "unclear"
MOVE_TOLERANCE = 0.3  # pixels that a moving object may seem to go back between frames


def _cell_slices(cell: int) -> tuple[slice, slice]:
    column, row = cell % 3, cell // 3
    return slice(CELL_EDGES[row], CELL_EDGES[row + 1]), slice(CELL_EDGES[column], CELL_EDGES[column + 1])


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Coverage templates float32 [C, V, P] and their squared sums [C, V], V = shape x size x offset y x offset x."""
    templates = np.zeros((9, len(SHAPES), len(SIZES), len(OFFSETS), len(OFFSETS), WINDOW, WINDOW), np.float32)
    for cell in range(9):
        rows, columns = _cell_slices(cell)
        x = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - (cell % 3 + 0.5) * SIDE / 3
        y = np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - (cell // 3 + 0.5) * SIDE / 3
        for s, shape in enumerate(SHAPES):
            for z, size in enumerate(SIZES):
                for j, shift_y in enumerate(OFFSETS):
                    for i, shift_x in enumerate(OFFSETS):
                        cover = shape_coverage(shape, x - shift_x, y - shift_y, RADIUS[size] * SIDE)
                        templates[cell, s, z, j, i, : len(y), : len(x)] = cover
    templates_CVP = templates.reshape(9, -1, WINDOW * WINDOW)
    return templates_CVP, np.square(templates_CVP).sum(axis=2)


@lru_cache(maxsize=16)
def _averaging(size: int) -> np.ndarray:
    """float32 [32, size]: rows average the source pixels that each of 32 pixels covers."""
    edges = np.arange(SIDE + 1) * size / SIDE
    pixel = np.arange(size)
    weights = np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, edges[:-1, None])
    return (np.clip(weights, 0, None) * SIDE / size).astype(np.float32)


@lru_cache(maxsize=1)
def _border_mask() -> np.ndarray:
    """bool [32, 32]: pixels along cell borders, which objects rarely reach, however many there are."""
    line = np.zeros(SIDE, bool)
    line[[0, 10, 11, 20, 21, 31]] = True
    return line[:, None] | line[None, :]


def _to_32(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1]:
        raise DataError(
            f"a picture to read has shape {pixels.shape} and dtype {pixels.dtype}; expected uint8 [S, S, 3]"
        )
    image = pixels.astype(np.float32)
    if len(image) == SIDE:
        return image
    weights = _averaging(len(image))
    return np.einsum("ih,hwc,jw->ijc", weights, image, weights, optimize=True)


def _difference(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture minus its background, float32 [32, 32, 3], and the background [3]."""
    image = _to_32(pixels)
    background = np.median(image[_border_mask()], axis=0)
    return image - background, background


def _read_cell(cell: int, patch: np.ndarray, background: np.ndarray) -> dict[str, str] | None:
    energy = float(np.square(patch).sum())
    if energy < FAINT_ENERGY:
        return None
    colours_K3 = np.array([PALETTE[name] for name in COLOURS], np.float32) - background
    window = np.zeros((WINDOW, WINDOW, 3), np.float32)
    window[: patch.shape[0], : patch.shape[1]] = patch
    templates_CVP, squares_CV = _templates()
    # |d - T c|^2 = |d|^2 - gain, with gain = 2 T.(d c) - |c|^2 |T|^2
    matched_VK = templates_CVP[cell] @ (window.reshape(-1, 3) @ colours_K3.T)
    own_VK = squares_CV[cell][:, None] * np.square(colours_K3).sum(axis=1)
    gain_VK = 2 * matched_VK - own_VK
    best = int(gain_VK.argmax())
    if gain_VK.flat[best] < PRESENT_GAIN * own_VK.flat[best] and energy < STRONG_ENERGY:
        return None  # What a neighbour's blurred edge or a tokenizer's ringing leaves.
    variant, colour = divmod(best, len(COLOURS))
    shape, size = divmod(variant // len(OFFSETS) ** 2, len(SIZES))
    clear = gain_VK.flat[best] >= CLEAR_SHARE * energy
    return {
        "shape": SHAPES[shape] if clear else UNCLEAR,
        "colour": COLOURS[colour],
        "size": SIZES[size],
        "place": PLACES[cell],
    }


def read_scene(pixels: np.ndarray) -> list[dict[str, str]]:
    """The objects of a picture, in reading order: dicts of shape, colour, size and place.

    pixels: uint8 RGB [S, S, 3], any S. Raises DataError for another shape or dtype.
    """
    difference, background = _difference(pixels)
    cells = (_read_cell(cell, difference[_cell_slices(cell)], background) for cell in range(9))
    return [item for item in cells if item is not None]


def _split_still(first: Sequence[dict], last: Sequence[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """(objects at rest, left over in the first frame, left over in the last frame); rest = same place and colour."""
    still, rest = [], list(last)
    gone = []
    for item in first:
        same = [other for other in rest if (other["place"], other["colour"]) == (item["place"], item["colour"])]
        if same:
            still.append(item)
            rest.remove(same[0])
        else:
            gone.append(item)
    return still, gone, rest


def _direction(start: str, end: str) -> str | None:
    index, other = PLACES.index(start), PLACES.index(end)
    step = (other % 3 - index % 3, other // 3 - index // 3)
    return next((name for name, way in DIRECTIONS.items() if way == step), None)


def _moves_evenly(frames: np.ndarray, start: str, end: str) -> bool:
    """True when the bright matter in the two cells drifts from one to the other without going back."""
    first, last = PLACES.index(start), PLACES.index(end)
    (rows_1, columns_1), (rows_2, columns_2) = _cell_slices(first), _cell_slices(last)
    rows = slice(min(rows_1.start, rows_2.start), max(rows_1.stop, rows_2.stop))
    columns = slice(min(columns_1.start, columns_2.start), max(columns_1.stop, columns_2.stop))
    axis = 1 if rows_1 == rows_2 else 0
    track = []
    for frame in frames:
        energy = np.square(_difference(frame)[0][rows, columns]).sum(axis=2)
        along = energy.sum(axis=1 - axis)
        track.append(float((along * np.arange(len(along))).sum() / max(float(along.sum()), 1.0)))
    steps = np.diff(track) * (1 if last > first else -1)
    return bool((steps > -MOVE_TOLERANCE).all())


def _changes_once(states: Sequence[object]) -> bool:
    """True when the sequence has one change, from its first to its last value."""
    return sum(before != after for before, after in itertools.pairwise(states)) == 1


def _name_event(gone: list[dict], come: list[dict]) -> str | None:
    if len(gone) > 1 or len(come) > 1 or not gone + come:
        return None
    if not gone:
        return "appears"
    if not come:
        return "disappears"
    if gone[0]["place"] == come[0]["place"]:
        return "turns"
    # Something that is of another colour elsewhere is not the same thing moved.
    return _direction(gone[0]["place"], come[0]["place"]) if gone[0]["colour"] == come[0]["colour"] else None


def read_clip(frames: np.ndarray) -> dict[str, Any]:
    """What happens in a clip: the mover's shape, colour, size, place (in the first frame that shows it) and event.

    frames: uint8 RGB [F, S, S, 3], F >= 2. event is one of facts.EVENTS, or None when nothing or more than one
    thing changes between the first and last frame. to_colour: after `turns`. still: the object at rest, or None.
    num_objects: things seen. smooth: the frames between agree with the event (a steady drift, or a single change).
    Raises DataError for another shape or dtype.
    """
    if frames.ndim != 4 or len(frames) < 2:
        raise DataError(f"a clip to read has shape {frames.shape}; expected uint8 [F, S, S, 3] with F >= 2")
    still, gone, come = _split_still(read_scene(frames[0]), read_scene(frames[-1]))
    event = _name_event(gone, come)
    nothing: dict[str, Any] = dict.fromkeys(("shape", "colour", "size", "place"))
    mover = next(iter(gone + come), nothing)
    smooth = event is not None
    if event in DIRECTIONS:
        smooth = _moves_evenly(frames, gone[0]["place"], come[0]["place"])
    elif event is not None:
        seen = [{item["place"]: item["colour"] for item in read_scene(frame)} for frame in frames]
        smooth = _changes_once([colours.get(mover["place"]) for colours in seen])
    return {
        **mover,
        "event": event,
        "to_colour": come[0]["colour"] if event == "turns" else None,
        "still": still[0] if still else None,
        "num_objects": len(still) + max(len(gone), len(come)),
        "smooth": smooth,
    }

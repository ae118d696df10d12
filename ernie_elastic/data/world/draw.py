"""Draws scenes and clips of the embedded world with numpy: anti-aliased, any size, a fraction of a millisecond.

Contract: pixels are a pure function of (scene, size). Lengths are fractions of the picture's side; x runs right,
y down. Coverage of a pixel is exact along x and, for boxes, along y; curved and slanted sides are integrated over
`SUB_ROWS` lines of each pixel row.

Shape letters: H/W rows and columns of a patch, S lines of a pixel row, F frames.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ernie_elastic.data.world.facts import DIRECTIONS, Clip, Scene, SceneObject
from ernie_elastic.errors import ConfigError

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 50, 45),
    "green": (50, 180, 75),
    "blue": (60, 105, 250),
    "yellow": (250, 215, 50),
    "purple": (180, 70, 215),
    "white": (240, 240, 240),
}
BACKGROUND_DARK = (20, 22, 28)
BACKGROUND_LIGHT = (32, 34, 42)
# A large object and its jitter of at most 1/32 stay inside a cell of 1/3: 4.3 + 1 < 32 / 6. All shapes fill the box
# of side 2 x radius; with these radii and arms any two slightly blurred shapes differ by more than an opaque pixel.
RADIUS = {"small": 3.0 / 32, "large": 4.3 / 32}
CROSS_ARM = 0.3  # half the width of a bar, of the radius
SUB_ROWS = 6


def _overlap(at: np.ndarray, half: np.ndarray | float) -> np.ndarray:
    """How much of the unit pixel centred at `at` lies in [-half, half]."""
    return np.clip(np.minimum(at + 0.5, half) - np.maximum(at - 0.5, -half), 0.0, 1.0)


def shape_coverage(shape: str, x_W: np.ndarray, y_H: np.ndarray, radius: float) -> np.ndarray:
    """Share of each pixel that a shape of `radius` pixels around the origin covers.

    x_W, y_H: float32 centres of pixel columns and rows. Returns float32 [H, W] in 0..1. Raises ConfigError for an
    unknown shape.
    """
    if shape == "square":
        return _overlap(y_H, radius)[:, None] * _overlap(x_W, radius)
    if shape == "cross":
        arm = CROSS_ARM * radius
        tall_H, flat_H = _overlap(y_H, radius)[:, None], _overlap(y_H, arm)[:, None]
        wide_W, thin_W = _overlap(x_W, radius), _overlap(x_W, arm)
        return flat_H * wide_W + (tall_H - flat_H) * thin_W
    if shape not in ("circle", "triangle"):
        raise ConfigError(f"shape {shape!r} is not one of circle, square, triangle, cross")
    low_H, high_H = np.clip(y_H - 0.5, -radius, radius), np.clip(y_H + 0.5, -radius, radius)
    height_H1 = (high_H - low_H)[:, None]
    line_HS = low_H[:, None] + height_H1 * ((np.arange(SUB_ROWS, dtype=np.float32) + 0.5) / SUB_ROWS)
    if shape == "circle":
        half_HS = np.sqrt(np.maximum(radius * radius - line_HS * line_HS, 0.0))
    else:
        half_HS = (line_HS + radius) / 2
    return height_H1 * _overlap(x_W, half_HS[:, :, None]).mean(axis=1)


def background_colour(brightness: float) -> np.ndarray:
    """RGB float32 [3] of a background of brightness 0..1."""
    dark, light = np.array(BACKGROUND_DARK, np.float32), np.array(BACKGROUND_LIGHT, np.float32)
    return dark + np.float32(brightness) * (light - dark)


def object_centre(item: SceneObject) -> tuple[float, float]:
    """(x, y) of an object's middle in fractions of the picture."""
    column, row = item.cell
    return (column + 0.5) / 3 + item.shift_x, (row + 0.5) / 3 + item.shift_y


def _paint(canvas_HW3: np.ndarray, item: SceneObject, offset: tuple[float, float] = (0.0, 0.0)) -> None:
    size = canvas_HW3.shape[0]
    centre_x, centre_y = object_centre(item)
    centre_x, centre_y = (centre_x + offset[0]) * size, (centre_y + offset[1]) * size
    radius = RADIUS[item.size] * size
    left, top = max(int(centre_x - radius - 1), 0), max(int(centre_y - radius - 1), 0)
    right, bottom = min(int(centre_x + radius + 2), size), min(int(centre_y + radius + 2), size)
    if right <= left or bottom <= top:
        return
    x_W = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - centre_x)
    y_H = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - centre_y)
    cover_HW1 = shape_coverage(item.shape, x_W, y_H, radius)[:, :, None]
    patch = canvas_HW3[top:bottom, left:right]
    patch += cover_HW1 * (np.array(PALETTE[item.colour], np.float32) - patch)


def _blank(brightness: float, size: int) -> np.ndarray:
    return np.tile(background_colour(brightness), (size, size, 1))


def _to_pixels(canvas: np.ndarray) -> np.ndarray:
    return (canvas + 0.5).astype(np.uint8)


def draw_scene(scene: Scene, size: int = 32) -> np.ndarray:
    """The picture of a scene: uint8 RGB [size, size, 3].

    ours: dark, nearly plain background, so that a tokenizer's bits go to the objects.
    """
    canvas = _blank(scene.background, size)
    for item in scene.objects:
        _paint(canvas, item)
    return _to_pixels(canvas)


def draw_clip(clip: Clip, size: int = 32) -> np.ndarray:
    """The frames of a clip: uint8 RGB [F, size, size, 3], F = clip.num_frames.

    A moving object crosses one cell at even speed, from its place in the first frame to the next in the last one;
    other events happen between frames F/2 - 1 and F/2.
    """
    rest = _blank(clip.background, size)
    if clip.still is not None:
        _paint(rest, clip.still)
    changed = clip.mover if clip.to_colour is None else dataclasses.replace(clip.mover, colour=clip.to_colour)
    frames = np.empty((clip.num_frames, size, size, 3), np.uint8)
    for number in range(clip.num_frames):
        canvas = rest.copy()
        late = number >= clip.num_frames // 2
        if clip.event in DIRECTIONS:
            step_x, step_y = DIRECTIONS[clip.event]
            way = number / (clip.num_frames - 1) / 3
            _paint(canvas, clip.mover, (step_x * way, step_y * way))
        elif clip.event == "turns":
            _paint(canvas, changed if late else clip.mover)
        elif (clip.event == "appears") == late:
            _paint(canvas, clip.mover)
        frames[number] = _to_pixels(canvas)
    return frames

"""Media at another rate or size: sounds to a sample rate, pictures to a square, moments of a video at even times.

Pure functions on arrays; `decoding` makes the arrays from files. Whatever is already at the wanted rate or size is
returned bit for bit.

Shape letters: N samples, F frames, K chosen frames, H/W pixels, S size of the square, P taps of a filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ernie_elastic.errors import DataError

# What is drawn where a picture has nothing: behind transparent pixels and beside a picture that is not square.
# ours: white, as pages show transparent pictures.
BACKGROUND = (255, 255, 255)
MAX_FRAMES = 1 << 16  # frames that one video may have or give

# ours: a Kaiser window of 70 dB over 32 zero crossings a side leaves 13.5 % of the band for the filter's slope. It lies
# below the lower Nyquist frequency, so that nothing folds back: 86 % of the band is kept, 6.9 of 8 kHz at 16 kHz.
ZERO_CROSSINGS = 32
KAISER_BETA = 6.755
CUTOFF = 0.9325  # of the lower Nyquist frequency, the middle of the slope
BLOCK_ROWS = 4096  # outputs of one phase that are computed at once; bounds the memory of long sounds
EVEN_RATIO = 1.5  # longest to shortest duration of frames that count as one rate, written in a clock's coarse ticks


def resample(wave_N: np.ndarray, rate: int, target: int) -> np.ndarray:
    """A sound at another sample rate, by a windowed sinc in float64.

    wave_N: float [N] at `rate` Hz, silence before and after. Returns float32 [ceil(N * target / rate)] at `target` Hz;
    its sample n is at the very time n / target (the ratio is exact). Frequencies above the lower Nyquist frequency are
    removed by 70 dB; a constant stays that constant. ours: polyphase by definition, one kernel for each of the
    `target / gcd` phases, since the project has no signal library. Raises DataError unless both rates are positive.
    """
    if rate < 1 or target < 1:
        raise DataError(f"cannot resample from {rate} Hz to {target} Hz; both rates must be at least 1 Hz")
    if rate == target or len(wave_N) == 0:
        return wave_N.astype(np.float32)
    common = math.gcd(rate, target)
    up, down = target // common, rate // common
    half = math.ceil(ZERO_CROSSINGS * max(1.0, down / up))
    padded = np.pad(np.asarray(wave_N, dtype=np.float64), half)
    windows_NP = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)  # row i: samples i - half .. i + half
    result = np.empty(-(-len(wave_N) * up // down), dtype=np.float32)
    for phase in range(min(up, len(result))):
        # Outputs phase, phase + up, ... lie at the same fraction between two samples: one kernel serves them all.
        first, rest = divmod(phase * down, up)
        kernel_P = _kernel(rest / up, half, min(1.0, up / down) * CUTOFF)
        rows, places = windows_NP[first::down], result[phase::up]
        for start in range(0, len(places), BLOCK_ROWS):
            part = slice(start, min(start + BLOCK_ROWS, len(places)))
            places[part] = np.ascontiguousarray(rows[part]) @ kernel_P
    return result


def _kernel(fraction: float, half: int, cutoff: float) -> np.ndarray:
    """float64 [2 * half + 1], the taps for a point `fraction` samples after the middle one; they sum to 1."""
    distance_P = np.arange(-half, half + 1) - fraction
    inside_P = np.clip(1.0 - (distance_P / half) ** 2, 0.0, None)  # 0 at the window's ends and beyond
    taps_P = np.sinc(cutoff * distance_P) * np.i0(KAISER_BETA * np.sqrt(inside_P)) * (inside_P > 0)
    return taps_P / taps_P.sum()


def fit_image(pixels_HW3: np.ndarray, size: int) -> np.ndarray:
    """A picture as a square of `size` pixels: the longer side becomes `size`, the rest is BACKGROUND on both sides.

    pixels_HW3: uint8 [H, W, 3]. Returns uint8 [size, size, 3]. Each new pixel is the mean of the area it covers (the
    nearest one when enlarging). ours: padding, not cropping, as what a record's text names may stand at the border.
    Raises DataError for another dtype or shape, or a size below 1.
    """
    if pixels_HW3.dtype != np.uint8 or pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3 or pixels_HW3.size == 0:
        raise DataError(f"a picture is {pixels_HW3.dtype} {pixels_HW3.shape}; expected uint8 [H, W, 3]")
    if size < 1:
        raise DataError(f"a picture cannot be fitted to {size}x{size} pixels; the size must be at least 1")
    height, width = pixels_HW3.shape[:2]
    if height == width == size:
        return pixels_HW3.copy()
    longer = max(height, width)
    # A 20000x1 picture still gets one row.
    new_height, new_width = (max(1, round(side * size / longer)) for side in (height, width))
    picture = Image.fromarray(pixels_HW3).resize((new_width, new_height), Image.Resampling.BOX)
    square_SS3 = np.full((size, size, 3), BACKGROUND, dtype=np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    square_SS3[top : top + new_height, left : left + new_width] = np.asarray(picture)
    return square_SS3


def fit_frames(frames_FHW3: np.ndarray, size: int) -> np.ndarray:
    """`fit_image` for every frame of uint8 [F, H, W, 3]: uint8 [F, size, size, 3]. Raises DataError likewise.

    ours: all frames share one shape, so they share one scale and one border.
    """
    if frames_FHW3.ndim != 4 or len(frames_FHW3) == 0:
        raise DataError(f"a video has shape {frames_FHW3.shape}; expected [F, H, W, 3] with at least one frame")
    return np.stack([fit_image(frame, size) for frame in frames_FHW3])


def even_times(durations_F: Sequence[float], num_frames: int | None, name: str) -> np.ndarray:
    """Which stored frame is shown at each of K even moments: int64 [K], never decreasing.

    durations_F: how long each frame is shown, positive, in any one unit. num_frames: K; the moments are the middles of
    K equal parts of the whole. None: every frame is given at least once, at the step of the shortest one, so that a
    frame held twice as long comes twice (Pillow's GIF writer joins equal frames so); durations within EVEN_RATIO count
    as equal. ours: the report says nothing about uneven times. Raises DataError, naming `name`, for durations that are
    not positive, num_frames below 1, or more than MAX_FRAMES frames.
    """
    durations = np.asarray(durations_F, dtype=np.float64)
    if len(durations) == 0 or not (np.isfinite(durations) & (durations > 0)).all():
        raise DataError(f"{name} cannot be read as a video: its frames have no increasing times; save it anew")
    total, shortest = float(durations.sum()), float(durations.min())
    if num_frames is None and durations.max() <= EVEN_RATIO * shortest:
        count, step = len(durations), 0.0
    elif num_frames is None:
        count, step = max(1, round(total / shortest)), shortest
    else:
        count, step = num_frames, total / max(1, num_frames)
    if not 1 <= count <= MAX_FRAMES:
        raise DataError(
            f"{name} cannot be read as a video: {count} frames at even times are asked for; 1 to {MAX_FRAMES} can be "
            "given, choose num_frames in that range"
        )
    if step == 0.0:
        return np.arange(count)
    moments_K = (np.arange(count) + 0.5) * step
    return np.minimum(np.searchsorted(np.cumsum(durations), moments_K, side="right"), len(durations) - 1)

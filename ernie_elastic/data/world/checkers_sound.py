"""Reads notes and syllables back from waves, without a model: nearest of the spectra of everything the world sings.

Contract: any finite mono wave gets a reading; a segment that is nearly silent reads as nothing. Notes are compared
by the compressed spectrum of their whole length (pitch and timbre), syllables by log energies in bands over time,
with the voice's pitch smoothed away. ours: the checkers.

Shape letters: N samples, S segments, B spectrum bins or features, V templates.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ernie_elastic.data.world.facts import NOTES, SYLLABLES, TIMBRES, Phrase, WorldConfig
from ernie_elastic.data.world.sound import sing
from ernie_elastic.errors import DataError

SILENCE_RMS = 0.01
SILENCE_SHARE = 0.1  # of the loudest segment
COMPRESSION = 0.6  # exponent on magnitudes, so that overtones count
MIN_LIKENESS = 0.5  # cosine below which a segment is no note at all
SMEAR_HZ = 15.0  # a second, wider look at each peak: decoders may break phases between steps
UNCLEAR = "unclear"
FRAME_SECONDS, HOP_SECONDS = 0.025, 0.010
BAND_EDGES_HZ = (80, 200, 320, 450, 600, 780, 980, 1220, 1500, 1820, 2200, 2650, 3200, 3900, 4800, 6000, 7600)
BAND_FLOOR = 0.02  # of the loudest band, under which energy is silence
VOICES = (107.0, 120.0, 133.0, 147.0)


def _segments(wave: np.ndarray, sample_rate: int, steps: int) -> np.ndarray:
    """The wave in pieces of one note, float64 [S, N], without silent ones; half a piece or more at the end counts."""
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise DataError(f"a sound to read has shape {wave.shape} and dtype {wave.dtype}; expected float mono [N]")
    if not np.isfinite(wave).all():
        raise DataError("a sound to read has values that are not finite")
    length = sample_rate * 2 // 25 * steps
    count = (len(wave) + length // 2) // length
    padded = np.zeros(count * length)
    padded[: min(len(wave), len(padded))] = wave[: len(padded)]
    pieces_SN = padded.reshape(count, length)
    loudness_S = np.sqrt(np.square(pieces_SN).mean(axis=1))
    return pieces_SN[loudness_S > max(SILENCE_RMS, SILENCE_SHARE * loudness_S.max(initial=0.0))]


def _normalised(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-9)


def _smear(magnitude_SB: np.ndarray, width: float) -> np.ndarray:
    """Gaussian smoothing along the bins; width: standard deviation in bins."""
    reach = int(3 * width) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    padded = np.pad(magnitude_SB, ((0, 0), (reach, reach)))
    return np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=1) @ (kernel / kernel.sum())


def _note_features(pieces_SN: np.ndarray, sample_rate: int) -> np.ndarray:
    """Compressed magnitudes up to 7 kHz above the noise floor, smoothed narrowly and widely, unit length: [S, B]."""
    length = pieces_SN.shape[1]
    bins = 7000 * length // sample_rate
    magnitude_SB = np.abs(np.fft.rfft(pieces_SN * np.hanning(length), axis=1))[:, :bins]
    magnitude_SB = np.maximum(magnitude_SB - 2 * np.median(magnitude_SB, axis=1, keepdims=True), 0.0)
    looks = [_smear(magnitude_SB, width * length / sample_rate) for width in (SMEAR_HZ / 4, SMEAR_HZ)]
    return _normalised(np.concatenate([_normalised(look**COMPRESSION) for look in looks], axis=1))


@lru_cache(maxsize=8)
def _note_templates(sample_rate: int, steps: int) -> np.ndarray:
    """[V, B], V = timbre x note."""
    config = WorldConfig(sample_rate=sample_rate, steps_per_note=steps)
    waves = [sing(Phrase(notes=(note,), timbre=timbre, gain=1.0), config) for timbre in TIMBRES for note in NOTES]
    return _note_features(np.stack(waves).astype(np.float64), sample_rate)


def read_phrase(wave: np.ndarray, sample_rate: int = 16000, steps_per_note: int = 2) -> dict[str, object]:
    """{"notes": names in order, "timbre": name or None}; a segment like no note reads as "unclear".

    wave: float mono [N] at sample_rate Hz. Raises DataError for another shape, dtype or values that are not finite.
    """
    pieces_SN = _segments(wave, sample_rate, steps_per_note)
    if not len(pieces_SN):
        return {"notes": [], "timbre": None}
    likeness_SV = _note_features(pieces_SN, sample_rate) @ _note_templates(sample_rate, steps_per_note).T
    likeness_STP = likeness_SV.reshape(len(pieces_SN), len(TIMBRES), len(NOTES))
    # One timbre plays the whole phrase: the one whose best notes fit best in sum.
    timbre = int(likeness_STP.max(axis=2).sum(axis=0).argmax())
    best_S = likeness_STP[:, timbre].argmax(axis=1)
    clear_S = likeness_STP[:, timbre].max(axis=1) >= MIN_LIKENESS
    notes = [NOTES[best] if clear else UNCLEAR for best, clear in zip(best_S, clear_S, strict=True)]
    return {"notes": notes, "timbre": TIMBRES[timbre]}


def read_notes(wave: np.ndarray, sample_rate: int = 16000, steps_per_note: int = 2) -> list[str]:
    """The notes of a wave, in order; see `read_phrase`."""
    notes = read_phrase(wave, sample_rate, steps_per_note)["notes"]
    assert isinstance(notes, list)
    return notes


def _speech_features(pieces_SN: np.ndarray, sample_rate: int) -> np.ndarray:
    """Log band energies over time, floor removed, flattened: [S, B]."""
    frame, hop = round(FRAME_SECONDS * sample_rate), round(HOP_SECONDS * sample_rate)
    views = np.lib.stride_tricks.sliding_window_view(pieces_SN, frame, axis=1)[:, ::hop]
    power = np.square(np.abs(np.fft.rfft(views * np.hanning(frame), axis=2)))
    frequency = np.fft.rfftfreq(frame, 1 / sample_rate)
    # Bins of 40 Hz are shared between bands by distance, so that harmonics of any voice fill all of them alike.
    centres = (np.array(BAND_EDGES_HZ[1:]) + np.array(BAND_EDGES_HZ[:-1])) / 2
    widths = np.diff(BAND_EDGES_HZ) / 1.5
    bands = power @ np.exp(-0.5 * ((frequency[:, None] - centres) / widths) ** 2)
    loudest = bands.max(axis=(1, 2), keepdims=True)
    return np.log1p(bands / (np.maximum(loudest, 1e-12) * BAND_FLOOR**2 * 10)).reshape(len(pieces_SN), -1)


@lru_cache(maxsize=8)
def _syllable_templates(sample_rate: int, steps: int) -> np.ndarray:
    """[voices, syllables, B]."""
    config = WorldConfig(sample_rate=sample_rate, steps_per_note=steps)
    waves = [
        sing(Phrase(syllables=(name,), voice=voice, gain=1.0, seed=seed), config)
        for seed, voice in enumerate(VOICES)
        for name in SYLLABLES
    ]
    features = _speech_features(np.stack(waves).astype(np.float64), sample_rate)
    return features.reshape(len(VOICES), len(SYLLABLES), -1)


def read_syllables(wave: np.ndarray, sample_rate: int = 16000, steps_per_syllable: int = 2) -> list[str]:
    """The syllables of a wave, in order. wave: float mono [N]. Raises DataError as `read_phrase` does."""
    pieces_SN = _segments(wave, sample_rate, steps_per_syllable)
    if not len(pieces_SN):
        return []
    templates = _syllable_templates(sample_rate, steps_per_syllable)
    features_SB = _speech_features(pieces_SN, sample_rate)
    distance = np.square(templates[:, :, None] - features_SB).sum(axis=3).mean(axis=0)
    return [SYLLABLES[best] for best in distance.argmin(axis=0)]

"""Sings phrases of the embedded world with numpy: pitched notes of two timbres, and syllables by formant synthesis.

Contract: the wave is a pure function of (phrase, config); its length is a whole number of 80 ms steps. Notes start
at phase zero, so that equal notes sound equal. ours: eight pitches of the C major scale from C5 (523 Hz), where a
semitone is far wider than the 6 Hz that one note's length resolves.

Shape letters: N samples, H harmonics.
"""

from __future__ import annotations

import numpy as np

from ernie_elastic.data.world.facts import NOTES, Phrase, WorldConfig
from ernie_elastic.errors import ConfigError

SEMITONES = (0, 2, 4, 5, 7, 9, 11, 12)
LOWEST_PITCH = 523.2511
HARMONICS: dict[str, tuple[float, ...]] = {"flute": (1.0, 0.18, 0.05), "organ": (0.7, 0.55, 0.5, 0.4, 0.3, 0.2)}
ATTACK_SECONDS = 0.008
RELEASE_SECONDS = 0.016
DECAY_SECONDS = 0.25
PEAK = 0.6  # of a note of gain 1; leaves head room for a codec's overshoot

# Formants (Hz) and bandwidths of vowels after textbook averages of male speakers, rounded.
VOWEL_FORMANTS: dict[str, tuple[float, float, float]] = {
    "a": (750.0, 1150.0, 2450.0),
    "i": (280.0, 2250.0, 2950.0),
    "u": (310.0, 750.0, 2250.0),
    "e": (480.0, 1850.0, 2500.0),
}
FORMANT_WIDTHS = (70.0, 90.0, 130.0)
FORMANT_GAINS = (1.0, 0.7, 0.4)
# Where a vowel's formants start after a consonant, and the centre and width of its burst of noise.
LOCUS_FORMANTS: dict[str, tuple[float, float, float]] = {
    "b": (200.0, 700.0, 2100.0),
    "d": (200.0, 1750.0, 2700.0),
    "g": (200.0, 2250.0, 2400.0),
    "m": (240.0, 1000.0, 2200.0),
}
BURSTS: dict[str, tuple[float, float]] = {"b": (600.0, 250.0), "d": (4200.0, 900.0), "g": (1900.0, 350.0)}
CLOSURE_SECONDS = 0.012
ONSET_SECONDS = 0.045  # the vowel's voice is fully there
GLIDE_SECONDS = 0.030
TOP_HARMONIC_HZ = 4000.0


def note_frequency(note: str, cents: float = 0.0) -> float:
    """Frequency of a note in Hz. Raises ConfigError for an unknown name."""
    if note not in NOTES:
        raise ConfigError(f"note {note!r} is not one of {' '.join(NOTES)}")
    return LOWEST_PITCH * 2.0 ** (SEMITONES[NOTES.index(note)] / 12 + cents / 1200)


def _edges(time_N: np.ndarray, length: float, attack: float, release: float) -> np.ndarray:
    return np.clip(np.minimum(time_N / attack, (length - time_N) / release), 0.0, 1.0)


def _note(note: str, phrase: Phrase, config: WorldConfig) -> np.ndarray:
    time_N = np.arange(config.note_samples) / config.sample_rate
    angle_N = 2 * np.pi * note_frequency(note, phrase.cents) * time_N
    harmonics = HARMONICS[phrase.timbre]
    wave_N = sum(level * np.sin((number + 1) * angle_N) for number, level in enumerate(harmonics))
    length = config.note_samples / config.sample_rate
    envelope_N = _edges(time_N, length, ATTACK_SECONDS, RELEASE_SECONDS) * np.exp(-time_N / DECAY_SECONDS)
    loudness = PEAK / np.sqrt(np.sum(np.square(harmonics)) * 2)
    return np.asarray(wave_N * envelope_N * loudness)


def _formant_levels(frequency_H: np.ndarray, formants: tuple[float, float, float]) -> np.ndarray:
    peaks = zip(formants, FORMANT_WIDTHS, FORMANT_GAINS, strict=True)
    return np.sum([gain / (1 + ((frequency_H - at) / width) ** 2) for at, width, gain in peaks], axis=0)


def _harmonic_waves(angle_N: np.ndarray, count: int) -> np.ndarray:
    # sin((h+1)a) = 2 cos(a) sin(ha) - sin((h-1)a): one sine and one cosine for the whole stack.
    waves_HN = np.empty((count, len(angle_N)))
    double_N = 2 * np.cos(angle_N)
    waves_HN[0] = np.sin(angle_N)
    waves_HN[1] = double_N * waves_HN[0]
    for number in range(2, count):
        waves_HN[number] = double_N * waves_HN[number - 1] - waves_HN[number - 2]
    return waves_HN


def _burst(consonant: str, rng: np.random.Generator, config: WorldConfig) -> np.ndarray:
    centre, width = BURSTS[consonant]
    count = round((ONSET_SECONDS - CLOSURE_SECONDS) * config.sample_rate)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / config.sample_rate)
    noise_N = np.fft.irfft(spectrum * np.exp(-0.5 * ((frequency - centre) / width) ** 2), count)
    return noise_N / np.sqrt(np.mean(noise_N**2)) * np.exp(-np.arange(count) / count * 3)


def _syllable(syllable: str, waves_HN: np.ndarray, frequency_H: np.ndarray, rng: np.random.Generator,
              config: WorldConfig) -> np.ndarray:  # fmt: skip
    consonant, vowel = syllable[0], syllable[1]
    time_N = np.arange(config.note_samples) / config.sample_rate
    length = config.note_samples / config.sample_rate
    glide_N = np.clip((time_N - ONSET_SECONDS + 0.01) / GLIDE_SECONDS, 0.0, 1.0)
    levels = [_formant_levels(frequency_H, table) for table in (LOCUS_FORMANTS[consonant], VOWEL_FORMANTS[vowel])]
    levels = [level / np.sqrt(np.sum(level**2) / 2) for level in levels]
    voiced_N = (1 - glide_N) * (levels[0] @ waves_HN) + glide_N * (levels[1] @ waves_HN)
    wave_N = 0.2 * voiced_N * _edges(time_N - ONSET_SECONDS + 0.01, length - ONSET_SECONDS + 0.01, 0.012, 0.025)
    if consonant == "m":
        murmur_H = np.exp(-0.5 * ((frequency_H - 250.0) / 90.0) ** 2)
        murmur_H /= np.sqrt(np.sum(murmur_H**2) / 2)
        wave_N += 0.12 * (murmur_H @ waves_HN) * _edges(time_N, ONSET_SECONDS + 0.015, 0.01, 0.015)
    else:
        start = round(CLOSURE_SECONDS * config.sample_rate)
        burst_N = _burst(consonant, rng, config)
        wave_N[start : start + len(burst_N)] += 0.22 * burst_N
    return wave_N


def _speak(phrase: Phrase, config: WorldConfig) -> np.ndarray:
    rng = np.random.default_rng(phrase.seed)
    voice = phrase.voice * 2.0 ** (phrase.cents / 1200)
    frequency_H = voice * np.arange(1, int(TOP_HARMONIC_HZ / voice) + 1)
    angle_N = 2 * np.pi * voice * np.arange(config.note_samples * len(phrase.syllables)) / config.sample_rate
    waves_HN = _harmonic_waves(angle_N, len(frequency_H))
    parts = np.split(waves_HN, len(phrase.syllables), axis=1)
    return np.concatenate(
        [_syllable(name, part, frequency_H, rng, config) for name, part in zip(phrase.syllables, parts, strict=True)]
    )


def sing(phrase: Phrase, config: WorldConfig) -> np.ndarray:
    """The sound of a phrase: float32 mono [N] in [-1, 1], N = notes (or syllables) x config.note_samples.

    Raises ConfigError when the phrase has both notes and syllables, or neither, or an unknown note.
    """
    if bool(phrase.notes) == bool(phrase.syllables):
        raise ConfigError(f"a phrase has either notes or syllables, not {phrase.notes!r} and {phrase.syllables!r}")
    if phrase.notes:
        wave_N = np.concatenate([_note(note, phrase, config) for note in phrase.notes])
    else:
        wave_N = _speak(phrase, config)
    return np.clip(wave_N * phrase.gain, -1.0, 1.0).astype(np.float32)

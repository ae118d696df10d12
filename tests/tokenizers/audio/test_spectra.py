"""Short-time spectra invert exactly, and a wave found from magnitudes alone has those magnitudes."""

from __future__ import annotations

import math

import pytest
import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizers.audio.spectra import Spectrum

SPECTRUM = Spectrum(512, 128)


def chord(length: int = 7680) -> torch.Tensor:
    time = torch.arange(length) / 16000
    return sum(0.3 * torch.sin(2 * math.pi * frequency * time) for frequency in (440.0, 662.0, 1320.0))[None]


def agreement_db(wave: torch.Tensor, magnitude: torch.Tensor) -> float:
    noise = (SPECTRUM(wave).abs() - magnitude).square().sum()
    return float(10 * torch.log10(magnitude.square().sum() / noise))


def test_frames_are_whole_and_the_transform_inverts() -> None:
    wave = torch.randn(2, 1280)
    spectrum = SPECTRUM(wave)
    assert spectrum.shape == (2, 10, 257)
    torch.testing.assert_close(SPECTRUM.inverse(spectrum), wave, atol=1e-5, rtol=1e-4)


def test_first_phase_is_good_and_rounds_improve_it() -> None:
    magnitude = SPECTRUM(chord()).abs()
    guess = agreement_db(SPECTRUM.wave_from_magnitude(magnitude, 0), magnitude)
    better = agreement_db(SPECTRUM.wave_from_magnitude(magnitude, 8), magnitude)
    zero_phase = agreement_db(SPECTRUM.inverse(magnitude.to(torch.complex64)), magnitude)
    assert guess > 15 and better > 25 and better > guess + 5 and zero_phase < guess - 5


def test_a_wave_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    magnitude = SPECTRUM(torch.cat([chord(), chord().flip(1) * torch.linspace(0, 1, 7680)])).abs()
    both = SPECTRUM.wave_from_magnitude(magnitude, 4)
    torch.testing.assert_close(both[1:], SPECTRUM.wave_from_magnitude(magnitude[1:], 4), atol=1e-4, rtol=1e-3)
    assert torch.equal(both, SPECTRUM.wave_from_magnitude(magnitude, 4))


def test_silence_stays_silent() -> None:
    assert float(SPECTRUM.wave_from_magnitude(torch.zeros(1, 10, 257), 4).abs().max()) == 0


@pytest.mark.parametrize(("window", "hop"), [(511, 128), (512, 127), (128, 128)])
def test_windows_that_do_not_overlap_are_refused(window: int, hop: int) -> None:
    with pytest.raises(ConfigError, match=f"window {window} and hop {hop}"):
        Spectrum(window, hop)

"""Losses and measures of sounds: mel spectrograms at several windows, Whisper's features, SI-SDR.

Contract: pure functions of waves; a sound may have any length from one sample on, and is compared item by item. The
teacher is frozen and gives targets without gradients. paper: section 2.5 (the first code is aligned with Whisper's
encoder, average-pooled to 12.5 Hz). background: mel losses of EnCodec and DAC; Whisper's front end.

Shape letters: N sounds, L samples, K frequency bins, M mel bands, T frames, S steps of codes, C channels, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.data.media.resampling import resample
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizer_training.losses.perceptual import frozen_model, read_json

LINEAR_HZ, LINEAR_STEP_HZ, LOG_STEP = 1000.0, 200.0 / 3.0, math.log(6.4) / 27.0  # background: Slaney's mel scale
LOG_FLOOR = 1e-5  # amplitude that is added before the logarithm: -100 dB
RMS_FLOOR = 1e-8  # squared amplitude below which the linear term loses its slope
RATIO_FLOOR = 1e-12  # SI-SDR lies in -120..120 dB
WINDOWS_AT_ONCE = 8  # of a teacher; bounds the memory of long sounds


def mel_filters(sample_rate: int, window: int, num_mels: int, area_norm: bool = False) -> torch.Tensor:
    """Triangular filters float64 [K, M] from the K = window // 2 + 1 bins of a spectrum to M mel bands, 0..Nyquist.

    background: Slaney's mel scale (linear below 1000 Hz). Peaks are 1; with area_norm the areas over Hz are 1, as
    Whisper has them. Raises ConfigError when a band holds no bin.
    """
    if min(sample_rate, num_mels) < 1 or window < 2:
        raise ConfigError(f"mel filters: sample_rate {sample_rate}, window {window}, num_mels {num_mels} are too small")
    bins_K = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    corners = _mel_to_hz(torch.linspace(0, _hz_to_mel(sample_rate / 2), num_mels + 2, dtype=torch.float64))
    rise_KM = (bins_K[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall_KM = (corners[2:] - bins_K[:, None]) / (corners[2:] - corners[1:-1])
    filters_KM = torch.minimum(rise_KM, fall_KM).clamp(min=0.0)
    if not bool((filters_KM.amax(dim=0) > 0).all()):
        raise ConfigError(
            f"mel filters: some of {num_mels} bands hold no bin of a window of {window} samples at {sample_rate} Hz; "
            "take fewer bands or a longer window"
        )
    return filters_KM * (2.0 / (corners[2:] - corners[:-2])) if area_norm else filters_KM


def _hz_to_mel(hertz: float) -> float:
    if hertz < LINEAR_HZ:
        return hertz / LINEAR_STEP_HZ
    return LINEAR_HZ / LINEAR_STEP_HZ + math.log(hertz / LINEAR_HZ) / LOG_STEP


def _mel_to_hz(mel_M: torch.Tensor) -> torch.Tensor:
    knee = LINEAR_HZ / LINEAR_STEP_HZ
    return torch.where(mel_M < knee, mel_M * LINEAR_STEP_HZ, LINEAR_HZ * ((mel_M - knee) * LOG_STEP).exp())


class MultiScaleMel(nn.Module):
    """Distance of two sounds by their mel spectrograms at several windows; differentiable.

    Per window: mean |difference of log amplitudes| + linear_weight * root mean square difference of amplitudes, where
    a full-scale sine has amplitude 1 to 2 in its band. The first hears what is quiet, the second what is loud. ours:
    numbers of bands that leave none without a bin at any usual rate.
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (2048, 1024, 512, 256),
        num_mels: Sequence[int] = (64, 48, 32, 16),
        linear_weight: float = 1.0,
    ) -> None:
        """sample_rate in Hz; windows in samples (a step is a quarter), num_mels: bands of each.

        Raises ConfigError when the two lists differ in length or are empty, or a band holds no bin.
        """
        super().__init__()
        if not windows or len(windows) != len(num_mels) or min(windows) < 4:
            raise ConfigError(
                f"mel loss: windows {tuple(windows)} and num_mels {tuple(num_mels)} must have one length, at least 1, "
                "and windows at least 4 samples"
            )
        self.windows, self.linear_weight = tuple(windows), linear_weight
        for window, bands in zip(windows, num_mels, strict=True):
            filters_KM = mel_filters(sample_rate, window, bands)
            self.register_buffer(f"filters_{window}", filters_KM.float(), persistent=False)
            self.register_buffer(f"shape_{window}", torch.hann_window(window), persistent=False)

    def forward(self, reference_NL: torch.Tensor, estimate_NL: torch.Tensor) -> torch.Tensor:
        """Scalar: the mean of `distance`."""
        return self.distance(reference_NL, estimate_NL).mean()

    def distance(self, reference_NL: torch.Tensor, estimate_NL: torch.Tensor) -> torch.Tensor:
        """float [N] of waves float [N, L] each, mean over windows. Raises DataError when shapes differ or L is 0."""
        check_pair("mel loss", reference_NL, estimate_NL)
        parts = []
        for window in self.windows:
            reference_NMT, estimate_NMT = self._mel(reference_NL, window), self._mel(estimate_NL, window)
            log_N = ((reference_NMT + LOG_FLOOR).log() - (estimate_NMT + LOG_FLOOR).log()).abs().mean(dim=(1, 2))
            square_N = (reference_NMT - estimate_NMT).square().mean(dim=(1, 2))
            # sqrt(square + floor) - sqrt(floor) without the difference: exactly 0 for equal sounds, a bounded slope.
            root_N = square_N / ((square_N + RMS_FLOOR).sqrt() + RMS_FLOOR**0.5)
            parts.append(log_N + self.linear_weight * root_N)
        return torch.stack(parts).mean(dim=0)

    def _mel(self, wave_NL: torch.Tensor, window: int) -> torch.Tensor:
        wave_NL = wave_NL if wave_NL.dtype == torch.float64 else wave_NL.float()
        filters_KM, shape_W = (getattr(self, f"{name}_{window}").to(wave_NL) for name in ("filters", "shape"))
        spectrum_NKT = torch.stft(
            wave_NL, window, window // 4, window=shape_W, center=True, pad_mode="constant", return_complex=True
        )
        amplitude_NKT = spectrum_NKT.abs() * (2.0 / shape_W.sum())
        return filters_KM.T @ amplitude_NKT


@dataclass(frozen=True)
class WhisperFrontEnd:
    """How Whisper's log mel spectrogram is made: sample_rate in Hz, window and hop in samples, num_mels bands."""

    sample_rate: int = 16_000
    window: int = 400
    hop: int = 160
    num_mels: int = 80

    @classmethod
    def read(cls, directory: Path, num_mels: int) -> Self:
        """The settings of `preprocessor_config.json`, or Whisper's own when there is none.

        Raises CheckpointError when it makes another number of bands than the model reads.
        """
        fields = read_json(directory / "preprocessor_config.json")
        found = cls(
            fields.get("sampling_rate", cls.sample_rate), fields.get("n_fft", cls.window),
            fields.get("hop_length", cls.hop), fields.get("feature_size", num_mels),
        )  # fmt: skip
        if found.num_mels != num_mels:
            raise CheckpointError(
                f"Whisper teacher: preprocessor_config.json of {directory} makes {found.num_mels} mel bands, the model "
                f"reads {num_mels}; take both files from one checkpoint"
            )
        return found

    def filters(self) -> torch.Tensor:
        """float32 [K, M]."""
        return mel_filters(self.sample_rate, self.window, self.num_mels, area_norm=True).float()


class WhisperTeacher(nn.Module):
    """The encoder of a Whisper model, frozen, as a source of targets."""

    filters_KM: torch.Tensor
    shape_W: torch.Tensor

    def __init__(self, encoder: nn.Module, front_end: WhisperFrontEnd) -> None:
        """encoder: a Transformers `WhisperEncoder`. `load` makes both."""
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.front_end = front_end
        config: Any = encoder.config
        self.width: int = config.d_model
        self.num_positions: int = config.max_source_positions
        self.register_buffer("filters_KM", front_end.filters(), persistent=False)
        self.register_buffer("shape_W", torch.hann_window(front_end.window), persistent=False)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """The teacher of a directory that Transformers wrote: a whole Whisper model or its encoder alone, in float32.

        Raises CheckpointError when it is missing, of another model type, or lacks weights of the encoder.
        """
        directory, what = Path(directory), "Whisper teacher"
        fields = read_json(directory / "config.json")
        if fields and fields.get("model_type") != "whisper":
            raise CheckpointError(
                f"{what}: {directory} holds a model of type {fields.get('model_type')!r}, not 'whisper'; give the "
                "directory of a Transformers Whisper model"
            )
        if fields.get("architectures") == ["WhisperEncoder"]:
            encoder = frozen_model(
                directory, "WhisperEncoder", what, module="transformers.models.whisper.modeling_whisper"
            )
        else:
            encoder = frozen_model(directory, "WhisperModel", what, read="encoder.").encoder
        return cls(encoder, WhisperFrontEnd.read(directory, encoder.config.num_mel_bins))

    def train(self, mode: bool = True) -> Self:
        """The teacher itself; it stays in evaluation mode, whatever mode says."""
        return super().train(False)

    @torch.no_grad()
    def features(self, wave_NL: torch.Tensor, sample_rate: int, num_steps: int) -> torch.Tensor:
        """Mean features float32 [N, S, C] over each of S = num_steps equal parts of waves float [N, L].

        sample_rate in Hz, any. Whisper has 50 frames a second; a frame that two steps share counts by its share in
        each. Sounds are padded with silence to what the encoder reads; longer ones are read piece by piece. Raises
        DataError for another shape, no samples, or no steps.
        """
        if wave_NL.ndim != 2 or wave_NL.shape[1] < 1 or num_steps < 1:
            raise DataError(
                f"Whisper teacher: waves of shape {tuple(wave_NL.shape)} and {num_steps} steps; expected [N, L] with "
                "L >= 1, and at least 1 step"
            )
        seconds = wave_NL.shape[1] / sample_rate
        own_NL = self._own_rate(wave_NL, sample_rate)
        piece = 2 * self.num_positions * self.front_end.hop  # the encoder's second convolution halves the frames
        pieces = math.ceil(own_NL.shape[1] / piece)
        own_XL = F.pad(own_NL, (0, pieces * piece - own_NL.shape[1])).reshape(-1, piece)
        found = [
            self.encoder(self.log_mel(part_XL)).last_hidden_state for part_XL in own_XL.split(WINDOWS_AT_ONCE)
        ]  # fmt: skip
        frames_NTC = torch.cat(found).reshape(len(wave_NL), pieces * self.num_positions, self.width)
        frames_per_step = seconds * self.front_end.sample_rate / (2 * self.front_end.hop) / num_steps
        return pooling(frames_NTC.shape[1], num_steps, frames_per_step).to(frames_NTC) @ frames_NTC

    def _own_rate(self, wave_NL: torch.Tensor, sample_rate: int) -> torch.Tensor:
        if sample_rate == self.front_end.sample_rate:
            return wave_NL.to(self.filters_KM)
        rows = [resample(wave_L, sample_rate, self.front_end.sample_rate) for wave_L in wave_NL.float().cpu().numpy()]
        return torch.stack([torch.from_numpy(row) for row in rows]).to(self.filters_KM)

    def log_mel(self, wave_NL: torch.Tensor) -> torch.Tensor:
        """Whisper's input float32 [N, M, L // hop] of waves float32 [N, L] at its own rate. background."""
        spectrum_NKT = torch.stft(
            wave_NL, self.front_end.window, self.front_end.hop, window=self.shape_W, return_complex=True
        )
        power_NKT = spectrum_NKT[..., :-1].abs().square()
        log_NMT = (self.filters_KM.T @ power_NKT).clamp(min=1e-10).log10()
        return (torch.maximum(log_NMT, log_NMT.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def pooling(num_frames: int, num_steps: int, frames_per_step: float) -> torch.Tensor:
    """float64 [S, T]: row s averages the frames that lie in [s, s + 1) * frames_per_step, a cut frame by its part.

    Rows sum to 1. Steps beyond the last frame repeat it.
    """
    edges_S = (torch.arange(num_steps + 1, dtype=torch.float64) * frames_per_step).clamp(max=num_frames)
    start_S = torch.minimum(edges_S[:-1], torch.tensor(num_frames - min(1.0, frames_per_step), dtype=torch.float64))
    end_S = torch.maximum(edges_S[1:], start_S + min(1.0, frames_per_step))
    frame_T = torch.arange(num_frames, dtype=torch.float64)
    shared_ST = torch.minimum(end_S[:, None], frame_T + 1) - torch.maximum(start_S[:, None], frame_T)
    shared_ST = shared_ST.clamp(min=0.0)
    return shared_ST / shared_ST.sum(dim=1, keepdim=True)


def distillation_loss(
    projected_NSC: torch.Tensor, teacher_NSC: torch.Tensor, axis: Literal["feature", "time"] = "feature"
) -> torch.Tensor:
    """Scalar distance of a student's features [N, S, C] from a teacher's, same shape; no gradient to the teacher.

    axis "feature": mean over steps of 1 - cosine along the channels; 0 for the same directions, 2 for opposite ones;
    a step's size is free. axis "time": mean over channels of -log sigmoid(cosine along the steps), as SpeechTokenizer
    writes it; 0.313 for the same, 1.313 for opposite; a channel's size is free, so channels of small teacher values
    count as much as large ones, and a sound of one step says only the sign. paper: section 2.5 gives no formula.
    Raises ConfigError for another axis or other shapes.
    """
    if projected_NSC.shape != teacher_NSC.shape or projected_NSC.ndim != 3:
        raise ConfigError(
            f"distillation: features {tuple(projected_NSC.shape)} and the teacher's {tuple(teacher_NSC.shape)} must "
            "have one shape [N, S, C]; project to the teacher's width"
        )
    if axis not in ("feature", "time"):
        raise ConfigError(f"distillation: axis {axis!r} is not feature, time")
    cosine = F.cosine_similarity(projected_NSC, teacher_NSC.detach(), dim=2 if axis == "feature" else 1, eps=1e-6)
    return (1.0 - cosine).mean() if axis == "feature" else -F.logsigmoid(cosine).mean()


def si_sdr(reference_NL: torch.Tensor, estimate_NL: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-distortion ratio float [N] in dB of waves float [N, L] each; higher is better.

    Means are removed; the estimate's part along the reference is signal, the rest distortion. Limited to -120..120 dB;
    -120 against silence, 0 for silence against silence. background: Le Roux et al. 2019. Raises DataError when shapes
    differ or L is 0.
    """
    check_pair("SI-SDR", reference_NL, estimate_NL)
    reference_NL, estimate_NL = (
        wave - wave.mean(dim=1, keepdim=True) for wave in (reference_NL.double(), estimate_NL.double())
    )
    tiny = torch.finfo(torch.float64).tiny
    scale_N1 = (reference_NL * estimate_NL).sum(dim=1, keepdim=True) / (
        reference_NL.square().sum(dim=1, keepdim=True) + tiny
    )
    signal_NL = scale_N1 * reference_NL
    floor_N = RATIO_FLOOR * estimate_NL.square().sum(dim=1) + tiny
    ratio_N = (signal_NL.square().sum(dim=1) + floor_N) / ((estimate_NL - signal_NL).square().sum(dim=1) + floor_N)
    return 10.0 * ratio_N.log10()


def check_pair(what: str, a_NL: torch.Tensor, b_NL: torch.Tensor) -> None:
    """Raises DataError unless both are waves [N, L] of one shape with at least one sample."""
    if a_NL.shape != b_NL.shape or a_NL.ndim != 2 or a_NL.shape[1] < 1:
        raise DataError(
            f"{what}: waves of shapes {tuple(a_NL.shape)} and {tuple(b_NL.shape)}; expected one shape [N, L], L >= 1"
        )

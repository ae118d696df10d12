"""The neural audio codec: a causal convolutional encoder and decoder around residual codebooks, 12.5 steps a second.

Contract: `encode`, `decode` as `AudioTokenizer` says; each sound by itself, so its codes do not depend on the others of
a call. `stream_encoder` and `stream_decoder` take a sound or its codes piece by piece and give, joined, the same codes
and (to float rounding) the same wave: nothing looks ahead, a step is coded as soon as its samples are there.
paper: section 2.5 (12.5 Hz, residual vector quantisation, first code semantic). peer: SEANet as in EnCodec and Mimi
(weight norm, ELU, residual units; strides 8, 6, 5, 4 and 2). ours: convolutions only, the width capped by `max_width`.

Shape letters: N sounds, L samples, S steps, Q levels, C latent width, D width of a code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.audio.base import AudioTokenizer, Wave
from ernie_elastic.tokenizers.audio.residual_codebooks import CodebookConfig, Quantised, ResidualCodebooks
from ernie_elastic.tokenizers.streaming_conv import (
    Causal,
    CausalConv1d,
    CausalConvTranspose1d,
    CausalResidual,
    CausalSequence,
    Pointwise,
    StreamState,
)  # fmt: skip

EDGE_KERNEL = 7  # of the first and last convolution. peer: SEANet
UNIT_KERNEL = 3  # of the dilated convolution of a residual unit
START_LOUDNESS = (
    0.1  # about the root mean square of speech; ours: a decoder that starts louder first learns to be quiet
)


@dataclass(frozen=True)
class SeanetAudioTokenizerConfig:
    """Sizes of the codec.

    sample_rate: Hz. strides: of the decoder, from the code rate up to samples; the encoder has them in reverse order;
    their product is step_samples (24 kHz: 8, 6, 5, 4, 2 = 1920; 16 kHz: 8, 5, 4, 4, 2 = 1280; both 12.5 Hz).
    width: channels at the sample rate; they double with every stride up to max_width. dilations: one residual unit each
    at every rate. latent_width: C. num_levels (Q), codebook_size (V), split_semantic, code_dim (0: no projections),
    decay, restart_below: see `CodebookConfig`. Raises ConfigError for values that cannot be.
    """

    sample_rate: int = 24000
    strides: tuple[int, ...] = (8, 6, 5, 4, 2)
    width: int = 32
    max_width: int = 512
    dilations: tuple[int, ...] = (1, 3)
    latent_width: int = 128
    num_levels: int = 8
    codebook_size: int = 2048
    split_semantic: bool = True
    code_dim: int = 0
    decay: float = 0.99
    restart_below: float = 0.1

    def __post_init__(self) -> None:
        for name in ("sample_rate", "width", "latent_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"audio codec: {name} is {getattr(self, name)}; it must be at least 1")
        if self.width < 2 or self.max_width < self.width:
            raise ConfigError(
                f"audio codec: width {self.width} and max_width {self.max_width}; width must be at least 2 and "
                "max_width at least width"
            )
        if not self.strides or min(self.strides) < 1 or not self.dilations or min(self.dilations) < 1:
            raise ConfigError(
                f"audio codec: strides {list(self.strides)} and dilations {list(self.dilations)} must be lists of "
                "numbers of at least 1, none empty"
            )
        self.codebooks  # noqa: B018  (raises ConfigError)

    @property
    def step_samples(self) -> int:
        """Samples of one step of codes."""
        return math.prod(self.strides)

    @property
    def num_components(self) -> int:
        """C, width of the features before quantisation."""
        return self.latent_width

    @property
    def codebooks(self) -> CodebookConfig:
        """The part that configures the codebooks."""
        return CodebookConfig(
            self.latent_width, self.num_levels, self.codebook_size, self.code_dim, self.split_semantic, self.decay,
            self.restart_below,
        )  # fmt: skip

    @property
    def semantic_width(self) -> int:
        """D, width of `SeanetAudioTokenizer.semantic_features`."""
        return self.code_dim or self.latent_width


class SeanetAudioTokenizer(AudioTokenizer):
    """Residual codes of sound by a neural codec. Its weights are random (from seed) until trained or loaded."""

    architecture = "seanet"
    config_class = SeanetAudioTokenizerConfig
    config: SeanetAudioTokenizerConfig

    def __init__(self, config: SeanetAudioTokenizerConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = _encoder(config)
            self.decoder = _decoder(config)
            self.quantizer = ResidualCodebooks(config.codebooks)

    def latent(self, wave_NL: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, S, C] before quantisation of waves [N, L], padded with zeros to whole steps."""
        padded_NL = F.pad(wave_NL, (0, -wave_NL.shape[1] % self.config.step_samples))
        return self.encoder(padded_NL[:, None]).movedim(1, 2)

    def quantise(self, latent_NSC: torch.Tensor, active_N: torch.Tensor | None = None) -> Quantised:
        """Codes and quantised features of latents [N, S, C]; see `ResidualCodebooks.quantise`."""
        return self.quantizer.quantise(latent_NSC, active_N)

    def wave(self, features_NSC: torch.Tensor) -> torch.Tensor:
        """Waves [N, S * step_samples] of quantised features [N, S, C]; not clamped, so that gradients flow."""
        return self.decoder(features_NSC.movedim(1, 2))[:, 0]

    def semantic_features(self, latent_NSC: torch.Tensor) -> torch.Tensor:
        """Quantised level 0 [N, S, D] of latents [N, S, C], before its projection back; gradients straight through.

        This is what a teacher's features are distilled into. paper: section 2.5.
        """
        return self.quantizer.quantise(latent_NSC).semantic

    @torch.no_grad()
    def encode_with_components(self, waves: Sequence[Wave]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes int64 [S, Q] of each wave [L], and its features float32 [S, C] before quantisation."""
        found = []
        for wave in waves:
            latent_SC = self.latent(self.check_wave(wave)[None])[0]
            found.append((self.quantizer.encode(latent_SC), latent_SC))
        return found

    @torch.no_grad()
    def decode_batch(self, codes: Sequence[torch.Tensor | np.ndarray]) -> list[torch.Tensor]:
        """Waves float32 [S * step_samples] in [-1, 1] of codes int64 [S, Q'], each by itself."""
        checked = [self.check_codes(codes_SQ) for codes_SQ in codes]
        return [self.wave(self.quantizer.decode(codes_SQ)[None])[0].clamp(-1.0, 1.0) for codes_SQ in checked]

    def stream_encoder(self) -> SeanetStreamEncoder:
        """A fresh encoder of one sound that comes in pieces."""
        return SeanetStreamEncoder(self)

    def stream_decoder(self) -> SeanetStreamDecoder:
        """A fresh decoder of one sound whose codes come in pieces."""
        return SeanetStreamDecoder(self)


class SeanetStreamEncoder:
    """Codes of one sound that comes in pieces of any lengths. Many of them may share a tokenizer."""

    def __init__(self, tokenizer: SeanetAudioTokenizer) -> None:
        self.tokenizer = tokenizer
        self._state: StreamState = None
        self._rest_L = torch.zeros(0, device=tokenizer.device)
        self._finished = False

    @torch.no_grad()
    def push(self, wave: Wave) -> torch.Tensor:
        """int64 [S, Q] of the steps that a further piece [L] completes; S may be 0.

        Raises DataError for a piece that is empty, not mono or not finite, and after `finish`.
        """
        _check_open(self._finished, "encoder")
        joined_L = torch.cat([self._rest_L, self.tokenizer.check_wave(wave)])
        whole = len(joined_L) - len(joined_L) % self.tokenizer.config.step_samples
        self._rest_L = joined_L[whole:]
        return self._codes(joined_L[:whole])

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """int64 [S, Q], S = 1 when samples are left, which are padded with zeros to a step, else 0."""
        _check_open(self._finished, "encoder")
        self._finished = True
        size = self.tokenizer.config.step_samples
        return self._codes(F.pad(self._rest_L, (0, -len(self._rest_L) % size)))

    def _codes(self, wave_L: torch.Tensor) -> torch.Tensor:
        if not len(wave_L):
            return torch.zeros((0, self.tokenizer.num_levels), dtype=torch.long, device=wave_L.device)
        latent_1CS, self._state = self.tokenizer.encoder.step(wave_L[None, None], self._state)
        return self.tokenizer.quantizer.encode(latent_1CS[0].T)


class SeanetStreamDecoder:
    """The wave of one sound whose codes come in pieces. Many of them may share a tokenizer."""

    def __init__(self, tokenizer: SeanetAudioTokenizer) -> None:
        self.tokenizer = tokenizer
        self._state: StreamState = None
        self._finished = False

    @torch.no_grad()
    def push(self, codes_SQ: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 wave [S * step_samples] in [-1, 1] of further codes int64 [S, Q'], Q' <= Q levels.

        Raises DataError for codes that are empty, of another shape or out of range, and after `finish`.
        """
        _check_open(self._finished, "decoder")
        features_SC = self.tokenizer.quantizer.decode(self.tokenizer.check_codes(codes_SQ))
        wave_11L, self._state = self.tokenizer.decoder.step(features_SC.T[None], self._state)
        return wave_11L[0, 0].clamp(-1.0, 1.0)

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """float32 [0]: every step's samples came with it. Raises DataError when called twice."""
        _check_open(self._finished, "decoder")
        self._finished = True
        return torch.zeros(0, device=self.tokenizer.device)


def _check_open(finished: bool, what: str) -> None:
    if finished:
        raise DataError(f"audio codec: the stream {what} was finished; make a new one for the next sound")


def _widths(config: SeanetAudioTokenizerConfig) -> list[int]:
    """Channels at the sample rate, then after each stride of the encoder."""
    return [min(config.width * 2**index, config.max_width) for index in range(len(config.strides) + 1)]


def _units(width: int, dilations: Sequence[int]) -> list[Causal]:
    """Residual units at one rate, one for each dilation."""
    inner = max(1, width // 2)
    return [
        CausalResidual(
            CausalSequence([
                Pointwise(nn.ELU()),
                CausalConv1d(width, inner, UNIT_KERNEL, dilation=dilation),
                Pointwise(nn.ELU()),
                CausalConv1d(inner, width, 1),
            ])
        )
        for dilation in dilations
    ]  # fmt: skip


def _encoder(config: SeanetAudioTokenizerConfig) -> CausalSequence:
    widths = _widths(config)
    layers: list[Causal] = [CausalConv1d(1, widths[0], EDGE_KERNEL, gain=1 / START_LOUDNESS)]
    for stride, before, after in zip(reversed(config.strides), widths, widths[1:], strict=False):
        layers += _units(before, config.dilations)
        layers += [Pointwise(nn.ELU()), CausalConv1d(before, after, 2 * stride, stride)]
    return CausalSequence([*layers, Pointwise(nn.ELU()), CausalConv1d(widths[-1], config.latent_width, UNIT_KERNEL)])


def _decoder(config: SeanetAudioTokenizerConfig) -> CausalSequence:
    widths = _widths(config)[::-1]
    layers: list[Causal] = [CausalConv1d(config.latent_width, widths[0], UNIT_KERNEL)]
    for stride, before, after in zip(config.strides, widths, widths[1:], strict=False):
        layers += [Pointwise(nn.ELU()), CausalConvTranspose1d(before, after, 2 * stride, stride)]
        layers += _units(after, config.dilations)
    return CausalSequence([*layers, Pointwise(nn.ELU()), CausalConv1d(widths[-1], 1, EDGE_KERNEL, gain=START_LOUDNESS)])

"""Transformers' neural codecs, Mimi, EnCodec and DAC, with the interface of our audio tokenizers.

Contract: the codes are those of the Transformers model itself for the wave padded with zeros to whole steps, each sound
by itself; `decode` gives exactly S * step_samples samples. Step sizes and code rates are the model's own (Mimi 12.5 Hz,
EnCodec 75 Hz, DAC 50 Hz and others): `config.step_samples` says them. `save` writes a directory that needs no other
file. A checkpoint that leaves a weight at random is refused. peer: section 2.5 of the report cites these codecs.

Shape letters: L samples, S steps, Q levels, V codes of a level, C width of the features before quantisation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.tokenizers.audio.base import AudioTokenizer, Wave
from ernie_elastic.tokenizers.saved import CONFIG_NAME, Fields

MODEL_FOLDER = "model"


@dataclass(frozen=True)
class CodecAdapterConfig:
    """What a Transformers codec is: sample_rate in Hz, step_samples of one step of codes, num_components (C),
    num_levels (Q, the first of the model's), codebook_size (V). All but num_levels follow from the model's config.
    """

    sample_rate: int
    step_samples: int
    num_components: int
    num_levels: int
    codebook_size: int


class CodecAdapter(AudioTokenizer):
    """A Transformers codec. A subclass names its classes and says how features, codes and waves follow."""

    config: CodecAdapterConfig
    model: Any  # the Transformers model; its attributes are its own class's
    model_type: ClassVar[str] = ""
    model_class: ClassVar[str] = ""

    def __init__(self, model: nn.Module, num_levels: int | None = None) -> None:
        """model: the Transformers model. num_levels: how many of its levels are used; None: all.

        Raises ConfigError when the model has fewer levels, or does what this adapter does not support.
        """
        super().__init__()
        found = self._describe(model.config)
        if num_levels is not None and not 1 <= num_levels <= found.num_levels:
            raise ConfigError(
                f"audio codec {self.architecture}: num_levels {num_levels} is not in 1..{found.num_levels}, the levels "
                "that the model has"
            )
        self.model = model.eval().requires_grad_(False)
        self.config = CodecAdapterConfig(
            found.sample_rate, found.step_samples, found.num_components, num_levels or found.num_levels,
            found.codebook_size,
        )  # fmt: skip

    @classmethod
    def from_directory(cls, directory: Path | str, num_levels: int | None = None) -> Self:
        """The codec of a directory that `save_pretrained` wrote, in float32, with its first `num_levels` levels.

        Raises CheckpointError when the directory holds another model type, or weights that do not fit; ConfigError as
        the constructor does.
        """
        found = _model_type(Path(directory))
        if found != cls.model_type:
            raise CheckpointError(
                f"{directory} holds a model of type {found!r}; {cls.__name__} reads {cls.model_type!r} "
                f"(audio codecs that can be read: {', '.join(sorted(ADAPTERS))})"
            )
        import transformers  # takes seconds, and only these codecs need it

        cls._refuse(transformers.AutoConfig.from_pretrained(directory))
        model, report = getattr(transformers, cls.model_class).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        lost = sorted([*report["missing_keys"], *(str(item) for item in report["mismatched_keys"])])
        if lost:
            raise CheckpointError(
                f"{directory} lacks {len(lost)} weights of its {found} model, first {lost[0]!r}; "
                "they would stay random: fetch or save the checkpoint again"
            )
        return cls(model, num_levels)

    def train(self, mode: bool = True) -> Self:
        """The codec itself; it stays frozen and in evaluation mode, whatever mode says: it is never trained here."""
        return super().train(False)

    @torch.no_grad()
    def encode_with_components(self, waves: Sequence[Wave]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes int64 [S, Q] of each wave [L], and the model's features float32 [S, C] before quantisation."""
        found = []
        for wave in waves:
            wave_L = self.check_wave(wave)
            wave_L = F.pad(wave_L, (0, -len(wave_L) % self.config.step_samples))
            features_1CS = self._features(wave_L[None, None])
            codes_SQ = self._codes(features_1CS)[0].T[:, : self.num_levels]
            steps = len(wave_L) // self.config.step_samples
            if len(codes_SQ) != steps:
                raise ConfigError(
                    f"audio codec {self.architecture}: {len(wave_L)} samples gave {len(codes_SQ)} steps, not {steps} "
                    f"of {self.config.step_samples} samples; its strides are not supported"
                )
            found.append((codes_SQ.contiguous(), features_1CS[0].T.contiguous()))
        return found

    @torch.no_grad()
    def decode_batch(self, codes: Sequence[torch.Tensor | np.ndarray]) -> list[torch.Tensor]:
        """Waves float32 [S * step_samples] in [-1, 1] of codes int64 [S, Q'], each by itself.

        A model whose strides are odd gives a few samples less or more; zeros follow, or they are cut.
        """
        waves = []
        for codes_SQ in [self.check_codes(item) for item in codes]:
            wave_L = self._wave(codes_SQ.T[None]).reshape(-1)
            length = len(codes_SQ) * self.config.step_samples
            waves.append(F.pad(wave_L[:length], (0, max(0, length - len(wave_L)))).clamp(-1.0, 1.0))
        return waves

    def save(self, directory: Path | str) -> None:
        """Write the model below `model/`, then `config.json`; `AudioTokenizer.load` gives back the same codes."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(Path(directory) / MODEL_FOLDER)
        self._write_config(directory)

    @classmethod
    def _read(cls, directory: Path, fields: Fields) -> Self:
        return cls.from_directory(directory / MODEL_FOLDER, int(fields["num_levels"]))

    @classmethod
    def _refuse(cls, config: Any) -> None:
        """Raise ConfigError for a Transformers config that the adapter cannot serve."""
        channels = getattr(config, "audio_channels", 1)
        if channels != 1:
            raise ConfigError(
                f"audio codec {cls.architecture}: the model has {channels} channels; only mono models are supported"
            )

    @classmethod
    def _describe(cls, config: Any) -> CodecAdapterConfig:
        """The adapter's config with all levels, of a Transformers config. Raises ConfigError as `_refuse` does."""
        raise NotImplementedError

    def _features(self, wave_11L: torch.Tensor) -> torch.Tensor:
        """Features [1, C, S] before quantisation of a wave of whole steps."""
        raise NotImplementedError

    def _codes(self, features_1CS: torch.Tensor) -> torch.Tensor:
        """Codes [1, at least Q, S] of features."""
        raise NotImplementedError

    def _wave(self, codes_1QS: torch.Tensor) -> torch.Tensor:
        """The wave, any shape with one sound's samples, of codes."""
        raise NotImplementedError


class MimiTokenizer(CodecAdapter):
    """Transformers' MimiModel: 24 kHz in 12.5 steps a second, level 0 semantic."""

    architecture = "mimi"
    model_type = "mimi"
    model_class = "MimiModel"

    @classmethod
    def _refuse(cls, config: Any) -> None:
        super()._refuse(config)
        if getattr(config, "encoder_config", None) is None or getattr(config, "decoder_config", None) is None:
            raise ConfigError("audio codec mimi: the model lacks its encoder or decoder half; give a whole MimiModel")
        if config.latent_stride != 2:
            raise ConfigError(
                f"audio codec mimi: {config.encodec_frame_rate} features and {config.frame_rate} codes a second; only "
                "a ratio of 2 is supported"
            )

    @classmethod
    def _describe(cls, config: Any) -> CodecAdapterConfig:
        cls._refuse(config)
        return CodecAdapterConfig(
            config.sampling_rate, config.frame_size, config.hidden_size, config.num_quantizers, config.codebook_size
        )

    def _features(self, wave_11L: torch.Tensor) -> torch.Tensor:
        return self.model.encoder(wave_11L, use_streaming=False).latents

    def _codes(self, features_1CS: torch.Tensor) -> torch.Tensor:
        levels = max(self.num_levels, self.model.config.num_semantic_quantizers)
        return self.model.quantizer.encode(features_1CS, levels).transpose(0, 1)

    def _wave(self, codes_1QS: torch.Tensor) -> torch.Tensor:
        return self.model.decode(codes_1QS).audio_values


class EncodecTokenizer(CodecAdapter):
    """Transformers' EncodecModel without normalisation and chunks, such as the one of 24 kHz: 75 steps a second."""

    architecture = "encodec"
    model_type = "encodec"
    model_class = "EncodecModel"

    @classmethod
    def _refuse(cls, config: Any) -> None:
        super()._refuse(config)
        if config.normalize or config.chunk_length_s is not None:
            raise ConfigError(
                f"audio codec encodec: normalize {config.normalize} and chunk_length_s {config.chunk_length_s}; only "
                "models that do neither are supported, such as the one of 24 kHz"
            )

    @classmethod
    def _describe(cls, config: Any) -> CodecAdapterConfig:
        cls._refuse(config)
        return CodecAdapterConfig(
            config.sampling_rate, config.hop_length, config.hidden_size, config.num_quantizers, config.codebook_size
        )

    def _features(self, wave_11L: torch.Tensor) -> torch.Tensor:
        return self.model.encoder(wave_11L)

    def _codes(self, features_1CS: torch.Tensor) -> torch.Tensor:
        return self.model.quantizer.encode(features_1CS).transpose(0, 1)

    def _wave(self, codes_1QS: torch.Tensor) -> torch.Tensor:
        return self.model.decode(codes_1QS[None], [None]).audio_values


class DacTokenizer(CodecAdapter):
    """Transformers' DacModel: 16, 24 or 44.1 kHz, 50 to 86 steps a second; not causal."""

    architecture = "dac"
    model_type = "dac"
    model_class = "DacModel"

    @classmethod
    def _describe(cls, config: Any) -> CodecAdapterConfig:
        cls._refuse(config)
        return CodecAdapterConfig(
            config.sampling_rate, config.hop_length, config.hidden_size, config.n_codebooks, config.codebook_size
        )

    def _features(self, wave_11L: torch.Tensor) -> torch.Tensor:
        return self.model.encoder(wave_11L)

    def _codes(self, features_1CS: torch.Tensor) -> torch.Tensor:
        return self.model.quantizer(features_1CS, self.num_levels)[1]

    def _wave(self, codes_1QS: torch.Tensor) -> torch.Tensor:
        return self.model.decode(audio_codes=codes_1QS).audio_values


ADAPTERS: dict[str, type[CodecAdapter]] = {
    item.model_type: item for item in (MimiTokenizer, EncodecTokenizer, DacTokenizer)
}


def adapter_from_directory(directory: Path | str, num_levels: int | None = None) -> CodecAdapter:
    """The adapter of whichever codec a Transformers directory holds, with its first `num_levels` levels (None: all).

    Raises CheckpointError when it holds none of them, ConfigError when the model is not supported.
    """
    found = _model_type(Path(directory))
    if found not in ADAPTERS:
        raise CheckpointError(
            f"{directory} holds a model of type {found!r}; audio codecs that can be read: {', '.join(sorted(ADAPTERS))}"
        )
    return ADAPTERS[found].from_directory(directory, num_levels)


def _model_type(directory: Path) -> str:
    path = directory / CONFIG_NAME
    try:
        return str(json.loads(path.read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no config of a Transformers model ({error}); check the path") from error

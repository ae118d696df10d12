"""The document layout that a model of a config reads and writes."""

from __future__ import annotations

from ernie_elastic.data.groups.layout import Layout
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.text.special import SpecialTokens


def layout_of(config: ErnieElasticConfig) -> Layout:
    """The document layout that a model of this config reads."""
    if not config.visual_bits or not config.understanding_patch:
        raise ConfigError(
            f"multimodal documents need visual_bits ({config.visual_bits}) and understanding_patch "
            f"({config.understanding_patch}) above 0"
        )
    assert config.visual_scales is not None and config.visual_amplitudes is not None
    eos = config.eos_token_id
    return Layout(
        special=SpecialTokens(
            pad=int(config.pad_token_id or 0),
            bos=int(config.bos_token_id or 0),
            eos=eos[0] if isinstance(eos, list) else int(eos or 0),
            boi=config.boi_token_id,
            eoi=config.eoi_token_id,
            bov=config.bov_token_id,
            eov=config.eov_token_id,
            boa=config.boa_token_id,
            eoa=config.eoa_token_id,
            next_frame=config.next_frame_token_id,
        ),
        quantizer=MultiScaleBits(tuple((h, w) for h, w in config.visual_scales), tuple(config.visual_amplitudes)),
        num_bits=config.visual_bits,
        num_levels=config.audio_num_levels,
        codebook_size=config.audio_codebook_size,
        understanding_grid=config.understanding_image_size // config.understanding_patch // 2,
        full_scale=config.ss_scale == "full",
        active_bits=config.visual_active_bits or 0,
        continuous_audio=config.audio_input == "continuous",
        speaker_size=config.speaker_embedding_size,
        feature_size=config.audio_feature_size,
        vocab_size=config.vocab_size,
    )

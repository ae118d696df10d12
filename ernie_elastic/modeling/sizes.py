"""Sizes of a model apart from what its tokenizers fix; a preset owns one."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.modeling.configuration import ErnieElasticConfig


@dataclass(frozen=True)
class ModelSizes:
    """Backbone and understanding sizes (ours throughout: the report discloses none but the ablation's).

    num_nextn_predict_layers 1 adds multi-token prediction; video_window limits how many frames a frame looks back; the
    other switches are those of ErnieElasticConfig. rope_theta 1e6 is the paper's; a tiny head needs a smaller base for
    its few pairs to tell positions apart.
    """

    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    moe_intermediate_size: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 2
    router_scoring: str = "softmax"
    num_shared_experts: int = 0
    first_k_dense: int = 0
    router_z_loss: float = 0.0
    router_orthogonal_loss: float = 0.0
    num_nextn_predict_layers: int = 0
    qk_norm: bool = True
    ss_scale: str = "first"
    video_window: int = 0
    visual_place_embedding: bool = False
    audio_input: str = "codes"
    speaker_embedding_size: int = 0
    rope_theta: float = 1_000_000.0
    mrope_layout: str = "sectioned"
    understanding_patch: int = 4
    understanding_width: int = 64
    understanding_layers: int = 1
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def to_config(self, tokenizers: Tokenizers, audio: bool = True) -> ErnieElasticConfig:
        """The full config: these sizes, and vocabulary, bits, scales and codes of the tokenizers.

        audio: False leaves the audio heads out, so that every layer may be dropped.
        """
        special, quantizer = tokenizers.text.special, tokenizers.visual.quantizer
        fields = asdict(self)
        theta = fields.pop("rope_theta")
        if not audio:
            fields["audio_input"] = "codes"
        return ErnieElasticConfig(
            **fields,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            vocab_size=tokenizers.text.vocab_size,
            pad_token_id=special.pad,
            bos_token_id=special.bos,
            eos_token_id=special.eos,
            boi_token_id=special.boi,
            eoi_token_id=special.eoi,
            bov_token_id=special.bov,
            eov_token_id=special.eov,
            boa_token_id=special.boa,
            eoa_token_id=special.eoa,
            next_frame_token_id=special.next_frame,
            visual_bits=tokenizers.visual.config.num_bits,
            visual_scales=[list(scale) for scale in quantizer.scales],
            visual_amplitudes=list(quantizer.amplitudes),
            understanding_image_size=tokenizers.visual.config.image_size,
            audio_num_levels=tokenizers.audio.num_levels if audio else 0,
            audio_codebook_size=tokenizers.audio.codebook_size,
            audio_feature_size=tokenizers.audio.config.num_components if fields["audio_input"] == "continuous" else 0,
        )

"""Configuration of the elastic multimodal MoE, a Transformers config: every idea of the report behind a field."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import SubModelSpec

SHIM_MODULE = "ernie_elastic_shim"
SHIM_TEXT = '''"""Loads this checkpoint's classes from the installed ernie_elastic package."""
try:
    from ernie_elastic.modeling import (
        ErnieElasticConfig,
        ErnieElasticForCausalLM,
        ErnieElasticModel,
        ErnieElasticProcessor,
    )
except ImportError as error:
    raise ImportError("this checkpoint needs the package ernie_elastic: run `pip install ernie-elastic`") from error
'''

CHOICES = {
    "router_scoring": ("softmax", "sigmoid"),
    "mrope_layout": ("sectioned", "interleaved"),
    "ss_scale": ("first", "full"),
    "audio_input": ("codes", "continuous"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"model config: {message}")


@strict
class ErnieElasticConfig(PreTrainedConfig):
    """Sizes and switches of the model.

    Backbone: pre-norm, GQA, SwiGLU experts in every layer, no biases (paper: section 1; ERNIE 4.5's block, ours:
    the report is silent on sizes). Visual fields describe the next-scale generator, understanding fields the
    image and video reader, audio fields the codec heads inside the stack.
    """

    model_type = "ernie_elastic"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the base class declares it as a plain list
    base_model_tp_plan = {  # noqa: RUF012 - as above
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }

    vocab_size: int = 1024
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    # ours: the report does not mention QK-norm; it steadies short runs at high learning rates.
    qk_norm: bool = True
    # paper: section 5, base 1e6 from the first stage.
    rope_parameters: dict[str, Any] | None = None
    default_theta = 1_000_000.0
    # Rotary pairs for (h, w, t). ours: the report is silent; ERNIE 4.5-VL's order, h and w on the fast pairs.
    mrope_section: list[int] | None = None
    # "sectioned": t on the slowest pairs. "interleaved": h, w, t in turn, so that t keeps fast pairs in a small head.
    mrope_layout: str = "sectioned"

    moe_intermediate_size: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 2
    # Where layers differ in it: the number of each layer, num_experts_per_tok their largest. None = all the same.
    # peer: Matryoshka-MoE.
    num_experts_per_tok_per_layer: list[int] | None = None
    # ours: the report is silent; softmax as in ERNIE 4.5, sigmoid as in DeepSeek-V3.
    router_scoring: str = "softmax"
    moe_norm_min: float = 1e-12
    output_router_logits: bool = False
    # paper: section 1.2 draws neither; peer: ERNIE 4.5 has both. Shared experts run for every token beside the routed
    # ones; the first layers may be dense, of width intermediate_size (default: that of the chosen experts together).
    num_shared_experts: int = 0
    first_k_dense: int = 0
    intermediate_size: int | None = None
    # peer: ERNIE 4.5 (1e-4 and 1e-2 there); the report names neither, so they are off.
    router_z_loss: float = 0.0
    router_orthogonal_loss: float = 0.0

    # paper: section 1.4, multi-token prediction on text; depth silent: 1 as in DeepSeek-V3, 0 switches it off.
    num_nextn_predict_layers: int = 0

    # Visual generation: bits per position, (h, w) per scale and the quantiser's amplitude per scale. 0 bits = none.
    visual_bits: int = 0
    visual_scales: list[list[int]] | None = None
    visual_amplitudes: list[float] | None = None
    # VideoAR: a learned embedding per scale. ours: on by default.
    visual_scale_embedding: bool = True
    # ours: a learned embedding per cell of each scale. Uni-RoPE gives places relative to the marker that opens the
    # picture, which a short run hardly learns to read.
    visual_place_embedding: bool = False
    # paper: figure 2 feeds S_S pooled to the first scale ("first"). "full" also appends the finished frame at full
    # resolution, read-only, so that later text and frames see the bits of the last scale.
    ss_scale: str = "first"
    # Only so many of the bits are in use (None = all): a low-bit start of a run (paper: section 2.2).
    visual_active_bits: int | None = None
    # paper: section 2.4, windowed temporal attention: latent frames that a frame sees back, 0 = all. peer proposal 8.
    video_window: int = 0

    # Understanding: pixels per patch side (0 = no reader), width and depth of its ViT.
    understanding_patch: int = 0
    understanding_width: int = 64
    understanding_layers: int = 1
    understanding_heads: int = 4
    understanding_image_size: int = 32

    # Audio: RVQ levels (0 = none), codes per level, and the layer after which each level's head sits.
    audio_num_levels: int = 0
    audio_codebook_size: int = 64
    audio_head_layers: list[int] | None = None
    # "codes": sounds are read as summed code embeddings (paper: section 2.6). "continuous": a small causal encoder over
    # audio_feature_size features a step, the tokenizer's own before quantisation (ours, as the visual reader has it).
    audio_input: str = "codes"
    audio_feature_size: int = 0
    audio_encoder_layers: int = 2
    # paper: section 2.6, a speaker embedding conditions speech; its size is silent, 0 = none.
    speaker_embedding_size: int = 0

    # Positions above which attention runs in blocks of queries, so that its mask never stands whole in memory.
    attention_block: int = 2048

    boi_token_id: int = 3
    eoi_token_id: int = 4
    bov_token_id: int = 5
    eov_token_id: int = 6
    boa_token_id: int = 7
    eoa_token_id: int = 8
    next_frame_token_id: int = 9

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill derived defaults and check that the fields fit together; raises ConfigError."""
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": self.default_theta}
        pairs = self.head_dim // 2
        if self.mrope_section is None:
            third = pairs * 11 // 32
            self.mrope_section = [third, third, pairs - 2 * third]
        if self.audio_head_layers is None:
            # paper: figure 3, one level after another in the top layers.
            self.audio_head_layers = list(range(self.num_hidden_layers - self.audio_num_levels, self.num_hidden_layers))
        if self.intermediate_size is None:
            self.intermediate_size = self.moe_intermediate_size * self.num_experts_per_tok
        self.visual_scales = self.visual_scales or []
        self.visual_amplitudes = self.visual_amplitudes or []
        super().__post_init__(**kwargs)
        self.auto_map = {
            "AutoConfig": f"{SHIM_MODULE}.ErnieElasticConfig",
            "AutoModel": f"{SHIM_MODULE}.ErnieElasticModel",
            "AutoModelForCausalLM": f"{SHIM_MODULE}.ErnieElasticForCausalLM",
            "AutoProcessor": f"{SHIM_MODULE}.ErnieElasticProcessor",
        }
        self._check()

    def _check(self) -> None:
        assert self.mrope_section is not None
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
            f"{self.num_key_value_heads}",
        )
        _require(
            sum(self.mrope_section) == self.head_dim // 2 and len(self.mrope_section) == 3,
            f"mrope_section {self.mrope_section} must hold 3 counts that add up to head_dim/2 = {self.head_dim // 2}",
        )
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok {self.num_experts_per_tok} must lie in 1..num_experts {self.num_experts}",
        )
        per_layer = self.num_experts_per_tok_per_layer
        _require(
            per_layer is None
            or (
                len(per_layer) == self.num_hidden_layers
                and min(per_layer) >= 1
                and max(per_layer) == self.num_experts_per_tok
            ),
            f"num_experts_per_tok_per_layer {per_layer} must hold {self.num_hidden_layers} numbers from 1 on, the "
            f"largest num_experts_per_tok {self.num_experts_per_tok}",
        )
        _require(
            0 <= self.first_k_dense <= self.num_hidden_layers,
            f"first_k_dense {self.first_k_dense} must lie in 0..num_hidden_layers {self.num_hidden_layers}",
        )
        _require(
            self.num_nextn_predict_layers in (0, 1),
            f"num_nextn_predict_layers {self.num_nextn_predict_layers} must be 0 or 1",
        )
        for name, allowed in CHOICES.items():
            _require(getattr(self, name) in allowed, f"{name} {getattr(self, name)!r} is not one of {allowed}")
        self._check_audio()
        self._check_visual()

    def _check_audio(self) -> None:
        heads = self.audio_head_layers
        assert heads is not None
        _require(
            len(heads) == self.audio_num_levels and heads == sorted(set(heads)),
            f"audio_head_layers {heads} must name {self.audio_num_levels} increasing layers, one per level",
        )
        _require(
            not heads or (heads[0] >= 0 and heads[-1] < self.num_hidden_layers),
            f"audio_head_layers {heads} must lie in 0..{self.num_hidden_layers - 1}",
        )
        _require(
            self.audio_input == "codes" or self.audio_feature_size > 0,
            f"audio_input 'continuous' needs audio_feature_size above 0, got {self.audio_feature_size}",
        )

    def _check_visual(self) -> None:
        assert self.visual_scales is not None and self.visual_amplitudes is not None
        _require(
            len(self.visual_scales) == len(self.visual_amplitudes),
            f"{len(self.visual_scales)} visual_scales but {len(self.visual_amplitudes)} visual_amplitudes",
        )
        _require(bool(self.visual_bits) == bool(self.visual_scales), "visual_bits and visual_scales go together")
        _require(
            not self.visual_scales or list(self.visual_scales[0]) == [1, 1],
            f"the first of visual_scales {self.visual_scales} must be [1, 1]: one position, BOI or S_S, predicts it",
        )
        active = self.visual_active_bits
        _require(
            active is None or 1 <= active <= self.visual_bits,
            f"visual_active_bits {active} must lie in 1..visual_bits {self.visual_bits}",
        )
        _require(self.video_window >= 0, f"video_window {self.video_window} must be 0 (all frames) or more")

    def full_spec(self) -> SubModelSpec:
        """The spec that leaves nothing out."""
        full = SubModelSpec.full(self.num_hidden_layers, self.num_experts, self.num_experts_per_tok)
        if self.num_experts_per_tok_per_layer is None:
            return full
        return SubModelSpec.of(full.layers, full.experts_per_layer, self.num_experts_per_tok_per_layer)

    def check_spec(self, spec: SubModelSpec) -> None:
        """Raise ConfigError unless `spec` lies inside this model and keeps its audio-head layers."""
        assert self.audio_head_layers is not None
        spec.validate(self.full_spec(), self.num_experts, self.audio_head_layers)

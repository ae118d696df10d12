"""The stack: experts, decoder layer, all layers with audio heads inside, and Transformers' entry to it.

Letters: B rows, T positions, H hidden, N flattened positions, E experts, K chosen, I expert width, Q audio levels,
V codes per level, S audio steps. The causal model stands above, in `generation/causal_lm.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling.attention import ErnieElasticAttention, RMSNorm
from ernie_elastic.modeling.blocks import ErnieElasticMLP, MultiTokenPredictor
from ernie_elastic.modeling.configuration import SHIM_MODULE, SHIM_TEXT, ErnieElasticConfig
from ernie_elastic.modeling.expert_parallel import ExpertShard
from ernie_elastic.modeling.heads import AudioIO, CodeSampler, VisualIO
from ernie_elastic.modeling.outputs import ErnieElasticModelOutput, StackOutput, router_loss
from ernie_elastic.modeling.positions import Rotary, UniRotary, axis_of_pair, rotary_frequencies
from ernie_elastic.modeling.router import ErnieElasticTopKRouter, orthogonal_loss, z_loss
from ernie_elastic.modeling.sound import SoundEncoder
from ernie_elastic.modeling.understanding import UnderstandingEncoder
from ernie_elastic.schema import RouterOutput, SubModelSpec


@use_experts_implementation
class ErnieElasticExperts(nn.Module):
    """All experts of a layer in two fused tensors, gate half first: gate_up_proj [E, 2I, H], down_proj [E, H, I]."""

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The definition, one expert at a time: [N, H], ids int64 [N, K], weights [N, K] -> [N, H]."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            hidden = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (hidden * top_k_weights[token, slot, None]).to(output.dtype))
        return output


class ErnieElasticMoE(nn.Module):
    """Router, experts, and shared experts where the config has them. No token is dropped (paper: section 1.2)."""

    def __init__(self, config: ErnieElasticConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = ErnieElasticTopKRouter(config, layer_idx)
        self.experts = ErnieElasticExperts(config)
        shared = config.num_shared_experts
        self.shared_experts = ErnieElasticMLP(config, shared * config.moe_intermediate_size) if shared else None
        self.z_loss, self.orthogonal_loss = config.router_z_loss, config.router_orthogonal_loss

    def forward(
        self,
        hidden_states: torch.Tensor,
        kept_experts: torch.Tensor | None = None,
        top_k: int | None = None,
        valid_N: torch.Tensor | None = None,
        expert_shard: ExpertShard | None = None,
    ) -> tuple[torch.Tensor, RouterOutput]:
        """[B, T, H] -> [B, T, H] and the decision; valid_N bool leaves padding out of the counts.

        expert_shard: `self.experts` holds this rank's share, other ranks hold the rest.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_NE, weights_NK, ids_NK = self.gate(flat, kept_experts, top_k)
        if expert_shard is None:
            output = self.experts(flat, ids_NK, weights_NK)
        else:
            output = expert_shard.run(self.experts, flat, ids_NK, weights_NK)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        decision = RouterOutput(weights_NK.detach(), ids_NK, self.gate.num_experts, valid_N)
        if self.z_loss or self.orthogonal_loss:
            rows_EH = self.gate.weight if kept_experts is None else self.gate.weight[kept_experts]
            decision.loss = self.z_loss * z_loss(logits_NE, valid_N) + self.orthogonal_loss * orthogonal_loss(rows_EH)
        return output.view_as(hidden_states), decision


class ErnieElasticDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention, then a mixture of experts or, where `dense_width` is given, one dense SwiGLU."""

    def __init__(self, config: ErnieElasticConfig, layer_idx: int, dense_width: int | None = None) -> None:
        super().__init__()
        self.self_attn = ErnieElasticAttention(config, layer_idx)
        self.mlp = ErnieElasticMoE(config, layer_idx) if dense_width is None else ErnieElasticMLP(config, dense_width)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotary,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache_layer: int | None = None,
        kept_experts: torch.Tensor | None = None,
        top_k: int | None = None,
        valid_N: torch.Tensor | None = None,
        expert_shard: ExpertShard | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, RouterOutput | None]:
        """[B, T, H] -> [B, T, H] and the router's decision (None in a dense layer)."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask,
            past_key_values,
            cache_layer,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, ErnieElasticMLP):
            return hidden_states + self.mlp(normed), None
        mixed, routing = self.mlp(normed, kept_experts, top_k, valid_N, expert_shard)
        return hidden_states + mixed, routing


class ErnieElasticPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the bare and the causal model."""

    config: ErnieElasticConfig
    config_class = ErnieElasticConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ErnieElasticDecoderLayer"]  # noqa: RUF012 - Transformers declares these as plain lists
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - as above
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012 - as above
        "router_logits": OutputRecorder(ErnieElasticTopKRouter, index=0),
        "hidden_states": ErnieElasticDecoderLayer,
        "attentions": ErnieElasticAttention,
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012 - as above

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for the decorator of the experts class in the file of the model class; here it is always
        in this file, and the causal model in another one."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ErnieElasticTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, ErnieElasticExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
        elif isinstance(module, nn.Linear | nn.Conv2d) and hasattr(module, "initializer_std"):
            init.normal_(module.weight, mean=0.0, std=float(module.initializer_std))  # type: ignore[arg-type]
        elif isinstance(module, UniRotary):
            init.copy_(module.inv_freq, rotary_frequencies(module.base, module.head_dim))
            init.copy_(module.axis_P, axis_of_pair(module.section, module.layout))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As Transformers', plus the shim file that `auto_map` names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{SHIM_MODULE}.py").write_text(SHIM_TEXT)


class ErnieElasticModel(ErnieElasticPreTrainedModel):
    """The stack with its embeddings for every modality."""

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        dense = [
            config.intermediate_size if i < config.first_k_dense else None for i in range(config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList(ErnieElasticDecoderLayer(config, i, width) for i, width in enumerate(dense))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = UniRotary(config)
        self.visual = VisualIO(config) if config.visual_bits else None
        self.audio = AudioIO(config) if config.audio_num_levels else None
        self.understanding = UnderstandingEncoder(config) if config.understanding_patch else None
        self.sound = SoundEncoder(config) if config.audio_input == "continuous" else None
        speaker = config.speaker_embedding_size
        self.speaker = nn.Linear(speaker, config.hidden_size, bias=False) if speaker else None
        self.mtp = self._make_predictor() if config.num_nextn_predict_layers else None
        self.gradient_checkpointing = False
        self.post_init()

    def _make_predictor(self) -> MultiTokenPredictor:
        config = self.config
        return MultiTokenPredictor(
            config, ErnieElasticDecoderLayer(config, config.num_hidden_layers, config.intermediate_size)
        )

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        submodel: SubModelSpec | None = None,
        **kwargs: Any,
    ) -> ErnieElasticModelOutput:
        """Transformers' entry for text: input_ids int64 [B, T] or inputs_embeds [B, T, H] -> last_hidden_state.

        position_ids [B, T], or [B, T, 3] for (t, h, w); attention_mask [B, S] (1 = valid) or a 4-D mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids if position_ids.dim() == 2 else position_ids[..., 0],
        )
        output = self.run_stack(inputs_embeds, position_ids, mask, past_key_values, submodel, **kwargs)
        return ErnieElasticModelOutput(
            last_hidden_state=output.hidden, past_key_values=past_key_values, router_loss=router_loss(output.routing)
        )

    def run_stack(
        self,
        hidden: torch.Tensor,
        position: torch.Tensor,
        mask: Any,
        cache: Cache | None = None,
        submodel: SubModelSpec | None = None,
        next_codes: torch.Tensor | CodeSampler | None = None,
        audio_index_S: torch.Tensor | None = None,
        valid_N: torch.Tensor | None = None,
        expert_shard: ExpertShard | None = None,
        **kwargs: Any,
    ) -> StackOutput:
        """Run every layer of the (sub-)model once. hidden [B, T, H], position [B, T(, 3)], mask bool [B, 1, T, S], a
        SequenceMask or what the attention back end takes. None with is_causal=False shows every key; Transformers' own
        entry leaves is_causal out.

        audio_index_S: flat positions that predict an audio step; next_codes: their true codes int64 [S, Q] (-1 where
        a level has none) or a sampler called level by level. The code of a level is embedded and added to the hidden
        state before the next layer (paper: section 2.6), so the layer after reads it and its KV entry is final.
        """
        spec = submodel or self.config.full_spec()
        if submodel is not None:
            self.config.check_spec(submodel)
        rotary = self.rotary_emb(position)
        routing: dict[int, RouterOutput] = {}
        audio_logits: list[torch.Tensor] = []
        heads = {layer: level for level, layer in enumerate(self.config.audio_head_layers or ())}
        all_experts = self.config.num_experts
        for slot, (layer_id, experts, top_k) in enumerate(
            zip(spec.layers, spec.experts_per_layer, spec.top_ks, strict=True)
        ):
            kept = None if len(experts) == all_experts else torch.tensor(experts, device=hidden.device)
            hidden, decision = self.layers[layer_id](
                hidden, rotary, mask, cache, slot, kept, top_k, valid_N, expert_shard, **kwargs
            )
            if decision is not None:
                routing[layer_id] = decision
            if layer_id in heads and audio_index_S is not None:
                hidden, logits = self._audio_level(hidden, heads[layer_id], audio_index_S, next_codes)
                audio_logits.append(logits)
        if self.training:
            hidden = hidden + self._touch_unused(hidden, rotary, spec, expert_shard)
        return StackOutput(self.norm(hidden), list(routing.values()), tuple(routing), audio_logits)

    def _touch_unused(
        self, hidden: torch.Tensor, rotary: Rotary, spec: SubModelSpec, expert_shard: ExpertShard | None
    ) -> torch.Tensor:
        """Zero times the layers that the spec leaves out, run on one position: unused = zero gradient, under every
        ZeRO stage and on every rank. ours: stage 3 otherwise applies the last real gradient again."""
        total = hidden.new_zeros(())
        one_position = tuple(None if part is None else part[:1, :1] for part in rotary)
        for layer_id in sorted(set(range(len(self.layers))) - set(spec.layers)):
            layer = self.layers[layer_id]
            total = total + layer(hidden[:1, :1].detach(), one_position, expert_shard=expert_shard)[0].sum()
        return 0.0 * total

    def _audio_level(
        self, hidden: torch.Tensor, level: int, index_S: torch.Tensor, next_codes: torch.Tensor | CodeSampler | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.audio is not None
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.audio.logits(flat[index_S], level)
        if next_codes is None:
            raise ConfigError("audio steps need next_codes: the true codes, or a sampler")
        codes_S = next_codes[:, level] if isinstance(next_codes, torch.Tensor) else next_codes(level, logits)
        if level + 1 < self.audio.num_levels:  # nothing reads the code of the last level
            flat = flat.index_add(0, index_S, self.audio.embed_level(codes_S, level).to(flat.dtype))
        return flat.view_as(hidden), logits

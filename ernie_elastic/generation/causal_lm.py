"""The causal model: the stack with its text head, Transformers' entry, the packed entry, and `generate`.

Letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from ernie_elastic.generation.modes import MultimodalGeneration
from ernie_elastic.generation.packed import PackedEntry
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.inputs import embed_batch
from ernie_elastic.modeling.masks import Places, SequenceMask
from ernie_elastic.modeling.model import ErnieElasticModel, ErnieElasticPreTrainedModel
from ernie_elastic.schema import PackedBatch, SubModelSpec


class ErnieElasticForCausalLM(PackedEntry, MultimodalGeneration, ErnieElasticPreTrainedModel, GenerationMixin):
    """The model with its text head (and, inside `model`, the heads of the other modalities)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - Transformers' form

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__(config)
        self.model = ErnieElasticModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        submodel: SubModelSpec | None = None,
        packed: PackedBatch | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Text entry, as every Transformers causal model: logits [B, T, vocab]; labels int64 [B, T] give the loss.

        packed: prompts of every modality as the processor gives them, instead of ids, positions and masks.
        """
        if packed is not None:
            inputs_embeds, input_ids = embed_batch(self.model, packed), None
            position_ids = packed.position_BT3
            attention_mask = SequenceMask(Places.of(packed), self.config.video_window).dense()
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            submodel=submodel,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if output.router_loss is not None:
                loss = loss + output.router_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_logits=output.router_logits,
        )

"""A model that Transformers does not know, saved with fused 3-D experts: stands for any out-of-tree mixture of experts.

It is copied into checkpoint directories as their own code (auto_map), so it imports nothing of this repository.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import CausalLMOutput


class TinyMoeConfig(PreTrainedConfig):
    """Sizes."""

    model_type = "tiny_moe_for_tests"

    def __init__(self, vocab_size=300, hidden_size=100, width=72, num_experts=7, chosen=2, layers=2, **kwargs):
        self.vocab_size, self.hidden_size, self.width = vocab_size, hidden_size, width
        self.num_experts, self.chosen, self.layers = num_experts, chosen, layers
        classes = {"AutoConfig": "tiny_moe.TinyMoeConfig", "AutoModelForCausalLM": "tiny_moe.TinyMoe"}
        kwargs.setdefault("auto_map", classes)
        super().__init__(**kwargs)


@use_experts_implementation
class TinyExperts(nn.Module):
    """gate_up_proj [E, 2I, H], down_proj [E, H, I]."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.width))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """One expert at a time, in increasing order."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            hidden = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, hidden * top_k_weights[token, slot, None])
        return output


class TinyLayer(nn.Module):
    """Router (a plain parameter), experts, and a linear layer with a bias."""

    def __init__(self, config):
        super().__init__()
        self.chosen = config.chosen
        self.router = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = TinyExperts(config)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        """[N, H] -> [N, H]."""
        weights, index = (x @ self.router.T).softmax(-1).topk(self.chosen)
        return x + self.experts(self.mix(x), index, weights)


class TinyMoe(PreTrainedModel):
    """Embedding, layers, tied head."""

    config_class = TinyMoeConfig
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}  # noqa: RUF012 - as the base class declares it

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TinyLayer(config) for _ in range(config.layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """The table."""
        return self.embed

    def get_output_embeddings(self):
        """The head."""
        return self.lm_head

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.data.normal_(0, 0.05)

    def forward(self, input_ids, **kwargs):
        """int64 [B, T] -> logits [B, T, V]."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x.reshape(-1, x.shape[-1])).view_as(x)
        return CausalLMOutput(logits=self.lm_head(x))

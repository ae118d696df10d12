"""A tiny multimodal model and random documents of every kind, for tests."""

from __future__ import annotations

import numpy as np
import torch

from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM

# Every option that adds positions, inputs, parameters or rules.
RICH: dict[str, object] = {
    "num_shared_experts": 1,
    "first_k_dense": 1,
    "ss_scale": "full",
    "video_window": 1,
    "speaker_embedding_size": 6,
    "audio_input": "continuous",
    "audio_feature_size": 9,
    "num_nextn_predict_layers": 1,
    "visual_place_embedding": True,
}
SCALES = [[1, 1], [2, 2], [4, 4], [4, 4]]


def tiny_config(**changes: object) -> ErnieElasticConfig:
    fields: dict[str, object] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "visual_bits": 5,
        "visual_scales": SCALES,
        "visual_amplitudes": [0.5, 0.4, 0.3, 0.2],
        "understanding_patch": 4,
        "understanding_width": 16,
        "understanding_heads": 2,
        "understanding_image_size": 16,
        "audio_num_levels": 3,
        "audio_codebook_size": 11,
        "mrope_layout": "interleaved",
        "initializer_range": 0.2,
    }
    return ErnieElasticConfig(**{**fields, **changes})


def tiny_model(seed: int = 0, **changes: object) -> ErnieElasticForCausalLM:
    torch.manual_seed(seed)
    model = ErnieElasticForCausalLM(tiny_config(**changes)).eval()
    for layer in model.model.layers[model.config.first_k_dense :]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.05)
    return model


def random_tokens(kind: str, role: str, rng: np.random.Generator, config: ErnieElasticConfig) -> Tokens:
    if kind == "text":
        return Tokens("text", role, ids=rng.integers(10, config.vocab_size, rng.integers(1, 6)).astype(np.int32))
    if kind == "audio":
        shape = (int(rng.integers(1, 5)), config.audio_num_levels)
        codes = rng.integers(0, config.audio_codebook_size, shape).astype(np.int16)
        features = rng.normal(size=(len(codes), config.audio_feature_size)) if config.audio_feature_size else None
        speaker = rng.normal(size=config.speaker_embedding_size) if config.speaker_embedding_size else None
        return Tokens("audio", role, codes=codes, features=features, speaker=speaker)
    size = config.understanding_image_size
    if role == "input":
        frames = 1 if kind == "image" else 4
        pixels = rng.integers(0, 256, (frames, size, size, 3)).astype(np.uint8)
        features = rng.normal(size=(frames, *config.visual_scales[-1], config.visual_bits)).astype(np.float16)
        return Tokens(kind, role, pixels=pixels, latents=features)
    frames = 1 if kind == "image" else int(rng.integers(2, 4))
    grid = config.visual_scales[-1]
    return Tokens(kind, role, latents=rng.normal(size=(frames, *grid, config.visual_bits)).astype(np.float16))


DOCUMENTS = {
    "text": [("text", "input"), ("text", "target")],
    "image_to_text": [("image", "input"), ("text", "target")],
    "video_to_text": [("video", "input"), ("text", "target")],
    "audio_to_text": [("audio", "input"), ("text", "target")],
    "text_to_image": [("text", "input"), ("image", "target")],
    "text_to_video": [("text", "input"), ("video", "target")],
    "text_to_audio": [("text", "input"), ("audio", "target")],
    "mixed": [
        ("text", "target"),
        ("image", "target"),
        ("text", "target"),
        ("audio", "target"),
        ("video", "input"),
        ("text", "input"),
        ("video", "target"),
        ("audio", "input"),
        ("image", "input"),
        ("text", "target"),
    ],
}


def random_parts(name: str, seed: int, config: ErnieElasticConfig) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [random_tokens(kind, role, rng, config) for kind, role in DOCUMENTS[name]]

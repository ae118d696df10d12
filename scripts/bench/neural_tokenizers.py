"""Rows of the neural tokenizers for the benchmark `tokenizers`: pictures of 256x256 and sounds, to codes and back.

Weights are random: time does not depend on them. Peers are what Transformers carries at its published sizes: Janus'
picture tokenizer (the same stride of 16) and Kyutai's Mimi (the same 12.5 Hz at 24 kHz). The case names parameters of
both, since they are not of one size.

Shape letters: N pictures, L samples, S steps, Q levels.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import JanusVQVAE, JanusVQVAEConfig, MimiConfig, MimiModel

from bench.common import Row, interleave
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizer, SeanetAudioTokenizerConfig
from ernie_elastic.tokenizers.visual.conv import ConvVisualTokenizer, conv_visual_config

SIDE = 256  # pixels
SECONDS = 10.0  # of sound


def millions(module: torch.nn.Module) -> str:
    """Parameters and buffers of a module in millions."""
    return f"{sum(value.numel() for value in module.state_dict().values()) / 1e6:.1f} M"


@torch.inference_mode()
def picture_rows(repeats: int) -> list[Row]:
    """Pictures/s of one picture uint8 [1, 256, 256, 3] to bits and back, beside Janus' tokenizer."""
    ours = ConvVisualTokenizer(conv_visual_config(SIDE)).eval()
    theirs = JanusVQVAE(JanusVQVAEConfig(num_patches=SIDE // 16)).eval()
    pixels = torch.randint(0, 256, (1, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = (pixels.float() / 127.5 - 1).movedim(-1, 1)
    total = ours.quantizer.encode(ours.encode(pixels)).total
    tokens = theirs.encode(values, return_dict=True).image_tokens.view(1, -1)
    seconds = interleave(
        {
            "encode": lambda _: ours.quantizer.encode(ours.encode(pixels)).targets,
            "janus encode": lambda _: theirs.encode(values, return_dict=True).image_tokens,
            "decode": lambda _: ours.decode(total),
            "janus decode": lambda _: theirs.decode(tokens),
        },
        repeats,
    )
    sizes = f"conv {millions(ours)}, Janus {millions(theirs)}"
    return [_row(f"picture {SIDE}x{SIDE} ({sizes}), {action}", 1, seconds, action, "janus", "pictures/s")
            for action in ("encode", "decode")]  # fmt: skip


@torch.inference_mode()
def sound_rows(repeats: int) -> list[Row]:
    """Seconds of sound a second of one wave float32 [L] to codes [S, Q] and back, beside Mimi."""
    config = SeanetAudioTokenizerConfig()
    ours, theirs = SeanetAudioTokenizer(config).eval(), MimiModel(MimiConfig()).eval()
    wave = 0.1 * torch.randn(round(SECONDS * config.sample_rate), generator=torch.Generator().manual_seed(0))
    codes = ours.encode(wave)
    their_codes = theirs.encode(wave[None, None], num_quantizers=config.num_levels).audio_codes
    seconds = interleave(
        {
            "encode": lambda _: ours.encode(wave),
            "mimi encode": lambda _: theirs.encode(wave[None, None], num_quantizers=config.num_levels).audio_codes,
            "decode": lambda _: ours.decode(codes),
            "mimi decode": lambda _: theirs.decode(their_codes).audio_values,
        },
        repeats,
    )
    case = f"sound {SECONDS:g} s, 24 kHz, {config.num_levels} levels (SEANet {millions(ours)}, Mimi {millions(theirs)})"
    return [_row(f"{case}, {action}", SECONDS, seconds, action, "mimi", "s of sound/s")
            for action in ("encode", "decode")]  # fmt: skip


def _row(case: str, amount: float, seconds: dict[str, float], action: str, peer: str, unit: str) -> Row:
    theirs: dict[str, Any] = {f"transformers_{peer}": amount / seconds[f"{peer} {action}"]}
    return Row(case, amount / seconds[action], theirs, unit, True)

"""What a model config needs to know of its tokenizers, without training any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ernie_elastic.tokenizers.quantizers import MultiScaleBits


def fake_tokenizers() -> Any:
    """Sizes of tokenizers with four scales of pictures."""
    special = SimpleNamespace(pad=0, bos=1, eos=2, boi=3, eoi=4, bov=5, eov=6, boa=7, eoa=8, next_frame=9)
    scales = ((1, 1), (2, 2), (4, 4), (4, 4))
    return SimpleNamespace(
        text=SimpleNamespace(special=special, vocab_size=512),
        visual=SimpleNamespace(
            quantizer=MultiScaleBits(scales, (0.5, 0.5, 0.5, 0.5)), config=SimpleNamespace(num_bits=24, image_size=32)
        ),
        audio=SimpleNamespace(num_levels=2, codebook_size=64, config=SimpleNamespace(num_components=128)),
    )

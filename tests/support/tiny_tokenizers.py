"""Real tokenizers of random weights that work in milliseconds, and the layout of a model that reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from ernie_elastic.data.groups.layout import Layout
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.special import SpecialTokens
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig

WORDS = "a red circle above a blue square in the centre of the picture"


def save_tiny_tokenizers(directory: Path, seed: int = 0) -> Layout:
    """Write text/, visual/ (48 pixels, 2 scales) and audio/ below `directory`; the layout that fits them."""
    torch.manual_seed(seed)
    text = TextTokenizer.train([WORDS] * 20, 330)
    visual = PatchVisualTokenizer(
        PatchVisualTokenizerConfig(image_size=48, patch=16, scales=((1, 1), (3, 3)), amplitudes=(0.5, 0.5), width=8)
    )
    audio = SpectralAudioTokenizer(SpectralAudioTokenizerConfig(num_components=8))
    Tokenizers(text, visual, audio).save(directory)
    return tiny_layout(directory)


def tiny_layout(directory: Path) -> Layout:
    """The layout of a model that reads the tokenizers below `directory`."""
    loaded = Tokenizers.load(directory)
    special = SpecialTokens(0, *range(9))
    return Layout(special, quantizer=loaded.visual.quantizer, num_bits=20, num_levels=loaded.audio.num_levels,
                  codebook_size=loaded.audio.codebook_size, understanding_grid=3)  # fmt: skip

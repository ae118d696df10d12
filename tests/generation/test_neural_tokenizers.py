"""The backbone on the neural tokenizers: clips of fewer latent frames, codes of SEANet and of a Transformers codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.data.prepare.tokenise import Tokenizers, tokenise, world_of
from ernie_elastic.data.prepare.tokenizer_service import CachedTokenizers, InProcessTokenizers, PooledTokenizers
from ernie_elastic.data.world.facts import WorldConfig
from ernie_elastic.data.world.scenes import world_sample
from ernie_elastic.generation.answer import answer
from ernie_elastic.generation.decoder import Sampling
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import modality_sums
from ernie_elastic.modeling.sizes import ModelSizes
from ernie_elastic.schema import JUDGED_TASKS, Segment
from ernie_elastic.tokenizers.audio.adapters import adapter_from_directory
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizer, SeanetAudioTokenizerConfig
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.conv import ConvVisualTokenizer
from ernie_elastic.tokenizers.visual.conv_config import conv_visual_config
from tests.tokenizers.audio.test_adapters import tiny_model

SIZES = ModelSizes(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    moe_intermediate_size=16, num_experts=4, understanding_width=16, understanding_patch=8, initializer_range=0.2,
    audio_input="continuous",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """Untrained neural tokenizers, as the pipeline reads them from a directory."""
    text = TextTokenizer.train(["a red circle and a blue square", "what is it ?"] * 20, 320)
    visual = ConvVisualTokenizer(
        conv_visual_config(32, 8, 6, num_scales=3, temporal_stride=4, width=4, bit_series=(6,))
    ).eval()
    audio = SeanetAudioTokenizer(
        SeanetAudioTokenizerConfig(
            sample_rate=16000, strides=(2, 4, 4, 5, 8), width=4, max_width=16, latent_width=8, num_levels=2,
            codebook_size=11,
        )
    ).eval()  # fmt: skip
    directory: Path = tmp_path_factory.mktemp("neural")
    Tokenizers(text, visual, audio).save(directory)
    return Tokenizers.load(directory)


@pytest.fixture(scope="module")
def model(tokenizers: Tokenizers) -> ErnieElasticForCausalLM:
    torch.manual_seed(0)
    return ErnieElasticForCausalLM(SIZES.to_config(tokenizers)).eval()


def test_every_task_trains(tokenizers: Tokenizers, model: ErnieElasticForCausalLM) -> None:
    assert tokenizers.visual.architecture == "conv" and tokenizers.audio.architecture == "seanet"
    samples = [world_sample(task, 0, 0, "train", world_of(tokenizers)) for task in JUDGED_TASKS]
    parts = tokenise(samples, tokenizers)
    clip = next(s.array for s in samples[3].segments if s.kind == "video")
    assert clip is not None
    latents = parts[3][-1].latents
    assert latents is not None and len(latents) == tokenizers.visual.latent_frames(len(clip)) < len(clip)
    read = parts[2][0]
    assert read.kind == "video" and read.latents is not None and len(read.latents) == len(clip)  # read frame by frame
    batch = collate([[build_document(part, layout_of(model.config)) for part in parts]], 1024)
    sums, counts = modality_sums(model.forward_packed(batch), batch)
    assert bool((counts[:4] > 0).all()) and bool(torch.isfinite(sums).all())  # the last one is of MTP, which is off
    sums.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    model.zero_grad()


@pytest.mark.parametrize("codec", ["seanet", "mimi"])
def test_every_service_gives_the_same_documents(codec: str, tokenizers: Tokenizers, tmp_path: Path) -> None:
    if codec == "mimi":
        tiny_model("mimi").save_pretrained(tmp_path / "mimi")
        tokenizers = Tokenizers(tokenizers.text, tokenizers.visual, adapter_from_directory(tmp_path / "mimi", 2))
    tokenizers.save(tmp_path / "tokenizers")
    samples = [world_sample(task, 1, 0, "train", WorldConfig()) for task in JUDGED_TASKS]
    plain = InProcessTokenizers(Tokenizers.load(tmp_path / "tokenizers"))
    expected = plain.tokenise(samples)
    with PooledTokenizers(tmp_path / "tokenizers", 1) as pool:
        assert pool.identity == plain.identity
        same(pool.tokenise(samples), expected)
    for _ in range(2):  # made the first time, read the second
        with CachedTokenizers(plain, tmp_path / "cache") as cached:
            same(cached.tokenise(samples), expected)


def same(found: list[list[Tokens]], expected: list[list[Tokens]]) -> None:
    for one, other in zip(found, expected, strict=True):
        for part, wanted in zip(one, other, strict=True):
            for name in ("ids", "pixels", "latents", "codes", "features"):
                a, b = getattr(part, name), getattr(wanted, name)
                assert (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and np.array_equal(a, b)))


def test_every_mode_answers(tokenizers: Tokenizers, model: ErnieElasticForCausalLM) -> None:
    prompt = [Segment("text", "input", text="a red circle")]
    sampling = Sampling(max_new_tokens=4)
    picture = answer(model, tokenizers, [prompt], "image", sampling)[0]
    assert isinstance(picture, np.ndarray) and picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    clip = answer(model, tokenizers, [prompt], "video", sampling)[0]
    assert isinstance(clip, np.ndarray) and clip.shape[1:] == (32, 32, 3) and len(clip) % 4 == 1
    sound = answer(model, tokenizers, [prompt], "audio", sampling)[0]
    assert isinstance(sound, np.ndarray) and sound.dtype == np.float32 and len(sound) % 1280 == 0
    read = [Segment("image", "input", array=picture), Segment("text", "input", text="what is it ?")]
    assert isinstance(answer(model, tokenizers, [read], "text", sampling)[0], str)

"""Loss weights that follow the observed losses, and a run whose bit count grows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernie_elastic.data.groups.augmentation import Augmentation, Flips
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.decoder import GroupDecoder
from ernie_elastic.generation.visual import decode_visual
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import LOSSES, modality_sums
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.losses import LossBalance, LossWeights, PosteriorWeights
from tests.modeling.common import random_parts, tiny_config, tiny_model


def test_posterior_weights_bring_losses_to_the_interval_of_text():
    balance = LossBalance(LossWeights(), PosteriorWeights(decay=0.9))
    assert balance.vector().tolist() == pytest.approx([1, 1, 1, 1, 0.3]), "nothing observed yet"
    for _ in range(200):
        balance.observe({"text": 2.0, "image": 0.5, "audio": 4.0, "mtp": 3.0})
    weights = dict(zip(LOSSES, balance.vector().tolist(), strict=True))
    assert weights == pytest.approx({"text": 1.0, "image": 4.0, "video": 1.0, "audio": 0.5, "mtp": 0.3}, rel=1e-5)
    balance.observe({"image": 0.5})
    assert balance.ema["text"] == pytest.approx(2.0), "a step without text leaves its average alone"


def test_posterior_weights_are_clamped_and_can_be_off():
    for enabled, expected in ((True, [1, 10, 0.1, 1, 0.3]), (False, [1, 1, 1, 1, 0.3])):
        balance = LossBalance(LossWeights(), PosteriorWeights(enabled=enabled, decay=0.0))
        balance.observe({"text": 1.0, "image": 1e-4, "video": 1e4})
        assert balance.vector().tolist() == pytest.approx(expected)
    with pytest.raises(ConfigError, match="low 2"):
        PosteriorWeights(low=2.0)


def test_a_long_text_counts_by_the_power_of_its_length():
    model = tiny_model()
    layout = layout_of(model.config)
    texts = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14]]
    parts = [[Tokens("text", "target", ids=np.array(ids, np.int32))] for ids in texts]
    batch = collate([[build_document(part, layout) for part in parts], [build_document(parts[0], layout)]])
    output = model.forward_packed(batch)
    targets = batch.text_targets_BT.reshape(-1)[output.text_index_N]
    each = torch.nn.functional.cross_entropy(output.text_logits_NV, targets, reduction="none")
    rows, columns = output.text_index_N // batch.text_targets_BT.shape[1], output.text_index_N
    key = rows * 10 + batch.document_BT.reshape(-1)[columns]
    length = torch.stack([(key == own).sum() for own in key]).float()
    assert set(length.tolist()) == {float((key == 0).sum()), float((key == 1).sum())} and length.unique().numel() == 2
    for power in (0.0, 0.5, 1.0):
        sums, counts = modality_sums(output, batch, power)
        torch.testing.assert_close(sums[0], (each * length**-power).sum())
        torch.testing.assert_close(counts[0], (length**-power).sum())
    assert float(modality_sums(output, batch, 1.0)[1][0]) == pytest.approx(3.0), "each document counts as one"
    with pytest.raises(ConfigError, match="text_length_power 2"):
        LossWeights(text_length_power=2.0)


def test_the_bit_count_grows_with_the_run():
    training = TrainingConfig(steps=100, bit_schedule=((0.0, 2), (0.5, 5)))
    assert [training.active_bits(step) for step in (0, 49, 50, 99)] == [2, 2, 5, 5]
    assert TrainingConfig(steps=100).active_bits(0) is None
    with pytest.raises(ConfigError, match="growing"):
        TrainingConfig(bit_schedule=((0.5, 2), (0.1, 4)))


def test_bits_that_are_not_in_use_are_neither_read_nor_predicted():
    model = tiny_model()
    layout = layout_of(model.config)
    parts = random_parts("text_to_video", 2, model.config)
    noisy = parts[1].latents.copy()
    noisy[..., 3:] = np.random.default_rng(0).normal(size=noisy[..., 3:].shape)
    batches = [
        collate([[build_document([parts[0], Tokens("video", "target", latents=latents)], layout, low)]])
        for latents in (parts[1].latents, noisy)
        for low in [Augmentation(flips=None, active_bits=3)]
    ]
    sums = [modality_sums(model.forward_packed(batch), batch)[0] for batch in batches]
    assert torch.equal(*sums), "the last two bits change nothing"
    loss = sums[0].sum()
    loss.backward()
    head = model.model.visual.bit_head.weight.grad
    assert head[:3].abs().sum() > 0 and head[3:].abs().sum() == 0
    assert model.model.visual.embed.weight.grad[:, 3:].abs().sum() == 0
    full = collate([[build_document([parts[0], parts[1]], layout)]])
    assert not torch.equal(modality_sums(model.forward_packed(full), full)[0], sums[0].detach())


def test_a_model_on_few_bits_draws_with_few_bits():
    model = tiny_model(visual_active_bits=2)
    layout = layout_of(model.config)
    decoder = GroupDecoder(model, layout)
    decoder.prefill([build_document([], layout, opener=layout.special.boi)])
    (total,) = decode_visual(decoder, video=False)
    assert total[..., 2:].abs().max() == 0 and total[..., :2].abs().min() > 0
    with pytest.raises(ConfigError, match="visual_active_bits 9"):
        tiny_config(visual_active_bits=9)


def test_flip_rates_grow_over_frames_and_the_error_is_inherited():
    generator = torch.Generator().manual_seed(0)
    flips = Flips(max_rate=0.2, frame_growth=0.05)
    rates = torch.stack([flips.rates(5, 4, generator) for _ in range(4000)])
    assert rates.max() <= 0.4 and rates.min() >= 0.0
    means = rates[:, :, 1:].mean((0, 2))
    assert torch.allclose(means, torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]), atol=0.01)
    last, first = rates[:, :-1, -1], rates[:, 1:, 0]
    low = 0.05 * torch.arange(1, 5)
    assert (first >= torch.maximum(last, low) - 1e-6).all(), "a frame starts no better than the one before ended"
    plain = Flips(max_rate=0.2, frame_growth=0.0, inherit_error=False)
    assert plain.rates(3, 2, generator).max() <= 0.2


def test_a_flip_rate_of_zero_is_plain_training():
    config = tiny_config()
    layout, parts = layout_of(config), random_parts("text_to_video", 4, config)
    plain = build_document(parts, layout)
    zero = Augmentation(Flips(0.0, frame_growth=0.0))
    flipped = build_document(parts, layout, zero, torch.Generator().manual_seed(0))
    for name in ("visual_inputs", "bit_targets"):
        assert torch.equal(getattr(plain, name), getattr(flipped, name))


def test_conditions_speakers_and_frames_are_dropped_at_their_shares():
    config = tiny_config(speaker_embedding_size=6)
    layout, generator = layout_of(config), torch.Generator().manual_seed(0)
    drop = Augmentation(flips=None, frame_drop=0.3, condition_dropout=0.2, speaker_dropout=0.4)
    video, audio = random_parts("text_to_video", 4, config), random_parts("text_to_audio", 4, config)
    words = len(video[0].ids)
    documents = [build_document(video, layout, drop, generator) for _ in range(1000)]
    full = len(build_document(video, layout))
    bare = sum(len(document) == full - words for document in documents)
    assert 150 < bare < 250 and {len(document) for document in documents} == {full, full - words}
    frames = torch.cat([d.dropped[d.frame == 1].any()[None] for d in documents]).float().mean()
    assert 0.25 < frames < 0.35
    silent = sum(not build_document(audio, layout, drop, generator).speakers for _ in range(1000))
    assert 340 < silent < 460
    assert all(len(d) == len(build_document(audio[:1], layout)) for d in [build_document(audio[:1], layout, drop)])

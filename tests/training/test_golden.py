"""A refactoring keeps the losses of a fixed tiny run; a change of the mathematics updates the file and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ernie_elastic.data.groups.augmentation import Augmentation, Flips
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.elastic.sampler import sample_spec
from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import TorchEngine
from ernie_elastic.training.losses import LossWeights
from tests.modeling.common import DOCUMENTS, RICH, random_parts, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"


# What each case trains with; "plain" is the model without options, as it always was.
CASES = {
    "plain": ({}, Augmentation(Flips(0.2, frame_growth=0.0, inherit_error=False))),
    "rich": (
        # Another table would draw other random weights than those behind the golden file.
        {**RICH, "visual_place_embedding": False, "router_z_loss": 1e-3, "router_orthogonal_loss": 1e-2},
        Augmentation(Flips(0.2), frame_drop=0.3, condition_dropout=0.2, active_bits=3),
    ),
}


def losses(case: str) -> list[list[float]]:
    """Mean losses (text, image, video, audio, mtp) of five elastic steps; null where there is no target."""
    options, augmentation = CASES[case]
    model = tiny_model(initializer_range=0.05, **options)
    training = TrainingConfig(
        engine="torch", rows_per_step=1, learning_rate=1e-2, loss_weights=LossWeights(image=4.0, video=4.0)
    )
    engine = TorchEngine(model, training)
    layout, rows = layout_of(model.config), []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        documents = [
            [build_document(random_parts(name, step, model.config), layout, augmentation, generator)]
            for name in DOCUMENTS
        ]
        spec = sample_spec(ElasticConfig(full_depth=0.3, full_width=0.3, full_sparsity=0.3), model.config, 0, step)
        (result,), _ = engine.train_step([collate(documents)], spec, 1e-2)
        rows.append([s / c if c else None for s, c in zip(result.sums.tolist(), result.counts.tolist(), strict=True)])
    return rows


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_golden_ones(case):
    expected = json.loads(GOLDEN.read_text())[case]
    for ours, theirs in zip(losses(case), expected, strict=True):
        # Other CPUs sum in another order; anything beyond is a change of the mathematics.
        assert ours == [value if value is None else pytest.approx(value, rel=2e-4) for value in theirs]

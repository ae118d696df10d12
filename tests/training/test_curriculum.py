"""Stages of a run: pure functions of the step, chained without a gap, as the report gives them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ernie_elastic.data.packed.mixture import PackedMixture
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling.positions import rotary_frequencies, set_rope_base
from ernie_elastic.presets import PRESETS
from ernie_elastic.training.curriculum import Curriculum, TrainingStage, paper_stages
from tests.modeling.common import tiny_model


def test_the_reports_stages_follow_one_another():
    plan = Curriculum(paper_stages(warmup_steps=10, mid_share=0.25), 200, 100)
    steps = [plan.at(step) for step in range(200)]
    assert [step.stage for step in steps] == ["stage-1"] * 150 + ["mid-training"] * 50
    factors = [step.lr_factor for step in steps]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)]) and set(factors[9:150]) == {1.0}
    assert factors[150] == 1.0 and factors[199] == pytest.approx(0.1)
    assert factors[150:] == sorted(factors[150:], reverse=True)
    assert factors[150 + 49 // 2] == pytest.approx(
        0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(24 / 49 * 3.14159265)))
    )
    assert {(s.bias_speed, s.mtp_weight, s.rope_theta) for s in steps[:150]} == {(1e-4, 0.3, 1e6)}
    assert {(s.bias_speed, s.mtp_weight, s.rope_theta) for s in steps[150:]} == {(1e-5, 0.1, 1e6)}


def test_the_batch_grows_linearly_in_tokens_and_reads_every_unit_once():
    plan = Curriculum(paper_stages(ramp_tokens=24_000, mid_share=0.5), 40, 1000)
    units = [plan.at(step).units for step in range(40)]
    assert [unit for step in units for unit in step] == list(range(units[-1].stop))
    sizes = [len(step) for step in units]
    assert sizes[0] == 1 and sizes == sorted(sizes) and sizes[-1] == 4
    for step, size in enumerate(sizes[:20]):  # paper: 14 M to 56 M, so one to four times
        assert size == min(4, int(1 + 3 * units[step].start * 1000 / 24_000))


def test_the_weights_of_a_mixture_change_with_the_steps_of_growing_batches():
    plan = Curriculum((TrainingStage("a", share=0.5), TrainingStage("b", share=0.5, batch_start=3, batch_end=3)), 4, 10)
    assert [plan.first_unit(step) for step in range(6)] == [0, 1, 2, 5, 8, 8]
    corpora = [SimpleNamespace(num_rows=50, num_documents=50) for _ in range(2)]
    mixture = PackedMixture(corpora, [(0, (1.0, 0.0)), (3, (0.0, 1.0))]).counted_by(plan.first_unit)
    sources = [[row // 50 for unit in plan.at(step).units for row, _ in mixture.rows_of_step(0, unit, 4)]
               for step in range(4)]  # fmt: skip
    assert [set(found) for found in sources] == [{0}, {0}, {0}, {1}] and [len(found) for found in sources] == [
        4,
        4,
        12,
        12,
    ]


def test_a_stage_in_tokens_ends_with_them():
    stages = (TrainingStage("a", tokens=5_000, batch_start=2, batch_end=2), TrainingStage("b", share=0.5))
    plan = Curriculum(stages, 6, 1000)
    assert [plan.at(step).stage for step in range(6)] == ["a", "a", "a", "b", "b", "b"]
    assert [len(plan.at(step).units) for step in range(6)] == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingStage("a"), "exactly one of them"),
        (lambda: TrainingStage("a", share=0.5, tokens=3), "exactly one of them"),
        (lambda: TrainingStage("a", share=1, kind="linear"), "kind 'linear'"),
        (lambda: TrainingStage("a", share=1, batch_end=4), "batch_start 1 and batch_end 4"),
        (lambda: TrainingStage("a", share=1, warmup_steps=-1), "must be 0 or more"),
        (lambda: Curriculum((TrainingStage("a", tokens=9_000),), 6, 1000), "take 9 steps .* the run has 6 steps"),
        (lambda: Curriculum((TrainingStage("a", share=0.8), TrainingStage("b", share=0.8)), 10, 1), "shares of 1.6"),
        (lambda: Curriculum((TrainingStage("a", share=0.5), TrainingStage("b", tokens=2)), 10, 1), "take 7 steps"),
    ],
)
def test_stages_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", [name for name, make in PRESETS.items() if make().training.stages])
def test_presets_with_stages_lay_them_out(name):
    training = PRESETS[name]().training
    plan = Curriculum(training.stages, training.steps, training.rows_per_step * PRESETS[name]().prepare.row_length)
    assert plan.at(0).stage == "stage-1" and plan.at(training.steps - 1).stage == "mid-training"


def test_another_rope_base_turns_the_positions():
    model = tiny_model()
    batch = torch.arange(12)[None]
    before = model(input_ids=batch).logits
    set_rope_base(model, 123.0)
    (rotary,) = [module for module in model.modules() if type(module).__name__ == "UniRotary"]
    assert torch.equal(rotary.inv_freq, rotary_frequencies(123.0, rotary.head_dim))
    assert model.config.rope_parameters["rope_theta"] == 123.0
    assert not torch.allclose(before, model(input_ids=batch).logits)

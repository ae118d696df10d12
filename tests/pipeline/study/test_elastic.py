"""`study elastic`: what the arms train, what is measured, and the tables and the figure that come of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ernie_elastic.errors import ConfigError
from ernie_elastic.pipeline.study import elastic as study_elastic
from ernie_elastic.pipeline.study import report as study_report
from ernie_elastic.pipeline.study.elastic import ARMS, SIZES, Arm, Job, Study
from tests.modeling.common import tiny_model

SIZE = {"layers": 8, "experts": 32, "top_k": 8}
LABELS = ("full", "depth_6", "depth_4", "experts_16", "k_4", "k_2", "k_1")


def results() -> study_report.Losses:
    """Losses of every arm, two seeds: sub-models of models that are not elastic lose most."""
    found: study_report.Losses = {}
    for arm in ARMS:
        labels = ("full",) if arm.name.startswith("alone") else LABELS
        slope = 0.1 if arm.name == "fixed" else 0.02
        found[arm.name] = {
            label: [{"text": 1 + seed, "image": 1.0, "loss": 1 + slope * number + 0.001 * seed} for seed in (0, 1)]
            for number, label in enumerate(labels)
        }
    return found


def test_arms_are_elastic_in_what_they_say_and_train_the_same_rows() -> None:
    arms = {arm.name: arm for arm in ARMS}
    assert len(arms) == len(ARMS) >= 12
    for name in ("depth", "width", "sparsity"):
        elastic = arms[name].elastic
        shares = {axis: getattr(elastic, f"full_{axis}") for axis in ("depth", "width", "sparsity")}
        assert shares == {axis: 0.8 if axis == name else 1.0 for axis in shares} and elastic.enabled
    assert not arms["fixed"].elastic.enabled and arms["all"].elastic.min_depth == 0.5
    runs = [Job(Path("out"), Path("t"), SIZES["full"], arm, 3) for arm in ARMS]
    training = [job.size.training(job.seed, job.arm.micro_batches) for job in runs]
    assert {(run.steps, run.rows_per_step, run.seed) for run in training} == {(240, 12, 3)}
    sizes = {job.arm.name: job.sizes for job in runs}
    full = SIZES["full"].model
    assert sizes["alone_depth"] == dataclasses.replace(full, num_hidden_layers=6)
    assert sizes["alone_width"] == dataclasses.replace(full, num_experts=16)
    assert sizes["alone_k1"] == dataclasses.replace(full, num_experts_per_tok=1)
    assert sizes["all"] == full


def test_sub_models_have_the_sizes_of_their_labels() -> None:
    model = tiny_model(audio_num_levels=0, audio_head_layers=[])
    config = model.config
    mass = torch.rand(config.num_hidden_layers, config.num_experts).double()
    found = study_elastic.sub_models(model, mass, Arm("all"))
    assert found["full"] == config.full_spec()
    for label, spec in found.items():
        kind, _, size = label.partition("_")
        got = {"depth": len(spec.layers), "experts": spec.num_experts, "k": spec.top_k}.get(kind)
        assert got is None or got == int(size), label
    assert list(study_elastic.sub_models(model, mass, Arm("alone_k1"))) == ["full"]


def test_tables_and_figure(tmp_path: Path) -> None:
    text = study_report.write_report(results(), SIZE, 2, tmp_path)
    assert (tmp_path / "tables.md").read_text() == text and text.startswith("Held-out loss, mean of 2 seeds")
    depth, width, k, policies, layers_k, modalities = text.strip().split("\n\n")[1:]
    assert depth.splitlines()[0] == "| training | 8 layers | 6 layers | 4 layers |"
    assert depth.splitlines()[2].startswith(
        "| not elastic | 1.0005 (1.0000 to 1.0010), +0.0 % (+0.0 to +0.0) | 1.1005 (1.1000 to 1.1010), +10.0 % (+10"
    )
    assert "| trained alone at that size |  | 1.0005" in depth and width.count("\n") == 6
    assert k.splitlines()[0].count("experts per token") == 4
    assert "| one for each layer | 1.0005" in layers_k and len(layers_k.splitlines()) == 4
    assert "evenly spaced layers" in policies and "| not elastic | 1.5000 | 1.0000 |" in modalities
    one = study_report.write_report({"sparsity": {"full": [{"loss": 2.0}], "k_4": [{"loss": 3.0}]}}, SIZE, 1, tmp_path)
    assert "| elastic sparsity | 2.0000 | 3.0000 |  |  |" in one, "nothing to compare with, no spread"
    study_report.write_report(results(), SIZE, 2, tmp_path)
    picture = Image.open(tmp_path / "losses.png")
    assert picture.size[0] > 2 * picture.size[1] and len(set(picture.convert("L").resize((60, 20)).getdata())) > 5


def test_the_number_of_steps_can_be_chosen_and_is_part_of_the_settings(tmp_path: Path, monkeypatch) -> None:
    trained = []

    def measured(jobs, workers):
        trained.extend(job.size.training(job.seed, 1).steps for job in jobs)
        return [(job, {"full": {"text": 1.0, "loss": 1.0}}) for job in jobs]

    monkeypatch.setattr(study_elastic, "_measured", measured)
    monkeypatch.setattr(study_elastic, "_pack", lambda size, job: None)
    study_elastic.run_study("smoke", tmp_path, (0, 1), 1, ("fixed",), tmp_path / "tokenizers", steps=7)
    assert trained == [7, 7]
    full = study_elastic.SIZES["full"]
    assert (full.lasting(960).num_records, full.lasting(60).num_records) == (40_000, 10_000) and full.lasting(
        None
    ) is full
    with pytest.raises(ConfigError, match="holds a study with settings"):
        study_elastic.run_study("smoke", tmp_path, (0, 1), 1, ("fixed",), tmp_path / "tokenizers")


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"arms \['dept'\] are not among \['fixed'"):
        study_elastic.run_study("smoke", tmp_path, (0,), 1, ("dept",))
    with pytest.raises(ConfigError, match="0 seeds"):
        study_elastic.run_study("smoke", tmp_path, (), 1)
    with pytest.raises(ConfigError, match="0 steps"):
        study_elastic.run_study("smoke", tmp_path, (0,), 1, steps=0)
    study_elastic._claim(tmp_path, Study("smoke", (0,), {"size": 1}))
    assert json.loads((tmp_path / "study.json").read_text())["config"] == {"size": 1}
    study_elastic._claim(tmp_path, Study("smoke", (0, 1), {"size": 1}))
    with pytest.raises(ConfigError, match="holds a study with settings"):
        study_elastic._claim(tmp_path, Study("smoke", (0,), {"size": 2}))

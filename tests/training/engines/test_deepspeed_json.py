"""DeepSpeed's JSON for every combination of options, and the combinations that are refused."""

from __future__ import annotations

import json
from itertools import product

import pytest

from ernie_elastic.errors import ConfigError
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines import deepspeed_engine as engine_deepspeed
from ernie_elastic.training.engines.deepspeed_json import deepspeed_config
from tests.modeling.common import tiny_model
from tests.support import ROOT

GOLDEN = ROOT / "tests" / "golden" / "deepspeed"
OPTIONS = (
    (0, 1, 2, 3),
    ("fp32", "bf16"),
    (("none", "adamw"), ("none", "muon"), ("optimizer", "adamw"), ("optimizer", "cpu_adam")),
    (1, 2),
)


def combinations() -> dict[str, TrainingConfig]:
    """Every combination that the configuration takes, by a name for its file."""
    found = {}
    for stage, precision, (offload, optimizer), split in product(*OPTIONS):
        options = {"zero_stage": stage, "precision": precision, "offload": offload, "optimizer": optimizer}
        try:
            training = TrainingConfig(rows_per_step=16, micro_batches=2, expert_parallel=split, **options)
        except ConfigError:
            continue
        name = [f"zero{stage}", precision, optimizer, *(["offload"] if offload != "none" else [])]
        found["-".join([*name, *(["experts"] if split > 1 else [])])] = training
    return found


@pytest.mark.parametrize("name", combinations())
def test_deepspeed_config_of_every_combination(name):
    assert deepspeed_config(combinations()[name], 2) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_golden_files_are_those_of_the_combinations():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(combinations()) and len(combinations()) > 15


def test_deepspeed_itself_accepts_every_combination():
    """It refuses keys that it does not know and dtypes and stages that do not fit."""
    from deepspeed.runtime.config import DeepSpeedConfig

    for name, training in combinations().items():
        made = DeepSpeedConfig(deepspeed_config(training, 1))
        assert made.zero_config.stage == training.zero_stage and made.gradient_accumulation_steps == 2, name
        assert made.bfloat16_config.enabled == (training.precision == "bf16"), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 4}, "zero_stage 4 is not one of 0, 1, 2, 3"),
        ({"precision": "fp16"}, "precision 'fp16' is not one of fp32, bf16"),
        ({"precision": "bf16", "zero_stage": 0}, "pass --training.zero-stage 1, 2 or 3"),
        ({"offload": "parameters"}, "offload 'parameters'"),
        ({"offload": "optimizer", "engine": "torch"}, "it needs --training.engine deepspeed .it is torch"),
        ({"offload": "optimizer", "zero_stage": 0}, "zero-stage 1, 2 or 3 .it is 0"),
        ({"optimizer": "cpu_adam"}, "pass --training.offload optimizer"),
    ],
)
def test_combinations_that_cannot_be_carried_out_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)


def test_bf16_needs_no_zero_stage_under_torch():
    assert TrainingConfig(precision="bf16", engine="torch", zero_stage=0).precision == "bf16"


def test_a_cpu_adam_that_cannot_be_compiled_says_what_it_needs(monkeypatch):
    from deepspeed.ops import adam

    def fail(*_, **__):
        raise RuntimeError("Ninja is required to load C++ extensions\nmore")

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", fail)
    training = TrainingConfig(offload="optimizer", optimizer="cpu_adam")
    with pytest.raises(
        ConfigError, match=r"g\+\+.*ninja.*\(Ninja is required.*\); install .*--training.optimizer adamw"
    ):
        engine_deepspeed._make_cpu_adam(tiny_model(), training)

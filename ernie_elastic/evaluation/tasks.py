"""Judged tasks on held-out records: what is asked, what is answered, and how right it is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.data.world import checkers
from ernie_elastic.data.world.scenes import WorldConfig, world_sample
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.generation.answer import Answer, GenerationMode, answer
from ernie_elastic.generation.decoder import RoutingSink, Sampling
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.schema import JUDGED_TASKS, Sample, Segment, SubModelSpec
from ernie_elastic.stages import progress


@dataclass(frozen=True)
class EvaluationConfig:
    """What is judged. num_samples per task, of the held-out split; seed picks the records; sampling decodes them.

    Text and audio take the likeliest choice; bits are drawn at temperature 0.5 (ours: a caption leaves the exact place
    open; docs/decisions.md has what other temperatures gave).
    """

    tasks: tuple[str, ...] = JUDGED_TASKS
    num_samples: int = 200
    seed: int = 0
    batch_size: int = 100
    world: WorldConfig = field(default_factory=WorldConfig)
    sampling: Sampling = field(default_factory=lambda: Sampling(bit_temperature=0.5, max_frames=8))

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(JUDGED_TASKS))
        if unknown:
            raise ConfigError(f"evaluation: tasks {unknown} are not among {list(JUDGED_TASKS)}")


@dataclass
class TaskResult:
    """Scores of one task. value: share that is right; chance: share right when answered with another record's truth."""

    task: str
    value: float
    chance: float
    n: int
    detail: dict[str, dict[str, float]]
    samples: list[Sample]
    answers: list[Answer]
    correct: list[bool]


def split_prompt(sample: Sample) -> tuple[tuple[Segment, ...], Segment]:
    """(prompt, target): everything before the first target segment, and that segment."""
    for index, segment in enumerate(sample.segments):
        if segment.role == "target":
            return sample.segments[:index], segment
    raise ConfigError(f"record {sample.key} has no target segment to judge")


def judge(
    model: ErnieElasticForCausalLM,
    tokenizers: Tokenizers,
    task: str,
    config: EvaluationConfig,
    submodel: SubModelSpec | None = None,
    routing_sink: RoutingSink | None = None,
) -> TaskResult:
    """Answer `num_samples` held-out records of one task and score the answers with its checker."""
    samples = [world_sample(task, config.seed, index, "test", config.world) for index in range(config.num_samples)]
    pairs = [split_prompt(sample) for sample in samples]
    mode: GenerationMode = pairs[0][1].kind
    answers = answer(
        model,
        tokenizers,
        [prompt for prompt, _ in pairs],
        mode,
        config.sampling,
        submodel,
        config.batch_size,
        routing_sink,
    )
    return score_answers(task, samples, answers, config.world)


def score_answers(task: str, samples: list[Sample], answers: list[Answer], world: WorldConfig) -> TaskResult:
    """Score given answers; partial keys of the checker become the detail, split by number of objects too."""
    buckets: dict[str, list[bool]] = defaultdict(list)
    correct = []
    for sample, output in zip(samples, answers, strict=True):
        scores = _score(task, sample, output, world)
        correct.append(bool(scores["correct"]))
        for name, value in scores.items():
            if name != "correct":
                buckets[name].append(bool(value))
        if (count := sample.truth.get("num_objects")) is not None:
            buckets[f"correct, {count} object{'s' if count != 1 else ''}"].append(correct[-1])
    detail = {name: {"value": float(np.mean(values)), "n": len(values)} for name, values in sorted(buckets.items())}
    chance = float(checkers.chance(task, [sample.truth for sample in samples]))
    return TaskResult(task, float(np.mean(correct)), chance, len(samples), detail, samples, answers, correct)


def _score(task: str, sample: Sample, output: Answer, world: WorldConfig) -> dict[str, bool]:
    try:
        return checkers.score(task, sample.truth, output, world)
    except DataError:  # an answer of no use to the checker, such as a video of one frame, is wrong
        return {"correct": False}


def evaluate(
    model: ErnieElasticForCausalLM,
    tokenizers: Tokenizers,
    config: EvaluationConfig,
    name: str = "model",
    submodel: SubModelSpec | None = None,
) -> list[TaskResult]:
    """Judge every task of the configuration, with a progress bar."""
    return [
        judge(model, tokenizers, task, config, submodel)
        for task in progress(list(config.tasks), desc=f"evaluate {name}", unit="task")
    ]


def accuracy_table(results: list[TaskResult]) -> dict[str, dict[str, Any]]:
    """{task: {"value", "chance", "n"}}, as summary.json holds it."""
    return {r.task: {"value": r.value, "chance": r.chance, "n": r.n} for r in results}

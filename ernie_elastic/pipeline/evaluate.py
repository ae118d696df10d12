"""`evaluate`: a model directory to results.json, samples.json and the media of its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_elastic.data.prepare.tokenise import world_of
from ernie_elastic.evaluation.media import write_results
from ernie_elastic.evaluation.tasks import EvaluationConfig, TaskResult, evaluate
from ernie_elastic.generation.loading import load_model, load_tokenizers
from ernie_elastic.model_directories import resolve_model_dir
from ernie_elastic.stages import say, stage_output

STAGE = "evaluate"


def run_evaluate(
    source: Path | None, out: Path, num_samples: int, seed: int, overwrite: bool = False, name: str | None = None
) -> dict[str, Any]:
    """Judge the model of `source` into the stage directory `out` and print its table; returns the table."""
    directory = resolve_model_dir(source)
    tokenizers = load_tokenizers(directory)
    config = EvaluationConfig(num_samples=num_samples, seed=seed, world=world_of(tokenizers))
    results = evaluate(load_model(directory), tokenizers, config, name or directory.name)
    with stage_output(out, STAGE, config, parent=directory, overwrite=overwrite) as temporary:
        table = write_results(results, temporary, name or directory.name, tokenizers.audio.config.sample_rate)
    print_results(results)
    media = sum(path.suffix in (".png", ".wav") for path in out.iterdir())
    say(f"evaluate: wrote {out}: results.json, samples.json and {media} pictures and sounds")
    return table


def print_results(results: list[TaskResult]) -> None:
    """One line per task: share right, chance, n, and the details."""
    for r in results:
        details = ", ".join(f"{name} {entry['value']:.0%}" for name, entry in r.detail.items())
        say(f"{r.task:16}{r.value:>8.1%}  chance {r.chance:.1%}  n {r.n}  ({details})")

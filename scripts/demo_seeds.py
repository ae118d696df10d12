"""Mean and spread of the demo's table over several runs: `python scripts/demo_seeds.py RUN RUN ...` prints Markdown.

Each RUN is a finished run of `ernie-elastic demo --run-dir RUN --seed N`. Accuracies are per cent: the mean, and the
lowest and highest of the runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = {
    "decode_tokens_per_s": "decode, text tokens/s",
    "model_bytes": "weight bytes",
    "resident_weight_bytes": "resident bytes",
}


def read_summaries(runs: list[Path]) -> list[dict[str, Any]]:
    """summary.json of every run; SystemExit names the one that has none or lists other models."""
    summaries = []
    for run in runs:
        path = run / "summary.json"
        if not path.exists():
            sys.exit(f"{path} does not exist; run `ernie-elastic demo --run-dir {run}` first")
        summaries.append(json.loads(path.read_text(encoding="utf-8")))
    names = [[row["model"] for row in summary["rows"]] for summary in summaries]
    if any(other != names[0] for other in names):
        sys.exit(f"the runs list different models: {names}")
    return summaries


def spread(values: list[float], digits: int = 1) -> str:
    """`mean (lowest to highest)`."""
    mean = sum(values) / len(values)
    return f"{mean:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(summaries: list[dict[str, Any]]) -> str:
    """The Markdown table: a column for each model, a row for each task, the mean of the tasks, speed and bytes."""
    models = [row["model"] for row in summaries[0]["rows"]]
    tasks = list(summaries[0]["rows"][0]["accuracy"])

    def line(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [line("", models), "| --- " * (len(models) + 1) + "|"]
    scores = {
        task: [[100 * s["rows"][i]["accuracy"][task]["value"] for s in summaries] for i in range(len(models))]
        for task in tasks
    }
    lines += [line(f"`{task}`", [spread(values) for values in scores[task]]) for task in tasks]
    means = [
        [sum(scores[task][i][run] for task in tasks) / len(tasks) for run in range(len(summaries))]
        for i in range(len(models))
    ]
    lines.append(line("mean of the tasks", [spread(values) for values in means]))
    for key, name in ROWS.items():
        values = [[float(s["rows"][i][key]) for s in summaries] for i in range(len(models))]
        lines.append(line(name, [spread(each, 0) for each in values]))
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(table(read_summaries([Path(argument) for argument in sys.argv[1:]])))

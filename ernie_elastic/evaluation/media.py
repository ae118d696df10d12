"""Writes answers beside their truth: PNG pictures, video strips, WAV sounds, and the JSON that lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from ernie_elastic.evaluation.tasks import TaskResult, accuracy_table, split_prompt
from ernie_elastic.generation.answer import Answer
from ernie_elastic.schema import Segment
from ernie_elastic.stages import write_json


def save_media(value: Answer, stem: Path, sample_rate: int) -> str | None:
    """Write an image or video strip (.png) or a sound (.wav) to `stem` + suffix; its file name, or None for text."""
    if isinstance(value, str):
        return None
    if value.dtype == np.uint8:
        frames = value[None] if value.ndim == 3 else value
        if len(frames) == 0:
            return None
        path = stem.with_suffix(".png")
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(path)
    else:
        if value.size == 0:
            return None
        path = stem.with_suffix(".wav")
        soundfile.write(path, value, sample_rate, subtype="PCM_16")
    return path.name


def write_results(
    results: list[TaskResult], directory: Path, name: str, sample_rate: int, num_shown: int = 12
) -> dict[str, Any]:
    """Write results.json, samples.json and the media of the first `num_shown` records of each task.

    Returns the accuracy table. The first records are shown, whatever their score.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table = accuracy_table(results)
    shown = []
    for result in results:
        for index in range(min(num_shown, result.n)):
            shown.append(_entry(result, index, directory, sample_rate))
    write_json(
        directory / "results.json",
        {"model": name, "accuracy": table, "detail": {result.task: result.detail for result in results}},
    )
    write_json(directory / "samples.json", shown)
    return table


def _entry(result: TaskResult, index: int, directory: Path, sample_rate: int) -> dict[str, Any]:
    sample, output = result.samples[index], result.answers[index]
    prompt, target = split_prompt(sample)
    stem = directory / f"{result.task}-{index}"
    media = next((segment for segment in prompt if segment.kind != "text"), None)
    texts = [segment.text for segment in prompt if segment.text]
    return {
        "task": result.task,
        "key": sample.key,
        "prompt_text": " ".join(texts) or None,
        "prompt_media": None if media is None else save_media(_content(media), Path(f"{stem}-prompt"), sample_rate),
        "truth_text": target.text,
        "truth_media": save_media(_content(target), Path(f"{stem}-truth"), sample_rate),
        "output_text": output if isinstance(output, str) else None,
        "output_media": save_media(output, Path(f"{stem}-output"), sample_rate),
        "correct": result.correct[index],
    }


def _content(segment: Segment) -> Answer:
    return segment.array if segment.array is not None else segment.text or ""

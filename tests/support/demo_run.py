"""A made-up demo run on disk, in the shape that the report reads. Its numbers and media are drawn from a seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageDraw

MODELS = ("full", "submodel-half", "submodel-shallow", "compressed")
CHANCE = {
    "image_to_text": 0.10,
    "text_to_image": 0.08,
    "video_to_text": 0.12,
    "text_to_video": 0.09,
    "audio_to_text": 0.15,
    "text_to_audio": 0.11,
    "text": 0.20,
}
COLOURS = {"red": (210, 60, 50), "blue": (50, 90, 210), "green": (40, 160, 80), "yellow": (225, 195, 50)}
SHAPES = ("circle", "square", "triangle")


def make_demo_run(folder: Path, samples_per_task: int = 12, steps: int = 400) -> Path:
    """Fill `folder` with everything that a demo run leaves for its report, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [summary_row(model, rng) for model in MODELS]
    seconds = {
        "tokenizers": 121.3,
        "data": 24.8,
        "training": 331.0,
        "extract": 3.2,
        "compress": 6.1,
        "evaluation": 96.4,
        "routing": 5.5,
    }
    write(folder / "summary.json", {"rows": rows, "logits_bit_equal": True, "seconds": seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics(steps, rng)))
    for row in rows:
        make_evaluation(folder / "evaluation" / row["model"], row, samples_per_task)
    write(folder / "tokenizers" / "text" / "health.json", {"vocabulary": 1024, "bytes_per_token": 4.21, "note": "ok"})
    write(folder / "tokenizers" / "visual" / "health.json", {"psnr_db": 31.4, "bits": {"used": 14, "of": 16}})
    write(folder / "tokenizers" / "audio" / "health.json", {"snr_db": 14.2, "perplexity": [203.5, 98.25]})
    figures = folder / "routing" / "figures"
    figures.mkdir(parents=True)
    for name in ("figure8_first", "figure8_last", "figure9_first", "figure10", "figure10_dark", "heatmap_text"):
        draw_figure(name).save(figures / f"{name}.png")
    routing = {"cautions": ["Few tokens of one task."], "sentences": {"figure10": "Text is the most even task."}}
    write(folder / "routing" / "statistics.json", routing)
    return folder


def write(path: Path, value: Any) -> None:
    """`value` as JSON, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def summary_row(model: str, rng: np.random.Generator) -> dict[str, Any]:
    """One row of summary.json; submodel-half and compressed have the same accuracies."""
    size = {"full": 1.0, "submodel-half": 0.58, "submodel-shallow": 0.74, "compressed": 0.58}[model]
    layers, experts, top_k = (6, 8, 2) if model == "submodel-shallow" else (8, 8 if model == "full" else 4, 2)
    rng = np.random.default_rng(5) if model in ("submodel-half", "compressed") else rng
    quality = {"full": 0.82, "submodel-shallow": 0.66}.get(model, 0.75)
    accuracy = {
        task: {
            "value": round(float(np.clip(quality + rng.normal(0, 0.1), 0, 1)) * 200) / 200,
            "chance": chance,
            "n": 200,
        }
        for task, chance in CHANCE.items()
    }
    bytes_ = int(9_400_000 * size)
    return {
        "model": model,
        "spec": {"layers": list(range(layers)), "experts_per_layer": [list(range(experts))] * layers, "top_k": top_k},
        "total_params": int(4_700_000 * size),
        "active_params": int(1_900_000 * size),
        "model_bytes": int(bytes_ * 0.706) if model == "compressed" else bytes_,
        "resident_weight_bytes": int(bytes_ * 0.73) if model == "compressed" else bytes_,
        "kernel": "native" if model == "compressed" else "grouped_mm",
        "decode_tokens_per_s": {"full": 212.0, "submodel-half": 251.0, "submodel-shallow": 275.5}.get(model, 196.0),
        "accuracy": accuracy,
    }


def metrics(steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Records of metrics.jsonl; some steps lack the sound tasks."""
    specs = [
        {"label": "d8-e8-k2", "num_layers": 8, "num_experts": 8, "top_k": 2},
        {"label": "d6-e4-k1", "num_layers": 6, "num_experts": 4, "top_k": 1},
    ]
    records = []
    for step in range(1, steps + 1):
        losses = {
            task: (0.3 + 0.1 * i + 5 * math.exp(-step / (40 + 15 * i))) * math.exp(rng.normal(0, 0.12))
            for i, task in enumerate(CHANCE)
            if "audio" not in task or step % 3
        }
        spec = specs[int(rng.random() < 0.4)]
        load = [1.15 + 0.1 * layer + 1.8 * math.exp(-step / 60) + abs(rng.normal(0, 0.08)) for layer in range(8)]
        # A layer that a step leaves out has no load there.
        load = [value if layer < spec["num_layers"] else None for layer, value in enumerate(load)]
        records.append(
            {
                "step": step,
                "loss": sum(losses.values()) / len(losses),
                "losses": losses,
                "lr": 1e-3,
                "grad_norm": 0.7,
                "tokens_per_s": 5200.0,
                "load_max_over_mean": load,
                "spec": spec,
                "seconds": 0.8,
            }
        )
    return records


def make_evaluation(folder: Path, row: dict[str, Any], samples_per_task: int) -> None:
    """results.json, samples.json and media of one model. Every model gets the same prompts."""
    detail = {"text_to_image": {"colour": {"value": 0.91, "n": 200}, "shape": {"value": 0.84, "n": 200}}}
    samples = [sample(folder, task, index, row["model"]) for task in CHANCE for index in range(samples_per_task)]
    write(folder / "results.json", {"model": row["model"], "accuracy": row["accuracy"], "detail": detail})
    write(folder / "samples.json", samples)


def sample(folder: Path, task: str, index: int, model: str) -> dict[str, Any]:
    """One sample with its media: the truth from (task, index), the answer from the model as well."""
    rng = np.random.default_rng([index, len(task)])
    colour, shape = list(COLOURS)[rng.integers(4)], SHAPES[rng.integers(3)]
    other = list(COLOURS)[rng.integers(4)]
    caption = f"a {colour} {shape} above a {other} circle"
    # Compressed weights are the same weights, so compressed answers like submodel-half.
    seed = MODELS.index("submodel-half" if model == "compressed" else model)
    correct = bool(np.random.default_rng([index, len(task), seed]).random() < 0.75)
    answer = caption if correct else f"a {other} {shape} above a {colour} circle"
    entry: dict[str, Any] = {
        "task": task,
        "key": f"{task}-{index}",
        "prompt_text": caption,
        "prompt_media": None,
        "truth_text": None,
        "truth_media": None,
        "output_text": None,
        "output_media": None,
        "correct": correct,
    }
    kind = next((k for k in ("image", "video", "audio") if k in task), None)
    if kind and task.startswith("text_to_"):
        entry["truth_media"] = media(folder, f"{task}-{index}-truth", kind, colour, shape, rng)
        entry["output_media"] = media(folder, f"{task}-{index}-output", kind, colour if correct else other, shape, rng)
    else:
        question = {"text": "Which shape is below?"}.get(task, "What is shown?")
        entry |= {"prompt_text": question, "truth_text": caption, "output_text": answer}
        if kind:
            entry["prompt_media"] = media(folder, f"{task}-{index}-input", kind, colour, shape, rng)
    return entry


def media(folder: Path, stem: str, kind: str, colour: str, shape: str, rng: np.random.Generator) -> str:
    """Write one picture, strip of frames or sound, and return its name relative to `folder`."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    if kind == "audio":
        time = np.arange(16_000) / 16_000
        notes = [220 * 2 ** (rng.integers(12) / 12) for _ in range(4)]
        wave = np.concatenate([np.sin(2 * np.pi * note * time[:4000]) * np.hanning(4000) for note in notes])
        soundfile.write(folder / "media" / f"{stem}.wav", (0.6 * wave).astype(np.float32), 16_000, subtype="PCM_16")
        return f"media/{stem}.wav"
    frames = [draw_scene(colour, shape, 6 + 2 * f) for f in range(8 if kind == "video" else 1)]
    strip = Image.new("RGB", (32 * len(frames), 32))
    for index, frame in enumerate(frames):
        strip.paste(frame, (32 * index, 0))
    strip.save(folder / "media" / f"{stem}.png")
    return f"media/{stem}.png"


def draw_scene(colour: str, shape: str, x: int) -> Image.Image:
    """A 32x32 picture of one object, drawn large and shrunk so that its edges are smooth."""
    image = Image.new("RGB", (128, 128), (238, 236, 230))
    pen, box = ImageDraw.Draw(image), (4 * x, 30, 4 * x + 48, 78)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=COLOURS[colour])
    pen.ellipse((70, 84, 100, 114), fill=COLOURS["blue"])
    return image.resize((32, 32), Image.Resampling.LANCZOS)


def draw_figure(name: str) -> Image.Image:
    """A stand-in for a routing figure."""
    image = Image.new("RGB", (640, 420), "white")
    ImageDraw.Draw(image).text((20, 20), name, fill="black")
    return image

"""The embedded world: procedural pictures, clips, sounds and texts for every task, from (seed, index, split) alone.

Contract: `world_sample` is a pure function; no file is read and nothing is downloaded. train and validation never
show a held-out combination, every test sample shows one (`facts`). `truth` holds what `checkers` needs. Keys
are `world/SPLIT/TASK/INDEX`; the seed belongs to the corpus, not to the key. ours: the whole world (the report
trains on private data); it is the smallest one in which every task of the report's modalities can be judged.

Task names beyond schema.JUDGED_TASKS, for training:
image_question [image, question] -> answer; scene_to_audio image -> the scene's phrase; speech_to_text and
text_to_speech syllables; image_to_relation and relation_to_image "a red circle above a blue square".
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ernie_elastic.data.world import text as world_text
from ernie_elastic.data.world.draw import PALETTE, draw_clip, draw_scene
from ernie_elastic.data.world.facts import (
    COLOURS,
    EVENTS,
    NOTES,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    SYLLABLES,
    TIMBRES,
    Clip,
    Phrase,
    Scene,
    SceneObject,
    WorldConfig,
    clip_held_out,
    clip_places,
    notes_held_out,
    random_clip,
    random_phrase,
    random_scene,
    random_speech,
    scene_held_out,
    scene_phrase,
    syllables_held_out,
)
from ernie_elastic.data.world.sound import sing
from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import JUDGED_TASKS, Sample, Segment, SegmentRole

__all__ = [
    "COLOURS", "EVENTS", "NOTES", "PALETTE", "PLACES", "SHAPES", "SIZES", "SPLITS", "SYLLABLES", "TIMBRES",
    "WORLD_TASKS", "Clip", "Phrase", "Scene", "SceneObject", "WorldConfig", "clip_held_out", "clip_places",
    "draw_clip", "draw_scene", "notes_held_out", "random_clip", "random_phrase", "random_scene", "random_speech",
    "scene_held_out", "scene_phrase", "sing", "syllables_held_out", "task_of_index", "world_records", "world_rng",
    "world_sample",
]  # fmt: skip

Made = tuple[tuple[Segment, ...], dict[str, Any]]


def world_rng(seed: int, index: int, split: str, purpose: str) -> np.random.Generator:
    """The random numbers of one sample: a pure function of the arguments. Raises ConfigError for an unknown split."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ConfigError(f"world seed {seed} and index {index} must not be negative")
    return np.random.default_rng([seed, index, SPLITS.index(split), zlib.crc32(purpose.encode())])


def _text(role: SegmentRole, text: str) -> Segment:
    return Segment("text", role, text=text)


def _image(role: SegmentRole, scene: Scene, config: WorldConfig) -> Segment:
    return Segment("image", role, array=draw_scene(scene, config.image_size))


def _video(role: SegmentRole, clip: Clip, config: WorldConfig) -> Segment:
    return Segment("video", role, array=draw_clip(clip, config.video_size))


def _audio(role: SegmentRole, phrase: Phrase, config: WorldConfig) -> Segment:
    return Segment("audio", role, array=sing(phrase, config))


def _scene_truth(scene: Scene) -> dict[str, Any]:
    items = world_text.reading_order(scene)
    return {"num_objects": len(items), "objects": [item.facts() for item in items]}


def _clip_truth(clip: Clip) -> dict[str, Any]:
    return {
        "event": clip.event,
        **clip.mover.facts(),
        "to_colour": clip.to_colour,
        "still": None if clip.still is None else clip.still.facts(),
        "num_objects": 1 if clip.still is None else 2,
    }


def _phrase_truth(phrase: Phrase) -> dict[str, Any]:
    return {"notes": list(phrase.notes), "timbre": phrase.timbre}


def _image_to_text(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    scene = random_scene(rng, config, split)
    caption = world_text.scene_caption(scene, rng)
    return (_image("input", scene, config), _text("target", caption)), _scene_truth(scene)


def _text_to_image(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    scene = random_scene(rng, config, split)
    prompt = world_text.scene_prompt(scene, rng)
    return (_text("input", prompt), _image("target", scene, config)), _scene_truth(scene)


def _video_to_text(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    clip = random_clip(rng, config, split)
    return (_video("input", clip, config), _text("target", world_text.clip_caption(clip, rng))), _clip_truth(clip)


def _text_to_video(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    clip = random_clip(rng, config, split)
    return (_text("input", world_text.clip_prompt(clip, rng)), _video("target", clip, config)), _clip_truth(clip)


def _audio_to_text(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    phrase = random_phrase(rng, config, split)
    caption = world_text.notes_caption(phrase, rng)
    return (_audio("input", phrase, config), _text("target", caption)), _phrase_truth(phrase)


def _text_to_audio(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    phrase = random_phrase(rng, config, split)
    prompt = world_text.notes_prompt(phrase, rng)
    return (_text("input", prompt), _audio("target", phrase, config)), _phrase_truth(phrase)


def _question(rng: np.random.Generator, config: WorldConfig, split: str) -> tuple[Scene, str, dict[str, Any]]:
    scene = random_scene(rng, config, split)
    kind, question, answer = world_text.ask(scene, rng)
    return scene, question, {"kind": kind, "question": question, "answer": answer, **_scene_truth(scene)}


def _text_task(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    scene, question, truth = _question(rng, config, split)
    given = f"{world_text.description(scene, rng)} {question}"
    return (_text("input", given), _text("target", truth["answer"])), truth


def _image_question(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    scene, question, truth = _question(rng, config, split)
    return (_image("input", scene, config), _text("input", question), _text("target", truth["answer"])), truth


def _scene_to_audio(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    while True:
        scene = random_scene(rng, config, split)
        phrase = scene_phrase(scene)
        if split == "test" or not notes_held_out(phrase.notes):
            break
    segments = (_image("input", scene, config), _audio("target", phrase, config))
    return segments, {**_scene_truth(scene), **_phrase_truth(phrase)}


def _speech_to_text(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    phrase = random_speech(rng, config, split)
    segments = (_audio("input", phrase, config), _text("target", world_text.speech_caption(phrase)))
    return segments, {"syllables": list(phrase.syllables)}


def _text_to_speech(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    phrase = random_speech(rng, config, split)
    segments = (_text("input", world_text.speech_prompt(phrase)), _audio("target", phrase, config))
    return segments, {"syllables": list(phrase.syllables)}


def _related_scene(rng: np.random.Generator, config: WorldConfig, split: str) -> tuple[Scene, str, dict[str, Any]]:
    scene = random_scene(rng, config, split, num_objects=2)
    first, relation, second = world_text.random_relation(scene, rng)
    text = world_text.relation_text(first, relation, second)
    return scene, text, {"relation": relation, "first": first.facts(), "second": second.facts(), **_scene_truth(scene)}


def _image_to_relation(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    scene, text, truth = _related_scene(rng, config, split)
    return (_image("input", scene, config), _text("target", text)), truth


def _relation_to_image(rng: np.random.Generator, config: WorldConfig, split: str) -> Made:
    scene, text, truth = _related_scene(rng, config, split)
    return (_text("input", text), _image("target", scene, config)), truth


MAKERS: dict[str, Callable[[np.random.Generator, WorldConfig, str], Made]] = {
    "image_to_text": _image_to_text,
    "text_to_image": _text_to_image,
    "video_to_text": _video_to_text,
    "text_to_video": _text_to_video,
    "audio_to_text": _audio_to_text,
    "text_to_audio": _text_to_audio,
    "text": _text_task,
    "image_question": _image_question,
    "scene_to_audio": _scene_to_audio,
    "speech_to_text": _speech_to_text,
    "text_to_speech": _text_to_speech,
    "image_to_relation": _image_to_relation,
    "relation_to_image": _relation_to_image,
}
WORLD_TASKS: tuple[str, ...] = (*JUDGED_TASKS, *(name for name in MAKERS if name not in JUDGED_TASKS))


def world_sample(task: str, seed: int, index: int, split: str = "train", config: WorldConfig | None = None) -> Sample:
    """The sample number `index` of a task: a pure function of its arguments.

    Segments: inputs, then one target, as named by the task; pictures uint8 [S, S, 3], clips uint8 [F, S, S, 3],
    sound float32 [N] at config.sample_rate, N a whole number of 80 ms steps. Raises ConfigError for an unknown task
    or split.
    """
    if task not in MAKERS:
        raise ConfigError(f"task {task!r} is not one of the world's tasks: {', '.join(WORLD_TASKS)}")
    segments, truth = MAKERS[task](world_rng(seed, index, split, task), config or WorldConfig(), split)
    return Sample(f"world/{split}/{task}/{index}", task, segments, truth)


def _shares(tasks_weights: Mapping[str, float]) -> tuple[tuple[str, ...], np.ndarray]:
    unknown = [task for task in tasks_weights if task not in MAKERS]
    if unknown:
        raise ConfigError(f"tasks {unknown} are not among the world's tasks: {', '.join(WORLD_TASKS)}")
    weights = np.array(list(tasks_weights.values()), np.float64)
    if not len(weights) or (weights < 0).any() or not np.isfinite(weights).all() or weights.sum() <= 0:
        raise ConfigError(f"task weights {dict(tasks_weights)} must not be negative and need a positive sum")
    return tuple(tasks_weights), np.cumsum(weights / weights.sum())


def task_of_index(tasks_weights: Mapping[str, float], seed: int, index: int, split: str = "train") -> str:
    """Task of the record `index` of a mixture: drawn with the given weights, a pure function of (seed, index, split).

    Raises ConfigError for unknown tasks or weights that do not make a distribution.
    """
    names, bounds = _shares(tasks_weights)
    at = world_rng(seed, index, split, "mixture").uniform() * bounds[-1]
    return names[int(np.searchsorted(bounds, at, side="right"))]


def world_records(
    tasks_weights: Mapping[str, float],
    seed: int,
    split: str = "train",
    start: int = 0,
    count: int | None = None,
    config: WorldConfig | None = None,
) -> Iterator[Sample]:
    """Records start, start + 1, ... of a mixture of tasks (`count` of them, or without end when None).

    Record i is `world_sample(task_of_index(..., i), seed, i)`, so any range can be made anew on its own. Raises
    ConfigError for unknown tasks or weights that do not make a distribution.
    """
    _shares(tasks_weights)
    config = config or WorldConfig()
    index = start
    while count is None or index < start + count:
        yield world_sample(task_of_index(tasks_weights, seed, index, split), seed, index, split, config)
        index += 1

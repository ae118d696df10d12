"""Scores what a model made against the truth of the world, without a model: the public door of the checkers.

Contract: `score(task, truth, output)` reads the output (text, pixels, frames or wave) and compares facts. The key
"correct" is the judged one; the others say which part failed. Nothing is scored by similarity to the true picture.

What "correct" asks for: image_to_text: shape, colour and place of every object, none missing or added.
text_to_image: shape and colour of every object, none missing or added (place and size are keys of their own).
video_to_text, text_to_video: the event. audio_to_text, text_to_audio, scene_to_audio: the sequence of pitches.
text, image_question: the answer. speech_to_text, text_to_speech: the syllables. image_to_relation, relation_to_image:
a stated relation that holds. ours: the definitions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ernie_elastic.data.world.checkers_sound import read_notes, read_phrase, read_syllables
from ernie_elastic.data.world.checkers_text import (
    read_answer,
    read_caption,
    read_clip_text,
    read_notes_text,
    read_syllables_text,
)
from ernie_elastic.data.world.checkers_vision import read_clip, read_scene
from ernie_elastic.data.world.facts import PLACES, WorldConfig
from ernie_elastic.errors import ConfigError, DataError

__all__ = [
    "CHECKED_TASKS", "TARGET_KIND", "chance", "checker_agreement", "compare", "read_answer", "read_caption",
    "read_clip", "read_clip_text", "read_notes", "read_notes_text", "read_output", "read_phrase", "read_scene",
    "read_syllables", "read_syllables_text", "score",
]  # fmt: skip

TARGET_KIND: dict[str, str] = {
    "image_to_text": "text", "text_to_image": "image", "video_to_text": "text", "text_to_video": "video",
    "audio_to_text": "text", "text_to_audio": "audio", "text": "text", "image_question": "text",
    "scene_to_audio": "audio", "speech_to_text": "text", "text_to_speech": "audio", "image_to_relation": "text",
    "relation_to_image": "image",
}  # fmt: skip
CHECKED_TASKS = tuple(TARGET_KIND)
Facts = Mapping[str, Any]


def _bag(objects: Sequence[Facts], *names: str) -> tuple:
    """The objects' attributes as a multiset that can be compared and hashed."""
    return tuple(sorted(tuple(str(item.get(name)) for name in names) for item in objects))


def _compare_scene(truth: Facts, reading: Facts) -> dict[str, bool]:
    want, got = truth["objects"], reading["objects"]
    keys = {name: _bag(want, name) == _bag(got, name) for name in ("shape", "colour", "size", "place")}
    everything = ("shape", "colour", "size", "place")
    return {**keys, "number": len(want) == len(got), "all": _bag(want, *everything) == _bag(got, *everything)}


def _compare_clip(truth: Facts, reading: Facts) -> dict[str, bool]:
    names = ("shape", "colour", "size", "place", "to_colour")
    keys = {name: truth.get(name) == reading.get(name) for name in names}
    still = [[facts["still"]] if facts.get("still") else [] for facts in (truth, reading)]
    keys["still"] = _bag(still[0], "shape", "colour", "place") == _bag(still[1], "shape", "colour", "place")
    keys["number"] = truth["num_objects"] == reading["num_objects"]
    if "smooth" in reading:
        keys["smooth"] = bool(reading["smooth"])
    keys["all"] = truth["event"] == reading["event"] and all(keys.values())
    return keys


def _compare_notes(truth: Facts, reading: Facts) -> dict[str, bool]:
    want, got = list(truth["notes"]), list(reading["notes"])
    timbre = truth["timbre"] == reading["timbre"]
    return {"number": len(want) == len(got), "timbre": timbre, "first": want[:1] == got[:1]}


def _compare_answer(truth: Facts, reading: Facts) -> dict[str, bool]:
    return {"first_word": read_answer(truth["answer"]).split()[:1] == reading["answer"].split()[:1]}


def _compare_syllables(truth: Facts, reading: Facts) -> dict[str, bool]:
    want, got = list(truth["syllables"]), list(reading["syllables"])
    return {
        "number": len(want) == len(got),
        "consonants": [name[0] for name in want] == [name[0] for name in got],
        "vowels": [name[1] for name in want] == [name[1] for name in got],
    }


def _holds(objects: Sequence[Facts], first: Facts, relation: str, second: Facts) -> bool:
    """True when some object like `first` stands in the relation to another like `second` (shape and colour)."""

    def alike(item: Facts, wanted: Facts) -> bool:
        return (item["shape"], item["colour"]) == (wanted["shape"], wanted["colour"])

    for a in (item for item in objects if alike(item, first)):
        for b in (item for item in objects if alike(item, second) and item is not a):
            row_a, column_a = divmod(PLACES.index(a["place"]), 3)
            row_b, column_b = divmod(PLACES.index(b["place"]), 3)
            true = {"above": row_a < row_b, "below": row_a > row_b,
                    "left of": column_a < column_b, "right of": column_a > column_b}  # fmt: skip
            if true[relation]:
                return True
    return False


def _said_relation(reading: Facts) -> tuple[Facts, str, Facts] | None:
    if "relation" in reading:  # the truth of another sample
        return reading["first"], reading["relation"], reading["second"]
    if len(reading["relations"]) != 1:
        return None
    first, relation, second = reading["relations"][0]
    return reading["objects"][first], relation, reading["objects"][second]


def _relation_said_holds(truth: Facts, reading: Facts) -> bool:
    said = _said_relation(reading)
    return said is not None and _holds(truth["objects"], *said)


def _relation_drawn_holds(truth: Facts, reading: Facts) -> bool:
    wanted = truth["first"], truth["relation"], truth["second"]
    return len(reading["objects"]) == 2 and _holds(reading["objects"], *wanted)


# "correct" of a task: either a key of the facts that has to be equal, or a test of its own.
KEYS: dict[str, Callable[[Facts], Any]] = {
    "image_to_text": lambda facts: _bag(facts["objects"], "shape", "colour", "place"),
    "text_to_image": lambda facts: _bag(facts["objects"], "shape", "colour"),
    "video_to_text": lambda facts: facts["event"],
    "text_to_video": lambda facts: facts["event"],
    "audio_to_text": lambda facts: tuple(facts["notes"]),
    "text_to_audio": lambda facts: tuple(facts["notes"]),
    "scene_to_audio": lambda facts: tuple(facts["notes"]),
    "text": lambda facts: read_answer(facts["answer"]),
    "image_question": lambda facts: read_answer(facts["answer"]),
    "speech_to_text": lambda facts: tuple(facts["syllables"]),
    "text_to_speech": lambda facts: tuple(facts["syllables"]),
}
TESTS: dict[str, Callable[[Facts, Facts], bool]] = {
    "image_to_relation": _relation_said_holds,
    "relation_to_image": _relation_drawn_holds,
}
PARTS: dict[str, Callable[[Facts, Facts], dict[str, bool]]] = {
    "image_to_text": _compare_scene,
    "text_to_image": _compare_scene,
    "video_to_text": _compare_clip,
    "text_to_video": _compare_clip,
    "audio_to_text": _compare_notes,
    "text_to_audio": _compare_notes,
    "scene_to_audio": _compare_notes,
    "text": _compare_answer,
    "image_question": _compare_answer,
    "speech_to_text": _compare_syllables,
    "text_to_speech": _compare_syllables,
}
TEXT_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "image_to_text": read_caption,
    "video_to_text": read_clip_text,
    "audio_to_text": read_notes_text,
    "text": lambda text: {"answer": read_answer(text)},
    "image_question": lambda text: {"answer": read_answer(text)},
    "speech_to_text": lambda text: {"syllables": read_syllables_text(text)},
    "image_to_relation": read_caption,
}


def _known(task: str) -> str:
    if task not in TARGET_KIND:
        raise ConfigError(f"task {task!r} has no checker; there are checkers for {', '.join(CHECKED_TASKS)}")
    return TARGET_KIND[task]


def read_output(task: str, output: str | np.ndarray, config: WorldConfig | None = None) -> dict[str, Any]:
    """The facts in an output of a task, in the shape of its `truth`.

    output: a string; pixels uint8 [S, S, 3]; frames uint8 [F, S, S, 3]; or a wave float [N] at config.sample_rate Hz.
    Raises ConfigError for an unknown task, DataError for an output of another kind, shape or dtype.
    """
    kind = _known(task)
    config = config or WorldConfig()
    if isinstance(output, str) != (kind == "text"):
        raise DataError(f"an output of {task} is a {type(output).__name__}; its checker reads {kind}")
    if isinstance(output, str):
        return TEXT_READERS[task](output)
    if kind == "image":
        objects = read_scene(output)
        return {"num_objects": len(objects), "objects": objects}
    if kind == "video":
        return read_clip(output)
    if task == "text_to_speech":
        return {"syllables": read_syllables(output, config.sample_rate, config.steps_per_note)}
    return read_phrase(output, config.sample_rate, config.steps_per_note)


def _correct(task: str, truth: Facts, reading: Facts) -> bool:
    return TESTS[task](truth, reading) if task in TESTS else KEYS[task](truth) == KEYS[task](reading)


def compare(task: str, truth: Facts, reading: Facts) -> dict[str, bool]:
    """Which facts of a reading are right: the judged key "correct", then the parts of the task's kind.

    truth: `Sample.truth`; reading: of `read_output`, or another sample's truth. Raises ConfigError for an unknown task.
    """
    _known(task)
    parts = PARTS[task](truth, reading) if task in PARTS else {}
    return {"correct": _correct(task, truth, reading), **parts}


def score(task: str, truth: Facts, output: str | np.ndarray, config: WorldConfig | None = None) -> dict[str, bool]:
    """`compare(task, truth, read_output(task, output))`."""
    return compare(task, truth, read_output(task, output, config))


def chance(task: str, truths: Sequence[Facts]) -> float:
    """Mean "correct" when each sample is answered by the truth of another, over all ordered pairs.

    Raises ConfigError for an unknown task, DataError for fewer than two truths.
    """
    _known(task)
    number = len(truths)
    if number < 2:
        raise DataError(f"chance of {task} needs at least 2 truths, got {number}")
    if task in TESTS:
        right = sum(
            TESTS[task](truth, other) for i, truth in enumerate(truths) for j, other in enumerate(truths) if i != j
        )
    else:
        right = sum(count * (count - 1) for count in Counter(KEYS[task](truth) for truth in truths).values())
    return right / (number * (number - 1))


def checker_agreement(
    task: str, truths: Sequence[Facts], outputs: Sequence[str | np.ndarray], config: WorldConfig | None = None
) -> float:
    """Share of outputs whose "correct" holds: a test of a checker, on true media or on a tokenizer's reconstructions.

    Raises DataError when the numbers differ or are zero.
    """
    if len(truths) != len(outputs) or not truths:
        raise DataError(
            f"checker agreement of {task}: {len(truths)} truths and {len(outputs)} outputs; give as many of both"
        )
    pairs = zip(truths, outputs, strict=True)
    return sum(score(task, truth, output, config)["correct"] for truth, output in pairs) / len(truths)

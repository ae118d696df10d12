"""The checkers: right on ground truth, right after a lossy tokenizer's damage, wrong on wrong answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_elastic.data.world.checkers import (
    CHECKED_TASKS,
    TARGET_KIND,
    chance,
    checker_agreement,
    compare,
    read_answer,
    read_caption,
    read_clip,
    read_clip_text,
    read_notes,
    read_notes_text,
    read_output,
    read_phrase,
    read_scene,
    read_syllables,
    score,
)
from ernie_elastic.data.world.scenes import (
    COLOURS,
    NOTES,
    PLACES,
    SHAPES,
    SIZES,
    WORLD_TASKS,
    Clip,
    Phrase,
    Scene,
    SceneObject,
    WorldConfig,
    draw_clip,
    draw_scene,
    random_clip,
    random_scene,
    sing,
    world_sample,
)
from ernie_elastic.errors import ConfigError, DataError

MEDIA_TASKS = [task for task in WORLD_TASKS if TARGET_KIND[task] != "text"]
SEEN = [task for task in WORLD_TASKS if "audio" not in task and "speech" not in task]  # the number of objects matters
TEXT_TRUTHS = {task: world_sample(task, 0, 0).truth for task in CHECKED_TASKS if TARGET_KIND[task] == "text"}
PICTURE_TASKS = [task for task in MEDIA_TASKS if TARGET_KIND[task] in ("image", "video")]


def outputs_of(task: str, config: WorldConfig, count: int = 200) -> tuple[list[dict], list[Any]]:
    """Truths and true targets, half of them of the test split."""
    samples = [world_sample(task, 9, index, "test" if index % 2 else "train", config) for index in range(count)]
    targets = [sample.segments[-1] for sample in samples]
    return [sample.truth for sample in samples], [t.text if t.array is None else t.array for t in targets]


def blurred(array: np.ndarray, amount: float = 0.15) -> np.ndarray:
    """A picture or clip after a 3-tap blur along rows and columns."""
    result = array.astype(np.float32)
    for axis in (-3, -2):
        result = (1 - 2 * amount) * result + amount * (np.roll(result, 1, axis) + np.roll(result, -1, axis))
    return result


def damaged(array: np.ndarray, rng: np.random.Generator, sigma: float = 6.0) -> np.ndarray:
    """Stand-in for a tokenizer's reconstruction: blur and noise on pixels (about 30 dB), noise on sound."""
    if array.dtype == np.uint8:
        return np.clip(blurred(array) + rng.normal(0, sigma, array.shape), 0, 255).astype(np.uint8)
    return (array + rng.normal(0, 0.02, array.shape)).astype(np.float32)


@pytest.mark.parametrize(("task", "objects"), [(t, n) for t in WORLD_TASKS for n in (1, 2, 3) if n == 1 or t in SEEN])
def test_ground_truth_is_right(task: str, objects: int) -> None:
    config = WorldConfig(min_objects=objects, max_objects=objects, second_object=(objects - 1) / 2)
    truths, outputs = outputs_of(task, config)
    assert checker_agreement(task, truths, outputs) >= 0.99
    scores = [score(task, truth, output) for truth, output in zip(truths, outputs, strict=True)]
    for key in scores[0]:
        assert np.mean([one[key] for one in scores]) >= 0.99, key


@pytest.mark.parametrize("objects", [1, 3])
@pytest.mark.parametrize("task", PICTURE_TASKS)
def test_ground_truth_is_right_at_64(task: str, objects: int) -> None:
    config = WorldConfig(image_size=64, video_size=64, min_objects=objects, max_objects=objects)
    assert checker_agreement(task, *outputs_of(task, config)) >= 0.99


@pytest.mark.parametrize(("task", "objects"), [(t, n) for t in MEDIA_TASKS for n in (1, 3) if n == 1 or t in SEEN])
def test_reconstructions_are_right(task: str, objects: int) -> None:
    rng = np.random.default_rng(0)
    config = WorldConfig(min_objects=objects, max_objects=objects, second_object=0.5)
    truths, outputs = outputs_of(task, config)
    scores = [score(task, truth, damaged(output, rng)) for truth, output in zip(truths, outputs, strict=True)]
    for key in scores[0]:
        assert np.mean([one[key] for one in scores]) >= 0.97, key


def test_a_patch_codec_of_28_decibels_is_read_right() -> None:
    """Pictures through 40 of 192 principal components of 8x8 patches, fitted on other pictures."""

    def patches(pictures: np.ndarray) -> np.ndarray:
        return pictures.reshape(-1, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 192)

    rng = np.random.default_rng(0)
    config = WorldConfig(max_objects=3)
    dense = [draw_scene(random_scene(rng, config, num_objects=1 + i % 6)) for i in range(600)]
    flat = patches(np.stack(dense).astype(np.float32))
    mean = flat.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov((flat - mean).T))
    kept = vectors[:, -40:].astype(np.float32)
    truths, outputs = outputs_of("text_to_image", config)
    coded = (patches(np.stack(outputs).astype(np.float32)) - mean) @ kept @ kept.T + mean
    pictures = coded.reshape(-1, 4, 4, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 32, 32, 3)
    pictures = np.clip(pictures, 0, 255).astype(np.uint8)
    error = np.mean((pictures.astype(float) - np.stack(outputs)) ** 2)
    assert 26 < 10 * np.log10(255**2 / error) < 30
    assert checker_agreement("text_to_image", truths, list(pictures)) >= 0.97


@pytest.mark.parametrize("rate", [24000, 48000])
@pytest.mark.parametrize("task", ["text_to_audio", "text_to_speech"])
def test_other_sample_rates(task: str, rate: int) -> None:
    config = WorldConfig(sample_rate=rate)
    assert checker_agreement(task, *outputs_of(task, config, 60), config) >= 0.99


def other(names: tuple[str, ...], name: str, rng: np.random.Generator) -> str:
    """Another name of a table."""
    return str(rng.choice([one for one in names if one != name]))


@pytest.mark.parametrize(
    ("name", "table", "drawn_right", "said_right"),
    [
        ("shape", SHAPES, False, False),
        ("colour", COLOURS, False, False),
        ("place", PLACES, True, False),
        ("size", SIZES, True, True),
    ],
)
def test_one_wrong_attribute(name: str, table: tuple[str, ...], drawn_right: bool, said_right: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        scene = random_scene(rng, WorldConfig(max_objects=3))
        change: dict[str, Any] = {name: other(table, getattr(scene.objects[0], name), rng)}
        changed = dataclasses.replace(scene.objects[0], **change)
        if changed.place in [item.place for item in scene.objects[1:]]:
            continue
        truth = {"objects": [item.facts() for item in scene.objects]}
        wrong = Scene((changed, *scene.objects[1:]), scene.background)
        drawn = score("text_to_image", truth, draw_scene(wrong))
        assert drawn["correct"] is drawn_right and not drawn[name] and not drawn["all"] and drawn["number"]
        said = " and ".join(f"a {o.size} {o.colour} {o.shape} at the {o.place}" for o in wrong.objects)
        told = score("image_to_text", truth, said)
        assert told["correct"] is said_right and not told[name] and not told["all"]


def test_swapped_attributes_and_other_numbers_are_wrong() -> None:
    red = SceneObject("circle", "red", "large", "top")
    blue = SceneObject("square", "blue", "large", "bottom")
    truth = {"objects": [red.facts(), blue.facts()]}
    swapped = (dataclasses.replace(red, colour="blue"), dataclasses.replace(blue, colour="red"))
    reading = score("text_to_image", truth, draw_scene(Scene(swapped)))
    assert not reading["correct"] and reading["shape"] and reading["colour"]
    for objects in ((red,), (), (red, blue, SceneObject("cross", "white", "small", "left"))):
        reading = score("text_to_image", truth, draw_scene(Scene(objects)))
        assert not reading["correct"] and not reading["number"]


def test_noise_and_smears_are_no_scene() -> None:
    rng = np.random.default_rng(0)
    truths, outputs = outputs_of("text_to_image", WorldConfig(max_objects=3), 40)
    noise = [rng.integers(0, 256, output.shape, np.uint8) for output in outputs]
    assert checker_agreement("text_to_image", truths, noise) == 0
    item = SceneObject("circle", "white", "large", "centre")
    smear = draw_scene(Scene(()))
    smear[4:28, 14:18] = 240  # a bar over three cells
    assert not score("text_to_image", {"objects": [item.facts()]}, smear)["correct"]
    assert read_scene(draw_scene(Scene(()))) == []


@pytest.mark.parametrize("size", [24, 48, 100, 256])
def test_pictures_of_any_size(size: int) -> None:
    rng = np.random.default_rng(size)
    config = WorldConfig(max_objects=3)
    right = 0
    for _ in range(50):
        scene = random_scene(rng, config)
        truth = {"objects": [item.facts() for item in scene.objects]}
        right += score("text_to_image", truth, draw_scene(scene, size))["all"]
    assert right >= 49


def test_clips_played_wrongly() -> None:
    rng = np.random.default_rng(1)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "appears": "disappears"}
    opposite |= {value: key for key, value in opposite.items()}
    moves = 0
    for _ in range(80):
        clip = random_clip(rng, WorldConfig(second_object=0.5))
        truth = {**clip.mover.facts(), "event": clip.event, "to_colour": clip.to_colour, "num_objects": 1}
        frames = draw_clip(clip)
        reading = read_clip(frames[::-1])
        if clip.event == "turns":
            assert reading["colour"] == clip.to_colour and reading["to_colour"] == clip.mover.colour
        else:
            assert reading["event"] == opposite[clip.event]
            assert not compare("text_to_video", truth, reading)["correct"]
        frozen = read_clip(np.repeat(frames[:1], 4, axis=0))
        assert frozen["event"] is None and not frozen["smooth"]
        if clip.event in ("left", "right", "up", "down"):
            moves += 1
            assert read_clip(frames)["smooth"] and not read_clip(frames[[0, 2, 1, 3]])["smooth"]
    assert moves > 20


def test_another_thing_elsewhere_is_no_motion() -> None:
    before = draw_scene(Scene((SceneObject("circle", "red", "large", "left"),)))
    after = draw_scene(Scene((SceneObject("circle", "blue", "large", "centre"),)))
    assert read_clip(np.stack([before, after]))["event"] is None
    far = draw_scene(Scene((SceneObject("circle", "red", "large", "right"),)))
    assert read_clip(np.stack([before, far]))["event"] is None
    still = SceneObject("square", "white", "small", "top")
    reading = read_clip(draw_clip(Clip(SceneObject("circle", "red", "large", "left"), "right", still=still)))
    assert reading["event"] == "right" and reading["still"] == still.facts() and reading["num_objects"] == 2


def test_one_wrong_note() -> None:
    config = WorldConfig()
    rng = np.random.default_rng(0)
    for _ in range(40):
        notes = [NOTES[index] for index in rng.integers(8, size=4)]
        truth = {"notes": notes, "timbre": "organ"}
        wrong = list(notes)
        spot = int(rng.integers(4))
        wrong[spot] = other(NOTES, notes[spot], rng)
        wave = sing(Phrase(notes=tuple(wrong), timbre="organ"), config)
        assert read_notes(wave) == wrong
        reading = score("text_to_audio", truth, wave)
        assert not reading["correct"] and reading["timbre"] and reading["number"]
        shorter = score("text_to_audio", truth, sing(Phrase(notes=tuple(notes[:3])), config))
        assert not shorter["correct"] and not shorter["number"] and not shorter["timbre"]


def test_silence_and_ragged_ends_of_sound() -> None:
    wave = sing(Phrase(notes=("c", "e", "g")), WorldConfig())
    silence = np.zeros(2560, np.float32)
    assert read_phrase(silence) == {"notes": [], "timbre": None} and read_syllables(silence) == []
    assert read_notes(np.zeros(0, np.float32)) == []
    assert read_notes(np.concatenate([wave, silence])) == ["c", "e", "g"]
    assert read_notes(wave[: -2560 // 4]) == ["c", "e", "g"]
    assert read_notes(wave[:-2560]) == ["c", "e"]
    noise = np.random.default_rng(0).normal(0, 0.2, 7680).astype(np.float32)
    assert "unclear" in read_notes(noise)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("a small red circle at the top left", [("circle", "red", "small", "top left")]),
        ("at the bottom a large blue cross", [("cross", "blue", "large", "bottom")]),
        ("A Large, white square in the MIDDLE.", [(None, None, "large", None), ("square", "white", None, "centre")]),
        ("two circles", [("circle", None, None, None)]),
        ("a red blue circle", [(None, "red", None, None), ("circle", "blue", None, None)]),
        ("", []),
        ("the of at left", []),
    ],
)
def test_captions(text: str, objects: list[tuple]) -> None:
    reading = read_caption(text)["objects"]
    assert [tuple(item[name] for name in ("shape", "colour", "size", "place")) for item in reading] == objects


def test_relations_and_counts_in_captions() -> None:
    reading = read_caption("two objects : a red circle is left of a blue square")
    assert reading["count"] == 2 and reading["relations"] == [(0, "left of", 1)]
    sample = world_sample("image_to_relation", 0, 0)
    first, second = sample.truth["first"], sample.truth["second"]
    said = f"a {first['colour']} {first['shape']} {sample.truth['relation']} a {second['colour']} {second['shape']}"
    assert score("image_to_relation", sample.truth, said) == {"correct": True}
    back = f"a {second['colour']} {second['shape']} {sample.truth['relation']} a {first['colour']} {first['shape']}"
    assert score("image_to_relation", sample.truth, back) == {"correct": False}


def test_prompts_determine_the_truth() -> None:
    config = WorldConfig(max_objects=3, second_object=0.5)
    for index in range(200):
        picture = world_sample("text_to_image", 0, index, "test", config)
        assert picture.segments[0].text is not None
        assert compare("text_to_image", picture.truth, read_caption(picture.segments[0].text))["all"]
        clip = world_sample("text_to_video", 0, index, "test", config)
        assert clip.segments[0].text is not None
        said = compare("text_to_video", clip.truth, read_clip_text(clip.segments[0].text))
        assert said["correct"] and said["all"]
        sound = world_sample("text_to_audio", 0, index, "test", config)
        assert sound.segments[0].text is not None
        reading = read_notes_text(sound.segments[0].text)
        assert reading == {"notes": sound.truth["notes"], "timbre": sound.truth["timbre"]}


def test_clip_texts() -> None:
    reading = read_clip_text("a small red circle at the left turns blue , a large white cross stays at the top")
    assert (reading["event"], reading["to_colour"], reading["place"]) == ("turns", "blue", "left")
    assert reading["still"]["shape"] == "cross"
    assert read_clip_text("a red circle at the left moves right and moves up")["event"] is None
    assert read_clip_text("a red circle at the left moves")["event"] is None


def test_answers() -> None:
    assert read_answer("At the Top Left.") == "top left"
    assert read_answer("the middle") == "centre"
    truth = {"answer": "red circle"}
    assert score("text", truth, "a red circle .")["correct"]
    assert score("text", truth, "red square") == {"correct": False, "first_word": True}
    assert not score("text", truth, "red circle red circle")["correct"]
    assert not score("text", truth, "")["correct"]


WORDS = ["a", "red", "left", "of", "circle", "moves", "turns", "and", ",", "top", "two", "objects", "right", "above"]
SAID = st.lists(st.sampled_from(WORDS)).map(" ".join)


@given(st.one_of(st.text(), SAID))
def test_any_text_gets_a_reading(text: str) -> None:
    for task, truth in TEXT_TRUTHS.items():
        assert all(isinstance(value, bool) for value in score(task, truth, text).values())


@pytest.mark.parametrize("task", CHECKED_TASKS)
def test_chance_is_the_mean_over_all_ordered_pairs(task: str) -> None:
    truths = [world_sample(task, 0, index, "test", WorldConfig(max_objects=1)).truth for index in range(60)]
    pairs = [compare(task, a, b)["correct"] for i, a in enumerate(truths) for j, b in enumerate(truths) if i != j]
    assert chance(task, truths) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert chance(task, truths) < 0.3
    assert chance(task, [truths[0]] * 3) == 1.0


def test_wrong_outputs_are_named() -> None:
    truth = world_sample("text_to_image", 0, 0).truth
    with pytest.raises(ConfigError, match="'paint' has no checker"):
        score("paint", truth, "red")
    with pytest.raises(DataError, match="text_to_image is a str"):
        score("text_to_image", truth, "red")
    with pytest.raises(DataError, match="image_to_text is a ndarray"):
        read_output("image_to_text", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(DataError, match=r"\(32, 32\).*uint8"):
        read_scene(np.zeros((32, 32), np.uint8))
    with pytest.raises(DataError, match="float64"):
        read_scene(np.zeros((32, 32, 3)))
    with pytest.raises(DataError, match="F >= 2"):
        read_clip(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="not finite"):
        read_notes(np.full(2560, np.nan, np.float32))
    with pytest.raises(DataError, match="int16"):
        read_notes(np.zeros(2560, np.int16))
    with pytest.raises(DataError, match="at least 2"):
        chance("text", [truth])
    with pytest.raises(DataError, match="1 truths and 0 outputs"):
        checker_agreement("text", [truth], [])

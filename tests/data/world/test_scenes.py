"""The embedded world: determinism, layout, held-out combinations, drawing, sound and words."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from ernie_elastic.data.world import text as world_text
from ernie_elastic.data.world.draw import shape_coverage
from ernie_elastic.data.world.scenes import (
    COLOURS,
    EVENTS,
    NOTES,
    PLACES,
    SHAPES,
    SYLLABLES,
    WORLD_TASKS,
    Clip,
    Phrase,
    Scene,
    SceneObject,
    WorldConfig,
    clip_held_out,
    draw_clip,
    draw_scene,
    notes_held_out,
    random_clip,
    random_phrase,
    random_scene,
    scene_held_out,
    scene_phrase,
    sing,
    syllables_held_out,
    task_of_index,
    world_records,
    world_sample,
)
from ernie_elastic.data.world.sound import note_frequency
from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import JUDGED_TASKS, Sample

LAYOUT = {
    "image_to_text": "image text",
    "text_to_image": "text image",
    "video_to_text": "video text",
    "text_to_video": "text video",
    "audio_to_text": "audio text",
    "text_to_audio": "text audio",
    "text": "text text",
    "image_question": "image text text",
    "scene_to_audio": "image audio",
    "speech_to_text": "audio text",
    "text_to_speech": "text audio",
    "image_to_relation": "image text",
    "relation_to_image": "text image",
}


def same(first: Sample, second: Sample) -> bool:
    """True when two samples are equal to the last bit."""

    def parts(sample: Sample) -> list[tuple]:
        return [(s.kind, s.role, s.text, None if s.array is None else s.array.tobytes()) for s in sample.segments]

    facts = [(sample.key, sample.task, sample.truth, parts(sample)) for sample in (first, second)]
    return facts[0] == facts[1]


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_samples_are_a_pure_function_of_seed_index_and_split(task: str) -> None:
    for index in (0, 7):
        assert same(world_sample(task, 3, index, "test"), world_sample(task, 3, index, "test"))
    truths = [
        json.dumps(world_sample(task, seed, index, split).truth, sort_keys=True)
        for seed in (0, 1)
        for split in ("train", "validation", "test")
        for index in range(12)
    ]
    assert len(set(truths)) > 60, "seed, index and split must each change the sample"


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_layout(task: str) -> None:
    config = WorldConfig(image_size=64, video_size=32, num_frames=5, sample_rate=24000)
    for index in range(10):
        sample = world_sample(task, 0, index, "validation", config)
        assert sample.key == f"world/validation/{task}/{index}"
        assert [segment.kind for segment in sample.segments] == LAYOUT[task].split()
        assert [segment.role for segment in sample.segments] == ["input"] * (len(sample.segments) - 1) + ["target"]
        assert json.loads(json.dumps(sample.truth)) == sample.truth
        for segment in sample.segments:
            if segment.kind == "text":
                assert segment.text and segment.array is None
                continue
            array = segment.array
            assert array is not None and segment.text is None
            if segment.kind == "audio":
                assert array.dtype == np.float32 and array.ndim == 1 and len(array) % 1920 == 0
                assert 0.1 < np.abs(array).max() <= 1.0
            else:
                shape = (64, 64, 3) if segment.kind == "image" else (5, 32, 32, 3)
                assert array.dtype == np.uint8 and array.shape == shape


def test_the_tasks_are_the_judged_ones_and_more() -> None:
    assert WORLD_TASKS[: len(JUDGED_TASKS)] == JUDGED_TASKS
    assert set(WORLD_TASKS) == set(LAYOUT)


def combinations(truth: dict) -> set[tuple]:
    """Held-out combinations in a truth."""
    held: set[tuple] = set()
    for item in truth.get("objects", ()):
        if scene_held_out(item["shape"], item["colour"], item["place"]):
            held.add((item["shape"], item["colour"], item["place"]))
    if "event" in truth and clip_held_out(truth["shape"], truth["colour"], truth["event"]):
        held.add((truth["shape"], truth["colour"], truth["event"]))
    if "notes" in truth and notes_held_out(truth["notes"]):
        held.add(tuple(truth["notes"]))
    if "syllables" in truth and syllables_held_out(truth["syllables"]):
        held.add(tuple(truth["syllables"]))
    return held


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_train_never_shows_what_every_test_sample_shows(task: str) -> None:
    config = WorldConfig(max_objects=3, second_object=0.5)
    for index in range(120):
        for split in ("train", "validation"):
            assert not combinations(world_sample(task, 1, index, split, config).truth)
        assert combinations(world_sample(task, 1, index, "test", config).truth)


def test_clips_of_the_train_split_show_no_held_out_scene() -> None:
    rng = np.random.default_rng(0)
    config = WorldConfig(second_object=1.0)
    for _ in range(200):
        clip = random_clip(rng, config, "train")
        colour_at_end = clip.to_colour or clip.mover.colour
        assert not scene_held_out(clip.mover.shape, clip.mover.colour, clip.mover.place)
        assert not scene_held_out(clip.mover.shape, colour_at_end, clip.end_place)
        assert clip.still is not None and not scene_held_out(*clip.still.combination)
        assert clip.still.place not in (clip.mover.place, clip.end_place)


def test_events_are_equally_frequent() -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        counts = Counter(random_clip(rng, WorldConfig(), split).event for _ in range(1400))
        assert set(counts) == set(EVENTS) and min(counts.values()) > 150 and max(counts.values()) < 250


def test_a_fifth_is_held_out_and_every_pair_of_attributes_is_still_seen() -> None:
    for tables, held in (
        ((SHAPES, COLOURS, PLACES), scene_held_out),
        ((SHAPES, COLOURS, EVENTS), clip_held_out),
        ((NOTES, NOTES, NOTES), lambda *notes: notes_held_out(notes)),
        ((SYLLABLES, SYLLABLES), lambda *names: syllables_held_out(names)),
    ):
        everything = list(itertools.product(*tables))
        seen = [triple for triple in everything if not held(*triple)]
        assert 0.77 < len(seen) / len(everything) < 0.83
        if len(tables) == 3:
            for i, j in ((0, 1), (0, 2), (1, 2)):
                assert len({(triple[i], triple[j]) for triple in seen}) == len(tables[i]) * len(tables[j])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3.0, 4.3, 8.6])
def test_drawing_is_antialiased_to_exact_coverage(shape: str, radius: float) -> None:
    centre_x, centre_y, fine = 10.3, 9.6, 32
    x, y = np.arange(20) + 0.5 - centre_x, np.arange(20) + 0.5 - centre_y
    cover = shape_coverage(shape, x.astype(np.float32), y.astype(np.float32), radius)
    dense = (np.arange(20 * fine) + 0.5) / fine
    dense_x, dense_y = np.meshgrid(dense - centre_x, dense - centre_y)
    arm = 0.3 * radius
    inside = {
        "circle": dense_x**2 + dense_y**2 < radius**2,
        "square": np.maximum(abs(dense_x), abs(dense_y)) < radius,
        "triangle": (dense_y < radius) & (2 * abs(dense_x) < dense_y + radius),
        "cross": (np.maximum(abs(dense_x) / radius, abs(dense_y) / arm) < 1)
        | (np.maximum(abs(dense_x) / arm, abs(dense_y) / radius) < 1),
    }[shape]
    exact = inside.reshape(20, fine, 20, fine).mean(axis=(1, 3))
    assert np.abs(cover - exact).max() < 0.04
    assert abs(cover.sum() - exact.sum()) < 0.01 * exact.sum()


def test_pictures_agree_between_sizes() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        scene = random_scene(rng, WorldConfig(max_objects=3))
        small, large = draw_scene(scene, 32).astype(float), draw_scene(scene, 64).astype(float)
        averaged = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(small - averaged).max() <= 8, "the same scene, but for rounding and line sampling"


def test_objects_stay_in_their_cells_at_full_jitter() -> None:
    for shape, place, (x, y) in itertools.product(SHAPES, PLACES, [(1, 1), (-1, 1), (1, -1), (-1, -1)]):
        item = SceneObject(shape, "white", "large", place, x / 32, y / 32)
        pixels = draw_scene(Scene((item,), 0.0), 96).astype(int)
        drawn = np.abs(pixels - pixels[48 if place != "centre" else 0, 0]).sum(axis=2) > 0
        column, row = item.cell
        outside = drawn.copy()
        outside[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = False
        if place != "left":  # there the reference pixel may lie under the object
            assert drawn.any() and not outside.any()


def test_dense_scenes_for_tokenizers() -> None:
    rng = np.random.default_rng(0)
    for count in range(10):
        scene = random_scene(rng, WorldConfig(), "train", num_objects=count)
        assert len(scene.objects) == len({item.place for item in scene.objects}) == count
        assert len({(item.shape, item.colour) for item in scene.objects}) == count


def test_clip_events() -> None:
    mover = SceneObject("square", "red", "large", "centre")
    empty = draw_scene(Scene((), 0.5), 32)
    rest = draw_scene(Scene((mover,), 0.5), 32)
    blue = draw_scene(Scene((SceneObject("square", "blue", "large", "centre"),), 0.5), 32)
    right = draw_scene(Scene((SceneObject("square", "red", "large", "right"),), 0.5), 32)
    for clip, first, last in (
        (Clip(mover, "appears"), empty, rest),
        (Clip(mover, "disappears"), rest, empty),
        (Clip(mover, "turns", to_colour="blue"), rest, blue),
        (Clip(mover, "right"), rest, right),
    ):
        frames = draw_clip(clip, 32)
        assert np.array_equal(frames[0], first) and np.array_equal(frames[-1], last)


def test_notes_have_their_pitch() -> None:
    config = WorldConfig()
    for note, timbre in itertools.product(NOTES, ("flute", "organ")):
        wave = sing(Phrase(notes=(note,), timbre=timbre), config)
        assert len(wave) == 2560 and wave.dtype == np.float32
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 65536))
        peak = np.argmax(spectrum) * 16000 / 65536
        assert abs(peak - note_frequency(note)) < 3
    assert note_frequency("high") == pytest.approx(2 * note_frequency("c"))


def test_syllables_sound_different_from_each_other() -> None:
    config = WorldConfig()
    waves = np.stack([sing(Phrase(syllables=(name,)), config) for name in SYLLABLES])
    assert np.isfinite(waves).all() and np.abs(waves).max() <= 1
    loudness = np.sqrt((waves**2).mean(axis=1))
    assert (loudness > 0.05).all()
    spectra = np.abs(np.fft.rfft(waves, axis=1))
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)
    likeness = spectra @ spectra.T - np.eye(len(SYLLABLES))
    assert likeness.max() < 0.999


def test_a_scene_plays_its_phrase() -> None:
    for index in range(30):
        sample = world_sample("scene_to_audio", 0, index, "train", WorldConfig(max_objects=3))
        objects = tuple(SceneObject(**item) for item in sample.truth["objects"])
        phrase = scene_phrase(Scene(objects[::-1]))
        assert (list(phrase.notes), phrase.timbre) == (sample.truth["notes"], sample.truth["timbre"])
        wave = sample.segments[-1].array
        assert wave is not None and np.array_equal(sing(phrase, WorldConfig()), wave)


def test_texts_are_short_and_of_the_vocabulary() -> None:
    words = set(world_text.vocabulary())
    assert len(words) < 120
    spoken = set()
    for task in WORLD_TASKS:
        for index in range(80):
            for segment in world_sample(task, 2, index, "train").segments:
                if segment.kind == "text":
                    assert segment.text is not None
                    assert segment.text.isascii() and segment.text == " ".join(segment.text.lower().split())
                    spoken |= set(segment.text.split())
                    assert len(segment.text.split()) <= 32
    assert spoken <= words
    assert len(words - spoken) < 5, f"never said: {words - spoken}"


def answer_again(question: str, objects: list[dict]) -> str:
    """The answer, worked out from the words of the question alone."""
    words = question.split()
    named = [item for item in objects if f"{item['colour']} {item['shape']}" in question]
    if question.startswith("where is"):
        return named[0]["place"]
    if question.startswith("what size"):
        return named[0]["size"]
    if question.startswith(("what colour", "what shape")):
        place = question.split(" the ")[-1].removesuffix(" ?")
        (item,) = [item for item in objects if item["place"] == place]
        return item[words[1]]
    if question.startswith("how many"):
        shapes = [item["shape"] for item in objects]
        kind = words[2].removesuffix("es") if words[2] == "crosses" else words[2].removesuffix("s")
        return ("zero", "one", "two", "three")[len(shapes) if kind == "object" else shapes.count(kind)]
    row = {item["place"]: PLACES.index(item["place"]) // 3 for item in objects}
    column = {item["place"]: PLACES.index(item["place"]) % 3 for item in objects}
    named.sort(key=lambda item: question.index(f"{item['colour']} {item['shape']}"))

    def holds(a: dict, b: dict) -> bool:
        if "above" in words or "below" in words:
            less = row[a["place"]] < row[b["place"]]
            return less if "above" in words else row[a["place"]] > row[b["place"]]
        less = column[a["place"]] < column[b["place"]]
        return less if "left of" in question else column[a["place"]] > column[b["place"]]

    if question.startswith("is the"):
        return "yes" if holds(*named) else "no"
    (answer,) = [item for item in objects if item is not named[0] and holds(item, named[0])]
    return f"{answer['colour']} {answer['shape']}"


@pytest.mark.parametrize("task", ["text", "image_question"])
def test_answers_are_right(task: str) -> None:
    kinds: Counter[str] = Counter()
    config = WorldConfig(max_objects=3)
    for index in range(400):
        sample = world_sample(task, 4, index, "train", config)
        truth = sample.truth
        asked, target = sample.segments[-2].text, sample.segments[-1].text
        assert asked is not None and asked.endswith(truth["question"])
        assert target == truth["answer"] == answer_again(truth["question"], truth["objects"])
        kinds[truth["kind"]] += 1
    assert len(kinds) == 8 and min(kinds.values()) > 8


def test_a_mixture_has_its_weights_and_any_range_can_be_made_anew() -> None:
    weights = {"text": 3.0, "audio_to_text": 1.0, "text_to_image": 0.0}
    tasks = Counter(task_of_index(weights, 0, index) for index in range(2000))
    assert tasks["text_to_image"] == 0 and 0.71 < tasks["text"] / 2000 < 0.79
    whole = list(world_records(weights, 5, "test", 0, 12))
    part = list(world_records(weights, 5, "test", 8, 4))
    assert all(same(a, b) for a, b in zip(whole[8:], part, strict=True))
    endless = world_records(weights, 5, "test")
    assert [next(endless).key for _ in range(5)] == [sample.key for sample in whole[:5]]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"task 'sing'.*image_to_text"):
        world_sample("sing", 0, 0)
    with pytest.raises(ConfigError, match="split 'dev'"):
        world_sample("text", 0, 0, "dev")
    with pytest.raises(ConfigError, match="index -1"):
        world_sample("text", 0, -1)
    with pytest.raises(ConfigError, match="max_objects is 4"):
        WorldConfig(max_objects=4)
    with pytest.raises(ConfigError, match="sample_rate is 8000"):
        WorldConfig(sample_rate=8000)
    with pytest.raises(ConfigError, match="16001"):
        WorldConfig(sample_rate=16001)
    with pytest.raises(ConfigError, match="weights"):
        next(world_records({"text": -1.0}, 0))
    with pytest.raises(ConfigError, match="dance"):
        next(world_records({"dance": 1.0}, 0))
    with pytest.raises(ConfigError, match="either notes or syllables"):
        sing(Phrase(), WorldConfig())


def test_jitter_makes_pictures_more_than_a_table() -> None:
    rng = np.random.default_rng(0)
    item = SceneObject("circle", "red", "large", "top")
    shifted = [SceneObject("circle", "red", "large", "top", *(rng.uniform(-1, 1, 2) / 32)) for _ in range(20)]
    pictures = {draw_scene(Scene((one,)), 32).tobytes() for one in (item, *shifted)}
    assert len(pictures) == 21
    phrases = [random_phrase(rng, WorldConfig()) for _ in range(20)]
    assert len({(phrase.gain, phrase.cents) for phrase in phrases}) == 20


@pytest.mark.parametrize(
    ("task", "role"), [("text_to_image", 0), ("image_to_text", 1), ("text_to_video", 0), ("text", 0)]
)
def test_every_object_of_several_is_named_after_its_place(task: str, role: int) -> None:
    orders = set()
    for index in range(80):
        text = str(world_sample(task, 3, index).segments[role].text).split(" . ")[0]
        places = [match.start() for match in re.finditer(r"\b(at the|in the)\b", text)]
        things = [match.start() for match in re.finditer(r"\b(small|large)\b", text)]
        if len(things) == 2:
            assert places[0] < things[0] < places[1] < things[1], text
        else:
            orders.add(places[0] < things[0])
    assert orders == ({True} if role else {True, False}), "a lone object stands on either side in what is read"

"""The nouns of the embedded world: names of attributes, configuration, scenes, clips, phrases, held-out combinations.

Contract: everything here is frozen and hashable; a picture, clip or sound is a pure function of one of these
objects. A held-out combination never occurs in a train or validation sample of any task; every test sample of the
judged tasks holds at least one. ours: the report has no such world, all choices are made for a demo on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_elastic.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EVENTS = (*DIRECTIONS, "appears", "disappears", "turns")
NOTES = ("c", "d", "e", "f", "g", "a", "b", "high")  # "high" is the c one octave above the first
TIMBRES = ("flute", "organ")
CONSONANTS = ("b", "d", "g", "m")
VOWELS = ("a", "i", "u", "e")
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)
SPLITS = ("train", "validation", "test")

STEP_SECONDS = 0.08  # paper: section 2.6, one audio group is one 80 ms step
HELD_OUT_MODULUS = 5
HELD_OUT_RESIDUE = 4


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and freedoms of the world.

    image_size, video_size: pixels of one side. min_objects..max_objects: objects of a scene (1 to 3).
    jitter: largest shift of an object from the middle of its cell, in pixels of a 32-pixel picture.
    second_object: probability that a clip has a second, still object. num_frames: frames of a clip.
    sample_rate: Hz; a multiple of 12.5 Hz, at least 16000. min_notes..max_notes: notes of a phrase, each
    `steps_per_note` steps of 80 ms long; the same counts hold for syllables. detune: largest mistuning, cents.
    """

    image_size: int = 32
    video_size: int = 32
    min_objects: int = 1
    max_objects: int = 2
    jitter: float = 1.0
    num_frames: int = 4
    second_object: float = 0.3
    sample_rate: int = 16000
    min_notes: int = 3
    max_notes: int = 4
    steps_per_note: int = 2
    detune: float = 2.0

    def __post_init__(self) -> None:
        checks = (
            ("image_size", self.image_size, 16, 1024),
            ("video_size", self.video_size, 16, 1024),
            ("max_objects", self.max_objects, 1, 3),
            ("min_objects", self.min_objects, 1, self.max_objects),
            ("jitter", self.jitter, 0.0, 1.0),
            ("num_frames", self.num_frames, 2, 64),
            ("second_object", self.second_object, 0.0, 1.0),
            ("sample_rate", self.sample_rate, 16000, 48000),
            ("min_notes", self.min_notes, 3, self.max_notes),
            ("max_notes", self.max_notes, 3, 32),
            ("steps_per_note", self.steps_per_note, 1, 8),
            ("detune", self.detune, 0.0, 20.0),
        )
        for name, value, low, high in checks:
            if not low <= value <= high:
                raise ConfigError(f"WorldConfig.{name} is {value}; it must lie in {low}..{high}")
        if self.sample_rate * 2 % 25:
            raise ConfigError(f"WorldConfig.sample_rate is {self.sample_rate}; 80 ms must be a whole number of samples")

    @property
    def step_samples(self) -> int:
        """Samples of one 80 ms step."""
        return self.sample_rate * 2 // 25

    @property
    def note_samples(self) -> int:
        """Samples of one note or syllable."""
        return self.step_samples * self.steps_per_note


@dataclass(frozen=True)
class SceneObject:
    """One thing: names of its attributes, and its shift from the middle of its cell in fractions of the picture."""

    shape: str
    colour: str
    size: str
    place: str
    shift_x: float = 0.0
    shift_y: float = 0.0

    @property
    def cell(self) -> tuple[int, int]:
        """(column, row) on the 3x3 grid."""
        index = PLACES.index(self.place)
        return index % 3, index // 3

    @property
    def combination(self) -> tuple[str, str, str]:
        """(shape, colour, place): what is held out for the test split."""
        return self.shape, self.colour, self.place

    def facts(self) -> dict[str, Any]:
        """The JSON-able attributes that a prompt names and a checker reads."""
        return {"shape": self.shape, "colour": self.colour, "size": self.size, "place": self.place}


@dataclass(frozen=True)
class Scene:
    """Objects in different cells on a plain background of brightness 0..1 (two nearby dark greys)."""

    objects: tuple[SceneObject, ...]
    background: float = 0.5


@dataclass(frozen=True)
class Clip:
    """`mover` does `event` (a direction: it ends one cell further; or it appears, disappears, turns `to_colour`)."""

    mover: SceneObject
    event: str
    num_frames: int = 4
    to_colour: str | None = None
    still: SceneObject | None = None
    background: float = 0.5

    @property
    def end_place(self) -> str:
        """Name of the cell where the mover is, or was, at the end."""
        column, row = self.mover.cell
        step_x, step_y = DIRECTIONS.get(self.event, (0, 0))
        return PLACES[(row + step_y) * 3 + column + step_x]


@dataclass(frozen=True)
class Phrase:
    """Sound: either `notes` played by `timbre`, or `syllables` spoken at `voice` Hz; exactly one is not empty.

    gain scales the wave; cents mistunes it; seed draws the noise of consonants.
    """

    notes: tuple[str, ...] = ()
    timbre: str = "flute"
    syllables: tuple[str, ...] = ()
    voice: float = 120.0
    gain: float = 0.9
    cents: float = 0.0
    seed: int = 0


def _held_out(*indices: int) -> bool:
    # A linear rule spreads the fifth that is held out evenly: every pair of attributes stays in the train split.
    return sum(weight * index for weight, index in enumerate(indices, start=1)) % HELD_OUT_MODULUS == HELD_OUT_RESIDUE


def scene_held_out(shape: str, colour: str, place: str) -> bool:
    """True for the fifth of the 216 (shape, colour, place) combinations that only the test split shows."""
    return _held_out(SHAPES.index(shape), COLOURS.index(colour), PLACES.index(place))


def clip_held_out(shape: str, colour: str, event: str) -> bool:
    """True for the fifth of the 168 (shape, colour, event) combinations that only the test split shows."""
    return _held_out(SHAPES.index(shape), COLOURS.index(colour), EVENTS.index(event))


def notes_held_out(notes: Sequence[str]) -> bool:
    """True when any three neighbouring notes are a held-out triple (a fifth of 512)."""
    index = [NOTES.index(note) for note in notes]
    return any(_held_out(*index[start : start + 3]) for start in range(len(index) - 2))


def syllables_held_out(syllables: Sequence[str]) -> bool:
    """True when any two neighbouring syllables are a held-out pair (a fifth of 256)."""
    index = [SYLLABLES.index(syllable) for syllable in syllables]
    return any(_held_out(*index[start : start + 2]) for start in range(len(index) - 1))


def clip_places(clip: Clip) -> Iterator[tuple[str, str, str]]:
    """Every (shape, colour, place) that some frame of the clip shows at rest: start, end, and the still object."""
    yield clip.mover.combination
    yield clip.mover.shape, clip.to_colour or clip.mover.colour, clip.end_place
    if clip.still is not None:
        yield clip.still.combination


def scene_phrase(scene: Scene) -> Phrase:
    """The phrase that a scene plays: a fixed reading of its objects in reading order.

    One object: notes of its colour, shape and row. Two: colour and shape of each. Three: the colours.
    The size of the first object chooses the timbre.
    """
    objects = sorted(scene.objects, key=lambda item: PLACES.index(item.place))
    indices: list[int] = []
    for item in objects:
        indices.append(COLOURS.index(item.colour))
        if len(objects) < 3:
            indices.append(7 - SHAPES.index(item.shape))
    if len(objects) == 1:
        indices.append(2 * objects[0].cell[1] + 1)
    return Phrase(notes=tuple(NOTES[index] for index in indices), timbre=TIMBRES[SIZES.index(objects[0].size)])


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def random_object(rng: np.random.Generator, config: WorldConfig, place: str | None = None) -> SceneObject:
    """An object with uniform attributes (at `place`, when given) and uniform jitter; held-out ones included."""
    shift_x, shift_y = rng.uniform(-1, 1, 2) * (config.jitter / 32)
    return SceneObject(
        _pick(rng, SHAPES), _pick(rng, COLOURS), _pick(rng, SIZES),
        place if place is not None else _pick(rng, PLACES), float(shift_x), float(shift_y),
    )  # fmt: skip


def random_scene(
    rng: np.random.Generator, config: WorldConfig, split: str = "train", num_objects: int | None = None
) -> Scene:
    """A scene of `split`: num_objects (0..9; drawn from the config when None) objects in different cells.

    No two objects share shape and colour. train and validation: no held-out combination. test: at least one, when
    there is an object. 9 objects are for tokenizers; the tasks use 1 to 3.
    """
    count = int(rng.integers(config.min_objects, config.max_objects + 1)) if num_objects is None else num_objects
    forced = int(rng.integers(count)) if split == "test" and count else -1
    objects: list[SceneObject] = []
    for number, place in enumerate(rng.permutation(9)[:count]):
        while True:
            item = random_object(rng, config, PLACES[place])
            held = scene_held_out(*item.combination)
            allowed = held if number == forced else split == "test" or not held
            if allowed and all((item.shape, item.colour) != (other.shape, other.colour) for other in objects):
                break
        objects.append(item)
    return Scene(tuple(objects), float(rng.uniform()))


def _draw_clip(rng: np.random.Generator, config: WorldConfig, event: str) -> Clip | None:
    """A clip of an event, or None when the draw leaves the grid or has two things alike."""
    mover = random_object(rng, config)
    column, row = mover.cell
    step_x, step_y = DIRECTIONS.get(event, (0, 0))
    if not (0 <= column + step_x < 3 and 0 <= row + step_y < 3):
        return None
    to_colour = _pick(rng, [name for name in COLOURS if name != mover.colour]) if event == "turns" else None
    clip = Clip(mover, event, config.num_frames, to_colour, None, float(rng.uniform()))
    if rng.uniform() >= config.second_object:
        return clip
    still = random_object(rng, config, _pick(rng, [p for p in PLACES if p not in (mover.place, clip.end_place)]))
    if (still.shape, still.colour) in ((mover.shape, mover.colour), (mover.shape, to_colour)):
        return None
    return Clip(mover, event, config.num_frames, to_colour, still, clip.background)


def random_clip(rng: np.random.Generator, config: WorldConfig, split: str = "train") -> Clip:
    """A clip of `split`. test: its (shape, colour, event) is held out.

    train and validation: neither it nor any scene that the clip shows at rest is held out.
    """
    event = _pick(rng, EVENTS)  # drawn once, so that all events stay equally frequent
    while True:
        clip = _draw_clip(rng, config, event)
        if clip is None:
            continue
        held = clip_held_out(clip.mover.shape, clip.mover.colour, clip.event)
        if split == "test":
            if held:
                return clip
        elif not held and not any(scene_held_out(*triple) for triple in clip_places(clip)):
            return clip


def _random_sound(rng: np.random.Generator, config: WorldConfig, names: Sequence[str]) -> tuple[tuple[str, ...], dict]:
    count = int(rng.integers(config.min_notes, config.max_notes + 1))
    chosen = tuple(names[int(index)] for index in rng.integers(len(names), size=count))
    loudness, mistuning = rng.uniform(0.7, 1.0), rng.uniform(-1, 1) * config.detune
    return chosen, {"gain": float(loudness), "cents": float(mistuning), "seed": int(rng.integers(2**31))}


def random_phrase(rng: np.random.Generator, config: WorldConfig, split: str = "train") -> Phrase:
    """min_notes..max_notes notes of one timbre; test: with a held-out triple, otherwise without any."""
    while True:
        notes, freedoms = _random_sound(rng, config, NOTES)
        if notes_held_out(notes) == (split == "test"):
            return Phrase(notes=notes, timbre=_pick(rng, TIMBRES), **freedoms)


def random_speech(rng: np.random.Generator, config: WorldConfig, split: str = "train") -> Phrase:
    """min_notes..max_notes syllables of one voice, 105 to 150 Hz; test: with a held-out pair, otherwise without."""
    while True:
        syllables, freedoms = _random_sound(rng, config, SYLLABLES)
        if syllables_held_out(syllables) == (split == "test"):
            return Phrase(syllables=syllables, voice=float(rng.uniform(105, 150)), **freedoms)

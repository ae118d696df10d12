"""What the embedded world says: captions with paraphrases, prompts, relations, counts, questions and answers.

Contract: lower-case ASCII, words and punctuation separated by single spaces, a vocabulary of fewer than 120 words
(`vocabulary`). Every prompt for a picture names shape, colour, size and place of each object, so that the truth is
determined by it. Targets list objects in reading order and vary less than prompts, since a greedy decoder says one
of them. ours: the wording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ernie_elastic.data.world.facts import (
    COLOURS,
    DIRECTIONS,
    NOTES,
    PLACES,
    SHAPES,
    SIZES,
    SYLLABLES,
    TIMBRES,
    Clip,
    Phrase,
    Scene,
    SceneObject,
)

NUMBERS = ("zero", "one", "two", "three")
RELATIONS = ("above", "below", "left of", "right of")
CAPTION_FRAMES = ("{0}", "there is {0}", "{n} : {0}")
PROMPT_FRAMES = ("draw {0}", "paint {0}", "a picture of {0}", "draw {n} : {0}")
CLIP_PROMPT_FRAMES = ("film {0}", "animate {0}", "a video where {0}")
NOTES_FRAMES = ("the {t} plays {0}", "{t} : {0}", "notes {0} on the {t}")
NOTES_PROMPT_FRAMES = ("play {0} on the {t}", "let the {t} play {0}", "{t} plays {0}")
MOVES = ("moves", "goes", "slides")
EVENT_VERBS = {"appears": ("appears", "shows up"), "disappears": ("disappears", "vanishes")}
TURNS = ("turns", "becomes")
STAYS = ("stays", "rests")
Question = tuple[str, str, str]  # kind, question, answer


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _at(place: str) -> str:
    return "in the centre" if place == "centre" else f"at the {place}"


def _noun(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


def _thing(item: SceneObject) -> str:
    return f"a {item.size} {_noun(item)}"


def reading_order(scene: Scene) -> list[SceneObject]:
    """The objects row by row, left to right."""
    return sorted(scene.objects, key=lambda item: PLACES.index(item.place))


def _count(number: int) -> str:
    return f"{NUMBERS[number]} object{'' if number == 1 else 's'}"


def scene_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A target caption: place, size, colour and shape of every object in reading order.

    ours: who has said the place knows where to look for the rest.
    """
    items = reading_order(scene)
    listed = " and ".join(f"{_at(item.place)} {_thing(item)}" for item in items)
    return _choose(rng, CAPTION_FRAMES).format(listed, n=_count(len(items)))


def _describe(scene: Scene, rng: np.random.Generator) -> str:
    """The objects in any order, each after its place; a single one before it as well.

    ours: a causal reader of an object's words then knows their place. With places after their objects a short run never
    learned which of two objects belongs where (docs/decisions.md).
    """
    items = [scene.objects[index] for index in rng.permutation(len(scene.objects))]
    parts = []
    for item in items:
        place = "in the middle" if item.place == "centre" and rng.integers(2) else _at(item.place)
        after = len(items) > 1 or rng.integers(2)
        parts.append(f"{place} {_thing(item)}" if after else f"{_thing(item)} {place}")
    return " and ".join(parts)


def scene_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt for a picture: complete, in any order, with more paraphrases than a caption."""
    return _choose(rng, PROMPT_FRAMES).format(_describe(scene, rng), n=_count(len(scene.objects)))


def _event(clip: Clip, rng: np.random.Generator) -> str:
    if clip.event in DIRECTIONS:
        return f"{_choose(rng, MOVES)} {clip.event}"
    if clip.event == "turns":
        return f"{_choose(rng, TURNS)} {clip.to_colour}"
    return _choose(rng, EVENT_VERBS[clip.event])


def _clip_story(clip: Clip, rng: np.random.Generator, place_first: bool) -> str:
    mover = (_at(clip.mover.place), _thing(clip.mover))
    story = f"{' '.join(mover if place_first else mover[::-1])} {_event(clip, rng)}"
    if clip.still is not None:
        story += f" , {_at(clip.still.place)} {_thing(clip.still)} {_choose(rng, STAYS)}"
    return story


def clip_caption(clip: Clip, rng: np.random.Generator) -> str:
    """A target caption of a clip: place of the mover in the first frame (or where it appears), mover, event."""
    return _clip_story(clip, rng, place_first=True)


def clip_prompt(clip: Clip, rng: np.random.Generator) -> str:
    """A prompt for a clip: as the caption; a lone mover stands before its place as well."""
    place_first = clip.still is not None or bool(rng.integers(2))
    return _choose(rng, CLIP_PROMPT_FRAMES).format(_clip_story(clip, rng, place_first))


def notes_caption(phrase: Phrase, rng: np.random.Generator) -> str:
    """A target text for notes; it holds no article, because "a" is a note."""
    return _choose(rng, NOTES_FRAMES).format(" ".join(phrase.notes), t=phrase.timbre)


def notes_prompt(phrase: Phrase, rng: np.random.Generator) -> str:
    """A prompt for notes."""
    return _choose(rng, NOTES_PROMPT_FRAMES).format(" ".join(phrase.notes), t=phrase.timbre)


def speech_caption(phrase: Phrase) -> str:
    """The syllables that are heard."""
    return " ".join(phrase.syllables)


def speech_prompt(phrase: Phrase) -> str:
    """A prompt for speech."""
    return "say " + " ".join(phrase.syllables)


def relations(first: SceneObject, second: SceneObject) -> list[str]:
    """Which of RELATIONS hold: `first` is ... `second`. Rows and columns of the grid decide."""
    (column_1, row_1), (column_2, row_2) = first.cell, second.cell
    holds = (row_1 < row_2, row_1 > row_2, column_1 < column_2, column_1 > column_2)
    return [name for name, true in zip(RELATIONS, holds, strict=True) if true]


def random_relation(scene: Scene, rng: np.random.Generator) -> tuple[SceneObject, str, SceneObject]:
    """Two objects of a scene of at least two, and a relation that holds between them."""
    first, second = (scene.objects[index] for index in rng.permutation(len(scene.objects))[:2])
    return first, _choose(rng, relations(first, second)), second


def relation_text(first: SceneObject, relation: str, second: SceneObject) -> str:
    """`a red circle above a blue square`."""
    return f"a {_noun(first)} {relation} a {_noun(second)}"


def _ask_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return "place", f"where is the {_noun(item)} ?", item.place


def _ask_size(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return "size", f"what size is the {_noun(item)} ?", item.size


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return "colour", f"what colour is the object {_at(item.place)} ?", item.colour


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return "shape", f"what shape is {_at(item.place)} ?", item.shape


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    return "count", "how many objects ?", NUMBERS[len(scene.objects)]


def _ask_count_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = _choose(rng, SHAPES) if rng.integers(2) else _choose(rng, [item.shape for item in scene.objects])
    number = sum(item.shape == shape for item in scene.objects)
    plural = {"cross": "crosses"}.get(shape, shape + "s")
    return "count_shape", f"how many {plural} ?", NUMBERS[number]


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) < 2:
        return None
    first, true, second = random_relation(scene, rng)
    wrong = [name for name in RELATIONS if name not in relations(first, second)]
    said, answer = (true, "yes") if rng.integers(2) else (_choose(rng, wrong), "no")
    return "relation", f"is the {_noun(first)} {said} the {_noun(second)} ?", answer


def _ask_related(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) != 2:
        return None
    first, relation, second = random_relation(scene, rng)
    return "related", f"what is {relation} the {_noun(second)} ?", _noun(first)


ASKERS: tuple[Callable[[Scene, np.random.Generator], Question | None], ...] = (
    _ask_place, _ask_size, _ask_colour, _ask_shape, _ask_count, _ask_count_shape, _ask_relation, _ask_related,
)  # fmt: skip


def ask(scene: Scene, rng: np.random.Generator) -> Question:
    """(kind, question, answer) about a scene; the answer is determined by the scene."""
    while True:
        question = ASKERS[int(rng.integers(len(ASKERS)))](scene, rng)
        if question is not None:
            return question


def description(scene: Scene, rng: np.random.Generator) -> str:
    """A description that a question of the text task follows."""
    return _describe(scene, rng) + " ."


def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark that the world can say, sorted; for text tokenizers and tests."""
    frames = (
        *CAPTION_FRAMES, *PROMPT_FRAMES, *CLIP_PROMPT_FRAMES, *NOTES_FRAMES, *NOTES_PROMPT_FRAMES, *MOVES, *TURNS,
        *STAYS, *(verb for verbs in EVENT_VERBS.values() for verb in verbs), *DIRECTIONS, *NUMBERS, *RELATIONS,
        *COLOURS, *SHAPES, *SIZES, *PLACES, *TIMBRES, *NOTES, *SYLLABLES,
        "say a and at in the middle is object objects . , ?",
        "where what size colour shape how many yes no crosses circles squares triangles",
    )  # fmt: skip
    words = {word for text in frames for word in text.split()}
    return tuple(sorted(word for word in words if "{" not in word))

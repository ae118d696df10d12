"""Reads objects, events, notes and answers back from text, without a model: one pass over known words.

Contract: any string gets a reading and none raises; unknown words are skipped; what is not said is None. The same
attribute said twice for one object starts another object, so that contradictions count as wrong. ours: the checkers.
"""

from __future__ import annotations

import re
from typing import Any

from ernie_elastic.data.world.facts import COLOURS, DIRECTIONS, NOTES, PLACES, SHAPES, SIZES, SYLLABLES, TIMBRES
from ernie_elastic.data.world.text import EVENT_VERBS, MOVES, NUMBERS, STAYS, TURNS

SEPARATORS = frozenset((",", ";", ".", ":", "and", "while", "with"))
VERTICAL = {"top": 0, "bottom": 2}
HORIZONTAL = {"left": 0, "right": 2}
MIDDLE = frozenset(("centre", "center", "middle"))
FILLERS = frozenset(("a", "an", "the", "at", "in", "is", "it"))
ATTRIBUTES = ("shape", "colour", "size", "place")


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks, in order."""
    return re.findall(r"[a-z0-9]+|[.,:;?]", text.lower())


def _attribute(word: str) -> tuple[str, str] | None:
    singular = "cross" if word == "crosses" else word[:-1] if word.endswith("s") and word[:-1] in SHAPES else word
    for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        if singular in known:
            return name, singular
    return None


class _ObjectReader:
    """Collects attributes word by word; closes an object at a separator or when an attribute comes twice."""

    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.current: dict[str, Any] = {}

    def close(self) -> None:
        """Finish the current object, if it is more than a place."""
        if not self.current.keys() & {"shape", "colour", "size"}:
            return  # A lone place waits for its object.
        row, column = self.current.pop("row", None), self.current.pop("column", None)
        middle = self.current.pop("middle", False)
        if row is not None or column is not None or middle:
            self.current["place"] = PLACES[(1 if row is None else row) * 3 + (1 if column is None else column)]
        self.objects.append({name: self.current.get(name) for name in ATTRIBUTES})
        self.current = {}

    def put(self, name: str, value: Any) -> None:
        """Set an attribute; a second value opens the next object."""
        if name in self.current:
            self.close()
        self.current[name] = value


def _is_relation(words: list[str], index: int) -> bool:
    return words[index] in ("above", "below") or (
        words[index] in HORIZONTAL and index + 1 < len(words) and words[index + 1] == "of"
    )


def read_caption(text: str) -> dict[str, Any]:
    """{"objects": [...], "relations": [...], "count": number or None} that a text claims.

    objects: dicts of shape, colour, size, place, None where not said, in the order of the text. relations: (index of
    the first object, relation, index of the second). count: of "N objects".
    """
    words, reader = words_of(text), _ObjectReader()
    relations: list[tuple[int, str, int]] = []
    count = None
    for index, word in enumerate(words):
        attribute = _attribute(word)
        if word in SEPARATORS:
            reader.close()
        elif attribute:
            reader.put(*attribute)
        elif _is_relation(words, index):
            reader.close()
            relations.append((len(reader.objects) - 1, word if word in ("above", "below") else f"{word} of",
                              len(reader.objects)))  # fmt: skip
        elif word in VERTICAL:
            reader.put("row", VERTICAL[word])
        elif word in HORIZONTAL:
            reader.put("column", HORIZONTAL[word])
        elif word in MIDDLE:
            reader.put("middle", True)
        elif word in NUMBERS and index + 1 < len(words) and words[index + 1].startswith("object"):
            count = NUMBERS.index(word)
    reader.close()
    relations = [said for said in relations if said[0] >= 0 and said[2] < len(reader.objects)]
    return {"objects": reader.objects, "relations": relations, "count": count}


def _event_at(words: list[str], index: int) -> tuple[str, str | None, int] | None:
    """(event, to_colour, words used) when an event is told at `index`."""
    word, following = words[index], words[index + 1] if index + 1 < len(words) else ""
    if word in MOVES and following in DIRECTIONS:
        return following, None, 2
    if word in TURNS and following in COLOURS:
        return "turns", following, 2
    for event, verbs in EVENT_VERBS.items():
        for verb in verbs:
            parts = verb.split()
            if words[index : index + len(parts)] == parts:
                return event, None, len(parts)
    return None


def read_clip_text(text: str) -> dict[str, Any]:
    """What a text says of a clip, in the shape of `checkers_vision.read_clip` (without `smooth`).

    More than one event, or none, reads as event None.
    """
    words = words_of(text)
    events: list[tuple[str, str | None]] = []
    moving: list[str] = []
    resting: list[str] = []
    clause: list[str] = []
    index = 0
    rests = False
    while index <= len(words):
        if index == len(words) or words[index] in SEPARATORS:
            (resting if rests else moving).extend([*clause, "."])
            clause, rests = [], False
            index += 1
            continue
        event = _event_at(words, index)
        if event is not None:
            events.append((event[0], event[1]))
            index += event[2]
            continue
        rests = rests or words[index] in STAYS
        clause.append(words[index])
        index += 1
    movers, still = read_caption(" ".join(moving))["objects"], read_caption(" ".join(resting))["objects"]
    mover = movers[0] if len(movers) == 1 else dict.fromkeys(ATTRIBUTES)
    event_name, to_colour = events[0] if len(events) == 1 else (None, None)
    return {
        **mover,
        "event": event_name,
        "to_colour": to_colour,
        "still": still[0] if len(still) == 1 else None,
        "num_objects": len(movers) + len(still),
    }


def read_notes_text(text: str) -> dict[str, Any]:
    """{"notes": note words in order, "timbre": the only timbre named, or None}."""
    words = words_of(text)
    timbres = [word for word in words if word in TIMBRES]
    return {"notes": [word for word in words if word in NOTES], "timbre": timbres[0] if len(timbres) == 1 else None}


def read_syllables_text(text: str) -> list[str]:
    """The syllables named, in order."""
    return [word for word in words_of(text) if word in SYLLABLES]


def read_answer(text: str) -> str:
    """An answer without articles and punctuation, lower case, `middle` as `centre`."""
    words = [word for word in words_of(text) if word[0].isalnum() and word not in FILLERS]
    return " ".join("centre" if word in MIDDLE else word for word in words)

"""The tokens that no text can produce: their ids, and how `tokenizer.json` spells them."""

from __future__ import annotations

from dataclasses import dataclass

SPECIAL_NAMES = ("pad", "bos", "eos", "boi", "eoi", "bov", "eov", "boa", "eoa", "next_frame")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that no text can produce.

    pad: padding. bos, eos: begin and end of a document. boi/eoi, bov/eov, boa/eoa: begin and end of an image, a
    video, a sound. next_frame: inside a video, the decision that another frame follows (CONTINUE).
    """

    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    bov: int
    eov: int
    boa: int
    eoa: int
    next_frame: int


def special_text(name: str) -> str:
    """How a special token is spelled in `tokenizer.json`, for example `<|boi|>`."""
    return f"<|{name}|>"


SPECIAL_TEXTS = tuple(special_text(name) for name in SPECIAL_NAMES)

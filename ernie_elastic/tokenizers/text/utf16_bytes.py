"""UTF-16BE bytes as text: the code points without a token of their own, and the way back from any cut of the bytes.

The vocabulary spells byte b as the private code point U+100000 + b, a byte symbol. `ByteFallback` replaces what the
vocabulary does not know by byte symbols (two for most code points, four for a surrogate pair); `to_text` and
`StreamDecoder` undo it. Reserved code points never get a token of their own, so a text that holds them is safe.

paper: section 2.1, text is UTF-16BE before byte-level BPE. ours: private symbols, since those of GPT-2 say UTF-8 to
other tools; the `tokenizers` library has no UTF-16 step, so this one is Python, and touches unknown code points only.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Iterator

from ernie_elastic.errors import DataError

ENCODING = "utf-16-be"
FIRST_RESERVED = 0x100000
NUM_RESERVED = 0x200  # 256 byte symbols, then marks of the trainer
BYTE_SYMBOLS = "".join(chr(FIRST_RESERVED + byte) for byte in range(256))
RESERVED = re.compile(f"[{chr(FIRST_RESERVED)}-{chr(FIRST_RESERVED + NUM_RESERVED - 1)}]")
_BYTE_RUN = re.compile(f"([{BYTE_SYMBOLS[0]}-{BYTE_SYMBOLS[-1]}]+)")
_SYMBOL_TO_BYTE = codecs.charmap_build(BYTE_SYMBOLS)


def to_symbols(text: str) -> str:
    """Every code point of a text as byte symbols. Raises UnicodeEncodeError for a lone surrogate."""
    return codecs.charmap_decode(text.encode(ENCODING), "strict", BYTE_SYMBOLS)[0]


def to_text(spelled: str) -> str:
    """Runs of byte symbols back to code points; bytes that are no UTF-16BE become U+FFFD."""
    return _BYTE_RUN.sub(lambda run: _to_bytes(run[0]).decode(ENCODING, "replace"), spelled)


def _to_bytes(symbols: str) -> bytes:
    return codecs.charmap_encode(symbols, "strict", _SYMBOL_TO_BYTE)[0]


class ByteFallback:
    """Spells a text with the code points of one vocabulary, and everything else in byte symbols."""

    def __init__(self, tokens: Iterable[str]) -> None:
        """tokens: a vocabulary; those of one code point outside the reserved ones are what it knows."""
        known = {token for token in tokens if len(token) == 1 and not RESERVED.match(token)}
        inside = "".join(re.escape(point) for point in sorted(known))
        self._unknown = re.compile(f"[^{inside}]+" if known else r"[\s\S]+")

    def spell(self, text: str, keep: re.Pattern[str] | None = None) -> str:
        """The text in known code points and byte symbols; what `keep` matches stays as it is.

        Raises DataError for a lone surrogate, which is not Unicode text.
        """
        if keep is None:
            return self._unknown.sub(_run_to_symbols, text)
        parts = _cut(text, keep)
        return "".join(part if kept else self._unknown.sub(_run_to_symbols, part) for part, kept in parts)

    def code_points(self, text: str, keep: re.Pattern[str] | None = None) -> list[int]:
        """For each position of `spell(text, keep)`, the index of the code point of `text` that it comes from."""
        points: list[int] = []
        start = 0
        for part, kept in _cut(text, keep) if keep else [(text, False)]:
            done = 0
            for run in self._unknown.finditer(part) if not kept else ():
                points.extend(range(start + done, start + run.start()))
                for index, point in enumerate(run[0], start + run.start()):
                    points.extend([index] * (2 if point <= "\uffff" else 4))
                done = run.end()
            points.extend(range(start + done, start + len(part)))
            start += len(part)
        return points


def _cut(text: str, keep: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    start = 0
    for match in keep.finditer(text):
        yield text[start : match.start()], False
        yield match[0], True
        start = match.end()
    yield text[start:], False


def _run_to_symbols(run: re.Match[str]) -> str:
    try:
        return to_symbols(run[0])
    except UnicodeEncodeError as error:
        place = run.start() + error.start
        raise DataError(
            f"text tokenizer: character {place} of the text is the lone surrogate "
            f"U+{ord(run.string[place]):04X}, which is not Unicode text; remove it"
        ) from error


class StreamDecoder:
    """Decodes ids as they come, wherever they are cut.

    The pieces of `push` and the last one of `finish` concatenate to the text that decoding all ids at once gives:
    bytes wait until their code point is whole, or until it is clear that it never will be.
    """

    def __init__(self, spelled: Callable[[Iterable[int]], str]) -> None:
        """spelled: ids to known code points and byte symbols; its errors reach the caller of `push`."""
        self._spelled = spelled
        self._bytes = codecs.getincrementaldecoder(ENCODING)("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these further ids; often empty in the middle of a code point."""
        pieces = []
        for place, part in enumerate(_BYTE_RUN.split(self._spelled(ids))):
            if place % 2:
                pieces.append(self._bytes.decode(_to_bytes(part)))
            elif part:
                pieces += [self.finish(), part]
        return "".join(pieces)

    def finish(self) -> str:
        """U+FFFD for a code point that stays incomplete, else nothing; the decoder is as new afterwards."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return rest


@functools.lru_cache(maxsize=64)
def literals(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """A pattern of these spellings, longest first; None when there are none."""
    spellings = [re.escape(token) for token in sorted(tokens, key=lambda token: (-len(token), token))]
    return re.compile("|".join(spellings)) if spellings else None

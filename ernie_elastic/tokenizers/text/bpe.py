"""Learning a vocabulary of UTF-16BE byte-level BPE, and segmenting with BPE dropout.

Contract: a token is one byte, or a whole number of code points, never half a code point beside another. The bytes of
a code point join in one merge, placed among the other merges by how often it happens, as BPE does.

paper: section 2.1 (byte-level BPE over UTF-16BE, BPE dropout, no phrases that a segmenter can split). ours: merges
respect code points. Free merges learn `00 20 00` first, which ties half of one letter to half of the next: they need
more tokens for the same text, and one wrong byte garbles all that follows it.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ernie_elastic.errors import DataError
from ernie_elastic.tokenizers.text.utf16_bytes import FIRST_RESERVED, RESERVED, to_symbols

Segmenter = Callable[[str], list[str]]

# ours: the report is silent. A space belongs to what follows it; marks and joiners stay with their letter, without
# which every vowel sign of an Indic or Thai word is a word of its own.
PATTERN = r" ?\p{L}[\p{L}\p{M}\x{200c}\x{200d}]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Han, kana, Thai and Lao, Myanmar, Khmer: scripts whose words have no space between them.
UNSPACED = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+"
)
# Reserved code points behind the byte symbols. "ALONE c" is a word that stands for "c gets a token of its own".
ALONE, BOUNDARY = chr(FIRST_RESERVED + 0x100), chr(FIRST_RESERVED + 0x101)
_EMIT = 1 << 16
_PIECE = 128


def learn(
    texts: Sequence[str], size: int, segmenter: Segmenter | None = None
) -> tuple[list[str], list[tuple[str, str]]]:
    """At most `size` tokens of whole code points, most frequent first, and the merges that make the longer ones.

    A token of one code point counts as the merge of its bytes. segmenter: cuts a run of an unspaced script into
    words; no token spans two of them, or leaves the run. Raises DataError when its words do not add up to the run.
    """
    given = [RESERVED.sub(BOUNDARY, text) for text in texts]
    if segmenter is not None:
        given = [UNSPACED.sub(lambda run: _segmented(run[0], segmenter), text) for text in given]
    counts = Counter[str]()
    for text in given:
        counts.update(text)
    del counts[BOUNDARY]
    backend = Tokenizer(models.BPE())
    words = f"{ALONE}[\\s\\S]|{BOUNDARY}|" + PATTERN.replace("[^\\s", f"[^{BOUNDARY}\\s")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    # The trainer counts its alphabet too, which here is the code points and both marks.
    trainer = trainers.BpeTrainer(vocab_size=len(counts) + 2 + size, show_progress=False)
    backend.train_from_iterator(_training_texts(given, counts), trainer)
    return _tokens_of(json.loads(backend.to_str())["model"]["merges"], size)


def _training_texts(texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    yield from texts
    # Each occurrence of a code point is a word of two symbols, so that the trainer weighs giving it a token against
    # every other merge. The library has no way to pass a count.
    for point, count in sorted(counts.items()):
        for start in range(0, count, _EMIT):
            yield (ALONE + point) * min(_EMIT, count - start)


def _tokens_of(merges: Iterable[Sequence[str]], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    tokens: dict[str, None] = {}
    kept: list[tuple[str, str]] = []
    for left, right in merges:
        if left == ALONE:
            new = [right]
        else:
            # Ties may put a merge before the code points that it joins.
            new = [part for part in (left, right) if len(part) == 1] + [left + right]
        new = [token for token in dict.fromkeys(new) if token not in tokens]
        if len(tokens) + len(new) > size:
            # What still fits are code points of this merge, of which all count the same.
            tokens.update(dict.fromkeys([token for token in new if len(token) == 1][: size - len(tokens)]))
            break
        tokens.update(dict.fromkeys(new))
        if left != ALONE:
            kept.append((left, right))
    return list(tokens), kept


def _segmented(run: str, segmenter: Segmenter) -> str:
    words = segmenter(run)
    if "".join(words) != run:
        raise DataError(
            f"text tokenizer: the segmenter turned {run[:20]!r} ({len(run)} characters) into words of "
            f"{sum(map(len, words))} characters; they must add up to the same text"
        )
    return BOUNDARY.join(["", *words, ""])


class Dropout:
    """Segments words with BPE dropout: at each step, each possible merge is left out with some probability.

    paper: section 2.1, rate not given; the algorithm is that of Provilkov et al. 2020. ours: in Python, since the
    library's own draws cannot be seeded.
    """

    def __init__(self, merges: Iterable[Sequence[str]]) -> None:
        """merges: the pairs of the vocabulary, first to last."""
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}

    def segment(self, word: str, dropout: float, rng: random.Random) -> list[str]:
        """Tokens of one word, which is spelled in known code points and byte symbols."""
        if len(word) > _PIECE:  # the time is quadratic; a merge lost at a seam is one more that was dropped
            pieces = [word[start : start + _PIECE] for start in range(0, len(word), _PIECE)]
            return [part for piece in pieces for part in self.segment(piece, dropout, rng)]
        parts: list[str] = []
        for point in word:
            whole = RESERVED.match(point) or rng.random() >= dropout
            parts.extend(point if whole else to_symbols(point))
        while True:
            pairs = [(self._ranks.get(pair), place) for place, pair in enumerate(pairwise(parts))]
            open_pairs = [(rank, place) for rank, place in pairs if rank is not None and rng.random() >= dropout]
            if not open_pairs:
                return parts
            _, place = min(open_pairs)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]

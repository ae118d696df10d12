"""Text to ids and back: UTF-16BE byte-level BPE of the `tokenizers` library, and a Transformers tokenizer of it.

Contract: `decode(encode(text)) == text` for every Unicode text, those that spell out a special token included: only
code that asks for `special` ids can put one into a sequence. Ids 0..9 are the special tokens, then 256 bytes, then
tokens of whole code points, most frequent first. Ids of equal texts and sizes are equal on every machine.

paper: section 2.1, UTF-16BE before byte-level BPE, so that every code point falls back to two bytes (four for a
surrogate pair) whatever its script, and BPE dropout in training. `utf16_bytes` has the bytes, `bpe` the merges.
ours: `tokenizer.json` holds tokens as readable text, so that an engine without our code still reads and writes right
all code points that have a token; only the others need the byte step of `TextTokenizer` and `hf`.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.text.bpe import PATTERN, Dropout, Segmenter, learn
from ernie_elastic.tokenizers.text.special import SPECIAL_NAMES, SPECIAL_TEXTS, SpecialTokens, special_text
from ernie_elastic.tokenizers.text.utf16_bytes import BYTE_SYMBOLS, ByteFallback, StreamDecoder, to_text

if TYPE_CHECKING:
    from ernie_elastic.tokenizers.text.hugging_face import ErnieElasticTokenizer

NUM_BYTES = 256
FILE_NAME = "tokenizer.json"


class TextTokenizer:
    """A byte-level BPE vocabulary. Make one with `train` or `load`."""

    def __init__(self, backend: Tokenizer) -> None:
        """backend: a tokenizer that knows all special tokens. Raises CheckpointError when one is missing."""
        found = {name: backend.token_to_id(special_text(name)) for name in SPECIAL_NAMES}
        ids = {name: index for name, index in found.items() if index is not None}
        missing = [special_text(name) for name in SPECIAL_NAMES if name not in ids]
        if missing:
            raise CheckpointError(
                f"text tokenizer: {' '.join(missing)} missing from a vocabulary of {backend.get_vocab_size()}; "
                "it was not made by train-tokenizer text"
            )
        if any(backend.token_to_id(symbol) is None for symbol in BYTE_SYMBOLS):
            raise CheckpointError(
                f"text tokenizer: the vocabulary of {backend.get_vocab_size()} lacks UTF-16BE byte symbols; it is of "
                "an older format (UTF-8): run train-tokenizer text again, and what was made from it"
            )
        # Text that spells out a special token stays text.
        backend.encode_special_tokens = True
        self._backend = backend
        self._fallback = ByteFallback(backend.get_vocab(with_added_tokens=False))
        self._ids = backend.get_vocab(with_added_tokens=True)
        by_id = sorted(self._ids, key=self._ids.__getitem__)
        self._spellings = ["" if token in SPECIAL_TEXTS else token for token in by_id]
        self.special = SpecialTokens(**ids)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, segmenter: Segmenter | None = None) -> TextTokenizer:
        """Learn tokens from `texts`, which are held in memory.

        vocab_size counts special tokens and bytes too; fewer ids result when the texts hold no more pairs to merge.
        segmenter: cuts a run of Han, kana, Thai, Lao, Khmer or Myanmar into words, so that no token is a phrase of
        several (paper: section 2.1); it is not needed afterwards. Raises ConfigError when vocab_size has no room for
        bytes and special tokens, DataError for a lone surrogate or a segmenter that changes the text.
        """
        smallest = NUM_BYTES + len(SPECIAL_NAMES)
        if vocab_size < smallest:
            raise ConfigError(
                f"text tokenizer: vocab_size {vocab_size} must be at least {smallest} (bytes and special tokens)"
            )
        nothing_known = ByteFallback(())
        given = list(texts)
        for text in given:
            nothing_known.spell(text)  # raises for a lone surrogate
        tokens, merges = learn(given, vocab_size - smallest, segmenter)
        vocabulary = {token: index for index, token in enumerate([*SPECIAL_TEXTS, *BYTE_SYMBOLS, *tokens])}
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(SPECIAL_TEXTS))
        return TextTokenizer(backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._spellings)

    def smaller(self, vocab_size: int) -> TextTokenizer:
        """This vocabulary's first `vocab_size` ids as a tokenizer: what training for that size gives.

        Raises ConfigError when vocab_size has no room for bytes and special tokens, or is larger than this one's.
        """
        smallest = NUM_BYTES + len(SPECIAL_NAMES)
        if not smallest <= vocab_size <= self.vocab_size:
            raise ConfigError(f"text tokenizer: vocab_size {vocab_size} must lie in {smallest}..{self.vocab_size}")
        description = json.loads(self._backend.to_str())
        model = description["model"]
        model["vocab"] = {token: index for token, index in model["vocab"].items() if index < vocab_size}
        kept = model["vocab"]
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) in kept and set(pair) <= set(kept)]
        return TextTokenizer(Tokenizer.from_str(json.dumps(description)))

    def encode(self, text: str, *, dropout: float = 0.0, seed: int | None = None) -> list[int]:
        """Ids of a text, without special tokens.

        dropout: for training only (0.1 is usual), the share of merges left out, so that a model sees many
        segmentations of the same word; the ids are a function of (text, dropout, seed) and decode to the same text.
        Raises DataError for a lone surrogate, which is not Unicode text, ConfigError for a dropout outside 0..1 or
        without a seed.
        """
        spelled = self._fallback.spell(text)
        if dropout == 0:
            return list(self._backend.encode(spelled, add_special_tokens=False).ids)
        if not 0 < dropout <= 1 or seed is None:
            raise ConfigError(
                f"text tokenizer: dropout {dropout} with seed {seed}; dropout must lie in 0..1, and above 0 it needs "
                "a seed, for example one made from the record's key"
            )
        rng = random.Random(seed)
        words = self._backend.pre_tokenizer.pre_tokenize_str(spelled)
        return [self._ids[part] for word, _ in words for part in self._dropout.segment(word, dropout, rng)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are no UTF-16BE become U+FFFD.

        Raises DataError for an id outside the vocabulary.
        """
        return to_text(self._spelled(ids))

    def stream_decoder(self) -> StreamDecoder:
        """A decoder to push ids into as they are generated."""
        return StreamDecoder(self._spelled)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as ids come, none empty; together they are `decode` of all ids. Raises as `decode` does."""
        decoder = self.stream_decoder()
        for index in ids:
            if piece := decoder.push((index,)):
                yield piece
        if piece := decoder.finish():
            yield piece

    def _spelled(self, ids: Iterable[int]) -> str:
        plain = [int(index) for index in ids]
        wrong = [index for index in plain if not 0 <= index < self.vocab_size]
        if wrong:
            raise DataError(f"text tokenizer: id {wrong[0]} is outside the vocabulary 0..{self.vocab_size - 1}")
        return "".join([self._spellings[index] for index in plain])

    @functools.cached_property
    def _dropout(self) -> Dropout:
        return Dropout(json.loads(self._backend.to_str())["model"]["merges"])

    @functools.cached_property
    def hf(self) -> ErnieElasticTokenizer:
        """The same vocabulary as a Transformers tokenizer, for `save_pretrained`, lm-eval and other engines."""
        # Takes seconds to import, and few callers need it.
        from ernie_elastic.tokenizers.text.hugging_face import ErnieElasticTokenizer

        named = {f"{name}_token": special_text(name) for name in ("pad", "bos", "eos")}
        others = [special_text(name) for name in SPECIAL_NAMES[3:]]
        return ErnieElasticTokenizer(
            tokenizer_object=self._backend,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,
            additional_special_tokens=others,
            **named,
        )

    def save(self, directory: Path | str) -> None:
        """Write `tokenizer.json` and what Transformers' AutoTokenizer needs beside it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.hf.save_pretrained(directory)
        self._backend.save(str(directory / FILE_NAME))

    @staticmethod
    def load(directory: Path | str) -> TextTokenizer:
        """Read what `save` wrote. Raises CheckpointError when it is missing or damaged."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; expected the output of train-tokenizer text")
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"{path} is damaged ({error}); run train-tokenizer text again") from error
        return TextTokenizer(backend)

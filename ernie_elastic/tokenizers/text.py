"""Text to ids and back: byte-level BPE of the `tokenizers` library, as a Transformers fast tokenizer for other tools.

Contract: `decode(encode(text)) == text` for every Unicode text, those that spell out a special token included: only
code that asks for `special` ids can put one into a sequence. Ids 0..9 are the special tokens, then 256 bytes, then
merges. Ids of equal texts and sizes are equal on every machine.

paper: section 2.1 has byte-level BPE (over UTF-16BE). ours: UTF-8, so that the saved `tokenizer.json` is one that
every engine loads; the embedded world is ASCII, where UTF-16BE would double the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ernie_elastic.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_NAMES = ("pad", "bos", "eos", "boi", "eoi", "bov", "eov", "boa", "eoa", "next_frame")
NUM_BYTES = 256
FILE_NAME = "tokenizer.json"


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
        # Text that spells out a special token stays text.
        backend.encode_special_tokens = True
        self._backend = backend
        self.special = SpecialTokens(**ids)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learn merges from `texts`.

        vocab_size counts special tokens and bytes too; fewer ids result when the texts hold no more pairs to merge.
        Raises ConfigError when vocab_size has no room for bytes and special tokens.
        """
        smallest = NUM_BYTES + len(SPECIAL_NAMES)
        if vocab_size < smallest:
            raise ConfigError(
                f"text tokenizer: vocab_size {vocab_size} must be at least {smallest} (bytes and special tokens)"
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[special_text(name) for name in SPECIAL_NAMES],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((_checked(text) for text in texts), trainer)
        return TextTokenizer(backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises DataError for a lone surrogate, which is not Unicode text."""
        return list(self._backend.encode(_checked(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD.

        Raises DataError for an id outside the vocabulary.
        """
        plain = [int(index) for index in ids]
        wrong = [index for index in plain if not 0 <= index < self.vocab_size]
        if wrong:
            raise DataError(f"text tokenizer: id {wrong[0]} is outside the vocabulary 0..{self.vocab_size - 1}")
        return str(self._backend.decode(plain, skip_special_tokens=True))

    @functools.cached_property
    def hf(self) -> PreTrainedTokenizerFast:
        """The same vocabulary as a Transformers tokenizer, for `save_pretrained`, lm-eval and other engines."""
        from transformers import PreTrainedTokenizerFast  # takes seconds to import, and few callers need it

        named = {f"{name}_token": special_text(name) for name in ("pad", "bos", "eos")}
        others = [special_text(name) for name in SPECIAL_NAMES[3:]]
        return PreTrainedTokenizerFast(
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


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text tokenizer: character {error.start} of the text is the lone surrogate "
            f"U+{ord(text[error.start]):04X}, which is not Unicode text; remove it"
        ) from error
    return text

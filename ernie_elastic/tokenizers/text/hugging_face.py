"""The text tokenizer as Transformers knows tokenizers: batches, padding, offsets, chat templates, AutoTokenizer.

Contract: ids equal `TextTokenizer.encode`, and every position that it reports (`offset_mapping`, `char_to_token`, ...)
counts code points of the caller's text, not the byte symbols that stand for some of them. A saved directory loads
with `AutoTokenizer.from_pretrained` once this module is imported, and elsewhere with `trust_remote_code=True`.
ours: the report is silent.
"""

from __future__ import annotations

import bisect
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig, PreTrainedTokenizerFast

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizers.text.utf16_bytes import ByteFallback, literals, to_text

SHIM_MODULE = "ernie_elastic_tokenizer_shim"
SHIM_TEXT = '''"""Loads this directory's tokenizer class from the installed ernie_elastic package."""
try:
    from ernie_elastic.tokenizers.text.hugging_face import ErnieElasticTokenizer
except ImportError as error:
    raise ImportError("this tokenizer needs the package ernie_elastic: run `pip install ernie-elastic`") from error
'''


class ErnieElasticTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that spells code points without a token in bytes on the way in, and undoes it on the way out.

    Text that spells out a special token stays text; `split_special_tokens=False` changes that, and
    `apply_chat_template` does so for what the template itself writes. Raises DataError for a lone surrogate.
    """

    # No __init__ here: Transformers would then rebuild the vocabulary instead of reading tokenizer.json.
    _auto_map: dict[str, list[str | None]] = {  # noqa: RUF012 - the base class reads it as a plain attribute
        "AutoTokenizer": [None, f"{SHIM_MODULE}.ErnieElasticTokenizer"]
    }

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoTokenizer") -> None:
        """Does nothing: Transformers would copy this file instead of the shim into every saved directory."""

    @functools.cached_property
    def _fallback(self) -> ByteFallback:
        return ByteFallback(self.backend_tokenizer.get_vocab(with_added_tokens=False))

    def _encode_plus(  # type: ignore[override]  # hands on by name what it does not read
        self, text: Any, text_pair: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        before, split = self.split_special_tokens, kwargs.get("split_special_tokens")
        split = before if split is None else split
        if kwargs.get("sanitize_control_tokens"):  # calls `encode` for each part of the chat, without the choice
            self.split_special_tokens = split
            try:
                return super()._encode_plus(text, text_pair, **kwargs)
            finally:
                self.split_special_tokens = before
        added = self.added_tokens_decoder.values()
        keep = literals(tuple(token.content for token in added if not (split and token.special)))
        spell = functools.partial(self._fallback.spell, keep=keep)
        spelled, spelled_pair = _each_text(spell, text), _each_text(spell, text_pair)
        if spelled == text and spelled_pair == text_pair:
            return super()._encode_plus(text, text_pair, **kwargs)
        words = kwargs.get("is_split_into_words", False)
        batched = isinstance(text, list | tuple) and (not words or (bool(text) and isinstance(text[0], list | tuple)))
        return_tensors = kwargs.pop("return_tensors", None)
        if not batched:
            text, spelled = [text], [spelled]
            text_pair, spelled_pair = ([text_pair], [spelled_pair]) if text_pair else (None, None)
        data = super()._encode_plus(spelled, spelled_pair, **kwargs)
        points = functools.partial(_Points, fallback=self._fallback, keep=keep)
        samples = data.get("overflow_to_sample_mapping", range(len(text)))
        encodings: list[Any] = []
        for encoding, sample in zip(data.encodings or (), samples, strict=True):
            pair = (text[sample],) if text_pair is None else (text[sample], text_pair[sample])
            sequences = [_each_text(points, item) for item in _sequences(pair, words)]
            encodings.append(CodePointEncoding(encoding, sequences))
        if "offset_mapping" in data:
            data["offset_mapping"] = [encoding.offsets for encoding in encodings]
        if not batched and return_tensors is None and "overflow_to_sample_mapping" not in data:
            single = {key: value[0] if isinstance(value[0], list) else value for key, value in data.items()}
            return BatchEncoding(single, encodings)
        return BatchEncoding(dict(data), encodings, tensor_type=return_tensors)

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        return super()._encode_without_added_tokens(self._fallback.spell(text))

    def _decode(self, *args: Any, **kwargs: Any) -> str:
        return to_text(super()._decode(*args, **kwargs))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens as `convert_ids_to_tokens` gives them."""
        return to_text(super().convert_tokens_to_string(tokens))

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; special tokens that the template writes become ids, those in messages stay text.

        The latter needs Transformers' `sanitize_control_tokens`, which `return_assistant_tokens_mask` excludes.
        """
        if not args and kwargs.get("tokenize", True):
            kwargs["tokenizer_kwargs"] = {"split_special_tokens": False} | (kwargs.get("tokenizer_kwargs") or {})
            known = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
            if "sanitize_control_tokens" in known and not kwargs.get("return_assistant_tokens_mask"):
                kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ConfigError: Transformers' training knows neither the bytes nor the merges that respect them."""
        raise ConfigError("text tokenizer: train_new_from_iterator is not supported; use TextTokenizer.train")

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        shim = Path(save_directory) / f"{SHIM_MODULE}.py"
        shim.write_text(SHIM_TEXT, encoding="utf-8")
        return (*super()._save_pretrained(save_directory, file_names, *args, **kwargs), str(shim))


class ErnieElasticTokenizerConfig(PreTrainedConfig):
    """A name under which AutoTokenizer knows the class; no checkpoint has it."""

    model_type = "ernie_elastic_tokenizer"


AutoTokenizer.register(ErnieElasticTokenizerConfig, ErnieElasticTokenizer, exist_ok=True)


def _each_text(function: Callable[[str], Any], texts: Any) -> Any:
    """The same nesting with the function of each text; anything else is left for Transformers to judge."""
    if isinstance(texts, str):
        return function(texts)
    if isinstance(texts, list | tuple):
        return type(texts)([_each_text(function, item) for item in texts])
    return texts


def _sequences(pair: tuple[Any, ...], words: bool) -> tuple[Any, ...]:
    """The one or two sequences of a sample, which may hold its pair itself."""
    first = pair[0]
    holds_both = isinstance(first, list | tuple) and (not words or (bool(first) and not isinstance(first[0], str)))
    return tuple(first) if len(pair) == 1 and holds_both else pair


class _Points:
    """Where the positions of a spelled text lie in the text that it spells, worked out when first asked."""

    def __init__(self, text: str, fallback: ByteFallback, keep: Any) -> None:
        self._arguments = (fallback, text, keep)

    @functools.cached_property
    def _points(self) -> list[int]:
        fallback, text, keep = self._arguments
        return fallback.code_points(text, keep)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The code points that a stretch of the spelled text touches."""
        return (self._points[start], self._points[end - 1] + 1) if start < end else (start, end)

    def place(self, point: int) -> int:
        """The first position of a code point in the spelled text."""
        return bisect.bisect_left(self._points, point)


class CodePointEncoding:
    """A `tokenizers.Encoding` whose positions count code points of the caller's text; all else is the original's."""

    def __init__(self, encoding: Encoding, sequences: list[Any]) -> None:
        """sequences: for each sequence of the encoding its points, or a list of them, one per given word."""
        self._encoding = encoding
        self._sequences = sequences

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while unpickling there is no original to ask
            raise AttributeError(name)
        return getattr(self._encoding, name)

    def __len__(self) -> int:
        return len(self._encoding)

    def _points(self, sequence: int | None, word: int | None) -> _Points | None:
        if sequence is None or sequence >= len(self._sequences):
            return None
        points = self._sequences[sequence]
        if isinstance(points, list | tuple):
            return points[word] if word is not None and word < len(points) else None
        return points

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(start, end) of each token; bytes of one code point share its place, special tokens are at (0, 0)."""
        ids = zip(self._encoding.sequence_ids, self._encoding.word_ids, self._encoding.offsets, strict=True)
        owners = [(self._points(sequence, word), span) for sequence, word, span in ids]
        return [points.span(*span) if points else span for points, span in owners]

    @property
    def overflowing(self) -> list[CodePointEncoding]:
        """What truncation cut off."""
        return [CodePointEncoding(item, self._sequences) for item in self._encoding.overflowing]

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        """Where a token lies in its sequence, or in its word where words were given."""
        return self.offsets[token_index] if self._encoding.token_to_chars(token_index) is not None else None

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The first token of a code point."""
        return self._encoding.char_to_token(self._place(char_pos, sequence_index), sequence_index)

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The word of a code point."""
        return self._encoding.char_to_word(self._place(char_pos, sequence_index), sequence_index)

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        """Where a word lies in its sequence."""
        span = self._encoding.word_to_chars(word_index, sequence_index)
        points = self._points(sequence_index, word_index)
        return points.span(*span) if span is not None and points else span

    def _place(self, point: int, sequence: int) -> int:
        points = self._points(sequence, None)
        return points.place(point) if points else point

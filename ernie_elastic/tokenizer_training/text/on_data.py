"""`train-tokenizer text --data`: the text tokenizer on any texts, measured and shown on held-out ones.

Contract: the directory holds the tokenizer, `health.json`, `metrics.jsonl` (compression by the number of ids),
`samples.html` (held-out texts cut into tokens), `report.html`, `rejects.txt` and a manifest; it is a function of the
texts and the settings. Merges are learned in one go, so there is no state to go on from.
"""

from __future__ import annotations

import html
import importlib
import json
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.stages import progress, say, stage_output, write_atomic, write_json
from ernie_elastic.tokenizer_training.loop import METRICS_NAME
from ernie_elastic.tokenizer_training.media_batches import Records
from ernie_elastic.tokenizer_training.records import open_records
from ernie_elastic.tokenizer_training.report import SampleSheet, write_report
from ernie_elastic.tokenizer_training.text.on_world import TextTrainingConfig, text_health, train_text_tokenizer
from ernie_elastic.tokenizer_training.train_on_data import DataRun
from ernie_elastic.tokenizers.text.bpe import PATTERN, Segmenter
from ernie_elastic.tokenizers.text.special import SPECIAL_TEXTS
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.training.ranks import world_size

SHOWN_TEXTS, SHOWN_CHARACTERS = 6, 600
SHOWN_DROPOUT = 0.1
MIN_SCRIPT_LETTERS = 200  # a script with fewer has no row of its own
SINGLE_BYTE_LIMIT = 0.2  # share of tokens that are one byte; more means that the vocabulary does not know the texts
COLOURS = ("#cfe8fc", "#fde3c8", "#d6f0da", "#f3d9ee")


@dataclass(frozen=True)
class TextRun(DataRun):
    """Train the text tokenizer on any texts.

    training: vocab_size. max_characters: of all texts, taken evenly over the records; more are left out. segmenter:
    "module:function" that cuts a run of an unspaced script into words, such as "jieba:lcut", so that no token is a
    phrase of several (paper: section 2.1). compare: also train a UTF-8 byte-level BPE of the same size and measure it.
    """

    training: TextTrainingConfig = field(default_factory=lambda: TextTrainingConfig(vocab_size=16_384))
    max_characters: int = 100_000_000
    segmenter: str | None = None
    compare: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_characters < 1:
            raise ConfigError(f"train-tokenizer: max_characters {self.max_characters} must be at least 1")


def load_segmenter(name: str) -> Segmenter:
    """The function that "module:function" names. Raises ConfigError when it is not there."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module runs, and may raise anything
        raise ConfigError(
            f"segmenter {name!r} cannot be imported ({error}); give module:function, such as jieba:lcut, of an "
            "installed package"
        ) from error
    if not callable(found):
        raise ConfigError(
            f"segmenter {name!r} is a {type(found).__name__}; name a function of a text, such as jieba:lcut"
        )

    def segment(run: str) -> list[str]:
        try:
            words = list(found(run))
        except Exception as error:  # another package's function may raise anything
            raise ConfigError(f"segmenter {name!r} failed on {run[:20]!r} ({type(error).__name__}: {error})") from error
        if not all(isinstance(word, str) for word in words):
            raise ConfigError(f"segmenter {name!r} gave {words[:3]!r} for {run[:20]!r}; expected a list of words")
        return words

    return segment


def train_text_on_data(run: TextRun, out: Path | str, overwrite: bool = False) -> dict[str, Any]:
    """Train, write the stage directory to `out`, return its health.

    Raises ConfigError for settings that do not fit, DataError when the texts cannot be used, CheckpointError when `out`
    exists and overwrite is False.
    """
    if world_size() > 1:
        raise ConfigError(
            f"train-tokenizer text: {world_size()} processes were started, and one trains it; leave out torchrun"
        )
    begun = time.perf_counter()
    segmenter = None if run.segmenter is None else load_segmenter(run.segmenter)
    extra: dict[str, Any] = {}
    with stage_output(out, "train-tokenizer-text", run, overwrite=overwrite, extra=extra) as folder:
        rejects: list[str] = []
        train = list(_texts(open_records(run, ("text",), "train"), run, rejects))
        held_out = list(_texts(open_records(run, ("text",), "held-out"), run, rejects))
        if not held_out:
            raise DataError(
                f"train-tokenizer: no text of {run.data} is held out at a share of {run.held_out_share}; raise "
                "--held-out-share or give more texts"
            )
        say(f"text tokenizer: {sum(map(len, train)):,} characters of {len(train)} texts")
        tokenizer, health = train_text_tokenizer(train, run.training, segmenter)
        tokenizer.save(folder)
        again = TextTokenizer.load(folder)
        health |= {"held_out_texts": len(held_out), "rejected_records": len(rejects), **text_health(again, held_out)}
        health |= script_table(again, held_out)
        if run.compare:
            health["utf8_bpe_bytes_per_token"] = utf8_bytes_per_token(train, held_out, again.vocab_size)
        health["single_byte_share"] = single_byte_share(again, held_out)
        health["collapse"] = collapse_findings(again, held_out, health, run.training.vocab_size)
        write_atomic(folder / "rejects.txt", "".join(f"{reason}\n" for reason in rejects))
        write_atomic(folder / "samples.html", samples_page(again, held_out[:SHOWN_TEXTS]))
        write_json(folder / "health.json", health)
        sheet = SampleSheet("Held-out texts cut into tokens, without and with dropout.", page="samples.html")
        curve = compression_curve(again, held_out)
        write_atomic(folder / METRICS_NAME, "".join(json.dumps(record) + "\n" for record in curve))
        write_report(folder, f"Text tokenizer: {run.data}", health, curve, sheet)
        extra["health"] = health
    peer = f", UTF-8 BPE {health['utf8_bpe_bytes_per_token']}" if run.compare else ""
    say(f"text tokenizer: {health['vocabulary']} ids, {health['bytes_per_token']} bytes per token{peer}")
    for line in health["collapse"]:
        say(f"text tokenizer: sign of collapse: {line}")
    say(f"text tokenizer: wrote {out} in {time.perf_counter() - begun:.0f} s; open {Path(out) / 'report.html'}")
    return health


def _texts(records: Records, run: TextRun, rejects: list[str]) -> Iterator[str]:
    """Texts of records taken evenly; those that cannot be read go to `rejects`. Raises DataError when they are many."""
    total, seen = len(records), 0
    bad = 0
    for index in progress(range(total), total=total, desc="texts", unit="record"):
        try:
            texts = [part.text for part in records[index].segments if part.text]
        except DataError as error:
            rejects.append(str(error))
            bad += 1
            if bad > max(1, run.max_reject_share * total):
                raise DataError(
                    f"train-tokenizer: {bad} of the first {index + 1} records cannot be read, more than the limit of "
                    f"{run.max_reject_share:.0%}; the first one: {rejects[0]}"
                ) from error
            continue
        # A budget that every record shares: what is over for one is left out of it alone.
        room = run.max_characters * (index + 1) // total - seen
        for text in texts:
            part = text[: max(0, room)]
            seen, room = seen + len(part), room - len(part)
            if part:
                yield part


def compression_curve(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[dict[str, float]]:
    """UTF-8 bytes per token of texts at growing numbers of ids ("step"), the last one the tokenizer's own."""
    smallest = 256 + len(SPECIAL_TEXTS)
    sizes = sorted({min(smallest << number, tokenizer.vocab_size) for number in range(30)})
    size = sum(len(text.encode()) for text in texts)
    curve = []
    for ids in sizes:
        part = tokenizer.smaller(ids)
        curve.append({"step": ids, "bytes_per_token": round(size / sum(len(part.encode(text)) for text in texts), 4)})
    return curve


def script_of(letter: str) -> str:
    """The script of a letter by the first word of its Unicode name: LATIN, CYRILLIC, CJK, HIRAGANA ..."""
    return unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]


def script_table(tokenizer: TextTokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """UTF-8 bytes per token of the words of each script, and tokens per word ("fertility") of all words."""
    size, tokens, letters = Counter[str](), Counter[str](), Counter[str]()
    words = Counter(word for text in texts for word in text.split())
    for word, count in words.items():
        letter = next((character for character in word if character.isalpha()), None)
        script = "no letters" if letter is None else script_of(letter)
        length = len(tokenizer.encode(" " + word))
        size[script] += count * (len(word.encode()) + 1)
        tokens[script] += count * length
        letters[script] += count * len(word)
    rows = [
        {"script": script, "share": round(letters[script] / letters.total(), 4),
         "bytes_per_token": round(size[script] / tokens[script], 3)}
        for script, _ in letters.most_common() if letters[script] >= MIN_SCRIPT_LETTERS
    ]  # fmt: skip
    return {"fertility": round(tokens.total() / max(1, words.total()), 3), "scripts": rows}


def utf8_bytes_per_token(train: Sequence[str], held_out: Sequence[str], vocab_size: int) -> float:
    """What a byte-level BPE over UTF-8 of the same size and word pattern reaches, trained on the same texts."""
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    peer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TEXTS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    peer.train_from_iterator(train, trainer)
    tokens = sum(len(peer.encode(text, add_special_tokens=False).ids) for text in held_out)
    return round(sum(len(text.encode()) for text in held_out) / tokens, 3)


def single_byte_share(tokenizer: TextTokenizer, texts: Sequence[str]) -> float:
    """Share of the tokens of texts that are one byte: what code points without a token are made of."""
    ids = Counter(index for text in texts for index in tokenizer.encode(text))
    first = len(SPECIAL_TEXTS)
    return round(sum(count for index, count in ids.items() if first <= index < first + 256) / ids.total(), 4)


def collapse_findings(tokenizer: TextTokenizer, texts: Sequence[str], health: dict[str, Any], wanted: int) -> list[str]:
    """Sentences about what is wrong with a text tokenizer; none for a healthy one."""
    bytes_alone = single_byte_share(tokenizer, texts)
    found = []
    if health["round_trip_share"] < 1:
        found.append(f"{1 - health['round_trip_share']:.2%} of the held-out texts do not come back unchanged")
    if bytes_alone > SINGLE_BYTE_LIMIT:
        found.append(f"{bytes_alone:.0%} of the tokens of held-out texts are single bytes: train on such texts")
    if tokenizer.vocab_size < wanted:
        found.append(
            f"the texts hold no more than {tokenizer.vocab_size} of the {wanted} ids asked for: give more text"
        )
    return found


def _shown(tokenizer: TextTokenizer, index: int) -> str:
    """A token as text; a single byte, which is half a code unit, as two hexadecimal digits."""
    byte = index - len(SPECIAL_TEXTS)
    return f"{byte:02x}" if 0 <= byte < 256 else tokenizer.decode([index])


def samples_page(tokenizer: TextTokenizer, texts: Sequence[str]) -> str:
    """One HTML page: the beginnings of texts with a coloured box for each token, without and with dropout."""
    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>Tokens</title><style>",
             "body{font:15px/1.9 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2430}",
             "span{padding:.1rem 0;border-radius:3px;white-space:pre-wrap} h2{font-size:1rem;color:#5b6675}",
             "</style><body><h1>Held-out texts, cut into tokens</h1>"]  # fmt: skip
    for number, text in enumerate(texts):
        shown = text[:SHOWN_CHARACTERS]
        for dropout in (0.0, SHOWN_DROPOUT):
            ids = tokenizer.encode(shown, dropout=dropout, seed=number if dropout else None)
            boxes = "".join(
                f"<span style='background:{COLOURS[i % len(COLOURS)]}'>{html.escape(_shown(tokenizer, index))}</span>"
                for i, index in enumerate(ids)
            )
            parts.append(f"<h2>Text {number + 1}, {len(ids)} tokens, dropout {dropout:g}</h2><p>{boxes}</p>")
    return "\n".join([*parts, "</body></html>\n"])

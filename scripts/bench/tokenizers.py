"""The three tokenizers on the CPU: bytes a token against UTF-8 byte-level BPE, and their speeds.

Text: `utf8_bpe` is the `tokenizers` library's byte-level BPE over UTF-8, with our word pattern, our number of ids and
special tokens, learned from the same texts, so that only the bytes and the merges that respect code points differ.
One vocabulary for all scripts together; `bytes/token` counts UTF-8 bytes for both. Speeds count each one's own tokens,
one text a call, words that occurred before are in the library's cache for both.
The texts are real and need no network: what the machine's programs say in many languages (gettext catalogs) and, for
English, Python's own documentation. They differ by machine, so the rows say how much of what was found, and a script
with too little is left out aloud. What is held out shares no source message with what is learned, in any language.

Visual and audio: random weights, which cost the same as learned ones. A picture is encoded to bits of all scales and
decoded from them; sound is noise, encoded to residual codes of 80 ms and decoded from them. The small tokenizers have
no peer; `neural_tokenizers` has the others' rows.
"""

from __future__ import annotations

import re
import struct
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench import neural_tokenizers
from bench.common import Row, interleave, skip_peer
from ernie_elastic import presets
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.bpe import PATTERN
from ernie_elastic.tokenizers.text.special import SPECIAL_TEXTS
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig

PEERS = ("utf8_bpe", "transformers_janus", "transformers_mimi")
Coder = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]

ENGLISH = "English"
# Languages of the catalogs whose texts make up a script, in equal shares; names as gettext has them.
SCRIPTS = {
    "Latin": ("cs", "de", "es", "fi", "fr", "pl", "tr", "vi"),
    "Cyrillic": ("bg", "ru", "sr", "uk"),
    "Greek": ("el",),
    "Georgian": ("ka",),
    "Hebrew": ("he",),
    "Arabic": ("ar", "fa"),
    "Devanagari": ("hi", "mr", "ne"),
    "Bengali": ("bn", "bn_IN", "as"),
    "Tamil": ("ta",),
    "Thai": ("th",),
    "Hangul": ("ko",),
    "Japanese": ("ja",),
    "Han": ("zh_CN", "zh_TW"),
}
TRAIN_BYTES = 300_000  # UTF-8 bytes to learn from, for each script; a quarter as much is held out
QUICK_TRAIN_BYTES = 60_000
HELD_OUT = 4  # one message in so many is held out
MIN_TRAIN_BYTES, MIN_HELD_OUT_BYTES = 20_000, 5_000  # a script with less is left out
MIN_MESSAGE = 40  # bytes of the English message: shorter ones are labels of buttons
KEY_LETTERS = 30  # messages that begin with the same letters count as one, so that variants stay on one side
VOCABULARIES, QUICK_VOCABULARIES = (4096, 16384), (4096,)

VISUAL = {
    "picture 48x48 (demo's code)": presets.DEMO_CODE,
    "picture 256x256 (patches of 16, 8 scales, 32 bits)": PatchVisualTokenizerConfig(
        image_size=256,
        patch=16,
        num_bits=32,
        scales=tuple((side, side) for side in (1, 2, 3, 4, 6, 8, 12, 16)),
        amplitudes=(0.5,) * 8,
    ),
}
BATCHES = (1, 64)  # pictures
SOUNDS = ((1, 10.0), (16, 2.0))  # waves in a call, seconds of each


@dataclass(frozen=True)
class Texts:
    """Texts of one script: to learn from, and held out. name: the script, and the languages that were found."""

    name: str
    train: list[str]
    held_out: list[str]


def size(texts: Iterable[str]) -> int:
    """UTF-8 bytes."""
    return sum(len(text.encode()) for text in texts)


def locale_folders() -> list[Path]:
    """Folders of gettext catalogs: the system's, Python's and those of installed packages."""
    prefixes = (sys.prefix, sys.base_prefix, "/usr", "/usr/local")
    packages = Path(sysconfig.get_path("purelib"))
    found = [Path(prefix) / "share" / "locale" for prefix in prefixes] + [Path("/usr/share/locale-langpack")]
    found += sorted(packages.glob("*/locale")) + sorted(packages.glob("*/*/locale"))
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def messages(file: Path) -> Iterator[tuple[str, str]]:
    """(English, translation) of a compiled catalog, long messages only; stops where it is damaged or not UTF-8.

    Format: GNU gettext manual, "The Format of GNU MO Files".
    """
    try:
        data = file.read_bytes()
        order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
        if order is None:
            return
        count, *tables = struct.unpack_from(order + "3I", data, 8)
        for place in range(count):
            spans = [struct.unpack_from(order + "2I", data, table + 8 * place) for table in tables]
            if spans[0][0] < MIN_MESSAGE:
                continue
            # Plural forms follow behind a zero byte; a context stands before \x04.
            parts = [data[start : start + length].partition(b"\0")[0] for length, start in spans]
            yield parts[0].rpartition(b"\x04")[2].decode(), parts[1].decode()
    except (OSError, struct.error, UnicodeDecodeError):
        return


def translations(language: str, folders: Iterable[Path]) -> dict[str, str]:
    """Every distinct translated message of a language and the English that it says."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted((folder / language / "LC_MESSAGES").glob("*.mo")):
            # Catalogs of ISO codes are lists of names, not text.
            for english, text in () if file.name.startswith("iso_") else messages(file):
                if text != english:
                    found.setdefault(text, english)
    return found


def documentation() -> dict[str, str]:
    """Paragraphs of Python's language reference, each its own key; none where Python came without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    paragraphs = (part for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
    return {part: part for part in paragraphs if len(part) >= MIN_MESSAGE}


def split(found: dict[str, str], train_bytes: int) -> tuple[list[str], list[str]]:
    """At most train_bytes UTF-8 bytes to learn from and a quarter as many held out; `found` is text to English key.

    Order and side come from a checksum of the key, so they are the same for all languages and on every run.
    """
    budgets = {False: train_bytes, True: train_bytes // HELD_OUT}
    sides: dict[bool, list[str]] = {False: [], True: []}
    hashed = [
        (zlib.crc32(re.sub(r"[\W_]", "", key).lower()[:KEY_LETTERS].encode()), text) for text, key in found.items()
    ]
    for checksum, text in sorted(hashed):
        side = checksum % HELD_OUT == 0
        budgets[side] -= len(text.encode())
        if budgets[side] >= 0:
            sides[side].append(text)
    return sides[False], sides[True]


def corpus(quick: bool) -> list[Texts]:
    """What this machine has, by script; says aloud which scripts are left out."""
    budget, folders = QUICK_TRAIN_BYTES if quick else TRAIN_BYTES, locale_folders()
    candidates = [(ENGLISH, {"Python's documentation": documentation()})]
    for script, languages in SCRIPTS.items():
        by_language = {language: translations(language, folders) for language in languages}
        candidates.append((script, {language: found for language, found in by_language.items() if found}))
    kept = []
    for script, sources in candidates:
        parts = [split(found, budget // len(sources)) for found in sources.values()]
        texts = Texts(
            f"{script} ({' '.join(sources)})", *([text for part in parts for text in part[k]] for k in (0, 1))
        )
        sizes = size(texts.train), size(texts.held_out)
        if sizes[0] < MIN_TRAIN_BYTES or sizes[1] < MIN_HELD_OUT_BYTES:
            reason = f"{sizes[0]} + {sizes[1]} bytes found, {MIN_TRAIN_BYTES} + {MIN_HELD_OUT_BYTES} needed"
            print(f"tokenizers: script {script} is left out: {reason}", file=sys.stderr, flush=True)
        else:
            kept.append(texts)
    return kept


def utf8_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over UTF-8, as the `tokenizers` library has it, with our words and special tokens."""
    backend = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), in_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TEXTS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.encode_special_tokens = True
    return backend


def coders(texts: list[str], vocab_size: int) -> tuple[dict[str, Coder], int]:
    """(encode, decode) of ours and the peer, learned from `texts`, and their number of ids."""
    # Few texts may have too few pairs to merge, for the one or the other: both get what the smaller one reaches.
    ours = TextTokenizer.train(texts, utf8_bpe(texts, vocab_size).get_vocab_size())
    found: dict[str, Coder] = {"ours": (ours.encode, ours.decode)}
    peer = utf8_bpe(texts, ours.vocab_size)
    if peer.get_vocab_size() == ours.vocab_size:
        found["utf8_bpe"] = (lambda text: peer.encode(text, add_special_tokens=False).ids, peer.decode)
    else:
        skip_peer("tokenizers", "utf8_bpe", f"{peer.get_vocab_size()} ids instead of {ours.vocab_size}")
    return found, ours.vocab_size


def encode_all(pairs: dict[str, Coder], texts: list[str]) -> dict[str, list[list[int]]]:
    """Ids of every text by every coder. Raises RuntimeError when one does not give back a text."""
    ids = {name: [encode(text) for text in texts] for name, (encode, _) in pairs.items()}
    for name, (_, decode) in pairs.items():
        for text, item in zip(texts, ids[name], strict=True):
            if decode(item) != text:
                raise RuntimeError(f"tokenizers: {name} does not give back {text[:40]!r}")
    return ids


def text_rows(scripts: list[Texts], vocab_size: int, repeats: int) -> list[Row]:
    """Bytes per token of each script and of all, then encode and decode speed of all held-out texts."""
    everything = Texts(
        "all scripts", [text for item in scripts for text in item.train], [t for item in scripts for t in item.held_out]
    )
    pairs, vocab_size = coders(everything.train, vocab_size)
    rows = []
    for item in [*scripts, everything] if len(scripts) > 1 else scripts:
        ids = encode_all(pairs, item.held_out)
        num_bytes = size(item.held_out)
        value = {name: num_bytes / sum(map(len, lists)) for name, lists in ids.items()}
        case = f"{vocab_size} ids: {item.name}, {size(item.train) / 1e3:.0f} kB, {num_bytes / 1e3:.0f} kB held out"
        rows.append(Row(case, value.pop("ours"), value, "bytes/token", higher_is_better=True))
    for action in ("encode", "decode"):
        variants = {name: text_variant(pair, action, everything.held_out, ids[name]) for name, pair in pairs.items()}
        seconds = interleave(variants, repeats)
        speed = {name: sum(map(len, ids[name])) / value for name, value in seconds.items()}
        rows.append(Row(f"{vocab_size} ids: {action}, all scripts", speed.pop("ours"), speed, "tokens/s", True))
    return rows


def text_variant(pair: Coder, action: str, texts: list[str], ids: list[list[int]]) -> Callable[[int], Any]:
    """What is timed: encoding every text or decoding every list of ids, one a call."""
    encode, decode = pair
    if action == "encode":
        return lambda _: [encode(text) for text in texts]
    return lambda _: [decode(item) for item in ids]


def visual_rows(case: str, config: PatchVisualTokenizerConfig, batch: int, repeats: int) -> list[Row]:
    """Pictures/s of pixels uint8 [N, H, W, 3] to the bits of every scale, and back."""
    tokenizer = PatchVisualTokenizer(config).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.image_size, config.image_size, 3)
    pixels_NHW3 = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def encode() -> list[torch.Tensor]:
        return tokenizer.quantizer.encode(tokenizer.encode(pixels_NHW3)).targets

    bits = encode()
    seconds = interleave(
        {"encode": lambda _: encode(), "decode": lambda _: tokenizer.decode(tokenizer.quantizer.replay(bits).total)},
        repeats,
    )
    return [
        Row(f"{case}, batch {batch}, {action}", batch / value, {}, "pictures/s", True)
        for action, value in seconds.items()
    ]


def random_audio_tokenizer() -> AudioTokenizer:
    """The default sizes with orthonormal directions and code books at random; as built, both are zero."""
    tokenizer = SpectralAudioTokenizer(SpectralAudioTokenizerConfig())
    generator = torch.Generator().manual_seed(0)
    tokenizer.basis_FC.copy_(torch.linalg.qr(torch.randn(tokenizer.basis_FC.shape, generator=generator)).Q)
    tokenizer.codebooks_QVC.copy_(torch.randn(tokenizer.codebooks_QVC.shape, generator=generator))
    return tokenizer.eval()


def audio_rows(tokenizer: AudioTokenizer, count: int, length_s: float, repeats: int) -> list[Row]:
    """Seconds of sound a second of `count` waves of noise, length_s seconds each, to codes and back."""
    generator = torch.Generator().manual_seed(0)
    samples = round(length_s * tokenizer.config.sample_rate)
    waves = list(0.1 * torch.randn(count, samples, generator=generator))
    codes = tokenizer.encode_batch(waves)
    seconds = interleave(
        {"encode": lambda _: tokenizer.encode_batch(waves), "decode": lambda _: tokenizer.decode_batch(codes)}, repeats
    )
    return [
        Row(f"sound, {count} x {length_s:g} s, {action}", count * length_s / value, {}, "s of sound/s", True)
        for action, value in seconds.items()
    ]


def run(quick: bool) -> list[Row]:
    """Text rows for each vocabulary, then two rows (encode, decode) for each picture size and batch, and each sound."""
    torch.manual_seed(0)
    rows: list[Row] = []
    if scripts := corpus(quick):
        for vocab_size in QUICK_VOCABULARIES if quick else VOCABULARIES:
            rows += text_rows(scripts, vocab_size, 3 if quick else 9)
    for case, config in VISUAL.items():
        for batch in BATCHES:
            # One small picture takes less than a millisecond, which needs more repeats.
            rows += visual_rows(case, config, batch, (3 if quick else 20) * (8 if batch == 1 else 1))
    tokenizer = random_audio_tokenizer()
    for count, length_s in SOUNDS:
        rows += audio_rows(tokenizer, count, length_s, 3 if quick else 20)
    return rows + neural_tokenizers.picture_rows(3 if quick else 20) + neural_tokenizers.sound_rows(3 if quick else 9)

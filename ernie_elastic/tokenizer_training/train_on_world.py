"""The stage `train-tokenizer`: one of the three tokenizers, trained on the embedded world, as a stage directory.

Contract: the directory holds what the tokenizer's `load` reads, `health.json` (numbers on the test split, which shows
held-out combinations), samples to look at or listen to, and a manifest with the same numbers. It is a function of
the config; the budget is in steps and samples, never in seconds. This is the only trainer that reads the world.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import soundfile
from PIL import Image

from ernie_elastic.data.world.checkers import score
from ernie_elastic.data.world.facts import WorldConfig
from ernie_elastic.data.world.scenes import (
    WORLD_TASKS,
    draw_clip,
    draw_scene,
    random_clip,
    random_scene,
    world_rng,
    world_sample,
)
from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import Sample
from ernie_elastic.stages import progress, say, stage_output, to_jsonable, write_json
from ernie_elastic.tokenizer_training.audio.spectral import AudioTrainingConfig, audio_health, train_audio_tokenizer
from ernie_elastic.tokenizer_training.text.on_world import TextTrainingConfig, text_health, train_text_tokenizer
from ernie_elastic.tokenizer_training.visual.patch import (  # fmt: skip
    VisualTrainingConfig,
    partial_sums,
    train_visual_tokenizer,
    visual_health,
)
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizerConfig

TokenizerKind = Literal["text", "visual", "audio"]
KINDS: tuple[str, ...] = get_args(TokenizerKind)
DENSE_OBJECTS = 9  # the most that a scene holds; dense scenes teach more patches per picture
SHEET_COLUMNS = 6
SHEET_ZOOM = 3
SOUND_PAIRS = 2


@dataclass(frozen=True)
class TokenizerTrainingConfig:
    """What the stage trains on and how long.

    seed: of data and training. world: the embedded world. text, visual, audio: sizes; *_training: budgets.
    text_samples: records of each task whose texts are read. dense_scenes: pictures of 0 to 9 objects; scenes: of as
    many objects as the tasks have; clips: whose frames are read. phrases: of notes; speeches: of syllables.
    test_samples: records of the test split for each number in health.json.
    """

    seed: int = 0
    world: WorldConfig = field(default_factory=WorldConfig)
    text_training: TextTrainingConfig = field(default_factory=TextTrainingConfig)
    visual: PatchVisualTokenizerConfig = field(default_factory=PatchVisualTokenizerConfig)
    visual_training: VisualTrainingConfig = field(default_factory=VisualTrainingConfig)
    audio: SpectralAudioTokenizerConfig = field(default_factory=SpectralAudioTokenizerConfig)
    audio_training: AudioTrainingConfig = field(default_factory=AudioTrainingConfig)
    text_samples: int = 300
    dense_scenes: int = 4500
    scenes: int = 2500
    clips: int = 900
    phrases: int = 1200
    speeches: int = 800
    test_samples: int = 200

    def __post_init__(self) -> None:
        for name in ("text_samples", "dense_scenes", "scenes", "clips", "phrases", "speeches", "test_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"TokenizerTrainingConfig.{name} is {getattr(self, name)}; it must be at least 1")

    @staticmethod
    def smoke(seed: int = 0) -> TokenizerTrainingConfig:
        """The same tokenizers on a budget of seconds: everything runs, the quality is poor."""
        return TokenizerTrainingConfig(
            seed=seed, visual_training=VisualTrainingConfig(steps=30), audio_training=AudioTrainingConfig(rounds=4),
            text_samples=60, dense_scenes=160, scenes=80, clips=20, phrases=60, speeches=60, test_samples=12,
        )  # fmt: skip

    def resolved(self, kind: TokenizerKind) -> dict[str, Any]:
        """The part of this config that decides tokenizer `kind`, JSON-able: what its manifest stores."""
        own = {
            "text": ("text_training", "text_samples"),
            "visual": ("visual", "visual_training", "dense_scenes", "scenes", "clips"),
            "audio": ("audio", "audio_training", "phrases", "speeches"),
        }[kind]
        names = ("seed", "world", "test_samples", *own)
        return {"kind": kind, **{name: to_jsonable(getattr(self, name)) for name in names}}


def train_tokenizer(
    kind: TokenizerKind, out: Path | str, config: TokenizerTrainingConfig | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Train one tokenizer on the embedded world, write its stage directory to `out`, return its health.

    The stage is named `train-tokenizer-KIND`. Raises ConfigError for an unknown kind or a config whose parts do not
    fit, CheckpointError when `out` exists and overwrite is False.
    """
    if kind not in KINDS:
        raise ConfigError(f"tokenizer kind {kind!r} is not one of {', '.join(KINDS)}")
    config = config or TokenizerTrainingConfig()
    _check_fit(config)
    makers: dict[str, Callable[[TokenizerTrainingConfig, Path], dict[str, Any]]] = {
        "text": _make_text, "visual": _make_visual, "audio": _make_audio,
    }  # fmt: skip
    extra: dict[str, Any] = {}
    start = time.perf_counter()
    resolved = config.resolved(kind)
    with stage_output(out, f"train-tokenizer-{kind}", resolved, overwrite=overwrite, extra=extra) as directory:
        health = makers[kind](config, directory)
        write_json(directory / "health.json", health)
        extra["health"] = health
    for line in _summary(kind, health):
        say(f"{kind} tokenizer: {line}")
    say(f"{kind} tokenizer: wrote {out} in {time.perf_counter() - start:.0f} s")
    return health


def _check_fit(config: TokenizerTrainingConfig) -> None:
    sizes = {config.visual.image_size, config.world.image_size, config.world.video_size}
    if len(sizes) > 1:
        raise ConfigError(
            f"visual tokenizer: image_size {config.visual.image_size}, world pictures {config.world.image_size} and "
            f"videos {config.world.video_size} pixels; one tokenizer codes all, so make them equal"
        )
    rates = (config.audio.sample_rate, config.audio.step_samples), (config.world.sample_rate, config.world.step_samples)
    if rates[0] != rates[1]:
        raise ConfigError(
            f"audio tokenizer: {rates[0][0]} Hz in steps of {rates[0][1]} samples, the world has {rates[1][0]} Hz and "
            f"{rates[1][1]}; make them equal"
        )


def world_texts(config: TokenizerTrainingConfig, split: str, count: int) -> Iterator[str]:
    """The texts of `count` records of every task of the world."""
    for task in WORLD_TASKS:
        for index in range(count):
            for segment in world_sample(task, config.seed, index, split, config.world).segments:
                if segment.text is not None:
                    yield segment.text


def world_pictures(config: TokenizerTrainingConfig) -> Iterator[np.ndarray]:
    """Training pictures uint8 [S, S, 3] and clips [F, S, S, 3]: dense scenes, scenes as in the tasks, clips."""
    world, size = config.world, config.visual.image_size
    for index in range(config.dense_scenes):
        rng = world_rng(config.seed, index, "train", "tokenizer-dense")
        yield draw_scene(random_scene(rng, world, "train", int(rng.integers(DENSE_OBJECTS + 1))), size)
    for index in range(config.scenes):
        yield draw_scene(random_scene(world_rng(config.seed, index, "train", "tokenizer-scene"), world, "train"), size)
    for index in range(config.clips):
        yield draw_clip(random_clip(world_rng(config.seed, index, "train", "tokenizer-clip"), world, "train"), size)


def world_waves(config: TokenizerTrainingConfig) -> Iterator[np.ndarray]:
    """Training sounds float32 [L]: phrases of notes, then of syllables."""
    for task, count in (("text_to_audio", config.phrases), ("text_to_speech", config.speeches)):
        for index in range(count):
            yield _media(world_sample(task, config.seed, index, "train", config.world))


def _media(sample: Sample) -> np.ndarray:
    array = sample.segments[-1].array
    assert array is not None  # the target of these tasks is a picture, clip or sound
    return array


def _test_samples(config: TokenizerTrainingConfig, task: str, world: WorldConfig | None = None) -> list[Sample]:
    indices = range(config.test_samples)
    return [world_sample(task, config.seed, index, "test", world or config.world) for index in indices]


def _agreement(samples: list[Sample], outputs: list[np.ndarray], world: WorldConfig, key: str = "correct") -> float:
    """Share of outputs that a checker reads as the sample's truth; key "all" asks for every attribute."""
    pairs = zip(samples, outputs, strict=True)
    right = [score(sample.task, sample.truth, output, world)[key] for sample, output in pairs]
    return round(float(np.mean(right)), 4)


def _make_text(config: TokenizerTrainingConfig, directory: Path) -> dict[str, Any]:
    tokenizer, health = train_text_tokenizer(world_texts(config, "train", config.text_samples), config.text_training)
    tokenizer.save(directory)
    again = TextTokenizer.load(directory)
    return health | text_health(again, world_texts(config, "test", config.test_samples))


def _make_visual(config: TokenizerTrainingConfig, directory: Path) -> dict[str, Any]:
    total = config.dense_scenes + config.scenes + config.clips
    pictures = progress(world_pictures(config), total=total, desc="drawing", unit="picture")
    tokenizer, health = train_visual_tokenizer(pictures, config.visual, config.visual_training, config.seed)
    tokenizer.save(directory)
    columns: list[np.ndarray] = []
    frames: list[np.ndarray] = []
    for count in range(config.world.min_objects, config.world.max_objects + 1):
        world = dataclasses.replace(config.world, min_objects=count, max_objects=count)
        samples = _test_samples(config, "text_to_image", world)
        pixels = np.stack([_media(sample) for sample in samples])
        decoded = list(tokenizer.reconstruct(pixels).numpy())
        for name, key in (("checker", "correct"), ("checker_all", "all")):
            health[f"{name}_{count}_object"] = _agreement(samples, decoded, world, key)
        columns += list(pixels[: SHEET_COLUMNS // 2])
        frames.append(pixels)
    clips = _test_samples(config, "text_to_video")
    clip_frames = np.stack([_media(sample) for sample in clips])
    flat = clip_frames.reshape(-1, *clip_frames.shape[2:])
    decoded = list(tokenizer.reconstruct(flat).numpy().reshape(clip_frames.shape))
    for name, key in (("checker", "correct"), ("checker_all", "all")):
        health[f"{name}_video"] = _agreement(clips, decoded, config.world, key)
    columns += list(clip_frames[0])
    health |= visual_health(tokenizer, np.concatenate([*frames, flat]))
    _write_sheet(tokenizer, np.stack(columns), directory / "samples.png")
    return health


def _write_sheet(tokenizer: VisualTokenizer, pixels_NHW3: np.ndarray, path: Path) -> None:
    """A row of originals, and below it what 1, 2, ... scales decode to."""
    codes = tokenizer.quantizer.encode(tokenizer.encode(pixels_NHW3))
    rows = [pixels_NHW3]
    rows += [tokenizer.decode(feature).numpy() for feature in partial_sums(tokenizer.quantizer, codes.targets)]
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray(sheet.repeat(SHEET_ZOOM, axis=0).repeat(SHEET_ZOOM, axis=1)).save(path)


def _make_audio(config: TokenizerTrainingConfig, directory: Path) -> dict[str, Any]:
    sounds = progress(world_waves(config), total=config.phrases + config.speeches, desc="singing", unit="phrase")
    tokenizer, health = train_audio_tokenizer(sounds, config.audio, config.audio_training, config.seed)
    tokenizer.save(directory)
    waves: list[np.ndarray] = []
    for name, task in (("notes", "text_to_audio"), ("syllables", "text_to_speech")):
        samples = _test_samples(config, task)
        own = [_media(sample) for sample in samples]
        codes = tokenizer.encode_batch(own)
        decoded = [wave.numpy() for wave in tokenizer.decode_batch(codes)]
        coarse = [wave.numpy() for wave in tokenizer.decode_batch([item[:, :1] for item in codes])]
        health[f"checker_{name}"] = _agreement(samples, decoded, config.world)
        health[f"checker_{name}_level_0"] = _agreement(samples, coarse, config.world)
        _write_sounds(tokenizer, name, list(zip(own, decoded, strict=True))[:SOUND_PAIRS], directory)
        waves += own
    return health | audio_health(tokenizer, waves)


def _write_sounds(
    tokenizer: AudioTokenizer, name: str, pairs: list[tuple[np.ndarray, np.ndarray]], directory: Path
) -> None:
    for index, pair in enumerate(pairs):
        for which, wave in zip(("original", "decoded"), pair, strict=True):
            path = directory / f"{name}-{index}-{which}.wav"
            soundfile.write(path, wave, tokenizer.config.sample_rate, subtype="PCM_16")


def _summary(kind: str, health: dict[str, Any]) -> list[str]:
    """What the stage prints of a tokenizer's health."""
    if kind == "text":
        return [
            f"{health['vocabulary']} ids, {health['bytes_per_token']} bytes per token, "
            f"{100 * health['round_trip_share']:.1f} % of test texts come back unchanged"
        ]
    agreement = ", ".join(
        f"{name.removeprefix('checker_').replace('_', ' ')} {100 * value:.1f} %"
        for name, value in health.items()
        if name.startswith("checker_")
    )
    lines = [f"checkers agree on reconstructions: {agreement}"]
    if kind == "visual":
        scales = " ".join(f"{value:.1f}" for value in health["psnr_db_by_scales"])
        entropy = " ".join(f"{value:.2f}" for value in health["bit_entropy_by_scale"])
        lines.append(f"PSNR {health['psnr_db']} dB ({scales} after each scale)")
        lines.append(
            f"{health['bits_per_picture']} bits per picture, {100 * health['bits_used']:.1f} % in use, "
            f"entropy of a bit by scale {entropy}"
        )
        return lines
    for number, level in enumerate(health["levels"]):
        lines.append(
            f"level {number}: perplexity {level['perplexity']}, {100 * level['used_share']:.0f} % of codes in use, "
            f"{level['snr_db']} dB after it"
        )
    return lines

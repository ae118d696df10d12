"""The command line of `train-tokenizer`: the small tokenizers of the demo, or with --data the full ones on any data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ernie_elastic.errors import ConfigError

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def train_small(
    kind: Annotated[Literal["text", "visual", "audio"], tyro.conf.Positional],
    /,
    *,
    out: Path,
    size: Literal["full", "smoke"] = "full",
    seed: int = 0,
    overwrite: Flag = False,
) -> None:
    """Train one tokenizer: a small one on the embedded world, or with --data DATA a full one on any data.

    DATA is a directory of files, a Hugging Face dataset directory, a Parquet or JSONL file, or "world". The options of
    the full ones: `ernie-elastic train-tokenizer visual --data DATA --help`; text, audio and refiner likewise.

    Args:
        kind: text (byte-level BPE), visual (multi-scale bits) or audio (residual codebooks); with --data also refiner.
        out: directory to write.
        size: full, or smoke for a quick look.
        seed: of the world and the training.
        overwrite: replace `out` if it exists.
    """
    import dataclasses

    from ernie_elastic.presets import debug, demo
    from ernie_elastic.tokenizer_training.train_on_world import train_tokenizer as train

    config = debug().tokenizers if size == "smoke" else demo().tokenizers
    train(kind, out, dataclasses.replace(config, seed=seed), overwrite=overwrite)


def parse_train_tokenizer(prog: str, arguments: Sequence[str]) -> Callable[[], None]:
    """The training that the arguments mean, not yet begun. Raises ConfigError for a kind that does not exist."""
    given = list(arguments)
    if not any(word == "--data" or word.startswith("--data=") for word in given):
        if given[:1] == ["refiner"]:
            raise ConfigError(f"{prog} refiner needs --data: a directory of pictures, a dataset, or world")
        return _deferred(train_small, prog, given)
    kind = given[0]
    if kind not in _KINDS:
        raise ConfigError(f"{prog}: {kind!r} is not one of {', '.join(_KINDS)}; it comes before the options")
    return _deferred(_trainer(kind), f"{prog} {kind}", given[1:])


def import_audio_codec(source: Path, out: Path, num_levels: int | None, overwrite: bool) -> None:
    """Write a Transformers codec as an audio tokenizer's stage directory.

    Raises CheckpointError when source is no Mimi, EnCodec or DAC model or `out` exists, ConfigError for a number of
    levels that the model has not.
    """
    from ernie_elastic.stages import say, stage_output
    from ernie_elastic.tokenizers.audio.adapters import adapter_from_directory

    tokenizer = adapter_from_directory(source, num_levels)
    settings = {"kind": "audio", "source": str(source), "num_levels": tokenizer.num_levels}
    with stage_output(out, "train-tokenizer-audio", settings, overwrite=overwrite) as folder:
        tokenizer.save(folder)
    rate = tokenizer.config.sample_rate / tokenizer.config.step_samples
    say(
        f"import-codec: {tokenizer.architecture}, {tokenizer.config.sample_rate} Hz, {rate:g} steps a second, "
        f"{tokenizer.num_levels} levels of {tokenizer.codebook_size} codes; wrote {out}"
    )


def _deferred(function: Callable[..., None], prog: str, arguments: list[str]) -> Callable[[], None]:
    import functools

    @functools.wraps(function)
    def call_later(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: function(*args, **kwargs)

    return tyro.cli(call_later, prog=prog, args=arguments)


_ARGUMENTS = """Args:
    run: what to train on, and how.
    out: directory to write.
    overwrite: replace `out` if it exists.
"""


def _trainer(kind: str) -> Callable[..., None]:
    """The function whose signature is the command line of one kind; modules are imported for that kind alone."""
    run_class, train = _KINDS[kind]()

    def command(run: Any, *, out: Path, overwrite: bool = False) -> None:
        train(run, out, overwrite)

    # Set by hand, since the class of the run is known here only.
    about = [inspect.getdoc(run_class) or "", (inspect.getdoc(run_class.__mro__[1]) or "").partition("\n\n")[2]]
    command.__doc__ = "\n\n".join([*about, _ARGUMENTS])
    command.__annotations__ = {"run": Annotated[run_class, tyro.conf.arg(name="")], "out": Path, "overwrite": Flag}
    return command


Train = Callable[[Any, Path, bool], Any]


def _text() -> tuple[Any, Train]:
    from ernie_elastic.tokenizer_training.text.on_data import TextRun, train_text_on_data

    return TextRun, train_text_on_data


def _visual() -> tuple[Any, Train]:
    from ernie_elastic.tokenizer_training.train_on_data import train_on_data
    from ernie_elastic.tokenizer_training.visual.recipe import VisualRecipe, VisualRun

    return VisualRun, lambda run, out, overwrite: train_on_data(VisualRecipe(run), run, out, overwrite)


def _audio() -> tuple[Any, Train]:
    from ernie_elastic.tokenizer_training.audio.recipe import AudioRecipe, AudioRun
    from ernie_elastic.tokenizer_training.train_on_data import train_on_data

    return AudioRun, lambda run, out, overwrite: train_on_data(AudioRecipe(run), run, out, overwrite)


def _refiner() -> tuple[Any, Train]:
    from ernie_elastic.tokenizer_training.refiner.recipe import RefinerRecipe, RefinerRun
    from ernie_elastic.tokenizer_training.train_on_data import train_on_data

    return RefinerRun, lambda run, out, overwrite: train_on_data(RefinerRecipe(run), run, out, overwrite)


_KINDS = {"text": _text, "visual": _visual, "audio": _audio, "refiner": _refiner}

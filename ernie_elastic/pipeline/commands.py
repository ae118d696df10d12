"""What each subcommand does: a thin function that calls one public function. Heavy imports wait inside.

The signatures are the command line: positional-only arguments first, options after.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ernie_elastic.errors import ConfigError

Source = Annotated[Path | None, tyro.conf.Positional]
Directory = Annotated[Path, tyro.conf.Positional]
Preset = Literal["debug", "demo", "small", "ablation_3b", "ultra_sparse"]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def demo(
    *, size: Literal["full", "smoke"] = "full", run_dir: Path | None = None, ranks: int = 2, seed: int = 0
) -> None:
    """Run the whole pipeline on the embedded world.

    Args:
        size: full takes about ten minutes on two cores; smoke shows the way in one or two.
        run_dir: where the run lives (default: runs/demo, or runs/smoke).
        ranks: processes to train with.
        seed: of tokenizers, data and training.
    """
    from ernie_elastic.pipeline.demo.run import run_demo

    run_demo(size, run_dir, ranks, seed)


def train_tokenizer(run: Callable[[], None]) -> None:
    """Train the text, visual or audio tokenizer, or the refiner."""
    run()


def _parse_train_tokenizer(prog: str, arguments: list[str]) -> Callable[[], None]:
    from ernie_elastic.pipeline.train_tokenizer import parse_train_tokenizer

    run = parse_train_tokenizer(prog, arguments)
    return lambda: train_tokenizer(run)


train_tokenizer.parse = _parse_train_tokenizer  # type: ignore[attr-defined]  # its options depend on the kind


def import_codec(source: Directory, /, *, out: Path, num_levels: int | None = None, overwrite: Flag = False) -> None:
    """Make an audio tokenizer of a Transformers Mimi, EnCodec or DAC directory; the weights are copied.

    Args:
        source: the model's directory.
        out: directory to write.
        num_levels: codebooks to use (default: all that the model has).
        overwrite: replace `out` if it exists.
    """
    from ernie_elastic.pipeline.train_tokenizer import import_audio_codec

    import_audio_codec(source, out, num_levels, overwrite)


def prepare_data(
    *,
    tokenizers: Path,
    out: Path,
    data: str = "world",
    kinds: tuple[Literal["text", "image", "video", "audio"], ...] = ("text", "image", "video", "audio"),
    num_records: int | None = None,
    row_length: int = 192,
    row_frames: int = 0,
    understanding_share: float = 0.5,
    video_frames: int = 8,
    text_dropout: float = 0.0,
    seed: int = 0,
    max_reject_share: float = 0.01,
    records_per_shard: int = 2000,
    num_workers: int = 2,
    preset: Preset = "demo",
    overwrite: Flag = False,
) -> None:
    """Tokenise and pack records: of any data, or of the embedded world.

    A run that was cut off goes on where it was when the same command runs again.

    Args:
        tokenizers: directory that holds text/, visual/ and audio/.
        out: directory to write.
        data: a directory of files, a Hugging Face dataset, tars, or a Parquet, JSONL, CSV or tar file; or world.
        kinds: of the media that are read.
        num_records: so many of the first records (default: all, or 20000 of the world).
        row_length: positions of a packed row.
        row_frames: frames of pictures and clips that a row may read; 0 is any number.
        understanding_share: of the pairs of text and media, those whose media are read; from the others they are drawn.
        video_frames: most frames of a clip.
        text_dropout: BPE dropout of the texts, 0.1 is usual; 0 is none.
        seed: of the world's records, of roles and of dropout.
        max_reject_share: stop when more of the records than this cannot be used.
        records_per_shard: records in one file; a killed run loses at most one file for each worker.
        num_workers: processes.
        preset: whose model will read the rows; it decides how long documents are.
        overwrite: replace `out` if it exists.
    """
    from ernie_elastic.data.prepare.records import WORLD
    from ernie_elastic.data.prepare.stage import PrepareConfig
    from ernie_elastic.data.prepare.stage import prepare_data as prepare
    from ernie_elastic.data.prepare.tokenise import Tokenizers, world_of
    from ernie_elastic.modeling.document_layout import layout_of
    from ernie_elastic.presets import PRESETS

    loaded = Tokenizers.load(tokenizers)
    config = PrepareConfig(
        num_records=(20_000 if data == WORLD else 0) if num_records is None else num_records,
        seed=seed,
        row_length=row_length,
        records_per_shard=records_per_shard,
        num_workers=num_workers,
        max_reject_share=max_reject_share,
        text_dropout=text_dropout,
        world=world_of(loaded),
        data=data,
        kinds=kinds,
        row_frames=row_frames,
        understanding_share=understanding_share,
        video_frames=video_frames,
    )
    layout = layout_of(PRESETS[preset]().model.to_config(loaded))
    prepare(tokenizers, out, config, layout, overwrite=overwrite)


def pretrain(run: Any) -> None:
    """Train (or go on with) a preset, making the tokenizers and packed data that it lacks."""
    from ernie_elastic.pipeline.pretrain import run_pretrain

    run_pretrain(*run)


def _parse_pretrain(prog: str, arguments: list[str]) -> Callable[[], None]:
    from ernie_elastic.pipeline.pretrain import parse_run

    run = parse_run(prog, arguments)
    return lambda: pretrain(run)


pretrain.parse = _parse_pretrain  # type: ignore[attr-defined]  # presets with nested overrides parse on their own


def extract(
    source: Source = None,
    /,
    *,
    out: Path,
    depth: int | None = None,
    experts: int | None = None,
    topk: int | None = None,
    topk_per_layer: tuple[int, ...] | None = None,
    layers: tuple[int, ...] | None = None,
    layer_policy: Literal["uniform", "prefix", "random"] = "uniform",
    expert_policy: Literal["mass", "random", "first"] = "mass",
    data: Path | None = None,
    budget: str | None = None,
    drop_modality: Literal["audio"] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    seed: int = 0,
    overwrite: Flag = False,
) -> None:
    """Cut a smaller model out of an elastic one; omitted sizes mean full.

    Args:
        source: a run, a checkpoint step or a sub-model (default: the newest run).
        out: directory to write.
        depth: layers to keep, evenly spaced among those that may be dropped.
        experts: experts to keep in every layer.
        topk: experts per token.
        topk_per_layer: experts per token of each kept layer, instead of topk.
        layers: the very layers to keep, instead of depth.
        layer_policy: which layers depth keeps.
        expert_policy: mass keeps the experts that were routed most.
        data: packed shards to measure expert importance (and, with a budget, losses) on.
        budget: weight bytes such as 4GiB or 800KiB; searches the measured Pareto front instead of depth and experts.
        drop_modality: audio removes the audio heads and frees their layers.
        dtype: of the stored weights.
        seed: of the random policies.
        overwrite: replace `out` if it exists.
    """
    from ernie_elastic.elastic.extract import Request, extract_submodel
    from ernie_elastic.elastic.search import extract_within_budget

    drop_audio = drop_modality == "audio"
    request = Request(depth, experts, topk, topk_per_layer, layers, layer_policy, expert_policy, seed, drop_audio)
    if budget is None:
        extract_submodel(source, out, request, data, dtype, overwrite)
    elif any(chosen is not None for chosen in (depth, experts, layers, topk_per_layer)):
        raise ConfigError(
            "--budget chooses depth and experts itself; leave out --depth, --experts, --layers and --topk-per-layer"
        )
    else:
        extract_within_budget(source, out, budget, request, data, dtype, overwrite)


def compress(
    source: Directory,
    /,
    *,
    out: Path,
    purpose: Annotated[Literal["serving", "storage"], tyro.conf.arg(name="for")] = "serving",
    layout: Literal["dense_plane", "tca_tbe", "entropy_coded"] | None = None,
    overwrite: Flag = False,
) -> None:
    """Compress a Hugging Face directory with BF16 weights; every tensor is decoded and compared before success.

    A run that was cut off goes on where it was when the same command runs again.

    Args:
        source: the directory (a run or a checkpoint step means its model).
        out: directory to write.
        purpose: serving: packed for the kernels when loaded; storage: 5 % smaller, for disks and downloads.
        layout: a stored layout by name, in place of the one that --for means.
        overwrite: replace `out` if it exists.
    """
    from ernie_elastic.compression.codec import LAYOUT_FOR
    from ernie_elastic.compression.directory import compress_directory
    from ernie_elastic.compression.summary import compress_lines
    from ernie_elastic.model_directories import resolve_model_dir
    from ernie_elastic.stages import say

    model, chosen = resolve_model_dir(source), layout or LAYOUT_FOR[purpose]
    say("\n".join(compress_lines(compress_directory(model, out, layout=chosen, overwrite=overwrite))))


def decompress(source: Directory, /, *, out: Path, overwrite: Flag = False) -> None:
    """Restore the identical files of a compressed directory.

    Args:
        source: a directory that `compress` wrote.
        out: directory to write.
        overwrite: replace `out` if it exists.
    """
    from ernie_elastic.compression.restore import decompress_directory
    from ernie_elastic.compression.summary import decompress_lines
    from ernie_elastic.stages import say

    say("\n".join(decompress_lines(decompress_directory(source, out, overwrite=overwrite))))


def info(source: Directory, /) -> None:
    """Print what a compressed directory holds, per tensor and in total.

    Args:
        source: a directory that `compress` wrote.
    """
    from ernie_elastic.compression.restore import directory_info
    from ernie_elastic.compression.summary import info_lines
    from ernie_elastic.stages import say

    say("\n".join(info_lines(directory_info(source))))


def generate(
    source: Source = None,
    /,
    *,
    prompt: str | None = None,
    image: Path | None = None,
    video: Path | None = None,
    audio: Path | None = None,
    to: Literal["text", "image", "video", "audio"] = "text",
    out: Path | None = None,
    temperature: float = 0.0,
    bit_temperature: float = 0.8,
    seed: int = 0,
    max_new_tokens: int = 64,
    refine: Path | None = None,
) -> None:
    """Generate text, an image, a video or a sound from a prompt and media.

    Args:
        source: a run, a step, a sub-model or a compressed directory (default: the newest run).
        prompt: text of the prompt.
        image: a picture to read.
        video: frames side by side in one picture, or an animated GIF, or a video file.
        audio: a sound file to read.
        to: what to generate.
        out: file for media (.png, .gif, .wav).
        temperature: of text and audio choices; 0 takes the likeliest one.
        bit_temperature: of the bits of pictures and frames; 0 takes the likelier value of each.
        seed: of the draws.
        max_new_tokens: limit of the answer's text.
        refine: directory of a refiner that makes pictures and frames larger (train-tokenizer refiner).
    """
    from ernie_elastic.pipeline.generate import run_generate

    media = {"image": image, "video": video, "audio": audio}
    run_generate(
        source,
        prompt,
        {k: v for k, v in media.items() if v is not None},
        to,
        out,
        temperature,
        bit_temperature,
        seed,
        max_new_tokens,
        refine,
    )


def evaluate(
    source: Source = None, /, *, out: Path, num_samples: int = 200, seed: int = 0, overwrite: Flag = False
) -> None:
    """Score a model on held-out records of the embedded world, every accuracy beside its chance level.

    Args:
        source: a run, a step, a sub-model or a compressed directory (default: the newest run).
        out: directory to write.
        num_samples: records per task.
        seed: of the records.
        overwrite: replace `out` if it exists.
    """
    from ernie_elastic.pipeline.evaluate import run_evaluate

    run_evaluate(source, out, num_samples, seed, overwrite)


def routing(
    source: Source = None, /, *, out: Path, data: Path | None = None, num_rows: int = 64, overwrite: Flag = False
) -> None:
    """Show how experts are routed, per task and layer: index.html, figures, statistics.json.

    Args:
        source: a run, a step, a sub-model or a compressed directory (default: the newest run).
        out: directory to write.
        data: packed shards to route (default: the run's own).
        num_rows: packed rows to route.
        overwrite: replace `out` if it exists.
    """
    from ernie_elastic.pipeline.routing import run_routing

    run_routing(source, out, data, num_rows, overwrite)


def study(
    name: Annotated[Literal["elastic"], tyro.conf.Positional],
    /,
    *,
    out: Path = Path("runs/study-elastic"),
    size: Literal["full", "smoke"] = "full",
    seeds: int = 3,
    workers: int = 2,
    arms: tuple[str, ...] = (),
    tokenizers: Path | None = None,
    steps: int | None = None,
) -> None:
    """Train elastic and other models on the same data and compare their held-out losses at every size.

    Args:
        name: the study.
        out: directory of the runs, the tables and the figure; a study that was cut off goes on there.
        size: full takes about forty minutes on two cores with three seeds; smoke shows the way in a minute.
        seeds: so many runs of every arm.
        workers: runs at the same time.
        arms: names of the ways to train (default: all).
        tokenizers: directory that holds text/, visual/ and audio/ (default: they are trained).
        steps: optimizer steps of every arm (default: 240, or 4); more of them read more records.
    """
    from ernie_elastic.pipeline.study.elastic import run_study

    run_study(size, out, tuple(range(seeds)), workers, arms, tokenizers, steps)


def doctor() -> None:
    """Print what this machine can run, and why not."""
    from ernie_elastic.pipeline.doctor import print_doctor

    print_doctor()


__all__ = [
    "compress",
    "decompress",
    "demo",
    "doctor",
    "evaluate",
    "extract",
    "generate",
    "import_codec",
    "info",
    "prepare_data",
    "pretrain",
    "routing",
    "train_tokenizer",
]

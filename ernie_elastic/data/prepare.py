"""The stage `prepare-data`: records to packed shards, with a report of what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ernie_elastic.data.layout import Layout, document_length
from ernie_elastic.data.packing import pack_lengths, packing_efficiency
from ernie_elastic.data.shards import ROWS_FILE, write_rows, write_shard
from ernie_elastic.data.tokenise import Tokenizers, check_sample, tokenise
from ernie_elastic.data.world import WorldConfig, world_records
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample
from ernie_elastic.stages import progress, say, stage_output

STAGE = "prepare-data"

# Shares of the tasks among the records; ours: pictures need most of the positions that a short run can afford.
DEFAULT_WEIGHTS = {
    "image_to_text": 0.16,
    "text_to_image": 0.30,
    "video_to_text": 0.15,
    "text_to_video": 0.17,
    "audio_to_text": 0.03,
    "text_to_audio": 0.05,
    "text": 0.14,
}


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare.

    num_records: documents of the training split of the embedded world. task_weights: their shares.
    row_length: positions of a packed row. records_per_shard and num_workers only change speed and file sizes.
    max_reject_share: the stage stops when more of the records than this cannot be used. sound_features: also store what
    a model with audio_input "continuous" reads (256 bytes a step beside 6 of codes, at the default sizes).
    text_dropout: BPE dropout of all texts (paper: section 2.1, in training only; these shards are for training).
    """

    num_records: int = 20000
    seed: int = 0
    row_length: int = 192
    records_per_shard: int = 2000
    num_workers: int = 2
    max_reject_share: float = 0.01
    sound_features: bool = True
    text_dropout: float = 0.0
    world: WorldConfig = field(default_factory=WorldConfig)
    task_weights: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))


def prepare_data(
    tokenizers_dir: Path, out: Path, config: PrepareConfig, layout: Layout, overwrite: bool = False
) -> dict[str, Any]:
    """Tokenise and pack the world's training records into `out`; returns (and prints) the report.

    layout fixes how long a document is. Raises DataError when too many records are rejected, CheckpointError when
    `out` exists.
    """
    if config.num_records < 1:
        raise ConfigError(f"prepare-data: num_records {config.num_records} must be at least 1")
    if not 0 <= config.text_dropout < 1:
        raise ConfigError(f"prepare-data: text_dropout {config.text_dropout} must lie in [0, 1)")
    extra: dict[str, Any] = {}
    tokens: Counter[str] = Counter()
    lengths: list[int] = []
    rejects: list[str] = []
    with stage_output(out, STAGE, config, parent=None, overwrite=overwrite, extra=extra) as directory:
        jobs = [
            (str(tokenizers_dir), str(directory / f"shard-{number:05d}.safetensors"), config, layout, start)
            for number, start in enumerate(range(0, config.num_records, config.records_per_shard))
        ]
        with progress(total=config.num_records, desc="prepare-data", unit="rec") as bar:
            for shard_lengths, shard_tokens, shard_rejects in _run(jobs, config.num_workers):
                lengths += shard_lengths
                tokens.update(shard_tokens)
                rejects += shard_rejects
                bar.update(len(shard_lengths) + len(shard_rejects))
        if len(rejects) > config.max_reject_share * config.num_records:
            raise DataError(
                f"prepare-data: {len(rejects)} of {config.num_records} records cannot be used, more than the limit of "
                f"{config.max_reject_share:.0%}; the first one: {rejects[0]}"
            )
        rows = pack_lengths(lengths, config.row_length)
        write_rows(directory / ROWS_FILE, rows)
        (directory / "rejects.txt").write_text("".join(f"{reason}\n" for reason in rejects))
        report = {
            "records": len(lengths),
            "rejected": len(rejects),
            "rows": len(rows),
            "row_length": config.row_length,
            "positions": sum(lengths),
            "packing_efficiency": packing_efficiency(lengths, rows, config.row_length),
            "tokens": dict(tokens),
        }
        extra.update(report)
    say(
        f"prepare-data: {report['records']} records, {report['rejected']} rejected, {report['positions']} positions in "
        f"{report['rows']} rows of {config.row_length}: packing efficiency {report['packing_efficiency']:.1%}; "
        f"wrote {out}"
    )
    return report


Job = tuple[str, str, PrepareConfig, Layout, int]
Result = tuple[list[int], dict[str, int], list[str]]


def _run(jobs: list[Job], num_workers: int) -> Iterator[Result]:
    if num_workers <= 1 or len(jobs) == 1:
        yield from map(_make_shard, jobs)
        return
    with get_context("spawn").Pool(min(num_workers, len(jobs))) as pool:
        yield from pool.imap(_make_shard, jobs)


def _make_shard(job: Job) -> Result:
    import torch

    tokenizers_dir, path, config, layout, start = job
    torch.set_num_threads(1)
    tokenizers = Tokenizers.load(tokenizers_dir)
    count = min(config.records_per_shard, config.num_records - start)
    samples = list(world_records(config.task_weights, config.seed, "train", start, count, config.world))
    kept, rejects = _kept(samples, tokenizers)
    documents = tokenise(kept, tokenizers, config.text_dropout, config.seed)
    write_shard(Path(path), documents, config.sound_features)
    tokens: Counter[str] = Counter()
    for document in documents:
        for part in document:
            tokens[f"{part.kind}_{part.role}"] += len(part)
    return [document_length(document, layout) for document in documents], dict(tokens), rejects


def _kept(samples: list[Sample], tokenizers: Tokenizers) -> tuple[list[Sample], list[str]]:
    """The samples that the tokenizers can read, and why the others are left out."""
    kept, rejects = [], []
    for sample in samples:
        try:
            check_sample(sample, tokenizers)
        except DataError as error:
            rejects.append(str(error))
        else:
            kept.append(sample)
    return kept, rejects

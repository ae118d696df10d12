"""The stage `prepare-data`: records to packed shards, with a report of what became of them.

Contract: the output is a function of records, tokenizers and config, with any number of workers. A run that was cut off
at any moment goes on at its finished shards and leaves the bytes that an uninterrupted one does (but for the time in
the manifest).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ernie_elastic
from ernie_elastic.data.groups.layout import Layout
from ernie_elastic.data.packed.packing import pack_lengths, packing_efficiency
from ernie_elastic.data.packed.shards import ROWS_FILE, STAGE, write_rows
from ernie_elastic.data.prepare.records import WORLD, WorldSource, open_data
from ernie_elastic.data.prepare.shard_job import Job, Note, ShardMaker, ShardSettings
from ernie_elastic.data.prepare.shard_pool import run_jobs
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.data.prepare.tokenizer_service import tokenizers_hash
from ernie_elastic.data.sources.base import Source
from ernie_elastic.data.world.scenes import WorldConfig
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.resumable import PartialOutput, resumable_output
from ernie_elastic.schema import SegmentKind
from ernie_elastic.stages import progress, say, write_atomic, write_json

KINDS: tuple[SegmentKind, ...] = ("text", "image", "video", "audio")
REPORT_FILE, REJECTS_FILE = "report.json", "rejects.txt"
MAX_SHARDS = 100_000  # their names have five digits, and are read in the order of names
# Of a config: they change no byte of a shard, so that another value of them goes on with the same ones.
UNDECISIVE = ("num_workers", "max_reject_share")

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

    data: "world" for the embedded world, or a directory of files, a Hugging Face dataset, or a file of records. kinds:
    of the media that are read of such data. num_records: documents of the world's training split; of other data so many
    of the first records, 0 = all. task_weights: the world's shares. row_length: positions of a packed row. row_frames:
    frames of pictures and clips that the documents of a row may read, 0 = any number (they cost memory beside the
    row's positions). records_per_shard: records that are lost when a run is killed. num_workers: processes.
    max_reject_share: the stage stops when more of the records than this cannot be used. sound_features: also store
    what a model with audio_input "continuous" reads (256 bytes a step beside 6 of codes, at the default sizes).
    text_dropout: BPE dropout of all texts (paper: section 2.1, in training only; these shards are for training).
    understanding_share: of the pairs of text and media, those whose media are read (`documents.assign_roles`).
    video_frames: most frames of a clip.
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
    data: str = WORLD
    kinds: tuple[SegmentKind, ...] = KINDS
    row_frames: int = 0
    understanding_share: float = 0.5
    video_frames: int = 8

    def __post_init__(self) -> None:
        if self.num_records < (1 if self.data == WORLD else 0):
            raise ConfigError(
                f"prepare-data: num_records {self.num_records} must be at least 1 (0: all, of other data)"
            )
        for name in ("understanding_share", "max_reject_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"prepare-data: {name} {getattr(self, name)} must lie in [0, 1]")
        if not 0 <= self.text_dropout < 1:
            raise ConfigError(f"prepare-data: text_dropout {self.text_dropout} must lie in [0, 1)")
        if self.row_length < 2 or self.records_per_shard < 1 or self.video_frames < 1 or self.row_frames < 0:
            raise ConfigError(
                f"prepare-data: row_length {self.row_length} must be at least 2, records_per_shard "
                f"{self.records_per_shard} and video_frames {self.video_frames} at least 1, row_frames "
                f"{self.row_frames} at least 0"
            )
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ConfigError(f"prepare-data: kinds {self.kinds} must be some of {', '.join(KINDS)}")


def prepare_data(
    tokenizers_dir: Path, out: Path, config: PrepareConfig, layout: Layout, overwrite: bool = False
) -> dict[str, Any]:
    """Tokenise and pack the training records into `out`; returns (and prints) the report.

    layout fixes how long a document is. Raises DataError when too many records are rejected (what is done is kept),
    ConfigError when the data cannot be opened, CheckpointError when `out` exists.
    """
    out = Path(out)
    maker = _maker(tokenizers_dir, config, layout)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    decisive = {name: value for name, value in fields.items() if name not in UNDECISIVE}
    made_of = {"tokenizers": tokenizers_hash(tokenizers_dir), "layout": layout.sizes()}
    inputs = made_of | {
        "records": len(maker.source),
        "source": maker.source.identity(),
        "versions": [ernie_elastic.__version__, torch.__version__, torch.backends.cpu.get_cpu_capability()],
    }
    extra: dict[str, Any] = {}
    with resumable_output(out, STAGE, config, inputs, None, overwrite, extra, decisive) as partial:
        notes = _make_shards(maker, partial, config, out)
        lengths = [length for note in notes for length in note.lengths]
        frames = [count for note in notes for count in note.frames]
        if not lengths:
            raise DataError(f"prepare-data: none of {len(maker.source)} records of {config.data} gave a document")
        rows = pack_lengths(lengths, config.row_length, frames, config.row_frames)
        write_rows(partial.target / ROWS_FILE, rows)
        rejects = [line for note in notes for _, line in note.rejects]
        write_atomic(partial.target / REJECTS_FILE, "".join(f"{line}\n" for line in rejects))
        report = _report(notes, lengths, rows, config.row_length)
        write_json(partial.target / REPORT_FILE, report)
        extra.update(report, **made_of)
    _rejects_beside(out).unlink(missing_ok=True)
    _print(report, config, out)
    return report


def _maker(tokenizers_dir: Path, config: PrepareConfig, layout: Layout) -> ShardMaker:
    names = [field.name for field in dataclasses.fields(ShardSettings)]
    settings = ShardSettings(**{name: getattr(config, name) for name in names})
    source: Source
    if config.data == WORLD:
        source = WorldSource(config.task_weights, config.seed, config.num_records, config.world)
    else:
        rate = Tokenizers.load(tokenizers_dir).audio.config.sample_rate
        source = open_data(config.data, config.kinds, rate, config.num_records)
        if len(source) == config.num_records:
            say(f"prepare-data: the first {len(source)} records of {config.data} are taken")
    return ShardMaker(source, str(tokenizers_dir), layout, settings)


def _make_shards(maker: ShardMaker, partial: PartialOutput, config: PrepareConfig, out: Path) -> list[Note]:
    """The notes of all shards, in their order, those made that an earlier run has not."""
    total, size = len(maker.source), config.records_per_shard
    if -(-total // size) > MAX_SHARDS:
        raise ConfigError(
            f"prepare-data: {total} records in shards of {size} are more than {MAX_SHARDS} shards; raise "
            "--records-per-shard"
        )
    jobs = []
    for number, start in enumerate(range(0, total, size)):
        name = f"shard-{number:05d}"
        path, note = partial.target / f"{name}.safetensors", partial.notes / f"{name}.json"
        jobs.append(Job(path, note, start, min(start + size, total)))
    found = {job: Note.read(job.note) for job in jobs if job.note.exists() and job.path.exists()}
    waiting = [job for job in jobs if job not in found]
    rejected = sum(len(note.rejects) for note in found.values())
    done = total - sum(job.stop - job.start for job in waiting)
    with (
        progress(total=total, desc="prepare-data", unit="rec", initial=done) as bar,
        contextlib.closing(run_jobs(maker, waiting, config.num_workers, bar.update)) as finished,
    ):
        for job in itertools.chain([None], finished):
            if job is not None:
                found[job] = Note.read(job.note)
                rejected += len(found[job].rejects)
            if rejected > config.max_reject_share * total:
                raise _too_many([found[job] for job in jobs if job in found], total, config, out)
    partial.hashes.update({job.path.name: note.sha256 for job, note in found.items()})
    return [found[job] for job in jobs]


def _too_many(notes: Sequence[Note], total: int, config: PrepareConfig, out: Path) -> DataError:
    """The error of a run that stops for its rejects, which a file beside the output then names."""
    rejects = [line for note in notes for _, line in note.rejects]
    path = _rejects_beside(out)
    write_atomic(path, "".join(f"{line}\n" for line in rejects))
    return DataError(
        f"prepare-data: {len(rejects)} of {total} records cannot be used, more than the limit of "
        f"{config.max_reject_share:.0%}; {path} names them, the first one: {rejects[0]}; repair them, or raise "
        "--max-reject-share: what is done is kept"
    )


def _rejects_beside(out: Path) -> Path:
    return out.with_name(f"{out.name}-{REJECTS_FILE}")


def _report(
    notes: Sequence[Note], lengths: Sequence[int], rows: Sequence[Sequence[int]], row_length: int
) -> dict[str, Any]:
    tokens: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    for note in notes:
        tokens.update(note.tokens)
        positions.update(note.positions)
    why = Counter(reason for note in notes for reason, _ in note.rejects)
    return {
        "records": sum(note.records for note in notes),
        "documents": len(lengths),
        "rejected": sum(why.values()),
        "rejected_because": dict(sorted(why.items())),
        "rows": len(rows),
        "row_length": row_length,
        "positions": sum(lengths),
        "positions_of": dict(sorted(positions.items())),
        "packing_efficiency": packing_efficiency(lengths, rows, row_length),
        "tokens": dict(sorted(tokens.items())),
    }


def _print(report: dict[str, Any], config: PrepareConfig, out: Path) -> None:
    shares = ", ".join(f"{kind} {count / report['positions']:.1%}" for kind, count in report["positions_of"].items())
    say(
        f"prepare-data: {report['records']} records, {report['rejected']} rejected, {report['positions']} positions "
        f"({shares}) in {report['rows']} rows of {config.row_length}: packing efficiency "
        f"{report['packing_efficiency']:.1%}; wrote {out}"
    )
    if report["rejected"]:
        why = ", ".join(f"{count} {reason}" for reason, count in report["rejected_because"].items())
        say(f"prepare-data: rejected: {why}; {out / REJECTS_FILE} names them")

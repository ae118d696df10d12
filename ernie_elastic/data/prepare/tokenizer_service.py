"""Tokenizers as a service to training: in this process, in a pool of processes, or from a cache on disk.

Contract: `stream` and `tokenise` of every implementation give the same documents, bit for bit, in the order of the
samples, and raise the same DataError at the same record. A document is a function of the record's content and of the
tokenizers alone, so each record is encoded by itself, on one thread, without autocast: a matrix product of few rows
may sum in another order than one of many (sounds of one step do, and pictures of a 1x1 to 3x3 grid; the world's 4x4
grids do not). ours: the report is silent. A service is for one thread of its caller; processes may share a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import signal
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import ernie_elastic
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.prepare.tokenise import Tokenizers, plain_arithmetic, tokenise
from ernie_elastic.errors import CheckpointError, ConfigError, DataError, ErnieElasticError
from ernie_elastic.schema import Sample
from ernie_elastic.stages import disk_error, say, sha256_file, write_atomic

Documents = Generator[list[Tokens], None, None]
Part = str | np.ndarray | None
# What a job gives: the documents before the first record that cannot be read, and that record's error.
Answer = tuple[list[list[Tokens]], DataError | None]

RECORDS_PER_JOB = 16  # sent to a worker at once; speed only
JOBS_PER_WORKER = 2  # handed out ahead of the caller; bounds the memory
WINDOW = 256  # records that a cache looks up at once; bounds the memory, and gives a pool behind it enough to do
CACHE_VERSION = "1"  # another number makes every older cache entry a miss
DECISIVE_FILES = ("text/tokenizer.json", "visual/config.json", "audio/config.json")
WEIGHTS = ("*.safetensors", "model/*.json")  # of visual/ and audio/; `model/` is a Transformers codec's
ARRAYS = ("ids", "pixels", "latents", "codes", "features", "speaker")


class TokenizerServiceError(ErnieElasticError, RuntimeError):
    """A pool that lost a worker or is closed. Not a DataError: no record is to be rejected for it."""


class TokenizerService(ABC):
    """Samples in, token segments out. A context manager; leaving it ends whatever the service started."""

    identity: str  # `tokenizers_hash` of the tokenizers behind it

    @abstractmethod
    def stream(self, samples: Iterable[Sample]) -> Documents:
        """Documents one by one, in the order of `samples`, which are read only as far ahead as is needed.

        Each is a list of Tokens, one per segment, with the dtypes and shapes that `Tokens` gives. Raises DataError,
        which names the record, in the place of the first document that cannot be made; TokenizerServiceError.
        """

    def tokenise(self, samples: Iterable[Sample]) -> list[list[Tokens]]:
        """All documents of `samples` at once. Raises as `stream` does."""
        return list(self.stream(samples))

    @abstractmethod
    def close(self) -> None:
        """End what was started; a second call does nothing."""

    def __enter__(self) -> TokenizerService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcessTokenizers(TokenizerService):
    """The plain definition: this process tokenises, record by record, when it is asked."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        self.tokenizers = tokenizers

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        """`tokenizers_hash` of the files that the tokenizers would be saved as; made when it is first asked for."""
        with tempfile.TemporaryDirectory(prefix="tokenizers-") as directory:
            self.tokenizers.save(directory)
            return tokenizers_hash(directory)

    def stream(self, samples: Iterable[Sample]) -> Documents:
        for job in _batches(samples, RECORDS_PER_JOB):
            yield from _documents(_run_job(job, self.tokenizers))

    def close(self) -> None:
        """Nothing was started."""


class PooledTokenizers(TokenizerService):
    """Spawned processes that each load the tokenizers; records go out in jobs, documents come back in order.

    At most JOBS_PER_WORKER jobs of RECORDS_PER_JOB records per worker are under way or wait for the caller: while it
    takes nothing, nothing more is read. A worker that dies ends the stream and the pool.
    """

    def __init__(self, tokenizers_dir: Path | str, num_workers: int) -> None:
        """tokenizers_dir: what `Tokenizers.load` reads. Raises ConfigError when num_workers is below 1,
        CheckpointError when a tokenizer is missing; one that is damaged is found by the first `stream`.
        """
        if num_workers < 1:
            raise ConfigError(f"tokenizer pool: num_workers {num_workers} must be at least 1")
        self._directory, self._num_workers = str(tokenizers_dir), num_workers
        self.identity = tokenizers_hash(tokenizers_dir)
        self._closed = False
        # Spawned: a fork would copy torch's threads in an undefined state. Ctrl-C is the caller's to handle. Not
        # multiprocessing.Pool, which waits for ever for a job whose worker died.
        self._pool = ProcessPoolExecutor(
            num_workers, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        )

    def stream(self, samples: Iterable[Sample]) -> Documents:
        ahead = JOBS_PER_WORKER * self._num_workers
        jobs = _batches(samples, RECORDS_PER_JOB)
        waiting: deque[tuple[list[Sample], Future[Answer]]] = deque()
        try:
            while True:
                for job in itertools.islice(jobs, ahead - len(waiting)):
                    with self._explained(job):
                        waiting.append((job, self._pool.submit(_work, job, self._directory, self.identity)))
                if not waiting:
                    return
                job, future = waiting.popleft()
                with self._explained(job):
                    answer = future.result()
                yield from _documents(answer)
        finally:  # the caller stopped early, or a record failed
            for _, future in waiting:
                future.cancel()

    @contextlib.contextmanager
    def _explained(self, job: list[Sample]) -> Iterator[None]:
        if self._closed:
            raise TokenizerServiceError("tokenizer pool: it is closed; open a new one")
        try:
            yield
        except BrokenProcessPool as error:
            raise TokenizerServiceError(
                f"tokenizer pool: one of {self._num_workers} workers died before the records {job[0].key} to "
                f"{job[-1].key} were done; use fewer workers if memory ran out, or InProcessTokenizers to find a "
                "record that does it; then open a new pool"
            ) from error

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(cancel_futures=True)


class CachedTokenizers(TokenizerService):
    """Documents from files below `cache_dir`, made by `inner` the first time; closing it closes `inner`.

    A file is named by all that decides its bits: the tokenizers' identity, the content of each segment (not the
    record's name, task or truth), and the versions and instruction set that the arithmetic ran on. It carries a
    checksum; a damaged file is dropped, announced and made anew. hits, misses: records served so far from files, and
    by `inner`; damaged: files dropped, whose records count as misses. The sample rate is the tokenizers' own.
    """

    def __init__(self, inner: TokenizerService, cache_dir: Path | str) -> None:
        """Raises CheckpointError when cache_dir cannot be made."""
        self.inner, self.cache_dir, self.identity = inner, Path(cache_dir), inner.identity
        self.hits = self.misses = self.damaged = 0
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.cache_dir) from error

    def stream(self, samples: Iterable[Sample]) -> Documents:
        for window in _batches(samples, WINDOW):
            keys = [sample_key(sample, self.identity) for sample in window]
            found = [self._load(key) for key in keys]
            missing = [sample for sample, document in zip(window, found, strict=True) if document is None]
            with contextlib.closing(self.inner.stream(missing)) as made:
                for key, document in zip(keys, found, strict=True):
                    if document is None:
                        document = next(made)
                        write_atomic(self.path(key), _document_bytes(document, key))
                        self.misses += 1
                    else:
                        self.hits += 1
                    yield document

    def path(self, key: str) -> Path:
        """Where the document of a `sample_key` lies."""
        return self.cache_dir / f"{key}.safetensors"

    def _load(self, key: str) -> list[Tokens] | None:
        path = self.path(key)
        try:
            return _read_document(path, key)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            path.unlink(missing_ok=True)
            self.damaged += 1
            say(f"tokenizer cache: {path} was damaged ({' '.join(str(error).split())}); dropped, made anew")
            return None
        except OSError as error:
            raise CheckpointError(
                f"tokenizer cache: cannot read {path}: {error.strerror or error}; repair or delete {self.cache_dir}"
            ) from error

    def close(self) -> None:
        self.inner.close()


def tokenizers_hash(directory: Path | str) -> str:
    """Hex SHA-256 of the files below `directory` that decide what the tokenizers do.

    ours: not `stages.directory_hash`, which needs a manifest (tokenizers of a model directory have none), sees no file
    that changed under it, and differs when only health.json does. Raises CheckpointError when a file is missing.
    """
    root = Path(directory)
    files = [root / name for name in DECISIVE_FILES]
    for kind in ("visual", "audio"):
        found = sorted({path for pattern in WEIGHTS for path in (root / kind).rglob(pattern)})
        files += found or [root / kind / "tokenizer.safetensors"]
    parts: list[Part] = []
    for path in files:
        if not path.is_file():
            make = f"ernie-elastic train-tokenizer {path.parent.name} --out {path.parent}"
            raise CheckpointError(f"{path} does not exist; make it with `{make}`")
        parts += [path.relative_to(root).as_posix(), sha256_file(path)]
    return _digest(parts)


def sample_key(sample: Sample, identity: str) -> str:
    """Hex SHA-256 of all that decides a document's bits; identity: that of the tokenizers."""
    parts: list[Part] = [
        CACHE_VERSION, identity, ernie_elastic.__version__, torch.__version__, torch.backends.cpu.get_cpu_capability(),
    ]  # fmt: skip
    for segment in sample.segments:
        parts += [segment.kind, segment.role, segment.text, segment.array, segment.speaker]
    return _digest(parts)


def _digest(parts: Iterable[Part]) -> str:
    """Hex SHA-256; each part goes in with its type and length, so that no two lists run together."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, data = f"array {part.dtype.str} {part.shape}", part.tobytes()
        else:
            head, data = ("none", b"") if part is None else ("text", part.encode("utf-8", "surrogatepass"))
        found.update(f"{head} {len(data)}\n".encode())
        found.update(data)
    return found.hexdigest()


def _document_bytes(document: list[Tokens], key: str) -> bytes:
    """One safetensors file: arrays `SEGMENT.FIELD`, and under `document` JSON of kind and role of each and a checksum.

    One entry of metadata, since safetensors writes several in any order: the same document is the same file.
    """
    named = {f"{number}.{name}": getattr(part, name) for number, part in enumerate(document) for name in ARRAYS}
    arrays = {name: np.ascontiguousarray(array) for name, array in named.items() if array is not None}
    segments = [[part.kind, part.role] for part in document]
    return save(arrays, {"document": json.dumps([segments, _checksum(arrays, segments, key)])})


def _checksum(arrays: dict[str, np.ndarray], segments: list[list[str]], key: str) -> str:
    parts: list[Part] = [key, json.dumps(segments)]
    for name in sorted(arrays):
        parts += [name, arrays[name]]
    return _digest(parts)


def _read_document(path: Path, key: str) -> list[Tokens]:
    with safe_open(path, "numpy") as file:
        segments, checksum = json.loads(file.metadata()["document"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if _checksum(arrays, segments, key) != checksum:
        raise ValueError("its checksum is not that of its content")
    return [
        Tokens(kind, role, **{name: arrays.get(f"{number}.{name}") for name in ARRAYS})
        for number, (kind, role) in enumerate(segments)
    ]


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    rest = iter(samples)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _documents(answer: Answer) -> Documents:
    documents, error = answer
    yield from documents
    if error is not None:
        raise error


def _work(job: list[Sample], directory: str, identity: str) -> Answer:
    """What a worker does with a job; an error in loading reaches the caller like any other."""
    return _run_job(job, _loaded(directory, identity))


@lru_cache(maxsize=1)
def _loaded(directory: str, identity: str) -> Tokenizers:
    tokenizers = Tokenizers.load(directory)
    if (found := tokenizers_hash(directory)) != identity:  # a cache would keep these documents under a wrong name
        raise CheckpointError(
            f"{directory} changed while a tokenizer pool was open on it: its hash is {found[:12]}, it was "
            f"{identity[:12]}; open a new pool"
        )
    return tokenizers


def _run_job(job: list[Sample], tokenizers: Tokenizers) -> Answer:
    documents: list[list[Tokens]] = []
    with plain_arithmetic():
        for sample in job:
            try:
                documents.append(_tokenise_record(sample, tokenizers))
            except DataError as error:
                return documents, error
    return documents, None


def _tokenise_record(sample: Sample, tokenizers: Tokenizers) -> list[Tokens]:
    try:
        return tokenise([sample], tokenizers)[0]
    except ValueError as error:  # a tokenizer does not know the record, and numpy stacks no pictures of two sizes
        text = str(error)
        raise DataError(text if text.startswith("record ") else f"record {sample.key}: {text}") from error

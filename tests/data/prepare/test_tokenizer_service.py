"""One interface to tokenizers: in process, in a pool and from a cache give the same bits and the same errors."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.data.prepare.tokenizer_service import (
    JOBS_PER_WORKER,
    RECORDS_PER_JOB,
    CachedTokenizers,
    InProcessTokenizers,
    PooledTokenizers,
    TokenizerServiceError,
    sample_key,
    tokenizers_hash,
)
from ernie_elastic.data.world.scenes import WORLD_TASKS, world_sample
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.schema import Sample, Segment
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig

NUM_WORKERS = 2
BAD = {
    "no text": Segment("text", "input"),
    "half a character": Segment("text", "input", text="\ud800"),
    "empty sound": Segment("audio", "input", array=np.zeros(0, np.float32)),
    "sound that is not finite": Segment("audio", "input", array=np.full(5, np.nan, np.float32)),
    "float picture": Segment("image", "target", array=np.zeros((32, 32, 3), np.float32)),
    "small picture": Segment("image", "target", array=np.zeros((31, 32, 3), np.uint8)),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    text = TextTokenizer.train(["a red circle and a blue square", "what is it ?"] * 20, 300)
    visual = PatchVisualTokenizer(PatchVisualTokenizerConfig()).eval()
    audio = SpectralAudioTokenizer(SpectralAudioTokenizerConfig(num_levels=2))
    audio.basis_FC.normal_(std=0.02)
    audio.codebooks_QVC.normal_()
    path = tmp_path_factory.mktemp("tokenizers")
    Tokenizers(text, visual, audio).save(path)
    return path


@pytest.fixture(scope="module")
def plain(directory: Path) -> InProcessTokenizers:
    return InProcessTokenizers(Tokenizers.load(directory))


@pytest.fixture(scope="module")
def pool(directory: Path) -> Iterator[PooledTokenizers]:
    with PooledTokenizers(directory, NUM_WORKERS) as service:
        yield service  # type: ignore[misc]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    made = [world_sample(task, 3, index) for index in range(4) for task in WORLD_TASKS]
    voice = dataclasses.replace(made[5].segments[1], speaker=np.linspace(-1, 1, 7, dtype=np.float32))
    # A product of one row sums in another order than one of several: what shows that records are encoded alone.
    noise = np.random.default_rng(0).uniform(-1, 1, (40, 1280)).astype(np.float32)
    made += [
        Sample(f"step/{number}", "one step", (Segment("audio", "input", array=row),))
        for number, row in enumerate(noise)
    ]
    both = (*made[0].segments, *made[2].segments, voice)  # several pictures and a speaker in one record
    return [*made, Sample("rich", "rich", both), Sample("nothing", "text", ())]


def assert_equal(found: list[list[Tokens]], expected: list[list[Tokens]]) -> None:
    """Same kinds, roles and arrays: dtype, shape and every bit."""
    assert len(found) == len(expected)
    for document, other in zip(found, expected, strict=True):
        assert [(part.kind, part.role) for part in document] == [(part.kind, part.role) for part in other]
        for part, same in zip(document, other, strict=True):
            for field in dataclasses.fields(Tokens)[2:]:
                value, wanted = getattr(part, field.name), getattr(same, field.name)
                assert (value is None) == (wanted is None), field.name
                if value is not None:
                    assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape)
                    assert value.tobytes() == wanted.tobytes(), f"{part.kind}: {field.name}"
                    assert value.flags.writeable


def test_every_service_gives_the_same_bits_for_every_task(plain, pool, directory, samples, tmp_path):
    expected = plain.tokenise(samples)
    assert {part.kind for document in expected for part in document} == {"text", "image", "video", "audio"}
    assert_equal(pool.tokenise(samples), expected)
    cold = CachedTokenizers(InProcessTokenizers(Tokenizers.load(directory)), tmp_path / "plain")
    behind_pool = CachedTokenizers(pool, tmp_path / "pool")
    for cached in (cold, behind_pool):
        assert_equal(cached.tokenise(samples), expected)
        assert (cached.hits, cached.misses) == (0, len(samples))
        assert_equal(cached.tokenise(iter(samples)), expected)
        assert (cached.hits, cached.misses, cached.damaged) == (len(samples), len(samples), 0)
    files = [{path.name: path.read_bytes() for path in cached.cache_dir.iterdir()} for cached in (cold, behind_pool)]
    assert files[0] == files[1] and len(files[0]) == len(samples)  # no temporary file is left


def test_a_document_depends_on_nothing_but_its_record(plain, samples):
    expected = plain.tokenise(samples)
    for sample, document in zip(samples, expected, strict=True):
        assert_equal(plain.tokenise([sample]), [document])
    assert_equal(plain.tokenise(samples[::-1])[::-1], expected)
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(plain.tokenise(samples), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_record_is_named_by_each_in_its_place(plain, pool, samples, tmp_path, what):
    picture = samples[0].segments[0]
    bad = Sample("world/the-bad-one", "text", (picture, BAD[what]))
    mixed = [*samples[:19], bad, *samples[19:40]]
    expected = plain.tokenise(samples[:19])
    cached = CachedTokenizers(plain, tmp_path)
    cached.tokenise(samples[15:40])
    messages = []
    for service in (plain, pool, cached):
        found = []
        with pytest.raises(DataError, match=r"^record world/the-bad-one: ") as error:
            for document in service.stream(mixed):
                found.append(document)
        assert_equal(found, expected)
        messages.append(str(error.value))
    assert len(set(messages)) == 1
    assert_equal(pool.tokenise(samples[:19]), expected)  # the pool goes on


def test_a_pool_reads_no_further_ahead_than_it_says(pool, samples):
    limit = NUM_WORKERS * JOBS_PER_WORKER * RECORDS_PER_JOB
    taken = 0

    def endless() -> Iterator[Sample]:
        nonlocal taken
        while True:
            taken += 1
            yield samples[taken % 13]

    stream = pool.stream(endless())
    for number in range(1, 3 * RECORDS_PER_JOB):
        next(stream)
        assert taken <= number + limit + RECORDS_PER_JOB
    stream.close()
    assert len(pool.tokenise(samples[:5])) == 5


def test_closing_a_pool_ends_its_processes(directory, samples):
    before = set(multiprocessing.active_children())
    with PooledTokenizers(directory, 2) as service:
        stream = service.stream(samples)
        next(stream)
        assert set(multiprocessing.active_children()) - before
    assert not set(multiprocessing.active_children()) - before
    for leftover in (service.stream(samples), stream):
        with pytest.raises(TokenizerServiceError, match="closed; open a new one"):
            list(leftover)
    service.close()


@pytest.mark.timeout(120)
def test_a_dead_worker_is_an_error_and_no_hang(directory, samples):
    before = set(multiprocessing.active_children())
    wave = np.zeros(160_000, np.float32)  # a job of these is larger than any pipe, so one is being written

    def killing() -> Iterator[Sample]:
        for number in range(10 * RECORDS_PER_JOB):
            if number == 2 * RECORDS_PER_JOB:
                for process in set(multiprocessing.active_children()) - before:
                    os.kill(process.pid, signal.SIGKILL)
            yield Sample(f"long/{number}", "audio_to_text", (Segment("audio", "input", array=wave),))

    with PooledTokenizers(directory, 1) as service:
        with pytest.raises(TokenizerServiceError, match=r"one of 1 workers died before the records long/\d+ to long"):
            service.tokenise(killing())
        with pytest.raises(TokenizerServiceError, match="open a new pool"):
            service.tokenise(samples[:1])
    assert not set(multiprocessing.active_children()) - before


def test_a_pool_says_what_is_wrong_with_its_arguments(directory, tmp_path, samples):
    with pytest.raises(ConfigError, match="num_workers 0"):
        PooledTokenizers(directory, 0)
    copy = shutil.copytree(directory, tmp_path / "copy")
    with PooledTokenizers(copy, 1) as service:
        (copy / "visual" / "config.json").write_text((copy / "visual" / "config.json").read_text() + " ")
        with pytest.raises(CheckpointError, match="changed while"):
            service.tokenise(samples[:1])
    (copy / "audio" / "tokenizer.safetensors").write_bytes(b"")
    with PooledTokenizers(copy, 1) as service, pytest.raises(CheckpointError, match="no whole audio tokenizer"):
        service.tokenise(samples[:1])
    shutil.rmtree(copy / "text")
    with pytest.raises(CheckpointError, match="train-tokenizer text"):
        PooledTokenizers(copy, 1)


def test_identity_is_that_of_the_files_and_changes_with_each(plain, directory, tmp_path):
    assert plain.identity == tokenizers_hash(directory)
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert tokenizers_hash(copy) == plain.identity
    (copy / "visual" / "health.json").write_text("{}")  # decides nothing
    assert tokenizers_hash(copy) == plain.identity
    for name in ("text/tokenizer.json", "visual/config.json", "audio/tokenizer.safetensors"):
        before = tokenizers_hash(copy)
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        assert tokenizers_hash(copy) != before


def test_the_key_sees_all_content_and_nothing_else():
    array, speaker = np.arange(12, dtype=np.int32), np.zeros(3, np.float32)
    segment = Segment("audio", "input", text="ab", array=array, speaker=speaker)
    changed = [
        dataclasses.replace(segment, **change)
        for change in (
            {"kind": "text"}, {"role": "target"}, {"text": "ac"}, {"text": None}, {"text": ""},
            {"array": array.view(np.float32)}, {"array": array.reshape(3, 4)}, {"array": array.reshape(4, 3)},
            {"array": array + 1}, {"array": array[::-1]}, {"array": None}, {"array": array[:0]},
            {"speaker": speaker + 1}, {"speaker": None}, {"array": speaker, "speaker": array},
        )
    ]  # fmt: skip
    lists = [(segment,), (), (segment, segment), *((item,) for item in changed)]
    keys = [sample_key(Sample("key", "task", segments), "tokenizers") for segments in lists]
    assert len(set(keys)) == len(keys)
    renamed = Sample("other", "other", (dataclasses.replace(segment, array=array.copy()),), {"truth": 1})
    assert sample_key(renamed, "tokenizers") == keys[0] != sample_key(renamed, "other tokenizers")


def test_damaged_entries_are_dropped_and_made_anew(plain, samples, tmp_path, capsys, stress):
    rich = next(sample for sample in samples if sample.key == "rich")
    expected = plain.tokenise([rich])
    cached = CachedTokenizers(plain, tmp_path)
    cached.tokenise([rich])
    path = cached.path(sample_key(rich, plain.identity))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    other = next(iter(samples))
    cached.tokenise([other])
    damages = [b"", whole[:7], whole[:header], whole[:-1], whole + b"\0", b"not a cache entry"]
    damages.append(cached.path(sample_key(other, plain.identity)).read_bytes())  # whole, of another record
    places = [*range(0, header, 1 if stress > 1 else 7), *range(header, len(whole), len(whole) // 20)]
    damages += [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in places]
    for number, damage in enumerate(damages):
        path.write_bytes(damage)
        assert_equal(cached.tokenise([rich]), expected)
        assert cached.damaged == number + 1
        assert path.read_bytes() == whole
    assert "was damaged" in capsys.readouterr().out
    assert_equal(cached.tokenise([rich]), expected)
    assert (cached.hits, cached.misses, cached.damaged) == (1, 2 + len(damages), len(damages))


def test_a_cache_folder_that_cannot_be_one_is_an_error(plain, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        CachedTokenizers(plain, tmp_path / "file")
    cached = CachedTokenizers(plain, tmp_path / "cache")
    cached.path(sample_key(samples[0], plain.identity)).mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .* repair or delete"):
        cached.tokenise(samples[:1])


def test_closing_a_cache_closes_what_is_behind_it(directory, samples, tmp_path):
    with CachedTokenizers(PooledTokenizers(directory, 1), tmp_path) as cached:
        pass
    with pytest.raises(TokenizerServiceError, match="closed"):
        cached.tokenise(samples[:1])

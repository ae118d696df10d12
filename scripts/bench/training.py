"""Elastic steps against full steps, packed rows against padded ones, checkpoints, waiting for data, ranks.

`full_step`: seconds of a step of the whole model at the same rows; ours is the mean over the specs that the sampler
draws. `flop_share`: that times the active sub-models' share of the operations (`training/flops.py`). `padded`: when
every document has a row of its own, padded to the longest. `at_once`: a checkpoint that the training waits for.
`one_rank`, `one_rank_two_threads`: the same global batch in one process. `step`: seconds of a whole step.
Documents are random, of the seven kinds that the demo judges; one process, plain-torch engine, but for the rows of
`training_runs`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.common import Row, interleave
from bench.training_runs import checkpoint_rows, run_rows
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.layout import Document, Layout
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate, pack_lengths
from ernie_elastic.elastic.sampler import sample_spec
from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.schema import PackedBatch, SubModelSpec
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import TorchEngine
from ernie_elastic.training.flops import StepFlops

PEERS = ("full_step", "flop_share", "padded", "at_once", "one_rank", "one_rank_two_threads", "step")
ROW_LENGTH = 256
SCALES = [[1, 1], [2, 2], [4, 4], [4, 4]]


def model_config(quick: bool) -> ErnieElasticConfig:
    """The demo preset's sizes (a smaller one when quick)."""
    size: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32} if quick else {}
    return ErnieElasticConfig(
        **size, vocab_size=512, head_dim=32, visual_bits=24, visual_scales=SCALES, visual_amplitudes=[0.5] * 4,
        understanding_patch=4, audio_num_levels=2, mrope_layout="interleaved",
    )  # fmt: skip


def documents(layout: Layout, count: int) -> list[Document]:
    """Random documents with the demo's mix of lengths."""
    rng = np.random.default_rng(0)

    def text(role: str) -> Tokens:
        return Tokens("text", role, ids=rng.integers(10, 512, int(rng.integers(6, 20))).astype(np.int32))

    def picture(kind: str, role: str, frames: int) -> Tokens:
        if role == "input":
            pixels = rng.integers(0, 256, (frames, 32, 32, 3)).astype(np.uint8)
            return Tokens(kind, role, pixels=pixels, latents=rng.normal(size=(frames, 4, 4, 24)).astype(np.float16))
        return Tokens(kind, role, latents=rng.normal(size=(frames, 4, 4, 24)).astype(np.float16))

    def sound(role: str) -> Tokens:
        return Tokens("audio", role, codes=rng.integers(0, 64, (8, 2)).astype(np.int16))

    makers: list[Callable[[], list[Tokens]]] = [
        lambda: [picture("image", "input", 1), text("target")],
        lambda: [text("input"), picture("image", "target", 1)],
        lambda: [picture("video", "input", 4), text("target")],
        lambda: [text("input"), picture("video", "target", 4)],
        lambda: [sound("input"), text("target")],
        lambda: [text("input"), sound("target")],
        lambda: [text("input"), text("target")],
    ]
    return [build_document(makers[i % len(makers)](), layout) for i in range(count)]


def packed(items: list[Document]) -> PackedBatch:
    """All documents in rows of ROW_LENGTH."""
    rows = pack_lengths([len(item) for item in items], ROW_LENGTH)
    return collate([[items[i] for i in row] for row in rows], ROW_LENGTH)


def in_pairs(
    step: Callable[[SubModelSpec], Any], specs: list[SubModelSpec], full: SubModelSpec, rounds: int
) -> dict[str, float]:
    """Mean seconds of the specs' steps and of a full step beside each of them; medians over the rounds for each spec.

    A full step follows or precedes every sampled one, so that a machine whose speed drifts slows both.
    """
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in specs] for name in ("elastic", "full")}
    for turn in range(rounds + 1):
        for place, spec in enumerate(specs):
            pair = [("elastic", spec), ("full", full)]
            for name, chosen in pair if (turn + place) % 2 else reversed(pair):
                begun = time.perf_counter()
                step(chosen)
                if turn:  # the first round warms up
                    seconds[name][place].append(time.perf_counter() - begun)
    return {name: statistics.fmean(statistics.median(times) for times in places) for name, places in seconds.items()}


def run(quick: bool) -> list[Row]:
    """All rows."""
    torch.manual_seed(0)
    config = model_config(quick)
    model = ErnieElasticForCausalLM(config)
    engine = TorchEngine(model, TrainingConfig(engine="torch", rows_per_step=1))
    items = documents(layout_of(config), 21 if quick else 42)
    batch, padded, full = packed(items), collate([[item] for item in items]), config.full_spec()
    specs = [sample_spec(ElasticConfig(), config, 0, step) for step in range(6 if quick else 32)]

    def step(target: PackedBatch, spec: SubModelSpec) -> Any:
        return engine.train_step([target], spec, 1e-4)

    repeats = 3 if quick else 12
    flops = StepFlops(config, ROW_LENGTH)
    share = sum(flops.per_position(spec) for spec in specs) / len(specs) / flops.per_position(full)
    mean = in_pairs(lambda spec: step(batch, spec), specs, full, 1 if quick else 4)
    distinct = sorted({spec for spec in specs if spec != full}, key=lambda spec: spec.label())
    reduced = interleave(
        {"reduced": lambda turn: step(batch, distinct[turn % len(distinct)]), "full": lambda _: step(batch, full)},
        repeats,
    )
    layouts = interleave({"packed": lambda _: step(batch, full), "padded": lambda _: step(padded, full)}, repeats)
    positions = batch.num_positions
    lengths = [len(item) for item in documents(layout_of(config), 2000)]
    rows = len(pack_lengths(lengths, ROW_LENGTH))
    return [
        Row(
            f"mean of {len(specs)} sampled steps", mean["elastic"],
            {"flop_share": share * mean["full"], "full_step": mean["full"]}, "s", False,
        ),
        Row("a reduced step", reduced["reduced"], {"full_step": reduced["full"]}, "s", False),
        Row(
            f"{len(items)} documents", positions / layouts["packed"], {"padded": positions / layouts["padded"]},
            "positions/s", True,
        ),
        Row(
            "packing of 2,000 documents", 100 * sum(lengths) / rows / ROW_LENGTH,
            {"padded": 100 * sum(lengths) / len(lengths) / max(lengths)}, "% filled", True,
        ),
        *checkpoint_rows(engine, lambda: step(batch, full), quick),
        *([] if quick else run_rows()),
    ]  # fmt: skip

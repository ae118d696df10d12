"""`study elastic`: what elastic training costs the full model and gives its sub-models, at the same steps and seeds.

Every arm is a run of `pretrain` on the same packed data; it differs in what is elastic, or in the size that is trained.
Every trained model is measured on held-out rows, itself and cut to the sizes of the study. paper: Tables 9 to 11 (full
size, and cut by depth, width and top-k); the models trained alone, the layer policies and "all" together are ours.

Contract: the model has no audio heads, so that every layer may be dropped. A study that was cut off goes on where it
was; results.json, tables.md and losses.png appear when all runs are done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ernie_elastic.data.packed.mixture import MixtureConfig
from ernie_elastic.data.packed.shards import STAGE as PACKED_STAGE
from ernie_elastic.data.prepare.stage import PrepareConfig, prepare_data
from ernie_elastic.data.prepare.tokenise import TOKENIZER_NAMES, Tokenizers
from ernie_elastic.elastic.importance import choose_experts, packed_rows, stored_mass
from ernie_elastic.elastic.space import ElasticConfig, choose_layers
from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.loading import load_model
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import MODALITIES, modality_sums
from ernie_elastic.modeling.sizes import ModelSizes
from ernie_elastic.pipeline.pretrain import is_done
from ernie_elastic.pipeline.study.report import FIGURE_FILE, TABLE_FILE, write_report
from ernie_elastic.presets import DEMO_MODEL, DEMO_TOKENIZERS, DEMO_WORLD, SHORT_RUN
from ernie_elastic.schema import SubModelSpec
from ernie_elastic.stages import fingerprint, progress, say, to_jsonable, write_json
from ernie_elastic.tokenizer_training.train_on_world import TokenizerTrainingConfig, train_tokenizer
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.loop import pretrain

RESULTS_FILE, STUDY_FILE, LOSSES_FILE = "results.json", "study.json", "losses.json"
TASKS = {"image_to_text": 0.3, "text_to_image": 0.3, "video_to_text": 0.1, "text_to_video": 0.1, "text": 0.2}
HELD_OUT_SEED = 1_000_003  # of the records that no arm is trained on
FIXED = ElasticConfig(enabled=False)


@dataclass(frozen=True)
class StudySize:
    """How large a study is. rows: packed rows of a step; held_out_rows: rows that every model is measured on."""

    model: ModelSizes
    tokenizers: TokenizerTrainingConfig
    steps: int
    rows: int
    num_records: int
    held_out_rows: int
    row_length: int = 128

    def training(self, seed: int, micro_batches: int) -> TrainingConfig:
        """The run of every arm: the demo's, in plain torch, since single processes train side by side."""
        return dataclasses.replace(
            SHORT_RUN, steps=self.steps, rows_per_step=self.rows, optimizer="muon", zero_stage=0, engine="torch",
            learning_rate=1.5e-3, seed=seed, micro_batches=micro_batches, log_every=50, keep_checkpoints=1,
        )  # fmt: skip

    def lasting(self, steps: int | None) -> StudySize:
        """The same study over so many steps (None = its own), with more records where they are more: none is read more
        often than in the study as it is."""
        if steps is None:
            return self
        records = self.num_records * max(self.steps, steps) // self.steps
        return dataclasses.replace(self, steps=steps, num_records=records)

    def prepare(self, seed: int, num_records: int) -> PrepareConfig:
        """Packed data of these records."""
        return PrepareConfig(
            num_records=num_records, seed=seed, row_length=self.row_length, world=DEMO_WORLD, task_weights=dict(TASKS)
        )


STUDY_MODEL = dataclasses.replace(DEMO_MODEL, num_experts=32, num_experts_per_tok=8, moe_intermediate_size=32)
SIZES = {
    "full": StudySize(STUDY_MODEL, DEMO_TOKENIZERS, steps=240, rows=12, num_records=10_000, held_out_rows=96),
    "smoke": StudySize(
        dataclasses.replace(
            STUDY_MODEL, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=16, understanding_width=32,
        ),
        dataclasses.replace(TokenizerTrainingConfig.smoke(), world=DEMO_WORLD, visual=DEMO_TOKENIZERS.visual),
        steps=4, rows=6, num_records=200, held_out_rows=8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to train. alone: share of (layers, experts, top-k) of a model that is trained at that size.

    micro_batches: parts of a step, of the same rows altogether.
    """

    name: str
    elastic: ElasticConfig = FIXED
    alone: tuple[float, float, float] = (1.0, 1.0, 1.0)
    micro_batches: int = 1


def _only(**axes: Any) -> ElasticConfig:
    """Elastic in the named axes alone."""
    return dataclasses.replace(ElasticConfig(full_depth=1.0, full_width=1.0, full_sparsity=1.0, min_depth=0.0), **axes)


# paper: section 6.4: one axis at a time, reduced in 20 % of the steps; depth down to one layer, half the experts.
ARMS = (
    Arm("fixed"),
    Arm("depth", _only(full_depth=0.8)),
    Arm("width", _only(full_width=0.8)),
    Arm("sparsity", _only(full_sparsity=0.8)),
    Arm("sparsity_per_layer", _only(full_sparsity=0.8, per_layer_top_k=True)),
    Arm("all", ElasticConfig()),
    Arm("all_sandwich", ElasticConfig(sandwich=True), micro_batches=3),
    Arm("depth_prefix", _only(full_depth=0.8, layer_policy="prefix")),
    Arm("depth_uniform", _only(full_depth=0.8, layer_policy="uniform")),
    Arm("alone_depth", alone=(0.75, 1.0, 1.0)),
    Arm("alone_half_depth", alone=(0.5, 1.0, 1.0)),
    Arm("alone_width", alone=(1.0, 0.5, 1.0)),
    Arm("alone_half_k", alone=(1.0, 1.0, 0.5)),
    Arm("alone_k1", alone=(1.0, 1.0, 0.0)),
)


@dataclass(frozen=True)
class Job:
    """One arm with one seed. out: the study's directory."""

    out: Path
    tokenizers: Path
    size: StudySize
    arm: Arm
    seed: int
    threads: int = 1

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        return self.out / "runs" / f"{self.arm.name}-seed{self.seed}"

    @property
    def sizes(self) -> ModelSizes:
        """The model that is trained."""
        layers, experts, top_k = self.arm.alone
        full = self.size.model
        return dataclasses.replace(
            full,
            num_hidden_layers=round(layers * full.num_hidden_layers),
            num_experts=round(experts * full.num_experts),
            num_experts_per_tok=max(1, round(top_k * full.num_experts_per_tok)),
        )

    def config(self, tokenizers: Tokenizers) -> ErnieElasticConfig:
        """The model's config, without audio."""
        return self.sizes.to_config(tokenizers, audio=False)


@dataclass
class Study:
    """What `run_study` found: losses[arm][sub-model] = one dict of losses a seed."""

    size: str
    seeds: tuple[int, ...]
    config: dict[str, Any]
    losses: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)


def run_study(
    size: str,
    out: Path,
    seeds: tuple[int, ...],
    workers: int,
    arms: tuple[str, ...] = (),
    tokenizers: Path | None = None,
    steps: int | None = None,
) -> Study:
    """Train and measure arms with every seed, `workers` at a time; returns and writes (results.json) the losses.

    arms: names of ARMS, empty = all. tokenizers: a directory of trained ones (default: they are trained in `out`).
    steps: of every arm (default: the size's); more steps read more records.
    Raises ConfigError for names that are unknown, and when `out` holds a study of other settings.
    """
    chosen = tuple(arm for arm in ARMS if not arms or arm.name in arms)
    if unknown := sorted(set(arms) - {arm.name for arm in ARMS}):
        raise ConfigError(f"study: arms {unknown} are not among {[arm.name for arm in ARMS]}")
    if size not in SIZES or not seeds or workers < 1 or (steps is not None and steps < 1):
        raise ConfigError(
            f"study: size {size!r}, {len(seeds)} seeds, {workers} workers, {steps} steps; choose a size of "
            f"{list(SIZES)} and numbers from 1 on"
        )
    settings = SIZES[size].lasting(steps)
    study = Study(size, seeds, to_jsonable({"size": settings, "tokenizers": tokenizers and tokenizers.resolve()}))
    _claim(out, study)
    if tokenizers is None:
        tokenizers = out / "tokenizers"
        _train_tokenizers(settings, tokenizers)
    threads = max(1, torch.get_num_threads() // workers)
    jobs = [Job(out, tokenizers, settings, arm, seed, threads) for seed in seeds for arm in chosen]
    _pack(settings, jobs[0])
    for job, losses in progress(_measured(jobs, workers), total=len(jobs), desc="study elastic", unit="run"):
        for label, values in losses.items():
            study.losses.setdefault(job.arm.name, {}).setdefault(label, []).append(values)
    write_json(out / RESULTS_FILE, study)
    full = settings.model
    sizes = {"layers": full.num_hidden_layers, "experts": full.num_experts, "top_k": full.num_experts_per_tok}
    say(write_report(study.losses, sizes, len(seeds), out))
    say(f"study: wrote {out / TABLE_FILE}, {out / FIGURE_FILE} and {out / RESULTS_FILE}")
    return study


def _claim(out: Path, study: Study) -> None:
    """Note the settings in `out`, or compare them with those that are noted there."""
    path, mark = out / STUDY_FILE, fingerprint(study.config)
    if path.exists():
        noted = json.loads(path.read_text()).get("fingerprint")
        if noted != mark:
            raise ConfigError(
                f"{out} holds a study with settings {noted}, this one has {mark}; choose another --out, or remove it"
            )
        say(f"study: going on in {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"fingerprint": mark, "config": study.config})


def _train_tokenizers(size: StudySize, directory: Path) -> None:
    """The three tokenizers, unless they are there."""
    for kind in TOKENIZER_NAMES:
        if not is_done(directory / kind, f"train-tokenizer-{kind}", size.tokenizers.resolved(kind)):
            train_tokenizer(kind, directory / kind, size.tokenizers)


def _pack(size: StudySize, job: Job) -> None:
    """Training rows and held-out rows, unless they are there."""
    layout = layout_of(job.config(Tokenizers.load(job.tokenizers)))
    held_out = max(200, 12 * size.held_out_rows)
    for name, prepare in (
        ("packed", size.prepare(0, size.num_records)), ("held_out", size.prepare(HELD_OUT_SEED, held_out))
    ):  # fmt: skip
        if not is_done(job.out / name, PACKED_STAGE, prepare):
            prepare_data(job.tokenizers, job.out / name, prepare, layout)


def _measured(jobs: list[Job], workers: int) -> Iterator[tuple[Job, dict[str, dict[str, float]]]]:
    if workers == 1:
        yield from zip(jobs, map(run_job, jobs), strict=True)
        return
    with get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        yield from zip(jobs, pool.imap(run_job, jobs), strict=True)


def run_job(job: Job) -> dict[str, dict[str, float]]:
    """Train and measure one arm; what it prints goes to log.txt of its run. Returns the losses by sub-model."""
    done = job.run_dir / LOSSES_FILE
    if not done.exists():
        torch.set_num_threads(job.threads)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with (
            open(job.run_dir / "log.txt", "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            checkpoint = pretrain(
                job.run_dir, job.config, job.size.training(job.seed, job.arm.micro_batches), job.arm.elastic,
                job.tokenizers, MixtureConfig(((job.out / "packed", 1.0),)), f"study-{job.arm.name}",
            )  # fmt: skip
            sys.stdout.flush()
            write_json(done, measure(checkpoint / "model", job))
    return json.loads(done.read_text())


def sub_models(model: ErnieElasticForCausalLM, mass_LE: torch.Tensor, arm: Arm) -> dict[str, SubModelSpec]:
    """The sub-models that a trained model [L layers, E experts] is measured at, by a label of its sizes."""
    config = model.config
    layers, experts, top_k = config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
    if arm.name.startswith("alone"):
        return {"full": config.full_spec()}
    ks = sorted({top_k, *(max(1, top_k // share) for share in (2, 4, 8))}, reverse=True)
    wanted = {"full": (layers, experts, top_k)}
    wanted |= {f"depth_{depth}": (depth, experts, top_k) for depth in (layers * 3 // 4, layers // 2)}
    wanted[f"experts_{experts // 2}"] = (layers, experts // 2, top_k)
    wanted |= {f"k_{k}": (layers, experts, k) for k in ks[1:]}
    wanted["three_quarters_half_half"] = (layers * 3 // 4, experts // 2, max(1, top_k // 2))
    policy = arm.elastic.layer_policy if arm.elastic.layer_policy != "random" else "uniform"
    found = {}
    for label, (depth, kept, k) in wanted.items():
        chosen = choose_layers(config, depth, policy)
        found[label] = SubModelSpec(chosen, choose_experts(mass_LE, chosen, kept), k)
    return found


@torch.inference_mode()
def measure(model_dir: Path, job: Job) -> dict[str, dict[str, float]]:
    """Held-out losses of a trained model at every sub-model: those of the modalities, and their mean ("loss")."""
    model = load_model(model_dir)
    batches = packed_rows(job.out / "held_out", model, job.size.held_out_rows)
    found = {}
    for label, spec in sub_models(model, stored_mass(model_dir), job.arm).items():
        sums, counts = torch.zeros(len(MODALITIES)), torch.zeros(len(MODALITIES))
        for batch in batches:
            of_batch = modality_sums(model.forward_packed(batch, submodel=spec), batch)
            sums += of_batch[0][: len(MODALITIES)]
            counts += of_batch[1][: len(MODALITIES)]
        losses = {name: float(s / c) for name, s, c in zip(MODALITIES, sums, counts, strict=True) if float(c) > 0}
        found[label] = {**losses, "loss": sum(losses.values()) / len(losses)}
    return found

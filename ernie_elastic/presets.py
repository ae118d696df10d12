"""Named configurations of the whole pipeline: debug, debug_stages, demo, small, ablation_3b, ultra_sparse."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ernie_elastic.data.groups.augmentation import Augmentation, Flips
from ernie_elastic.data.packed.mixture import MixtureConfig
from ernie_elastic.data.prepare.stage import PrepareConfig
from ernie_elastic.data.world.facts import WorldConfig
from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.modeling.sizes import ModelSizes
from ernie_elastic.tokenizer_training.train_on_world import TokenizerTrainingConfig
from ernie_elastic.tokenizer_training.visual.patch import VisualTrainingConfig
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizerConfig
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.curriculum import paper_stages
from ernie_elastic.training.losses import LossWeights, PosteriorWeights
from ernie_elastic.training.schedules import Schedule


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run needs, from the tokenizers to the last step.

    run_dir: where the run lives; tokenizers and packed data default to folders inside it. data: several packed
    directories with weights, in place of packed_dir. seed is in each part.
    """

    run_dir: Path = Path("runs/custom")
    tokenizers_dir: Path | None = None
    packed_dir: Path | None = None
    data: MixtureConfig = field(default_factory=MixtureConfig)
    model: ModelSizes = field(default_factory=ModelSizes)
    tokenizers: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)

    @property
    def tokenizers_path(self) -> Path:
        """Directory of the three tokenizers."""
        return self.tokenizers_dir or self.run_dir / "tokenizers"

    @property
    def packed_path(self) -> Path:
        """Directory of the packed shards."""
        return self.packed_dir or self.run_dir / "packed"

    def mixture(self) -> MixtureConfig:
        """What is trained on: `data`, or the one packed directory."""
        return self.data if self.data.sources else MixtureConfig(((self.packed_path, 1.0),))


# What a run of minutes does without: each of these costs steps, and its gain shows on longer runs only.
SHORT_RUN = TrainingConfig(
    loss_weights=LossWeights(image=4.0, video=4.0, text_length_power=0.5),
    posterior=PosteriorWeights(enabled=False),
    augmentation=Augmentation(Flips(frame_growth=0.0, inherit_error=False)),
)
DEMO_MODEL = ModelSizes(
    rope_theta=10_000.0,
    mrope_layout="interleaved",
    initializer_range=0.05,
    audio_input="continuous",
    understanding_patch=8,
    visual_place_embedding=True,
)
# One cell of the code, and one token of the reader, for each cell of the world's 3x3 grid.
DEMO_WORLD = WorldConfig(image_size=48, video_size=48)
DEMO_CODE = PatchVisualTokenizerConfig(
    image_size=48, patch=16, scales=((1, 1), (3, 3), (3, 3)), amplitudes=(0.35, 0.8, 0.6)
)
DEMO_TOKENIZERS = TokenizerTrainingConfig(
    world=DEMO_WORLD, visual=DEMO_CODE, visual_training=VisualTrainingConfig(flip_rate=0.03)
)


def demo() -> RunConfig:
    """The embedded world on two CPU cores in minutes: 8 layers, 16 experts, top-2."""
    return RunConfig(
        run_dir=Path("runs/demo"),
        model=DEMO_MODEL,
        tokenizers=DEMO_TOKENIZERS,
        prepare=PrepareConfig(world=DEMO_WORLD, num_records=40_000, row_length=128),
        training=dataclasses.replace(
            SHORT_RUN,
            steps=1400,
            rows_per_step=18,
            optimizer="muon",
            zero_stage=0,
            learning_rate=1.5e-3,
            checkpoint_every=350,
            log_every=50,
        ),
        elastic=ElasticConfig(layer_policy="uniform", start_share=0.5),
    )


def debug() -> RunConfig:
    """Seconds on a CPU: the same pipeline at smoke size."""
    return RunConfig(
        run_dir=Path("runs/debug"),
        model=dataclasses.replace(
            DEMO_MODEL,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            moe_intermediate_size=16,
            num_experts=8,
            understanding_width=32,
        ),
        tokenizers=dataclasses.replace(TokenizerTrainingConfig.smoke(), world=DEMO_WORLD, visual=DEMO_CODE),
        prepare=PrepareConfig(world=DEMO_WORLD, num_records=400, records_per_shard=200),
        training=dataclasses.replace(
            SHORT_RUN, steps=20, rows_per_step=8, checkpoint_every=10, schedule=Schedule(warmup_steps=5)
        ),
    )


def debug_stages() -> RunConfig:
    """Seconds on a CPU: the report's stages, chained, at smoke size: a growing batch, then mid-training."""
    run = debug()
    return dataclasses.replace(
        run,
        run_dir=Path("runs/debug_stages"),
        training=dataclasses.replace(
            run.training, stages=paper_stages(5, ramp_tokens=40_000, mid_share=0.3), rows_per_step=4
        ),
    )


def small() -> RunConfig:
    """One GPU, minutes: 64 experts, top-2 (an activation rate of 3.1 %)."""
    return RunConfig(
        run_dir=Path("runs/small"),
        model=ModelSizes(
            hidden_size=256,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_experts=64,
            moe_intermediate_size=128,
            rope_theta=10_000.0,
            mrope_layout="interleaved",
            num_nextn_predict_layers=1,
            video_window=8,
            understanding_patch=DEMO_MODEL.understanding_patch,
            visual_place_embedding=True,
        ),
        tokenizers=DEMO_TOKENIZERS,
        prepare=PrepareConfig(world=DEMO_WORLD, num_records=200_000, row_length=1024),
        training=TrainingConfig(steps=5000, rows_per_step=32, checkpoint_every=500),
    )


def ablation_3b() -> RunConfig:
    """paper: section 6.4, the disclosed ablation: 16 layers, 64 experts, top-8, 3.2 B parameters; width ours."""
    return RunConfig(
        run_dir=Path("runs/ablation_3b"),
        model=ModelSizes(
            hidden_size=1024,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=64,
            moe_intermediate_size=1000,
            num_experts=64,
            num_experts_per_tok=8,
            understanding_width=256,
            num_nextn_predict_layers=1,
            video_window=8,
        ),
        prepare=PrepareConfig(num_records=200_000, row_length=8192),
        training=TrainingConfig(steps=20_000, rows_per_step=64, learning_rate=1e-4, stages=paper_stages()),
    )


def ultra_sparse() -> RunConfig:
    """An activation rate below 3 %: 512 experts, top-8 (ours: the report names the rate, not the counts)."""
    return RunConfig(
        run_dir=Path("runs/ultra_sparse"),
        model=ModelSizes(
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
            moe_intermediate_size=1024,
            num_experts=512,
            num_experts_per_tok=8,
            understanding_width=512,
            num_nextn_predict_layers=1,
            video_window=8,
        ),
        prepare=PrepareConfig(num_records=200_000, row_length=8192),
        # The batch grows from 2 M to 8 M positions (paper: 14 M to 56 M) over the first 10 G.
        training=TrainingConfig(
            steps=100_000, rows_per_step=256, learning_rate=1e-4, stages=paper_stages(ramp_tokens=10_000_000_000)
        ),
    )


PRESETS = {
    "debug": debug, "debug_stages": debug_stages, "demo": demo, "small": small, "ablation_3b": ablation_3b,
    "ultra_sparse": ultra_sparse,
}  # fmt: skip

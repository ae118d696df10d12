"""Group-by-group decoding with a KV cache: text tokens, scales of pictures, frames, audio steps.

Letters: B rows, T positions, S cached positions, G positions of one group, H hidden, D bits, Q levels, V codes,
N vocabulary. Every row of a batch is one document; shorter prompts are padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache

from ernie_elastic.data.grouping import Document, Layout, scale_positions
from ernie_elastic.data.packing import collate
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.masks import cached_mask, dense_mask
from ernie_elastic.modeling.model import ErnieElasticForCausalLM
from ernie_elastic.modeling.outputs import StackOutput
from ernie_elastic.schema import PAD_TASK, TASK_ID, RouterOutput, SubModelSpec
from ernie_elastic.tokenizers.quantizers import MultiScaleBits

# (hidden statistics of one step: tasks int8 [B * G], routing per layer, run layers)
RoutingSink = Callable[[torch.Tensor, list[RouterOutput], tuple[int, ...]], None]


def layout_of(config: ErnieElasticConfig) -> Layout:
    """The document layout that a model of this config reads."""
    if not config.visual_bits or not config.understanding_patch:
        raise ConfigError(
            f"multimodal documents need visual_bits ({config.visual_bits}) and understanding_patch "
            f"({config.understanding_patch}) above 0"
        )
    assert config.visual_scales is not None and config.visual_amplitudes is not None
    eos = config.eos_token_id
    return Layout(
        bos=int(config.bos_token_id or 0),
        eos=eos[0] if isinstance(eos, list) else int(eos or 0),
        boi=config.boi_token_id,
        eoi=config.eoi_token_id,
        bov=config.bov_token_id,
        eov=config.eov_token_id,
        boa=config.boa_token_id,
        eoa=config.eoa_token_id,
        next_frame=config.next_frame_token_id,
        quantizer=MultiScaleBits(tuple((h, w) for h, w in config.visual_scales), tuple(config.visual_amplitudes)),
        num_bits=config.visual_bits,
        num_levels=config.audio_num_levels,
        codebook_size=config.audio_codebook_size,
        understanding_grid=config.understanding_image_size // config.understanding_patch // 2,
    )


@dataclass(frozen=True)
class Sampling:
    """How choices are made. temperature 0 takes the most likely one; seed makes draws repeatable."""

    temperature: float = 0.0
    top_k: int = 0
    bit_temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 64
    max_frames: int = 16
    max_audio_steps: int = 64


@dataclass
class GroupDecoder:
    """State of a batch that is being decoded: cache, valid keys and each row's running position.

    forced: replaces every choice while testing (teacher forcing through the cached path).
    """

    model: ErnieElasticForCausalLM
    layout: Layout
    submodel: SubModelSpec | None = None
    sampling: Sampling = field(default_factory=Sampling)
    routing_sink: RoutingSink | None = None

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.device = self.model.device
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    @torch.inference_mode()
    def prefill(self, prompts: list[Document]) -> None:
        """Read all of each prompt but its last position, which the first step takes."""
        batch = collate([[document] for document in prompts], pad_left=True).to(self.device)
        hidden = self.model.model.embed_batch(batch)
        self.next_position = torch.tensor([document.next_position for document in prompts], device=self.device)
        self.last_position_B3 = batch.position_BT3[:, -1]
        self.last_hidden_BH = hidden[:, -1]
        self.key_valid_BS = batch.document_BT[:, :-1] >= 0
        self.last_task_B = batch.task_BT[:, -1]
        if hidden.shape[1] > 1:
            mask = dense_mask(batch.document_BT[:, :-1], batch.group_BT[:, :-1])
            out = self.model.model.run_stack(
                hidden[:, :-1],
                batch.position_BT3[:, :-1],
                mask,
                self.cache,
                self.submodel,
                valid_N=self.key_valid_BS.reshape(-1),
                is_causal=False,
            )
            self._record(batch.task_BT[:, :-1].reshape(-1), out)

    @torch.inference_mode()
    def step(
        self,
        embedded_BGH: torch.Tensor,
        position_BG3: torch.Tensor,
        task: str,
        next_codes: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        active_B: torch.Tensor | None = None,
    ) -> StackOutput:
        """Run one new group through the stack against the cache; its keys become final.

        next_codes: the audio sampler, called level by level when the group predicts an audio step.
        """
        rows, size = embedded_BGH.shape[:2]
        new = torch.ones((rows, size), dtype=torch.bool, device=self.device)
        self.key_valid_BS = torch.cat([self.key_valid_BS, new], dim=1)
        valid = new if active_B is None else active_B[:, None].expand(rows, size)
        out = self.model.model.run_stack(
            embedded_BGH,
            position_BG3,
            cached_mask(self.key_valid_BS, size),
            self.cache,
            self.submodel,
            next_codes=next_codes,
            valid_N=valid.reshape(-1),
            is_causal=False,
            audio_index_S=torch.arange(rows * size, device=self.device) if next_codes is not None else None,
        )
        tasks = torch.full((rows, size), TASK_ID[task], dtype=torch.int8, device=self.device)
        self._record(tasks.masked_fill(~valid, PAD_TASK).reshape(-1), out)
        return out

    def _record(self, task_N: torch.Tensor, out: StackOutput) -> None:
        if self.routing_sink is not None:
            self.routing_sink(task_N, out.routing, out.layers)

    def first_group(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding [B, 1, H] and position [B, 1, 3] of the prompts' last position."""
        return self.last_hidden_BH[:, None], self.last_position_B3[:, None]

    def running_position(self) -> torch.Tensor:
        """The next running index of every row on all three axes, float32 [B, 1, 3]; moves on by one."""
        position = self.next_position.float()[:, None, None].expand(-1, 1, 3)
        self.next_position = self.next_position + 1
        return position

    def choose(self, logits_BV: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """One id per row, int64 [B]."""
        heat = self.sampling.temperature if temperature is None else temperature
        if heat <= 0:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV.float() / heat
        if self.sampling.top_k:
            floor = logits_BV.topk(min(self.sampling.top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < floor, float("-inf"))
        probabilities = logits_BV.softmax(-1).cpu()
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0].to(self.device)

    def choose_bits(self, logits_BGD: torch.Tensor) -> torch.Tensor:
        """Bits 0/1 float32 of one scale."""
        if self.sampling.bit_temperature <= 0:
            return (logits_BGD >= 0).float()
        chance = (logits_BGD.float() / self.sampling.bit_temperature).sigmoid().cpu()
        return torch.bernoulli(chance, generator=self.generator).to(self.device)

    @torch.inference_mode()
    def decode_text(self) -> list[list[int]]:
        """Tokens of each row up to EOS (left out) or max_new_tokens."""
        embedded, position = self.first_group()
        rows = len(self.next_position)
        active = torch.ones(rows, dtype=torch.bool, device=self.device)
        produced: list[torch.Tensor] = []
        for _ in range(self.sampling.max_new_tokens):
            out = self.step(embedded, position, "text", active_B=active)
            token_B = self.choose(self.model.lm_head(out.hidden[:, -1]))
            active = active & (token_B != self.layout.eos)
            produced.append(torch.where(active, token_B, -1))
            if not bool(active.any()):
                break
            embedded, position = self.model.model.embed_tokens(token_B)[:, None], self.running_position()
        table = torch.stack(produced, dim=1).tolist()
        return [[token for token in row if token >= 0] for row in table]

    @torch.inference_mode()
    def decode_visual(self, video: bool) -> list[torch.Tensor]:
        """Accumulated features of each row's frames: float32 [F, H, W, D]; an image has one frame."""
        assert self.model.model.visual is not None
        task = "video_generation" if video else "image_generation"
        embedded, position = self.first_group()
        rows = len(self.next_position)
        active = torch.ones(rows, dtype=torch.bool, device=self.device)
        frame_counts = torch.zeros(rows, dtype=torch.int64, device=self.device)
        offset_B, frames = self.next_position.float(), []
        out = self.step(embedded, position, task, active_B=active)
        for frame in range(self.sampling.max_frames if video else 1):
            total = self.decode_frame(out, offset_B, frame, task, active)
            frames.append(total)
            frame_counts += active
            if frame + 1 == self.sampling.max_frames or not video:
                break
            # S_S is stepped once: its text logits decide, its bit logits start the next frame.
            pooled = self.layout.quantizer.down(total, 0)
            out = self.step(*self.embed_scale(pooled, 0, offset_B, frame, closing=True), task, active_B=active)
            logits_BN = self.model.lm_head(out.hidden[:, -1])
            active = active & (logits_BN[:, self.layout.next_frame] >= logits_BN[:, self.layout.eov])
            if not bool(active.any()):
                break
        stacked = torch.stack(frames, dim=1)
        return [stacked[row, : int(frame_counts[row])] for row in range(rows)]

    def decode_frame(
        self, out: StackOutput, offset_B: torch.Tensor, frame: int, task: str, active: torch.Tensor
    ) -> torch.Tensor:
        """All scales of one frame, the first one from `out`; the accumulated feature float32 [B, H, W, D]."""
        assert self.model.model.visual is not None
        quantizer = self.layout.quantizer
        total = torch.zeros((len(offset_B), *quantizer.grid, self.layout.num_bits), device=self.device)
        for scale, (height, width) in enumerate(quantizer.scales):
            if scale:
                group = self.embed_scale(quantizer.down(total, scale), scale, offset_B, frame)
                out = self.step(*group, task, active_B=active)
            bits = self.choose_bits(self.model.model.visual.bit_head(out.hidden)).unflatten(1, (height, width))
            total = total + quantizer.contribution(bits, scale)
        return total

    def embed_scale(
        self, feature_BhwD: torch.Tensor, scale: int, offset_B: torch.Tensor, frame: int, closing: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding [B, h*w, H] and position [B, h*w, 3] of the positions that predict (or close) a scale."""
        assert self.model.model.visual is not None
        rows = len(feature_BhwD)
        places = torch.tensor(scale_positions(self.layout.quantizer, scale), device=self.device)
        index = len(self.layout.quantizer.scales) if closing else scale
        flat = feature_BhwD.reshape(rows * len(places), -1)
        embedded = self.model.model.visual(flat, torch.full((len(flat),), index, device=self.device))
        position = torch.cat([torch.full((len(places), 1), float(frame), device=self.device), places], dim=1)
        return embedded.unflatten(0, (rows, -1)), position[None] + offset_B[:, None, None]

    @torch.inference_mode()
    def decode_audio(self) -> list[torch.Tensor]:
        """Codes int64 [S, Q] of each row, up to EOA (left out) or max_audio_steps."""
        assert self.model.model.audio is not None
        embedded, position = self.first_group()
        rows, end = len(self.next_position), self.layout.codebook_size
        active = torch.ones(rows, dtype=torch.bool, device=self.device)
        steps: list[torch.Tensor] = []
        for _ in range(self.sampling.max_audio_steps):
            chosen: list[torch.Tensor] = []
            self.step(embedded, position, "audio_generation", self._code_sampler(chosen, end), active)
            codes_BQ = torch.stack(chosen, dim=1)
            active = active & (codes_BQ[:, 0] != end)
            steps.append(codes_BQ.masked_fill(~active[:, None], -1))
            if not bool(active.any()):
                break
            embedded = self.model.model.audio.embed_steps(codes_BQ)[:, None]
            position = self.running_position()
        table = torch.stack(steps, dim=1)
        return [row[row[:, 0] >= 0] for row in table]

    def _code_sampler(self, chosen: list[torch.Tensor], end: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
        def sample(level: int, logits_BV: torch.Tensor) -> torch.Tensor:
            if level:  # only the first level may end the sound
                logits_BV = logits_BV[:, :end]
            chosen.append(self.choose(logits_BV))
            return chosen[-1]

        return sample

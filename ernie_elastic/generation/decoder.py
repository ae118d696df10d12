"""Group-by-group decoding with a KV cache: the state of a batch, and one step.

Letters: B rows, T positions, S cached positions, G positions of a step, H hidden, D bits, Q levels, V vocabulary.
Every row of a batch is one document; shorter prompts are padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache

from ernie_elastic.data.groups.layout import Document, Layout
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.protocols import CausalModel
from ernie_elastic.modeling.inputs import embed_batch
from ernie_elastic.modeling.masks import Places, SequenceMask, cached_mask
from ernie_elastic.modeling.outputs import StackOutput
from ernie_elastic.schema import PAD_TASK, TASK_ID, PackedBatch, RouterOutput, SubModelSpec

# (hidden statistics of one step: tasks int8 [B * G], routing per layer, run layers)
RoutingSink = Callable[[torch.Tensor, list[RouterOutput], tuple[int, ...]], None]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of pictures: logits = unconditional + value * (conditional - unconditional).

    The value moves linearly from `start` at the first scale to `end` at the last one; in a clip the first scale's moves
    from first_frame to start over the frames. 1 everywhere means none. VideoAR: 5 to 3 for text, 1 to 5 to 10 for
    classes; paper: silent.
    """

    start: float = 1.0
    end: float = 1.0
    first_frame: float | None = None

    def value(self, scale: int, num_scales: int, frame: int = 0, num_frames: int = 1) -> float:
        """The guidance of one scale of one frame."""
        start = self.start
        if self.first_frame is not None and num_frames > 1:
            start = self.first_frame + (self.start - self.first_frame) * frame / (num_frames - 1)
        return start + (self.end - start) * scale / max(1, num_scales - 1)


@dataclass(frozen=True)
class Sampling:
    """How choices are made. temperature 0 takes the most likely one; seed makes draws repeatable.

    speculative: draft the token after next with the MTP module and check it in the next step (the same tokens, fewer
    steps). guidance: of pictures and clips. max_parts: of a free-running answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    bit_temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 64
    max_frames: int = 16
    max_audio_steps: int = 64
    max_parts: int = 8
    speculative: bool = False
    guidance: Guidance | None = None


@dataclass
class GroupDecoder:
    """State of a batch that is being decoded: cache, the places of its keys, each row's running position.

    With guidance the rows are the conditional prompts followed by as many unconditional ones.
    """

    model: CausalModel
    layout: Layout
    submodel: SubModelSpec | None = None
    sampling: Sampling = field(default_factory=Sampling)
    routing_sink: RoutingSink | None = None

    def __post_init__(self) -> None:
        self.cache = DynamicCache()  # grows by layers: the MTP module takes the slot after the last one
        self.device = self.model.device
        self.generator = torch.Generator().manual_seed(self.sampling.seed)
        self.steps_taken = 0
        self.window = self.model.config.video_window
        self.next_clip = 1 << 20  # above the clips of any prompt
        spec = self.submodel or self.model.config.full_spec()
        self.mtp_slot = len(spec.layers)
        self.drafting = self.sampling.speculative
        if self.drafting and self.model.model.mtp is None:
            raise ConfigError("speculative decoding needs an MTP module: num_nextn_predict_layers is 0 in this model")

    def prefill(self, prompts: list[Document]) -> None:
        """Read all of each prompt but its last position, which the first step takes."""
        batch = collate([[document] for document in prompts], pad_left=True)
        self.prefill_batch(batch, torch.tensor([document.next_position for document in prompts]))

    @torch.inference_mode()
    def prefill_batch(self, batch: PackedBatch, next_position_B: torch.Tensor) -> None:
        """As `prefill`, of a left-padded batch with one document a row and the running index after it, int64 [B]."""
        batch = batch.to(self.device)
        model = self.model.model
        hidden = embed_batch(model, batch)
        self.next_position = next_position_B.to(self.device)
        self.next_group = int(batch.group_BT.max()) + 1
        places = Places.of(batch)
        self.keys = places.map(lambda part: part[:, :-1])
        self.last_places = places.map(lambda part: part[:, -1:])
        self.last_position_B3, self.last_hidden_BH = batch.position_BT3[:, -1], hidden[:, -1]
        # Without padding, windows and rejected drafts every key is visible, and no mask is made.
        self.all_visible = not self.window and bool((self.keys.document >= 0).all())
        # Read together with the first new position: one pass of the stack less.
        self.unread = (
            (hidden[:, :-1], batch.position_BT3[:, :-1], batch.task_BT[:, :-1]) if hidden.shape[1] > 1 else None
        )
        if self.drafting and self.unread is not None and model.mtp is not None:
            mask, (embedded, position, task_BT) = SequenceMask(self.keys, self.window).dense(), self.unread
            out = model.run_stack(
                embedded,
                position,
                mask,
                self.cache,
                self.submodel,
                valid_N=(self.keys.document >= 0).reshape(-1),
                is_causal=False,
            )
            rotary = model.rotary_emb(position)
            model.mtp(out.hidden, hidden[:, 1:], rotary, mask, self.cache, self.mtp_slot, is_causal=False)
            self._record(task_BT.reshape(-1), out)
            self.unread = None

    @torch.inference_mode()
    def step(
        self,
        embedded_BGH: torch.Tensor,
        position_BG3: torch.Tensor,
        task: str,
        next_codes: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        active_B: torch.Tensor | None = None,
        clip: tuple[int, int] = (-1, 0),
        groups: int = 1,
    ) -> StackOutput:
        """Run new positions through the stack against the cache; their keys become final.

        They are one group, or `groups` groups of one position each (a token and its draft). next_codes: the audio
        sampler, called level by level when the group predicts an audio step. clip: (number, frame) of a generated clip.
        """
        rows, size = embedded_BGH.shape[:2]
        new = self._places(rows, size, clip, groups)
        self.keys = self.keys.cat(new)
        self.next_group += groups
        self.steps_taken += 1
        active = torch.ones(rows, dtype=torch.bool, device=self.device) if active_B is None else active_B
        tasks_BG = torch.full((rows, size), TASK_ID[task], dtype=torch.int8, device=self.device)
        tasks_BG = tasks_BG.masked_fill(~active[:, None], PAD_TASK)
        mask = None if self.all_visible and groups == 1 else cached_mask(new, self.keys, self.window)
        if self.unread is not None:
            prompt, position_BP3, task_BP = self.unread
            embedded_BGH = torch.cat([prompt, embedded_BGH], dim=1)
            position_BG3 = torch.cat([position_BP3, position_BG3], dim=1)
            tasks_BG = torch.cat([task_BP, tasks_BG], dim=1)
            mask, self.unread = SequenceMask(self.keys, self.window).dense(), None
        length = embedded_BGH.shape[1]
        flat_BT = torch.arange(rows * length, device=self.device).view(rows, length)
        out = self.model.model.run_stack(
            embedded_BGH,
            position_BG3,
            mask,
            self.cache,
            self.submodel,
            next_codes=next_codes,
            valid_N=(tasks_BG != PAD_TASK).reshape(-1),
            is_causal=False,
            audio_index_S=flat_BT[:, -size:].reshape(-1) if next_codes is not None else None,
        )
        self._record(tasks_BG.reshape(-1), out)
        out.hidden = out.hidden[:, -size:]
        return out

    def _places(self, rows: int, size: int, clip: tuple[int, int], groups: int) -> Places:
        document = self.last_places.document.expand(rows, size)
        group = torch.full_like(document, self.next_group)
        if groups > 1:
            group = group + torch.arange(size, dtype=group.dtype, device=self.device)
        number, frame = clip
        return Places(
            document,
            group,
            torch.full_like(document, number),
            torch.full_like(document, frame),
            torch.zeros_like(document, dtype=torch.bool),
        )

    def reject(self, rows_B: torch.Tensor) -> None:
        """Hide the newest key of the rows where bool [B] is True."""
        document = self.keys.document.clone()
        document[:, -1] = torch.where(rows_B, -1, document[:, -1])
        self.keys = Places(document, self.keys.group, self.keys.clip, self.keys.frame, self.keys.dropped)
        self.all_visible = self.all_visible and not bool(rows_B.any())

    def _record(self, task_N: torch.Tensor, out: StackOutput) -> None:
        if self.routing_sink is not None:
            self.routing_sink(task_N, out.routing, out.layers)

    def first_group(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding [B, 1, H] and position [B, 1, 3] of the prompts' last position."""
        return self.last_hidden_BH[:, None], self.last_position_B3[:, None]

    def set_pending(self, embedded_B1H: torch.Tensor, position_B13: torch.Tensor) -> None:
        """Make these the position that the next step reads first: embedding [B, 1, H] and position [B, 1, 3]."""
        self.last_hidden_BH, self.last_position_B3 = embedded_B1H[:, 0], position_B13[:, 0]

    def open(self, token: int) -> None:
        """Read what is pending and put a marker (BOI, BOV, BOA) after it."""
        self.step(*self.first_group(), "text")
        rows = len(self.next_position)
        self.set_pending(*self.token_group(torch.full((rows,), token, device=self.device)))

    def running_position(self) -> torch.Tensor:
        """The next running index of every row on all three axes, float32 [B, 1, 3]; moves on by one."""
        position = self.next_position.float()[:, None, None].expand(-1, 1, 3)
        self.next_position = self.next_position + 1
        return position

    def token_group(self, token_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding and position of one text token a row, at the next running index."""
        return self.model.model.embed_tokens(token_B)[:, None], self.running_position()

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

"""`generate(generation_mode=...)`: Transformers' entry to the group-by-group decoder, and free-running generation.

Letters: B rows, F frames, H/W grid, D bits, S audio steps, Q levels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch

from ernie_elastic.data.packed.batch_rows import select_rows, stack_rows
from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.audio import cut_short, decode_audio
from ernie_elastic.generation.decoder import GroupDecoder, Sampling
from ernie_elastic.generation.protocols import CausalModel
from ernie_elastic.generation.text import decode_text
from ernie_elastic.generation.visual import decode_visual
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.schema import PackedBatch, SubModelSpec

MODES = ("text", "image", "video", "audio", "interleaved")
GenerationMode = Literal["text", "image", "video", "audio", "interleaved"]
# One part of a free-running answer: its kind, and token ids, features [F, H, W, D] or codes [S, Q].
Part = tuple[str, torch.Tensor]


class MultimodalGeneration:
    """`generate` for the causal model; without a mode and a packed prompt it is Transformers' own."""

    def generate(
        self,
        *args: Any,
        generation_mode: GenerationMode | None = None,
        packed: PackedBatch | None = None,
        next_position: torch.Tensor | None = None,
        unconditional: PackedBatch | None = None,
        unconditional_next_position: torch.Tensor | None = None,
        sampling: Sampling | None = None,
        submodel: SubModelSpec | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts that the processor made (`packed`, left-padded, one document a row).

        generation_mode: "text" gives int64 [B, n], padded on the right; "image" float32 [B, H, W, D] features; "video"
        and "audio" one tensor a row, [F, H, W, D] or codes int64 [S, Q]; "interleaved" one list of parts a row: the
        model itself opens pictures, clips and sounds. `processor.post_process_multimodal_output` turns each into media.
        unconditional: prompts for guidance. submodel runs a part of the model. max_new_tokens in kwargs is understood.
        Raises ConfigError for an unknown mode, and for a mode without the head that it needs.
        """
        if packed is None:
            if generation_mode not in (None, "text"):
                raise ConfigError(
                    f"generation_mode {generation_mode!r} needs a prompt of the processor: "
                    "model.generate(**processor.apply_chat_template(...), generation_mode=...)"
                )
            inputs = kwargs if submodel is None else {**kwargs, "submodel": submodel}
            return super().generate(*args, **inputs)  # type: ignore[misc]

        model = cast(CausalModel, self)
        mode = generation_mode or "text"
        if mode not in MODES:
            raise ConfigError(f"generation_mode {mode!r} is not one of {', '.join(MODES)}")
        sampling = sampling or Sampling()
        if "max_new_tokens" in kwargs:
            sampling = replace(sampling, max_new_tokens=int(kwargs["max_new_tokens"]))
        if next_position is None:
            raise ConfigError("packed prompts need next_position int64 [B], as the processor gives it")
        layout = layout_of(model.config)
        if mode == "interleaved":
            rows = [select_rows(packed, [row]) for row in range(len(packed.document_BT))]
            decoders = [GroupDecoder(model, layout, submodel, sampling) for _ in rows]
            for row, decoder in enumerate(decoders):
                decoder.prefill_batch(rows[row], next_position[row : row + 1])
            return [run_free(decoder) for decoder in decoders]
        decoder = GroupDecoder(model, layout, submodel, sampling)
        if sampling.guidance is not None and mode in ("image", "video"):
            if unconditional is None or unconditional_next_position is None:
                raise ConfigError("guidance needs unconditional prompts; pass guidance=True to the processor")
            packed = stack_rows(packed, unconditional)
            next_position = torch.cat([next_position, unconditional_next_position])
        decoder.prefill_batch(packed, next_position)
        return _decode(decoder, mode)


def _decode(decoder: GroupDecoder, mode: str) -> Any:

    layout = decoder.layout
    if mode == "text":
        rows = [torch.tensor(row, dtype=torch.int64) for row in decode_text(decoder)]
        pad = layout.special.pad
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    decoder.open({"image": layout.special.boi, "video": layout.special.bov, "audio": layout.special.boa}[mode])
    if mode == "audio":
        return decode_audio(decoder)
    totals = decode_visual(decoder, mode == "video")
    return totals if mode == "video" else torch.cat(totals)


@torch.inference_mode()
def run_free(decoder: GroupDecoder) -> list[Part]:
    """Let the model itself open BOI, BOV and BOA: the parts of its answer in order, up to EOS (one row).

    Parts: ("text", int64 [n]), ("image" or "video", float32 [F, H, W, D]), ("audio", int64 [S, Q]). Ends at max_parts
    media or max_new_tokens text tokens.
    """

    layout, sampling, head = decoder.layout, decoder.sampling, decoder.model.lm_head
    parts: list[Part] = []
    text: list[int] = []
    written = 0
    can_draw, can_play = decoder.model.model.visual is not None, decoder.model.model.audio is not None
    while written < sampling.max_new_tokens and len(parts) < sampling.max_parts:
        out = decoder.step(*decoder.first_group(), "text")
        token = int(decoder.choose(head(out.hidden[:, -1])))
        if token == layout.special.eos:
            break
        decoder.set_pending(*decoder.token_group(torch.tensor([token], device=decoder.device)))
        kind = {layout.special.boi: "image", layout.special.bov: "video", layout.special.boa: "audio"}.get(token)
        if kind is None or not (can_play if kind == "audio" else can_draw):
            text.append(token)
            written += 1
            continue
        if text:
            parts.append(("text", torch.tensor(text)))
            text = []
        if kind == "audio":
            codes = decode_audio(decoder)[0]
            if len(codes) == sampling.max_audio_steps:
                cut_short(decoder)
            parts.append((kind, codes))
            closer = layout.special.eoa
        else:
            parts.append((kind, decode_visual(decoder, kind == "video", close=True)[0]))
            closer = layout.special.eov if kind == "video" else layout.special.eoi
        decoder.set_pending(*decoder.token_group(torch.tensor([closer], device=decoder.device)))
    if text:
        parts.append(("text", torch.tensor(text)))
    return parts

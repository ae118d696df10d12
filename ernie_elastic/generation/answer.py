"""Prompts in, text, pictures, videos or sounds out: batched generation over whole segments.

Letters: F frames, H/W pixels, n audio samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.layout import Document
from ernie_elastic.data.prepare.tokenise import Tokenizers, tokenise
from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.audio import decode_audio
from ernie_elastic.generation.decoder import GroupDecoder, RoutingSink, Sampling
from ernie_elastic.generation.protocols import CausalModel
from ernie_elastic.generation.text import decode_text
from ernie_elastic.generation.visual import decode_visual
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.schema import Sample, Segment, SubModelSpec

GenerationMode = Literal["text", "image", "video", "audio"]
Answer = str | np.ndarray


def answer(
    model: CausalModel,
    tokenizers: Tokenizers,
    prompts: Sequence[Sequence[Segment]],
    mode: GenerationMode,
    sampling: Sampling | None = None,
    submodel: SubModelSpec | None = None,
    batch_size: int = 100,
    routing_sink: RoutingSink | None = None,
) -> list[Answer]:
    """One answer per prompt: str, uint8 [H, W, 3], uint8 [F, H, W, 3] or float32 [n] in [-1, 1].

    mode says what is generated. submodel runs a part of the model. routing_sink receives every router decision.
    Raises ConfigError when the model has no head for the mode.
    """
    if mode not in ("text", "image", "video", "audio"):
        raise ConfigError(f"generation mode {mode!r} is not one of text, image, video, audio")
    if mode == "audio" and model.model.audio is None:
        raise ConfigError("this model has no audio heads (they were dropped at extraction); choose another mode")
    layout = layout_of(model.config)
    opener = {"text": None, "image": layout.special.boi, "video": layout.special.bov, "audio": layout.special.boa}[mode]
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        samples = [Sample(f"prompt/{start + i}", mode, tuple(segments)) for i, segments in enumerate(part)]
        documents = [build_document(parts, layout, opener=opener) for parts in tokenise(samples, tokenizers)]
        decoder = GroupDecoder(model, layout, submodel, sampling or Sampling(), routing_sink)
        answers += _decode(decoder, documents, tokenizers, mode)
    return answers


def _decode(
    decoder: GroupDecoder, documents: list[Document], tokenizers: Tokenizers, mode: GenerationMode
) -> list[Answer]:
    decoder.prefill(documents)
    if mode == "text":
        return [tokenizers.text.decode(ids) for ids in decode_text(decoder)]
    if mode == "audio":
        codes = [row.cpu() for row in decode_audio(decoder)]
        waves = iter(tokenizers.audio.decode_batch([row for row in codes if len(row)]))
        return [np.asarray(next(waves)) if len(row) else np.zeros(0, dtype=np.float32) for row in codes]
    totals = [total.cpu().float() for total in decode_visual(decoder, mode == "video")]
    with torch.inference_mode():
        if mode == "image":
            return list(tokenizers.visual.decode(torch.cat(totals)).numpy())
        return [tokenizers.visual.decode_video(total).numpy() for total in totals]

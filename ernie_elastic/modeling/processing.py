"""The processor: messages with content parts in, what the model reads out, and the model's answers back to media.

Letters: B rows, T positions, F frames, H/W pixels, n audio samples, D bits, S steps, Q levels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from transformers import BatchFeature, ProcessorMixin

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.data.prepare.tokenise import Tokenizers, tokenise
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.schema import TASKS, Sample, Segment

PLACEHOLDERS = {"<|image|>": "image", "<|video|>": "video", "<|audio|>": "audio"}
# ours: the report shows no template, and a base model knows no roles; parts follow one another as in training.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '<|' ~ part.type ~ '|>' }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
TOKEN_TYPES = {"image": 1, "video": 2, "audio": 3}


class ErnieElasticProcessor(ProcessorMixin):
    """Tokenizers of every modality behind Transformers' processor interface.

    `apply_chat_template(messages)` and `processor(text=..., images=..., videos=..., audio=...)` give a BatchFeature:
    input_ids and attention_mask int64 [B, T] (pad at positions that are no text), position_ids float32 [B, T, 3],
    mm_token_type_ids int64 [B, T] (0 text, 1 image, 2 video, 3 audio), and for `model.generate`: `packed`,
    `next_position`, and with guidance=True `unconditional`, `unconditional_next_position`.
    """

    def __init__(self, tokenizers: Tokenizers, config: ErnieElasticConfig, chat_template: str | None = None) -> None:
        self.tokenizers, self.config = tokenizers, config
        self.tokenizer = tokenizers.text.hf
        self.layout = layout_of(config)
        self.template = chat_template or CHAT_TEMPLATE
        self.chat_template = self.template

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.tokenizers.text.vocab_size}, bits={self.layout.num_bits})"

    @classmethod
    def get_attributes(cls) -> list[str]:
        """None: the tokenizers travel in a folder of their own."""
        return []

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> ErnieElasticProcessor:
        """The processor of a model directory, compressed or not; CheckpointError when it carries no tokenizers."""
        from transformers import AutoConfig

        directory = Path(pretrained_model_name_or_path)
        config = AutoConfig.from_pretrained(directory)
        if not isinstance(config, ErnieElasticConfig):
            raise CheckpointError(f"{directory} holds a {config.model_type!r} model; expected an ernie_elastic one")
        path = directory / "chat_template.jinja"
        return cls(Tokenizers.load(directory / "tokenizers"), config, path.read_text() if path.exists() else None)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write tokenizers and chat template beside a model's config. Returns the paths written.

        Raises ConfigError for push_to_hub: push the whole directory instead.
        """
        if push_to_hub:
            raise ConfigError("processor: push_to_hub is not supported here; push the model's whole directory")
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizers.save(directory / "tokenizers")
        (directory / "chat_template.jinja").write_text(self.template)
        if not (directory / "config.json").exists():
            self.config.save_pretrained(directory)
        return [str(directory / "tokenizers"), str(directory / "chat_template.jinja")]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        guidance: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with placeholders <|image|>, <|video|>, <|audio|>, and the media that fill them in order.

        images: uint8 [H, W, 3] arrays or PIL images; videos: uint8 [F, H, W, 3]; audio: float32 [n] in [-1, 1] at the
        tokenizer's rate. Raises DataError when placeholders and media do not match.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        queues = {"image": _queue(images, 3), "video": _queue(videos, 4), "audio": _queue(audio, 1)}
        prompts = [self._segments(item, queues) for item in texts]
        left = {kind: len(queue) for kind, queue in queues.items() if queue}
        if left:
            raise DataError(f"processor: media without a placeholder in the texts: {left}")
        return self.encode(prompts, guidance)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = True,
        guidance: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Messages (one conversation, or a list of them) as what the model reads; a string with tokenize=False.

        A message is {"role", "content"}; content is a string or parts {"type": "text", "text"} and {"type": "image" |
        "video" | "audio", the same key: the array}. Raises DataError when text spells out a placeholder.
        """
        single = bool(conversation) and isinstance(conversation[0], dict)
        conversations = [conversation] if single else list(conversation)
        template = Environment().from_string(chat_template or self.template)
        rendered, media = [], {"image": [], "video": [], "audio": []}  # type: ignore[var-annotated]
        for messages in conversations:
            for message in messages:
                _check_text(message["content"])
                for part in message["content"] if not isinstance(message["content"], str) else ():
                    if part["type"] != "text":
                        media.setdefault(part["type"], []).append(part.get(part["type"], part.get("url")))
            rendered.append(template.render(messages=messages, **kwargs))
        unknown = sorted(set(media) - {"image", "video", "audio"})
        if unknown:
            raise DataError(f"processor: content part type {unknown[0]!r} is not one of text, image, video, audio")
        if not tokenize:
            return rendered[0] if single else rendered
        return self(
            text=rendered, images=media["image"], videos=media["video"], audio=media["audio"], guidance=guidance
        )

    def _segments(self, text: str, queues: dict[str, list[np.ndarray]]) -> list[Segment]:
        segments = []
        for piece in re.split("(" + "|".join(map(re.escape, PLACEHOLDERS)) + ")", text):
            kind: Any = PLACEHOLDERS.get(piece)
            if kind is not None:
                if not queues[kind]:
                    raise DataError(f"processor: the text has more {piece} than there are {kind} inputs")
                segments.append(Segment(kind, "input", array=queues[kind].pop(0)))
            elif piece:
                segments.append(Segment("text", "input", text=piece))
        return segments

    def encode(self, prompts: Sequence[Sequence[Segment]], guidance: bool = False) -> BatchFeature:
        """Prompts of segments as a BatchFeature (see the class)."""
        samples = [Sample(f"prompt/{i}", "prompt", tuple(segments)) for i, segments in enumerate(prompts)]
        parts = tokenise(samples, self.tokenizers)
        documents = [build_document(part, self.layout) for part in parts]
        batch = collate([[document] for document in documents], pad_left=True)
        kinds = torch.tensor([TOKEN_TYPES.get(name.split("_")[0], 0) for name in TASKS] + [0])  # the last one: padding
        pad = int(self.config.pad_token_id or 0)
        data: dict[str, Any] = {
            "input_ids": batch.text_ids_BT.masked_fill(batch.text_ids_BT < 0, pad),
            "attention_mask": (batch.document_BT >= 0).long(),
            "position_ids": batch.position_BT3,
            "mm_token_type_ids": kinds[batch.task_BT.long()].masked_fill(batch.text_ids_BT >= 0, 0),
            "packed": batch,
            "next_position": torch.tensor([document.next_position for document in documents]),
        }
        if guidance:
            bare = [build_document([p for p in part if p.kind != "text"], self.layout) for part in parts]
            data["unconditional"] = collate([[document] for document in bare], pad_left=True)
            data["unconditional_next_position"] = torch.tensor([document.next_position for document in bare])
        return BatchFeature(data)

    def post_process_multimodal_output(
        self, generated_outputs: Any, skip_special_tokens: bool = True, generation_mode: str = "text", **kwargs: Any
    ) -> list[Any]:
        """What `model.generate` gave, as media: str, uint8 [H, W, 3], uint8 [F, H, W, 3], float32 [n]; for
        "interleaved" one list of (kind, media) a row. Raises DataError for an unknown mode."""
        if generation_mode == "interleaved":
            return [[(kind, self._media(kind, value)) for kind, value in row] for row in generated_outputs]
        if generation_mode not in ("text", "image", "video", "audio"):
            raise DataError(f"generation_mode {generation_mode!r} is not one of text, image, video, audio, interleaved")
        return [self._media(generation_mode, value) for value in generated_outputs]

    def _media(self, kind: str, value: torch.Tensor) -> Any:
        value = value.cpu()
        if kind == "text":
            return self.tokenizers.text.decode(value.tolist())
        if kind == "audio":
            if not len(value):
                return np.zeros(0, dtype=np.float32)
            return np.asarray(self.tokenizers.audio.decode(value))
        with torch.inference_mode():
            feature_fhwD = value.float().reshape(-1, *value.shape[-3:])
            if kind == "video":
                return self.tokenizers.visual.decode_video(feature_fhwD).numpy()
            return self.tokenizers.visual.decode(feature_fhwD)[0].numpy()

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids of several rows as text."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Token ids as text."""
        return self.tokenizer.decode(*args, **kwargs)


def _queue(media: Any, dims: int) -> list[np.ndarray]:
    if media is None:
        return []
    items = media if isinstance(media, (list, tuple)) else [media]
    arrays = [np.asarray(item) for item in items]
    for array in arrays:
        if array.ndim != dims:
            raise DataError(f"processor: an input of shape {array.shape}; expected {dims} dimensions")
    return arrays


def _check_text(content: Any) -> None:
    texts = [content] if isinstance(content, str) else [p.get("text", "") for p in content if p["type"] == "text"]
    for text in texts:
        for placeholder in PLACEHOLDERS:
            if placeholder in text:
                raise DataError(
                    f"processor: a text holds {placeholder}, which stands for a medium; pass it as a content part"
                )

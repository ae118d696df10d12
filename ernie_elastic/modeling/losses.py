"""Loss sums of the four modalities. Letters: N positions, V vocabulary or codes, D bits, S audio steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ernie_elastic.modeling.heads import bit_loss
from ernie_elastic.modeling.outputs import PackedOutput
from ernie_elastic.schema import TASK_ID, PackedBatch

MODALITIES = ("text", "image", "video", "audio")


def modality_sums(output: PackedOutput, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sums and their weights' sums per modality, float32 [4] each, in the order of MODALITIES.

    text: cross-entropy per token. image, video: bit cross-entropy per position, weighted by scale. audio:
    cross-entropy averaged over the levels of a step.
    """
    targets_N = batch.text_targets_BT.reshape(-1)[output.text_index_N]
    text = F.cross_entropy(output.text_logits_NV.float(), targets_N, reduction="sum")
    per_position_N = bit_loss(output.bit_logits_ND, batch.bit_targets_ND) * batch.bit_weight_N
    video_N = batch.task_BT.reshape(-1)[batch.bit_index_N] == TASK_ID["video_generation"]
    codes_SQ = batch.next_codes_BTQ.flatten(0, 1)[output.audio_index_S]
    audio, levels = text.new_zeros(()), max(1, len(output.audio_logits))
    for level, logits_SV in enumerate(output.audio_logits):
        target_S = codes_SQ[:, level]
        audio = audio + F.cross_entropy(logits_SV.float(), target_S, ignore_index=-1, reduction="sum") / levels
    sums = torch.stack([text, (per_position_N * ~video_N).sum(), (per_position_N * video_N).sum(), audio])
    counts = torch.stack(
        [
            torch.tensor(float(len(targets_N)), device=text.device),
            (batch.bit_weight_N * ~video_N).sum(),
            (batch.bit_weight_N * video_N).sum(),
            (codes_SQ >= 0).sum().float() / levels,
        ]
    )
    return sums, counts

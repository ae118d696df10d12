"""Loss sums of the four modalities. Letters: N positions, V vocabulary or codes, D bits, S audio steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ernie_elastic.modeling.heads import bit_loss
from ernie_elastic.modeling.outputs import PackedOutput
from ernie_elastic.schema import TASK_ID, PackedBatch

MODALITIES = ("text", "image", "video", "audio")
# What is added up: one loss per modality, and that of multi-token prediction.
LOSSES = (*MODALITIES, "mtp")


def modality_sums(
    output: PackedOutput, batch: PackedBatch, text_length_power: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sums and their weights' sums, float32 [5] each, in the order of LOSSES.

    text: cross-entropy per token, times n^-text_length_power where its document has n targets. image, video: bit
    cross-entropy per position, weighted by scale. audio: cross-entropy averaged over the levels of a step. mtp:
    cross-entropy of the token after next.
    """
    targets_N = batch.text_targets_BT.reshape(-1)[output.text_index_N]
    text_N = F.cross_entropy(output.text_logits_NV.float(), targets_N, reduction="none")
    weight_N = _length_weights(batch, text_length_power)[output.text_index_N]
    text = (text_N * weight_N).sum()
    mtp_targets_N = batch.text_targets_BT.reshape(-1)[output.mtp_index_N + 1]
    mtp = F.cross_entropy(output.mtp_logits_NV.float(), mtp_targets_N, reduction="sum")
    bit_targets_ND, bit_weight_N = batch.bit_targets_ND, batch.bit_weight_N
    if len(output.bit_index_N) != len(batch.bit_index_N):  # a sequence shard holds some of the targets
        here_N = torch.isin(batch.bit_index_N, output.bit_index_N)
        bit_targets_ND, bit_weight_N = bit_targets_ND[here_N], bit_weight_N[here_N]
    active = batch.active_bits or bit_targets_ND.shape[-1]
    per_position_N = bit_loss(output.bit_logits_ND[:, :active], bit_targets_ND[:, :active]) * bit_weight_N
    video_N = batch.task_BT.reshape(-1)[output.bit_index_N] == TASK_ID["video_generation"]
    codes_SQ = batch.next_codes_BTQ.flatten(0, 1)[output.audio_index_S]
    audio, levels = text.new_zeros(()), max(1, len(output.audio_logits))
    for level, logits_SV in enumerate(output.audio_logits):
        target_S = codes_SQ[:, level]
        audio = audio + F.cross_entropy(logits_SV.float(), target_S, ignore_index=-1, reduction="sum") / levels
    sums = torch.stack([text, (per_position_N * ~video_N).sum(), (per_position_N * video_N).sum(), audio, mtp])
    counts = torch.stack(
        [
            weight_N.sum(),
            (bit_weight_N * ~video_N).sum(),
            (bit_weight_N * video_N).sum(),
            (codes_SQ >= 0).sum().float() / levels,
            torch.tensor(float(len(mtp_targets_N)), device=text.device),
        ]
    )
    return sums, counts


def _length_weights(batch: PackedBatch, power: float) -> torch.Tensor:
    """float32 [B * T]: n^-power at every position of a document with n text targets."""
    documents_BT = batch.document_BT
    if not power:
        return torch.ones(documents_BT.numel(), device=documents_BT.device)
    rows_B1 = torch.arange(len(documents_BT), device=documents_BT.device)[:, None]
    number_N = ((documents_BT + 1) + rows_B1 * (documents_BT.max() + 2)).reshape(-1)
    counts = torch.bincount(number_N, weights=(batch.text_targets_BT.reshape(-1) >= 0).float())
    return counts[number_N].clamp(min=1.0).float() ** -power

"""What only a GPU can show of training: FlexAttention, compiled and with a backward, takes the steps of SDPA."""

from __future__ import annotations

import pytest
import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import modality_sums
from ernie_elastic.schema import SubModelSpec
from tests.modeling.common import DOCUMENTS, RICH, random_parts, tiny_model

FEWER = SubModelSpec((0, 3, 4, 5), ((0, 1, 2),) * 4, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [None, FEWER], ids=["full", "fewer"])
def test_flex_attention_trains_as_sdpa(spec: SubModelSpec | None, other: str = "flex_attention") -> None:
    model = tiny_model(**{**RICH, "head_dim": 16}).train()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = layout_of(model.config)
    documents = [build_document(random_parts(name, 9, model.config), layout) for name in DOCUMENTS]
    batch, found = collate([documents[::2], documents[1::2]]).to(device), {}
    model.to(device)
    for attention in ("sdpa", other):
        model.set_attn_implementation(attention)
        model.zero_grad()
        sums, counts = modality_sums(model.forward_packed(batch, submodel=spec), batch)
        loss = (sums / counts.clamp(min=1.0)).sum()
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}  # type: ignore[union-attr]
        found[attention] = (loss.detach(), gradients)
    torch.testing.assert_close(found[other][0], found["sdpa"][0], rtol=1e-4, atol=1e-4)
    for name, gradient in found["sdpa"][1].items():
        torch.testing.assert_close(found[other][1][name], gradient, rtol=1e-2, atol=1e-3, msg=name)


def test_the_comparison_itself_runs_on_a_cpu() -> None:
    test_flex_attention_trains_as_sdpa(FEWER, other="eager")

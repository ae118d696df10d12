"""The inputs of generated pictures: a place embedding counts cells inside each scale of each picture."""

from __future__ import annotations

import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.generation.decoder import GroupDecoder, Sampling
from ernie_elastic.generation.visual import decode_visual
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.heads import cell_in_scale
from tests.modeling.common import random_parts, tiny_model


def test_cells_are_counted_anew_in_every_scale_and_picture():
    scale_N = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 1, 1])
    index_N = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22])
    assert cell_in_scale(scale_N, index_N).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 1]
    split = torch.tensor([3, 4, 8, 9])
    assert cell_in_scale(torch.tensor([1, 1, 1, 1]), split).tolist() == [0, 1, 0, 1], "another picture starts anew"
    assert cell_in_scale(scale_N[:0], index_N[:0]).tolist() == []


def test_every_cell_reads_its_own_row_of_the_table():
    model = tiny_model(visual_place_embedding=True)
    layout, visual = layout_of(model.config), model.model.visual
    document = build_document(random_parts("text_to_image", 1, model.config), layout)
    batch = collate([[document, document]])
    rows = visual.place_embed(
        batch.visual_scale_N * visual.cells + cell_in_scale(batch.visual_scale_N, batch.visual_index_N)
    )
    with_place = visual(batch.visual_inputs_ND, batch.visual_scale_N, batch.visual_index_N)
    visual.place_embed = None
    without = visual(batch.visual_inputs_ND, batch.visual_scale_N, batch.visual_index_N)
    torch.testing.assert_close(with_place - without, rows)
    one = len(batch.visual_scale_N) // 2
    assert torch.equal(rows[:one], rows[one:]), "the second picture of a row has the same places"
    assert len(rows[:one].unique(dim=0)) == one, "no two cells of a picture share a row"


def test_rows_that_are_drawn_together_draw_what_they_draw_alone():
    model = tiny_model(visual_place_embedding=True).eval()
    torch.nn.init.normal_(model.model.visual.place_embed.weight)  # as strong as a trained one
    layout = layout_of(model.config)
    prompts = [
        build_document(random_parts("text_to_image", seed, model.config)[:1], layout, opener=layout.special.boi)
        for seed in (1, 2, 3)
    ]

    def draw(rows: list) -> list[torch.Tensor]:
        decoder = GroupDecoder(model, layout, sampling=Sampling(bit_temperature=0.0))
        decoder.prefill(rows)
        return decode_visual(decoder, video=False)

    for alone, together in zip([draw([prompt])[0] for prompt in prompts], draw(prompts), strict=True):
        torch.testing.assert_close(together, alone)

"""Figures: every panel can be drawn for odd routings, and a region's place names the right number."""

from __future__ import annotations

import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ernie_elastic.analysis import figures
from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.drawing import Panel, Region, render, scope_note, task_label, theme
from ernie_elastic.analysis.trace import RoutingCounts, TraceHeader, counts_from_trace


@pytest.fixture(scope="module")
def counts(make_trace) -> RoutingCounts:
    return st.paper_rows(counts_from_trace(make_trace(experts=8, layers=3, tokens=40)))


@pytest.fixture(scope="module")
def panels(counts) -> dict[str, Panel]:
    return {panel.name: panel for panel in all_panels(counts)}


def all_panels(counts: RoutingCounts, style: str = "light") -> list[Panel]:
    return [
        *figures.specialization_panels(counts, style),
        *figures.overlap_panels(counts, style),
        figures.entropy_panel(counts, style),
        *figures.heat_map_panels(counts, style),
    ]


def test_panels_are_named_once_and_their_regions_lie_inside_the_picture(panels):
    assert len(panels) == 3 + 3 + 1 + 6 and {"figure8_first", "figure9_last", "heatmap_audio"} <= set(panels)
    for panel in panels.values():
        assert panel.regions
        for region in panel.regions:
            left, top, right, bottom = region.box
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            assert len(region.rows) >= 1


def cell(region: Region, table: np.ndarray, row: int, column: int) -> float:
    return float(table.reshape(-1)[region.offset + row * region.row_stride + column * region.col_stride])


def test_regions_point_at_the_numbers_they_show(counts, panels):
    # Every number of these stands for its own place, so that no two can be mistaken for each other.
    frequency, iou, entropy = (
        np.arange(values.size).reshape(values.shape)
        for values in (st.specialization(counts), st.quarter_iou(counts), st.normalized_entropy(counts))
    )
    bars = panels["figure8_middle"]
    assert cell(bars.regions[4], frequency, 0, 6) == frequency[4, 1, 6]
    assert bars.regions[4].rows == ("Video Generation",)
    overlap = panels["figure9_last"].regions[0]
    assert cell(overlap, iou, 1, 5) == iou[2, 1, 5]
    lines = panels["figure10"].regions[0]
    assert cell(lines, entropy, 3, 2) == entropy[3, 2] and lines.rows[3] == "Image Generation"
    heat = panels["heatmap_audio"].regions[0]
    assert cell(heat, frequency, 2, 7) == frequency[5, 2, 7]


def test_a_bar_stands_where_its_region_says(counts):
    """The picture's own pixels: the tallest bar of a task is coloured up to the top of its column, others are not."""
    table = np.zeros((1, 1, 8), dtype=np.int64)
    table[0, 0, 5] = 9
    single = RoutingCounts(table, np.array([9]), ("image_generation",), TraceHeader("m", "s", 8, 1, (0,)))
    panel = figures.specialization_panels(single)[0]
    picture = np.asarray(Image.open(io.BytesIO(render(panel.figure, "png"))).convert("RGB")).astype(int)
    left, top, right, bottom = panel.regions[0].box
    y = int((top + 0.5 * (bottom - top)) * picture.shape[0])
    orange = np.array([0xD5, 0x5E, 0x00])
    for expert in range(8):
        x = int((left + (expert + 0.5) / 8 * (right - left)) * picture.shape[1])
        assert (np.abs(picture[y, x] - orange).max() < 8) == (expert == 5), expert


def test_a_task_without_tokens_is_left_out_of_maps_and_lines_and_marked_elsewhere():
    table = np.array([[[3, 1]], [[0, 0]]])
    counts = RoutingCounts(table, np.array([4, 0]), ("text", "audio"), TraceHeader("m", "s", 2, 1, (0,)))
    drawn = {panel.name: panel.figure.axes for panel in all_panels(counts)}
    assert "heatmap_text" in drawn and "heatmap_audio" not in drawn
    assert [text.get_text() for axes in drawn["figure8_first"] for text in axes.texts] == ["no tokens"]
    assert [text.get_text() for text in drawn["figure9_first"][0].texts] == ["1.00", "none", "none", "none"]
    assert [line.get_label() for line in drawn["figure10"][0].lines] == ["Text (4)"]


@pytest.mark.parametrize(("experts", "top_k", "layers"), [(1, 1, 1), (100, 4, 2)])
def test_odd_sizes_can_be_drawn(make_trace, experts, top_k, layers):
    trace = make_trace(experts=experts, top_k=top_k, layers=layers, tokens=10, names=("text", "other"))
    counts = counts_from_trace(trace)
    for panel in all_panels(counts, "dark"):
        assert render(panel.figure, "png", dpi=40)[:4] == b"\x89PNG"


def test_rendering_repeats_and_settings_are_left_alone(counts):
    before = dict(matplotlib.rcParams)
    first, second = (render(figures.figure_9(counts), "svg") for _ in range(2))
    assert first == second and b"<svg" in first and b"Date" not in first
    with theme("dark"):
        pass
    assert dict(matplotlib.rcParams) == before


def test_wide_figures_have_a_cell_for_every_task_and_layer(counts):
    assert len(figures.figure_8(counts).axes) == 18
    assert len(figures.figure_9(counts).axes) == 4  # three maps and a colour bar


def test_labels_carry_what_is_needed(counts, panels):
    assert task_label("image_understanding") == "Image Understanding"
    assert task_label("image_understanding", short=True) == "Image U"
    header = replace(counts.header, shared_experts=1, kept_experts=((0, 1), (2, 3, 4), (0, 1, 2, 3)))
    masked = RoutingCounts(np.zeros_like(counts.counts), np.zeros_like(counts.tokens), counts.task_names, header)
    assert scope_note(masked) == "N = 8 experts, k = 2, 2-4 kept, 1 shared not shown"
    titles = [axes.get_title(loc="left") for axes in panels["figure8_first"].figure.axes]
    assert titles[5] == "Audio · 80 tokens"


def test_difference_panels_share_one_scale(make_trace):
    names = ("text", "audio")
    one, two = (counts_from_trace(make_trace(layers=2, tokens=40, seed=seed, names=names)) for seed in (0, 1))
    comparison = st.compare_counts(one, two)
    panels = figures.difference_panels(comparison)
    limits = {panel.figure.axes[0].images[0].get_clim() for panel in panels}
    assert len(panels) == 2 and limits == {(-np.abs(comparison.frequency).max(), np.abs(comparison.frequency).max())}

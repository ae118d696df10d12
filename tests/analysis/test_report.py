"""The report's directory: whole or absent, self-contained, and saying the same in every file."""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from ernie_elastic.analysis import page, report
from ernie_elastic.analysis import statistics as st
from ernie_elastic.analysis.trace import counts_from_trace, load_counts
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.stages import read_manifest

TITLE = 'Routing of <script>alert("x")</script> & co'


@pytest.fixture(scope="module")
def written(make_trace, tmp_path_factory):
    """One report with a comparison: (directory, result, counts)."""
    trace = make_trace(experts=8, layers=3, tokens=60)
    other = make_trace(experts=8, layers=3, tokens=60, seed=1)
    out = tmp_path_factory.mktemp("report") / "routing"
    return out, report.write_report(trace, out, TITLE, compare=other), counts_from_trace(trace)


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.hidden = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.text.append(data)


@pytest.fixture(scope="module")
def parsed(written) -> Page:
    return Page((written[0] / "index.html").read_text())


def test_the_directory_is_a_stage_with_everything_in_it(written):
    out, result, counts = written
    manifest = read_manifest(out, ("routing",), verify=True)
    assert manifest.config["title"] == TITLE and manifest.config["header"]["num_experts"] == 8
    names = set(manifest.files)
    assert {"index.html", "statistics.json", "counts.npz"} <= names
    for stem in ("figure8", "figure9", "figure10", "heatmap_text", "difference_audio"):
        assert {f"figures/{stem}.png", f"figures/{stem}.svg"} <= names
    for stem in ("figure8", "figure9", "figure10", "heatmap", "difference"):
        assert f"figures/{stem}.csv" in names
    assert result["index"] == out / "index.html" and all(path.is_file() for path in result["figures"])
    stored = load_counts(out / "counts.npz")
    assert np.array_equal(stored.counts, counts.counts) and len(stored.task_names) == 7
    assert [path.name for path in out.parent.iterdir()] == ["routing"]


def test_the_page_opens_offline_and_its_links_lead_somewhere(written, parsed):
    out = written[0]
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset"):
            target = attributes.get(name)
            if target is None or target.startswith("data:"):
                continue
            assert tag == "a" and (out / target).is_file(), (tag, target)
    style = (out / "index.html").read_text().split("</style>")[0]
    assert "@import" not in style and "url(" not in style
    assert (out / "index.html").stat().st_size < 3_000_000


def test_the_page_is_readable_without_script(written, parsed):
    result, text = written[1], " ".join(parsed.text)
    assert text.count(TITLE) == 2, "the title is text in the tab and in the heading"
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    for sentence in result["sentences"].values():
        assert sentence in text
    for task in ("Text", "Image Understanding", "Audio", "All tasks"):
        assert task in text
    entropy = result["statistics"]["normalized_entropy"]["text"]
    assert f"{np.mean(entropy):.3f} ({min(entropy):.2f} to {max(entropy):.2f})" in text
    pictures = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(pictures) == 3 + 3 + 1 + 6 + 6
    assert all(picture["alt"] and picture["src"].startswith("data:image/png;base64,") for picture in pictures)


def test_the_pages_tables_hold_the_statistics(written):
    out, _, counts = written
    source = re.search(r'id="tables">(.*?)</script>', (out / "index.html").read_text(), re.S).group(1)
    tables, merged = json.loads(source), st.paper_rows(counts)
    for name, values in (
        ("frequency", st.specialization(merged)),
        ("iou", st.quarter_iou(merged)),
        ("entropy", st.normalized_entropy(merged)),
    ):
        raw = np.frombuffer(base64.b64decode(tables[name]["data"]), "<u2").astype(float)
        shown = raw * tables[name]["scale"] + tables[name]["base"]
        assert np.allclose(shown, values.ravel(), atol=tables[name]["scale"]), name
    tags = Page((out / "index.html").read_text()).tags
    regions = [json.loads(attributes["data-regions"]) for tag, attributes in tags if tag == "figure"]
    assert {region["table"] for panel in regions for region in panel} == set(tables)


def test_missing_numbers_in_a_packed_table_stay_missing_and_none_is_clipped():
    table = page.packed_table(np.array([0.0, np.nan, 100.0]), 0.01, 0.0, 2, " %")
    assert np.frombuffer(base64.b64decode(table["data"]), "<u2").tolist() == [0, 65535, 10000]
    with pytest.raises(ValueError, match="do not fit"):
        page.packed_table(np.array([-1.0]), 0.01, 0.0, 2, "")


def test_json_and_csv_say_the_same(written):
    out, result, counts = written
    statistics = json.loads((out / "statistics.json").read_text())
    assert statistics == json.loads(json.dumps(result["statistics"]))
    merged = st.paper_rows(counts)
    assert statistics["tokens"] == dict(zip(merged.task_names, merged.tokens.tolist(), strict=True))
    assert statistics["tokens"]["audio"] == 120

    def rows(name):
        with open(out / "figures" / name) as stream:
            return list(csv.DictReader(stream))

    for row in rows("figure10.csv"):
        expected = statistics["normalized_entropy"][row["task"]][int(row["layer"])]
        assert float(row["normalized_entropy"]) == pytest.approx(expected, abs=1e-5)
    usage = rows("heatmap.csv")
    assert len(usage) == 6 * 3 * 8 and len(rows("figure9.csv")) == 3 * 36 and len(rows("difference.csv")) == 6 * 3 * 8
    assert sum(int(row["tokens"]) for row in usage) == 7 * 60 * 3 * 2
    assert statistics["comparison"]["share_moved"]["text"][0] > 0


def test_a_task_without_tokens_is_missing_in_every_file(make_trace, tmp_path):
    trace = make_trace(experts=8, layers=2, tokens=20, names=("text", "image_generation"))
    rest = replace(trace, task=np.where(trace.task == 0, -1, trace.task).astype(np.int8))
    result = report.write_report(rest, tmp_path / "r", "t")
    assert result["statistics"]["normalized_entropy"]["text"] == [None, None]
    assert "No tokens of Text" in (tmp_path / "r" / "index.html").read_text()
    assert not (tmp_path / "r" / "figures" / "heatmap_text.png").exists()
    assert "NaN" not in (tmp_path / "r" / "statistics.json").read_text()
    assert "nan" not in (tmp_path / "r" / "figures" / "figure9.csv").read_text()


def test_nothing_is_left_when_the_report_cannot_be_made(make_trace, tmp_path, monkeypatch):
    trace = make_trace(experts=8, layers=2, tokens=5, names=("text", "image_generation"))
    with pytest.raises(DataError, match="no token of any task"):
        report.write_report(replace(trace, task=np.full_like(trace.task, -1)), tmp_path / "r", "t")
    with pytest.raises(ConfigError, match=r"8 experts.*16"):
        report.write_report(trace, tmp_path / "r", "t", compare=make_trace(experts=16, layers=2, tokens=5))
    monkeypatch.setattr(report, "build_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(trace, tmp_path / "r", "t")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_report_is_kept_unless_asked(make_trace, tmp_path):
    (tmp_path / "r").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        report.write_report(make_trace(experts=8, layers=1, tokens=5), tmp_path / "r", "t")

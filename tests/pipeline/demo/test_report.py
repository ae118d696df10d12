"""The demo's report shows what a run left, names what it lacks, invents nothing and needs no network."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ernie_elastic.errors import CheckpointError, DataError
from ernie_elastic.pipeline.demo import charts, tables
from ernie_elastic.pipeline.demo.report import choose_figures, read_metrics, write_demo_report
from ernie_elastic.pipeline.demo.samples import DRAWN, READ, Answers, together
from tests.support.demo_run import CHANCE, MODELS, make_demo_run

VOID = {"meta", "link", "img", "br", "hr", "input", "rect", "path", "line", "polyline", "polygon", "circle"}


class Outline(HTMLParser):
    """Counts tags and collects what they load; complains about a tag that is closed by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def outline(page: Path) -> Outline:
    """Parse a page and check that its tags are balanced."""
    parser = Outline()
    parser.feed(page.read_text(encoding="utf-8"))
    assert not parser.open
    return parser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole made-up run."""
    return make_demo_run(tmp_path_factory.mktemp("run") / "demo", samples_per_task=10, steps=120)


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    """Its report."""
    return write_demo_report(run)


@pytest.fixture
def scratch(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "demo"))


def test_page_loads_nothing_from_outside(page: Path) -> None:
    parsed = outline(page)
    assert parsed.loads and all(load.startswith("data:") for load in parsed.loads)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<script", re.sub(r"data:[\w/+-]+;base64,[\w+/=]+", "", text))


def test_page_embeds_the_very_bytes_of_the_media(run: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in ("full/media/text_to_image-0-output.png", "full/media/text_to_audio-0-output.wav"):
        data = (run / "evaluation" / name).read_bytes()
        assert base64.b64encode(data).decode() in text, name


def test_page_shows_every_accuracy_beside_chance_and_n(run: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\xa0", " ")
    rows = json.loads((run / "summary.json").read_text())["rows"]
    for row in rows:
        for task, entry in row["accuracy"].items():
            assert f"{100 * entry['value']:.1f} %" in text, (row["model"], task)
    for chance in CHANCE.values():
        assert f"chance {100 * chance:.1f} %, n = 200" in text


def test_page_shows_the_first_samples_of_every_task_and_says_so(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for section in (*DRAWN, *READ):
        start = text.index(f'<h3 id="{section.task}">')
        end = min(text.find(mark, start + 1) for mark in ("<h3", "</section>") if text.find(mark, start + 1) > 0)
        assert text[start:end].count('<article class="card">') == section.shown
        assert f"Shown: the first {section.shown} of 10 kept samples" in text[start:end]


def test_complete_run_has_nothing_missing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert 'class="missing"' not in text and 'class="absent"' not in text and "not measured" not in text


def test_tokenizers_and_routing_show_their_numbers_and_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<td>bits, used</td><td>14</td>" in text and "<td>perplexity</td><td>203.5, 98.25</td>" in text
    assert "Text is the most even task." in text and "Few tokens of one task." in text


def test_layers_without_load_and_losses_without_value_are_left_out() -> None:
    records = [
        {"step": 1, "losses": {"text": 2.0, "audio": None}, "load_max_over_mean": [None, 2.0]},
        {"step": 2, "losses": {"text": float("nan")}, "load_max_over_mean": [None, None]},
        {"step": 3, "losses": {"text": 1.0}, "load_max_over_mean": [1.0, 3.0]},
    ]
    assert "audio" not in tables.loss_chart(records) and "text" in tables.loss_chart(records)
    assert "nan" not in tables.loss_chart(records) and 'class="band' in tables.load_chart(records)
    assert tables.load_chart(records[1:2]) == "" and tables.loss_chart([{"step": 1, "losses": {}}]) == ""


def test_spec_is_put_into_words() -> None:
    spec = {"layers": [0, 2], "experts_per_layer": [[0, 1, 2], [1, 2]], "top_k": 1}
    assert tables.spec_text(spec) == "2 layers, 2-3 experts, top-1"
    assert tables.spec_text("d6-e8-k2") == "6 layers, 8 experts, top-2"


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("summary.json", "<code>summary.json</code>"),
        ("metrics.jsonl", "<code>metrics.jsonl</code>"),
        ("routing", "<code>routing/figures</code>"),
        ("evaluation/compressed", "<code>evaluation/compressed</code>"),
        ("evaluation/full/results.json", "<code>evaluation/full/results.json</code>"),
        ("evaluation", "samples of text_to_image"),
        ("evaluation/full/media/text_to_image-0-output.png", "missing: media/text_to_image-0-output.png"),
        ("tokenizers", "tokenizers/*/health.json"),
    ],
)
def test_what_is_lost_is_named_as_missing(scratch: Path, lost: str, named: str) -> None:
    path = scratch / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_demo_report(scratch)
    outline(page)
    assert named in page.read_text(encoding="utf-8")


def test_empty_run_gives_a_page_without_a_single_claim(tmp_path: Path) -> None:
    text = write_demo_report(tmp_path).read_text(encoding="utf-8")
    assert "without losing a bit" not in text and "<table>" not in text and "<polyline" not in text
    assert text.count('class="missing"') >= 8


def test_logits_that_differ_are_said_to_differ(scratch: Path) -> None:
    summary = json.loads((scratch / "summary.json").read_text())
    (scratch / "summary.json").write_text(json.dumps(summary | {"logits_bit_equal": False}))
    text = write_demo_report(scratch).read_text(encoding="utf-8")
    assert "<b>not bit-equal</b>" in text and "without losing a bit" not in text and '"arrow"' not in text


def test_prompts_and_answers_are_escaped(scratch: Path) -> None:
    path = scratch / "evaluation" / "full" / "samples.json"
    samples = json.loads(path.read_text())
    bad = "<script>alert(1)</script>"
    for sample in samples:
        sample |= {"prompt_text": bad, "output_text": bad, "truth_text": bad}
    path.write_text(json.dumps(samples))
    page = write_demo_report(scratch)
    assert "script" not in outline(page).counts


@pytest.mark.parametrize("name", ["summary.json", "evaluation/full/samples.json"])
def test_damaged_json_is_one_line_and_leaves_no_page(scratch: Path, name: str) -> None:
    (scratch / "report.html").unlink()
    (scratch / name).write_text('{"rows": [')
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is damaged"):
        write_demo_report(scratch)
    assert not list(scratch.glob("*report*"))


@pytest.mark.parametrize("name", ["text_to_image-0-output.png", "text_to_audio-0-output.wav"])
def test_damaged_media_names_its_file(scratch: Path, name: str) -> None:
    (scratch / "evaluation" / "full" / "media" / name).write_bytes(b"not what it says")
    with pytest.raises(DataError, match=re.escape(name)):
        write_demo_report(scratch)


def test_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent is not a directory"):
        write_demo_report(tmp_path / "absent")


def test_metrics_keep_the_last_record_of_a_step_and_drop_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [(1, 3), (2, 1)]
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(path)


def test_identical_answers_are_joined_and_different_verdicts_are_not() -> None:
    answers = [(Answers(model, Path(), []), {"output_text": "a", "correct": True}) for model in MODELS]
    assert [name for name, _ in together(answers, lambda _, s: s["output_text"])] == ["every model"]
    answers[0] = (answers[0][0], {"output_text": "a", "correct": False})
    names = [name.replace("\xa0", " ") for name, _ in together(answers, lambda _, s: s["output_text"])]
    assert names == ["full", "half = shallow = compressed"]


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, method 3 without continuity correction.
    low, high = tables.wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert tables.wilson(0.0, 200)[0] == 0.0 and tables.wilson(1.0, 200)[1] == pytest.approx(1.0)


def test_above_chance_needs_the_whole_interval() -> None:
    row = {"accuracy": {"a": {"value": 0.5, "chance": 0.45, "n": 200}, "b": {"value": 0.6, "chance": 0.45, "n": 200}}}
    assert tables.above_chance(row) == (1, 2)


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert charts.smooth([2.0] * 5, 3) == pytest.approx([2.0] * 5)
    assert charts.smooth([0.0] * 50 + [1.0] * 3, 3)[-1] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (3, 4000), (0, 9.4e6)])
def test_ticks_lie_inside_and_are_few(low: float, high: float) -> None:
    ticks = charts.linear_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 11 and low <= ticks[0] + 1e-9 and ticks[-1] <= high * (1 + 1e-9)


def test_chart_places_points_where_their_values_say() -> None:
    frame = charts.Frame(charts.WIDE, 330, (0, 10), (0.1, 10), log_y=True)
    top, middle, bottom = frame.py(10), frame.py(1), frame.py(0.1)
    assert middle == pytest.approx((top + bottom) / 2) and top < bottom
    assert frame.px(5) == pytest.approx((frame.px(0) + frame.px(10)) / 2)
    assert len(charts.thin(10_000)) <= charts.MAX_POINTS and charts.thin(10_000)[-1] == 9_999


def test_labels_of_neighbouring_dots_do_not_overlap() -> None:
    points = [
        charts.Point(name, x, 0.7) for name, x in (("submodel-half", 5.4e6), ("compressed", 5.3e6), ("full", 5.5e6))
    ]
    svg = charts.scatter_chart(points, "title", "bytes", 0.1)
    boxes = [
        (float(x), float(y), 7.2 * len(name))
        for x, y, name in re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)">([\w-]+)', svg.split("</svg>")[0])
    ]
    assert len(boxes) == 3
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or abs(a[1] - b[1]) >= 14


def test_whole_figures_replace_their_panels_and_dark_twins_go(tmp_path: Path) -> None:
    names = ["figure_8", "figure8_first", "figure9_first", "figure9_last", "figure10", "figure10_dark", "other"]
    chosen = choose_figures([tmp_path / f"{name}.png" for name in names])
    assert [path.stem for path, _ in chosen] == ["figure_8", "figure9_first", "figure9_last", "figure10", "other"]
    assert all(sentence for _, sentence in chosen)

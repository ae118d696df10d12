"""The sample cards of the demo's report: what was asked, the truth, and what each model answered.

A sample is one entry of evaluation/<model>/samples.json: {"task", "key", "prompt_text", "prompt_media", "truth_text",
"truth_media", "output_text", "output_media", "correct"}; media are file names relative to that folder, or lists of
them. Answers of several models to the same prompt are matched by (task, key).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ernie_elastic.pipeline.demo.media import media_html

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """The samples of one model and the folder that their media lie in."""

    model: str
    folder: Path
    samples: Sequence[Sample]


@dataclass(frozen=True)
class SampleSection:
    """One heading of the report: a task, how many samples are shown, and what the reader looks at."""

    task: str
    title: str
    shown: int
    note: str = ""
    layout: str = "tiles"  # tiles (small pictures), rows (strips of frames), sounds, question (text answers)


DRAWN = (
    SampleSection(
        "text_to_image",
        "Pictures drawn from captions",
        8,
        "The truth is the world's own picture; a caption leaves much open, so another picture can be right too.",
    ),
    SampleSection("text_to_video", "Videos from captions", 4, "Frames run from left to right.", "rows"),
    SampleSection(
        "text_to_audio", "Sounds from captions", 3, "Press play. The waveforms show loudness over time.", "sounds"
    ),
)
READ = (
    SampleSection("image_to_text", "Reading pictures", 6, layout="question"),
    SampleSection("video_to_text", "Reading videos", 4, "Frames run from left to right.", "question"),
    SampleSection("audio_to_text", "Listening", 4, layout="question"),
    SampleSection("text", "Text alone", 6, layout="question"),
)


def sample_section(section: SampleSection, answers: Sequence[Answers]) -> str:
    """The cards of one task, with the heading and a line that says which samples are shown. Empty without samples."""
    per_model = [(a, {str(s["key"]): s for s in a.samples if s["task"] == section.task}) for a in answers]
    per_model = [(a, by_key) for a, by_key in per_model if by_key]
    if not per_model:
        return ""
    keys = list(per_model[0][1])
    shown = keys[: section.shown]
    part = f"the first {len(shown)} of {len(keys)}" if len(shown) < len(keys) else f"all {len(keys)}"
    note = f"Shown: {part} kept samples, in the order of the held-out split, not picked. {escape(section.note)}"
    cards = [_card(section, [(a, by_key[key]) for a, by_key in per_model if key in by_key]) for key in shown]
    broad = " broad" if section.layout == "sounds" else ""
    return (
        f'<h3 id="{section.task}">{escape(section.title)}</h3><p class="soft">{note.strip()}</p>'
        f'<div class="cards{broad}">{"".join(cards)}</div>'
    )


def _card(section: SampleSection, answers: Sequence[tuple[Answers, Sample]]) -> str:
    """One prompt and every model's answer to it."""
    owner, first = answers[0]
    prompt = str(first.get("prompt_text") or "").strip()
    if section.layout == "question":
        return f'<article class="card">{_question(section, prompt, owner, first, answers)}</article>'
    truths = names_of(first, "truth_media")
    figures = [media_html(owner.folder, name, "truth", f"truth for: {prompt}") for name in truths]
    for models, (answer, sample) in together(answers, _content):
        outputs = names_of(sample, "output_media")
        caption = f"{escape(models)} {verdict(sample)}"
        if not outputs:
            nothing = '<div class="absent">nothing was made</div>'
            figures.append(f"<figure>{nothing}<figcaption>{caption}</figcaption></figure>")
        figures += [media_html(answer.folder, name, caption, f"{models} for: {prompt}") for name in outputs]
    body = f'<div class="{section.layout}">{"".join(figures)}</div>'
    return f'<article class="card"><p><q>{escape(prompt)}</q></p>{body}</article>'


def _question(
    section: SampleSection, prompt: str, owner: Answers, first: Sample, answers: Sequence[tuple[Answers, Sample]]
) -> str:
    """A card with text answers: the media that were asked about, the question, the truth and each model's words."""
    media = [media_html(owner.folder, name, "", f"input of: {prompt}") for name in names_of(first, "prompt_media")]
    if section.task != "image_to_text":
        media = [html.replace("<figure>", '<figure class="large">', 1) for html in media]
    lines = [f"<dt>asked</dt><dd>{escape(prompt)}</dd>"] if prompt else []
    lines.append(f"<dt>truth</dt><dd>{escape(str(first.get('truth_text') or 'not given'))}</dd>")
    for models, (_, sample) in together(answers, lambda answer, sample: sample.get("output_text")):
        said = str(sample.get("output_text") or "").strip()
        text = escape(said) if said else '<span class="soft">nothing</span>'
        lines.append(f"<dt>{escape(models)}</dt><dd>{text} {verdict(sample)}</dd>")
    return f'<div class="question">{"".join(media)}<dl>{"".join(lines)}</dl></div>'


def together(
    answers: Sequence[tuple[Answers, Sample]], content: Callable[[Answers, Sample], Any]
) -> list[tuple[str, tuple[Answers, Sample]]]:
    """Answers that are the same (content and verdict), joined: the models' short names, and the first of them."""
    groups: dict[Any, list[tuple[Answers, Sample]]] = {}
    for answer, sample in answers:
        groups.setdefault((content(answer, sample), sample.get("correct")), []).append((answer, sample))
    named = []
    for group in groups.values():
        names = [answer.model.removeprefix("submodel-") for answer, _ in group]
        every = len(names) == len(answers) and len(names) > 2
        named.append(("every model" if every else "\N{NO-BREAK SPACE}= ".join(names), group[0]))
    return named


def _content(answer: Answers, sample: Sample) -> Any:
    """The bytes of an answer's media; the names of those that are not there."""
    paths = [answer.folder / name for name in names_of(sample, "output_media")]
    return tuple(path.read_bytes() if path.is_file() else str(path) for path in paths)


def names_of(sample: Sample, field: str) -> list[str]:
    """Media names of a field that holds none, one or several."""
    value = sample.get(field)
    if not value:
        return []
    return [value] if isinstance(value, str) else [str(name) for name in value]


def verdict(sample: Sample) -> str:
    """What the checker said of an answer, as a coloured word; nothing when it did not judge."""
    correct = sample.get("correct")
    if correct is None:
        return ""
    return '<span class="yes">right</span>' if correct else '<span class="no">wrong</span>'

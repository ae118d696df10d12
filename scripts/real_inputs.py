"""Real photographs, speech and text to train tokenizers on: `python scripts/real_inputs.py OUT`.

OUT/photographs: the photographs that scikit-learn and scikit-image carry (PNG). OUT/speech: sentences of the Python
documentation, spoken by espeak-ng's voices (WAV, 22,050 Hz). OUT/text: the Python documentation and the documentation
of installed packages (TXT). Nothing is downloaded; a missing package or program is an error that names it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import pydoc_data.topics
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ernie_elastic.stages import progress, publish_directory

PARTS = ("photographs", "speech", "text")
# Names in skimage.data whose files are in the package, colour or grey; drawings, synthetic pictures and second
# views are left out.
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon",
    "motorcycle_left", "page", "retina", "rocket", "text",
)  # fmt: skip
VOICES = (
    "en", "en-us", "en+m1", "en+m3", "en+m5", "en+m7", "en+f1", "en+f2", "en+f3", "en+f5", "en-us+m2", "en-us+f4",
)  # fmt: skip
WORDS = (3, 24)  # fewest and most words of a spoken sentence
MIN_TEXT = 400  # characters of a documentation text


def photographs() -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 [H, W, 3] or [H, W]) of every photograph that the two packages carry. SystemExit without them."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        sys.exit(
            f"photographs need scikit-learn and scikit-image ({error}); run `pip install scikit-learn scikit-image`"
        )
    found = load_sample_images()
    for path, picture in zip(found.filenames, found.images, strict=True):
        yield Path(path).stem, np.asarray(picture)
    for name in PHOTOGRAPHS:
        if (path := Path(skimage.data.__file__).parent / f"{name}.png").exists():
            yield name, np.asarray(Image.open(path))
        elif any((path := Path(skimage.data.__file__).parent / f"{name}{end}").exists() for end in (".jpg", ".jpeg")):
            yield name, np.asarray(Image.open(path).convert("RGB"))


def topics() -> dict[str, str]:
    """The Python documentation's topics, as the interpreter's own `help()` shows them."""
    return {name: text for name, text in pydoc_data.topics.topics.items() if len(text) >= MIN_TEXT}


def module_docs() -> Iterator[tuple[str, str]]:
    """(module, its docstring) of the standard library, without importing the modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text is not None and len(text) >= MIN_TEXT:
            yield path.stem, text


def package_docs() -> Iterator[tuple[str, str]]:
    """(package, its long description) of every installed package."""
    for distribution in importlib.metadata.distributions():
        _, _, text = (distribution.read_text("METADATA") or "").partition("\n\n")
        if len(text) >= MIN_TEXT:
            yield distribution.metadata["Name"], text


def sentences() -> list[str]:
    """Sentences of the Python documentation that can be read aloud: letters and plain marks, WORDS words."""
    found = []
    for text in topics().values():
        plain = re.sub(r"[`*]", "", text)
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", plain):
            line = " ".join(sentence.split())
            if re.fullmatch(r"[A-Z][A-Za-z ,;'-]*[.!?]", line) and WORDS[0] <= len(line.split()) <= WORDS[1]:
                found.append(line)
    return sorted(set(found))


def speak(utterances: int, directory: Path) -> None:
    """Write `utterances` sentences as WAV files, voices, speeds and pitches drawn. SystemExit without espeak-ng."""
    program = shutil.which("espeak-ng")
    if program is None:
        sys.exit("speech needs espeak-ng; install it, for example with `apt-get install espeak-ng`")
    rng = random.Random(0)
    lines = sentences()
    jobs = []
    for number in range(utterances):
        voice, speed, pitch = rng.choice(VOICES), rng.randint(130, 190), rng.randint(30, 70)
        name = f"{number:05d}-{voice.replace('+', '-')}.wav"
        options = ["-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(directory / name)]
        jobs.append([program, *options, lines[rng.randrange(len(lines))]])
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda job: subprocess.run(job, check=True, capture_output=True), jobs)
        list(progress(done, total=len(jobs), desc="speech", unit="sentence"))


def write(out: Path, utterances: int, parts: Sequence[str] = PARTS) -> None:
    """Make the directories of `parts` below `out`, which must not exist; it appears whole or not at all."""
    if out.exists():
        sys.exit(f"{out} exists already; choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.tmp-") as folder:
        root = Path(folder) / "inputs"
        for name in parts:
            (root / name).mkdir(parents=True)
        for name, picture in photographs() if "photographs" in parts else ():
            Image.fromarray(picture).save(root / "photographs" / f"{name}.png")
        for part, texts in (("topic", topics().items()), ("module", module_docs()), ("package", package_docs())):
            for name, text in texts if "text" in parts else ():
                (root / "text" / f"{part}-{re.sub('[^A-Za-z0-9_.-]', '_', name)}.txt").write_text(
                    text, encoding="utf-8"
                )
        if "speech" in parts:
            speak(utterances, root / "speech")
        counts = ", ".join(f"{len(list((root / name).iterdir()))} {name}" for name in parts)
        publish_directory(root, out)
    print(f"real_inputs: {counts}; wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--utterances", type=int, default=400, help="sentences to speak (default: 400)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to make (default: all)")
    arguments = parser.parse_args()
    write(arguments.out, arguments.utterances, arguments.parts)

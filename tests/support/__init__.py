"""What several tests share; nothing in the package imports it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ernie_elastic"


def project_files(*suffixes: str) -> list[Path]:
    """Files of the checkout that git tracks or would track, with one of `suffixes` (all files when none is given).

    Outside of a git checkout: every file below the known folders.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.SubprocessError):
        folders = [ROOT / name for name in ("ernie_elastic", "scripts", "tests", "docs", ".ci")]
        paths = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*"))
        paths = [path for path in paths if "__pycache__" not in path.parts]
    return sorted(p for p in paths if p.is_file() and (not suffixes or p.suffix in suffixes))

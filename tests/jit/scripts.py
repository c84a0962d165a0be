"""Scripts that run in a process of their own, because they fork it, or interrupt it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, patience: int = 120) -> str:
    """What a script prints; a hang or an error of the process is a failure."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, timeout=patience, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout

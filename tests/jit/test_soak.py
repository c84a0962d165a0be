"""Short forms of `tests.jit.threads` and `tests.jit.memory`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jit.memory import SCENARIOS
from tests.jit.threads import SIGNATURES, run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_eight_threads_with_mixed_shapes_for_three_seconds() -> None:
    count = run(3)
    assert count.right, (str(count), count.wrong[:3], count.errors[:3])
    assert count.calls >= 8 * len(SIGNATURES)


CALLS = {"same signature": "12000", "eager ops": "6000"}  # the others compile, or fail, at every call


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", SCENARIOS)
def test_memory_is_flat(name: str) -> None:
    """In a process of its own: what other tests left would hide a leak."""
    command = [sys.executable, "-m", "tests.jit.memory", "--calls", CALLS.get(name, "4000"), name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

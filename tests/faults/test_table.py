"""The table of seeded faults holds: every fault can be planted, and planting one changes what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.faults.table import FAULTS


def test_there_are_thirty_at_least():
    assert len(FAULTS) >= 30


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_one_place_and_stays_python(name):
    fault = FAULTS[name]
    spec = find_spec(fault.module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text("utf-8")
    wrong = fault.applied_to(source)
    assert wrong != source
    compile(wrong, spec.origin, "exec")
    assert all(Path(path).exists() for path in fault.tests)


def test_the_switch_plants_one():
    script = (
        "from tests.faults.plant import plant\nplant()\n"
        "import mlx.core as mx, qgraph as qg\n"
        "print(qg.jit(lambda x: 1.0 / x)(mx.array([4.0])).item())"
    )

    def run(**fault: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | fault, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert run() == "0.25"
    assert run(QGRAPH_FAULT="one-over-x-is-x") == "4.0"

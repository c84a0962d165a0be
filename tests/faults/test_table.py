"""The table of seeded faults holds: every fault can be planted, and planting one changes what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.faults.plant import switch
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
    assert all(Path(test.partition("::")[0]).exists() for test in fault.tests)


def test_the_switch_plants_one_in_every_process():
    inner = "import mlx.core as mx, qgraph as qg; print(qg.jit(lambda x: 1.0 / x)(mx.array([4.0])).item())"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"

    def run(environment: dict[str, str]) -> str:
        done = subprocess.run(
            [sys.executable, "-c", outer], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert run(dict(os.environ)) == "0.25"
    assert run(switch(FAULTS["one-over-x-is-x"])) == "4.0"

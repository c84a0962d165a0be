"""The wheel, built from the sdist, installs and works; the public names are what they say."""

from __future__ import annotations

import importlib
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import qgraph as qg

ROOT = Path(__file__).parent.parent

PROBE = """
import sys
import mlx.core as mx, qgraph as qg
from importlib.metadata import entry_points
from importlib.resources import files
assert "site-packages" in qg.__file__, qg.__file__
f = qg.jit(lambda x, w: x @ w.T)
assert f.report(mx.ones((2, 64)), qg.quantize(mx.ones((8, 64)))).counts() == {"quantized_matmul": 1}
assert {p.name for p in entry_points(group="qgraph.passes")} == {"qgraph"}
assert (files("qgraph_examples") / "demo" / "model" / "config.json").is_file()
assert (files("qgraph") / "py.typed").is_file() and (files("qgraph_passes") / "py.typed").is_file()
print("works")
"""


@pytest.mark.slow
@pytest.mark.checkout
def test_a_wheel_built_from_the_sdist_installs_and_works(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "-o", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    [wheel] = tmp_path.glob("*.whl")
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in top if not t.endswith(".dist-info")} == {"qgraph", "qgraph_passes", "qgraph_examples"}
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}[cpu]"], check=True, cwd=tmp_path)
    found = subprocess.run([python, "-c", PROBE], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.strip() == "works"


def test_import_brings_in_nothing_heavy():
    heavy = ("networkx", "mlx_lm", "transformers", "matplotlib", "rich", "click")
    code = f"import sys, qgraph; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented():
    for name in (*qg.ops.__all__, "jit", "quantize", "load", "save", "inspect", "scope", "register"):
        assert getattr(qg, name).__doc__, name


def test_no_pass_is_imported_by_the_compiler_itself():
    assert importlib.import_module("qgraph_passes").ALL
    code = "import sys, qgraph; print('qgraph_passes' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"

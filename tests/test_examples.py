"""Every numbered example runs and prints what its docstring promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PRINTED = {
    "01_jit.py": ["3 × quantized_matmul", "CacheInfo(hits=0, misses=2"],
    "02_why_not.py": [
        "the slice 0:96 of the packed axis cuts groups of 64 (02_why_not.py:12)",
        "with strict=True",
    ],
    "03_own_pass.py": ["did not fire: a is (3,), b is (2, 3)", "same numbers as before: True"],
    "04_generate.py": ["123+456=579", "456-123=333", "quantized_lora_matmul"],
    "05_optimize.py": [
        "dense, the tokens are those of mlx-lm: True",
        "4 bit, the tokens are those of mlx-lm: True",
        "in every step: {'quantized_take': 1, 'quantized_matmul': 15}",
    ],
}


def test_the_table_lists_all_examples():
    assert sorted(p.name for p in EXAMPLES.glob("[0-9]*.py")) == sorted(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_promises(name, tmp_path):
    found = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    for line in PRINTED[name]:
        assert line in found.stdout

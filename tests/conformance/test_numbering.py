"""Every case of the checklists has a test that bears its number: `test_e07_…` (emlx), `test_m13_…` (mlx)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

NAME = re.compile(r"test_([em])(\d\d)_\w+")
# qgraph has no loops yet: what they carry has nothing to be tested with.
LOOPS = {
    52: "a weight in a while carry, with a dot in the body",
    53: "a weight carried through two nested whiles",
}  # and of 55 the last part, a dequantize inside a while
# 73–75 are about EMLX's own plugins and a downloaded checkpoint.
REQUIRED = {
    "e": {*range(1, 73), 76, 77} - LOOPS.keys(),
    "m": {*range(1, 21), 26, 27, 28, 37, 39, 40, 44},
}


def numbered():
    """The test functions of this folder by checklist and number."""
    found = {"e": {}, "m": {}}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(file.read_text("utf-8")).body:
            match = NAME.fullmatch(getattr(node, "name", ""))
            if isinstance(node, ast.FunctionDef) and match:
                found[match[1]].setdefault(int(match[2]), []).append((file.name, node))
    return found


@pytest.mark.parametrize("checklist", REQUIRED)
def test_the_numbers_are_those_of_the_checklist(checklist):
    assert set(numbered()[checklist]) == REQUIRED[checklist]


@pytest.mark.parametrize("checklist", REQUIRED)
def test_every_numbered_test_asserts_something_and_is_not_skipped(checklist):
    for number, functions in numbered()[checklist].items():
        for file, node in functions:
            text = ast.unparse(node)
            assert re.search(r"\bassert|\bcheck\(|raises", text), (number, file)
            assert not re.search(r"skip|xfail", text), (number, file)


def test_each_file_holds_one_checklist():
    for checklist, name in (("e", "test_emlx_"), ("m", "test_mlx_")):
        files = {file for functions in numbered()[checklist].values() for file, _ in functions}
        assert all(file.startswith(name) for file in files)

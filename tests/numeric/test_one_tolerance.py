"""There is one source of tolerances: no test writes one of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Calls that compare with a tolerance that the caller, or NumPy, chose.
COMPARING = {
    "allclose",
    "isclose",
    "assert_allclose",
    "approx",
    "assert_almost_equal",
    "assert_array_almost_equal",
}
SMALL = 0.05  # a comparison with a number below it (and above 0) is a tolerance


def literal_tolerances(source: str) -> list[str]:
    """What of `source` compares with a tolerance of its own."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = {k.arg for k in node.keywords} & {"rtol", "atol", "rel", "abs", "tolerance"}
            if name in COMPARING or (given and name not in ("assert_close", "difference", "close")):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(_is_small(side) for side in sides) and any(
                isinstance(op, ast.Lt | ast.LtE) for op in node.ops
            ):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def _is_small(node: ast.expr) -> bool:
    """A small number, or an expression of numbers alone, such as 4 * 2**-24."""
    if any(
        not isinstance(n, ast.Constant | ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop)
        for n in ast.walk(node)
    ):
        return False
    value = eval(compile(ast.Expression(node), "<number>", "eval"))
    return isinstance(value, float) and 0 < value < SMALL


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda f: str(f.relative_to(TESTS)))
def test_no_test_has_a_tolerance_of_its_own(file):
    assert literal_tolerances(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "assert np.allclose(a, b)",
        "assert mx.allclose(a, b, atol=t)",
        "np.testing.assert_allclose(a, b, rtol=4 * 2**-24)",
        "assert x == pytest.approx(3)",
        "assert abs(a - b) < 1e-5",
        "assert error <= 4 * 2**-24",
        "assert 0 <= e < 0.01",
        "assert near(a, b, rtol=1e-3)",
    ],
)
def test_the_search_finds_them(source):
    assert literal_tolerances(source)


@pytest.mark.parametrize(
    "source", ["assert_close(a, b, k=64)", "assert x < 1", "assert p > 0.1", "assert e <= 0.0"]
)
def test_the_search_leaves_others_alone(source):
    assert literal_tolerances(source) == []

"""Two graphs agree only where both give numbers."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from qgraph.ir import parse_graph
from qgraph.numeric import compare, relative_error

ONE = """graph(%x: f32[3]) {{
  %{op} = {op}(%x) : f32[3]
  return %{op}
}}"""


@pytest.mark.parametrize("wrong", [nan, inf, -inf])
def test_what_is_no_number_differs_from_a_number(wrong):
    numbers, broken = np.array([1.0, 2.0]), np.array([1.0, wrong])
    assert relative_error(numbers, broken) == inf
    assert relative_error(broken, numbers) == inf
    assert relative_error(broken, broken) == 0


def test_a_graph_that_makes_nan_where_the_other_makes_numbers_is_a_mismatch():
    exp, log = (parse_graph(ONE.format(op=op)) for op in ("exp", "arccosh"))
    assert compare(exp, exp) is None
    found = compare(exp, log)
    assert found is not None
    assert found.error == inf

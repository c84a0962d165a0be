"""Empty operands: every op gives NumPy's result or a clear error, and the process lives."""

from __future__ import annotations

import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.agree import normal
from tests.ops.table import TABLE

NO_OPERANDS = {"arange", "linspace", "eye", "tri", "random_key"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_every_op_survives_empty_operands(part):
    names = sorted(set(TABLE) - NO_OPERANDS)[part::3]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.zero_size", *names], capture_output=True, text=True, check=False
    )
    last = next((s for s in reversed(done.stdout.splitlines()) if s.startswith("about")), "nothing ran")
    assert done.returncode == 0, f"exit {done.returncode}, {last}\n{done.stderr[-3000:]}"
    tried = {name: int(n) for name, n in re.findall(r"^done (\w+) (\d+)$", done.stdout, re.MULTILINE)}
    assert set(tried) == set(names)
    assert all(tried.values()), tried


SIZES = [(0, 64, 8), (2, 64, 0), (2, 0, 8), (0, 0, 8), (0, 64, 0), (2, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("lead", [(), (3,), (0,), (2, 0)])
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_a_product_with_empty_sides_is_numpys(m, k, n, lead):
    x = mx.zeros((*lead, m, k)) + 1.0
    expected = np.matmul(np.array(x), np.ones((k, n), np.float32))
    for w in (mx.ones((n, k)), qg.quantize(mx.ones((n, k)), group_size=64)):
        for f in (lambda x, w: qg.dot(x, qg.transpose(w)), qg.inner):
            for found in (f(x, w), qg.jit(f)(x, w)):
                assert found.shape == expected.shape
                np.testing.assert_array_equal(np.array(found), expected)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(
    ("experts", "rows", "k", "n", "chosen"),
    [
        (3, 0, 64, 64, 2),
        (3, 1, 64, 64, 0),
        (3, 1, 0, 64, 2),
        (3, 1, 64, 0, 2),
        (0, 1, 64, 64, 0),
    ],
)
def test_experts_with_empty_sides(experts, rows, k, n, chosen, transpose):
    x = normal(chosen, rows, k)
    w = qg.quantize(normal(experts, *((n, k) if transpose else (k, n))), group_size=64)
    ids = mx.zeros((chosen,), mx.uint32)
    found = qg.gather_qmm(x, w, rhs_indices=ids, transpose=transpose)
    assert found.shape == (chosen, rows, n)
    assert np.array(found).tolist() == np.zeros((chosen, rows, n)).tolist()


def test_indices_into_nothing_are_refused():
    for f in (
        lambda i: qg.take(mx.zeros((0, 3)), i, axis=0),
        lambda i: qg.take(qg.quantize(mx.zeros((0, 64))), i, axis=0),
        lambda i: qg.quantized_take(qg.quantize(mx.zeros((0, 64))), i),
        lambda i: qg.take_along_axis(mx.zeros((0,)), i, axis=0),
        lambda i: qg.gather_mm(mx.zeros((2, 1, 3)), mx.zeros((0, 3, 4)), rhs_indices=i),
        lambda i: qg.gather_qmm(mx.zeros((2, 1, 64)), qg.quantize(mx.zeros((0, 8, 64))), rhs_indices=i),
    ):
        with pytest.raises(qg.ShapeError, match="empty"):
            f(mx.array([0, 0]))


def test_no_indices_into_nothing_give_nothing():
    none = mx.zeros((0,), mx.int32)
    assert qg.take(mx.zeros((0, 3)), none, axis=0).shape == (0, 3)
    assert qg.take(qg.quantize(mx.zeros((0, 64))), none, axis=0).shape == (0, 64)
    assert qg.take_along_axis(mx.zeros((0,)), none, axis=0).shape == (0,)
    assert qg.ops.updates.At(mx.zeros((0, 3)))[mx.array([1])].add(1.0).shape == (0, 3)
    assert qg.put_along_axis(mx.zeros((0,)), mx.array([1]), mx.ones(1), axis=0).shape == (0,)

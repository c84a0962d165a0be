"""What every test of a form asks: the op that it became, the numbers before and after, and those of MLX."""

from __future__ import annotations

import contextlib
import warnings

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import kernels
from qgraph.capture import capture as frontend
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir.dtypes import F32, F64, dtype_of
from qgraph.numeric import tolerance
from tests.agree import assert_close, leaves_of

PIPELINE = "canonicalize,raise-fast,guard-indices,legalize"
PLAIN = "canonicalize,guard-indices,legalize"


def raised(f, *args, captured=False):
    """The op histogram after the pass on `f`, after these checks.

    The reference gives the same for both graphs: of a function in qg, to float64's rounding; of captured MLX
    code, whose constants are rounded, to float32's. The program is within the tolerance of the reference, and
    no further from it than the code as it was written, beyond what the tolerance allows.
    """
    compiled = (qg.optimize if captured else qg.jit)(f, pipeline=PIPELINE)
    plain = (qg.optimize if captured else qg.jit)(f, pipeline=PLAIN)
    result = compiled.result(*args)
    inputs = [to_numpy(x) for x in leaves_of(args)]
    exact = evaluate(result.before, inputs)
    of_graph = F32 if captured else F64
    for found, want in zip(evaluate(result.after("raise-fast"), inputs), exact, strict=True):
        assert_close(
            found, want, of_graph, path="graph" if captured else "reference", about=str(result.graph)
        )
    for found, before, want in zip(leaves_of(compiled(*args)), leaves_of(plain(*args)), exact, strict=True):
        assert found.dtype == before.dtype
        assert_close(found, want, path="graph", about=str(result.graph))
        limit = tolerance(dtype_of(found.dtype), path="graph").frobenius
        finite = np.isfinite(want)
        error, other = (np.linalg.norm((to_numpy(x) - want)[finite]) for x in (found, before))
        assert error <= other + limit * np.linalg.norm(want[finite])
    return result.after("raise-fast").histogram()


def reasons(f, *args, rule=""):
    """Why the forms (or one of them) did not become an op."""
    misses = qg.jit(f, pipeline=PIPELINE).result(*args).context.misses.values()
    return [m.reason for m in misses if m.rule.startswith(rule or "raise-")]


def same_as_mlx(f, *args):
    """The histogram after the pass on captured MLX code, whose program gives MLX's own numbers bit by bit.

    That is with MLX's ops; the native kernels, where there are any, are held to what `raised` asks.
    """
    expected = leaves_of(f(*args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        for found, want in zip(leaves_of(qg.optimize(f, pipeline=PIPELINE)(*args)), expected, strict=True):
            assert found.dtype == want.dtype
            assert mx.array_equal(found, want, equal_nan=True).item()
    return raised(f, *args, captured=True)


@contextlib.contextmanager
def written_out():
    """Capture modules as plain functions are: what MLX keeps whole on a GPU arrives as primitives."""
    whole = frontend.cutting
    frontend.cutting = lambda cutter: contextlib.nullcontext()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qg.RecompileWarning)
            yield
    finally:
        frontend.cutting = whole

"""Traced values: what they know, and what they refuse."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph import TraceError
from qgraph.ops.dispatch import active


def traced(body, *args):
    """What `body` returns while it is traced."""
    seen = []

    @qg.jit
    def f(*args):
        seen.append(body(*args))
        return args[0]

    f(*args)
    return seen[0]


def test_a_traced_value_has_shape_dtype_ndim_size_and_length() -> None:
    def body(x):
        return x.shape, x.dtype, x.ndim, x.size, len(x), [r.shape for r in x]

    assert traced(body, mx.ones((2, 3))) == ((2, 3), mx.float32, 2, 6, 2, [(3,), (3,)])


def test_a_traced_quantized_value_has_the_logical_shape() -> None:
    w = qg.quantize(mx.ones((8, 64), mx.bfloat16))
    assert traced(lambda w: (w.shape, w.dtype, w.T.shape), w) == ((8, 64), mx.bfloat16, (64, 8))


def test_repr_tells_type_and_maker() -> None:
    assert traced(lambda x: repr(qg.exp(x)), mx.ones(2)) == "Tracer(f32[2], made by exp)"


def test_len_of_a_scalar_is_refused() -> None:
    with pytest.raises(TraceError, match=r"len\(\) of a 0-d value"):
        traced(len, mx.array(1.0))


def test_comparisons_are_arrays_and_values_hash_by_identity() -> None:
    def body(x):
        return (x == x).dtype, (x < 1).dtype, len({x, x, qg.exp(x)})

    assert traced(body, mx.ones(2)) == (mx.bool_, mx.bool_, 2)


def test_the_trace_ends_with_the_call_even_when_it_fails() -> None:
    @qg.jit
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        f(mx.ones(2))
    assert active() is None
    assert qg.exp(mx.zeros(1)).item() == 1.0


def test_a_trace_is_of_one_thread() -> None:
    """Another thread computes eagerly while this one traces."""
    got: list[float] = []

    @qg.jit
    def f(x):
        def elsewhere() -> None:
            got.append(qg.exp(mx.zeros(1)).item())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x

    f(mx.ones(2))
    assert got == [1.0]


def test_scopes_are_of_one_thread() -> None:
    found: list[str] = []

    def elsewhere() -> None:
        f = qg.jit(lambda x: qg.exp(x))
        found.append(f.graph(mx.ones(2)).find("exp")[0].origin.scope)

    with qg.scope("here"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found == [""]

"""Three answers that must agree: the float64 reference before any pass, after every pass, and MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.numeric.equivalence import TOLERANCE, relative_error


def leaves_of(tree):
    from qgraph.trace.tree import flatten

    leaves, spec = [], []
    flatten(tree, leaves, spec)
    return leaves


def agree(f, *args):
    """Check `f` on `args` in all three ways; the final graph, for more checks."""
    result = f.result(*args)
    inputs = [to_numpy(x) for x in leaves_of(args)]
    expected = evaluate(result.before, inputs)
    for stage in result.history:
        for want, found in zip(expected, evaluate(stage.graph, inputs), strict=True):
            error = relative_error(np.asarray(want), np.asarray(found))
            assert error <= TOLERANCE, (stage.name, error, str(stage.graph))
    for want, found in zip(expected, leaves_of(f(*args)), strict=True):
        got = to_numpy(found)
        assert got.shape == np.shape(want)
        error = relative_error(np.asarray(want, np.float64), got.astype(np.float64))
        assert error <= mlx_tolerance(found), (error, str(result.graph))
    return result.graph


def mlx_tolerance(x):
    """Several roundings to the result's dtype; sums are float32 everywhere (path P2)."""
    if qg.is_quantized(x):
        return mlx_tolerance(mx.zeros((), x.dtype))
    u = {mx.float32: 2.0**-24, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}.get(x.dtype, 0.0)
    return 64 * u if x.dtype == mx.float32 else 4 * u


def ops(graph):
    """The op histogram of a graph."""
    return graph.histogram()


def normal(*shape, dtype=mx.float32, seed=None):
    """Random data of order 1."""
    key = mx.random.key(hash(shape) % 2**31 if seed is None else seed)
    return mx.random.normal(shape, key=key).astype(dtype)

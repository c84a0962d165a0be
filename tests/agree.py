"""Three answers that must agree: the float64 reference before any pass, after every pass, and MLX.

`assert_close` is the one comparison of the tests, and `qgraph.numeric.tolerance` its one source of numbers.
"""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph import kernels
from qgraph.execute.reference import evaluate, to_numpy
from qgraph.ir.dtypes import F32, F64
from qgraph.numeric import tolerance
from qgraph.ops.chain import Chain
from qgraph.ops.dispatch import type_of
from qgraph.quant import unpack


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
            assert_close(found, want, F64, path="reference", about=(stage.name, str(stage.graph)))
    for want, found in zip(expected, leaves_of(f(*args)), strict=True):
        assert_close(found, want, about=str(result.graph))
    return result.graph


def difference(found, exact, dtype=None, k=1, path="graph", magnitude=None):
    """Why `found` is not `exact` within the tolerance of (dtype, k, path); empty if it is.

    `dtype` is found's own unless given. `magnitude` is what errors of sums are relative to (`magnitude_of`);
    for whole graphs it is the largest element, for models the root mean square.
    """
    dtype = dtype or (type_of(found).dtype if isinstance(found, mx.array | qg.QuantizedTensor) else F32)
    found, exact = _numpy(found), _numpy(exact)
    if exact.dtype.kind == "c" or found.dtype.kind == "c":
        found, exact = (np.stack([x.real, x.imag]) for x in (found, exact))
    if exact.dtype.kind != "f" and found.dtype.kind != "f":
        return "" if np.array_equal(found, exact) else f"found {found!r}, expected {exact!r}"
    if magnitude is None:
        magnitude = SIZES.get(path, lambda size: 0.0)(np.abs(exact[np.isfinite(exact)]))
    return tolerance(dtype, k, path).problem(found, exact, magnitude)


def _largest(size):
    return np.max(size, initial=0.0)


# What the paths of whole graphs are relative to.
SIZES = {
    "graph": _largest,
    "reference": _largest,
    "model": lambda size: np.sqrt(np.mean(np.square(size))),
}


def assert_close(found, exact, dtype=None, k=1, path="graph", magnitude=None, about=""):
    """Assert that there is no `difference`."""
    problem = difference(found, exact, dtype, k, path, magnitude)
    assert not problem, (problem, about)


def assert_as_mlx(found, wanted, about="", **how):
    """Assert that `found` is MLX's own result `wanted`: to the bit where MLX's ops are all that runs.

    Where native kernels run it is `assert_close`, with `how` to choose the tolerance.
    """
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), about
    if kernels.library() is None:
        assert mx.array_equal(found, wanted, equal_nan=found.dtype != mx.complex64), about
    else:
        assert_close(found, wanted, about=about, **how)


def close(*args, **kwargs):
    """Whether there is no `difference`."""
    return not difference(*args, **kwargs)


def magnitude_of(x, w, transpose=True):
    """|x| (|scales| q + |biases|), what the error of x @ w.T (x @ w) is relative to; w packed or dense."""
    if qg.is_quantized(w) and w.biases is not None:
        sizes = (abs(part.astype(mx.float32)) for part in (w.scales, w.biases))
        w = unpack(
            qg.QuantizedTensor(w.packed, *sizes, w.quantization, dtype=mx.float32, axis=w.axis), mx.float32
        )
    size = np.abs(to_numpy(w))
    return np.matmul(np.abs(to_numpy(x)), np.swapaxes(size, -1, -2) if transpose else size)


def _numpy(x):
    return to_numpy(x) if isinstance(x, mx.array | qg.QuantizedTensor) else np.asarray(x)


def ops(graph):
    """The op histogram of a graph, in which ops that a native kernel computes as a chain count one by one."""
    counts = Counter(graph.histogram())
    for node in graph.find(Chain.name):
        counts.update(node.op.names())
        counts[Chain.name] -= 1
    return dict(+counts)


def normal(*shape, dtype=mx.float32, seed=None):
    """Random data of order 1."""
    key = mx.random.key(hash(shape) % 2**31 if seed is None else seed)
    return mx.random.normal(shape, key=key).astype(dtype)

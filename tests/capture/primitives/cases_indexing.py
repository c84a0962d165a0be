"""The cases of reductions, sorting, reading and writing by index, transforms and random numbers."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from qgraph.ir.dtypes import BOOL, F32, I32, U32
from tests.capture.primitives.cases import axis_in, case, drawn, places
from tests.capture.primitives.replay import Case
from tests.ops.cases import ANY, FLOATS, INTS, seeds, shapes

# Reductions


@case("Reduce")
def reduce(draw, name):
    function = draw(st.sampled_from(["sum", "prod", "min", "max", "all", "any", "mean", "var"]))
    empty = function not in ("min", "max", "mean", "var")
    dtypes = {"prod": (*FLOATS, I32), "var": FLOATS}.get(function, (*FLOATS, *INTS, BOOL))
    x = drawn(draw, draw(shapes(1, empty=empty)), dtypes)
    axes = sorted({axis_in(draw, x) % x.ndim, draw(st.integers(0, x.ndim - 1))})
    keep = draw(st.booleans())
    whole = getattr(mx, function)
    k = max(1, int(np.prod([x.shape[i] for i in axes])))
    # In 16 bit MLX rounds the mean before it squares the differences.
    reference = x.dtype in (mx.float32,) or function in ("min", "max", "all", "any")
    return Case(
        lambda x: whole(x, axes, keepdims=keep),
        [x],
        k=k,
        magnitude=9.0 * k**2,
        reference=reference,
        notes={"f": function, "axes": axes},
    )


@case("LogSumExp")
def logsumexp(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), (F32,))
    return Case(lambda x: mx.logsumexp(x, -1), [x], magnitude=9.0)


@case("ArgReduce")
def arg_reduce(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), ANY)
    axis = draw(st.sampled_from([None, axis_in(draw, x)]))
    function = draw(st.sampled_from([mx.argmin, mx.argmax]))
    return Case(lambda x: function(x, axis), [x])


@case("Scan")
def scan(draw, name):
    function = draw(st.sampled_from(["cumsum", "cumprod", "cummax", "cummin"]))
    x = drawn(draw, draw(shapes(1)), (*FLOATS, I32), low=0, high=2)
    axis, reverse, inclusive = axis_in(draw, x), draw(st.booleans()), draw(st.booleans())
    whole = getattr(mx, function)
    # 16-bit sums are kept in 32 bit here, in 16 by MLX.
    return Case(
        lambda x: whole(x, axis=axis, reverse=reverse, inclusive=inclusive),
        [x],
        exact=False,
        k=8,
        magnitude=300.0,
        notes={"f": function, "axis": axis, "reverse": reverse, "inclusive": inclusive},
    )


@case("Softmax")
def softmax(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), FLOATS)
    precise = draw(st.booleans())
    half = x.dtype != mx.float32
    return Case(
        lambda x: mx.softmax(x, -1, precise=precise), [x], reference=precise or not half, magnitude=1.0
    )


@case("Sort", "ArgSort")
def sort(draw, name):
    x = drawn(draw, draw(shapes(1)), ANY)
    function, axis = getattr(mx, name.lower()), axis_in(draw, x)
    return Case(lambda x: function(x, axis), [x], reference=name == "Sort")


@case("Partition", "ArgPartition")
def partition(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), FLOATS)
    axis = axis_in(draw, x)
    n = x.shape[axis]
    k = draw(st.integers(-n, n - 1))
    function = getattr(mx, name.lower())
    if name == "Partition" and n > 1 and draw(st.booleans()):
        return Case(lambda x: mx.topk(x, n - 1, axis), [x], reference=False)
    return Case(lambda x: function(x, k, axis), [x], reference=False)


@case("SearchSorted")
def searchsorted(draw, name):
    a = mx.sort(drawn(draw, (draw(st.integers(1, 9)),), (F32, I32), grid=True))
    x = drawn(draw, draw(shapes(0, 3)), (F32,), grid=True).astype(a.dtype)
    side = draw(st.sampled_from(["left", "right"]))
    return Case(lambda a, x: mx.searchsorted(a, x, side), [a, x])


# Indexing


@case("Gather")
def gather(draw, name):
    x = drawn(draw, draw(shapes(2, 4, empty=False)), ANY)
    how = draw(st.sampled_from(["take", "embedding", "mixed", "two", "int", "vmap"]))
    if how == "take":
        axis = axis_in(draw, x)
        i = places(draw, draw(shapes(0, 2, empty=False)), x.shape[axis])
        return Case(lambda x, i: mx.take(x, i, axis), [x, i], notes={"how": how, "axis": axis})
    i = places(draw, draw(shapes(0, 2, empty=False)), x.shape[0])
    if how == "embedding":
        return Case(lambda x, i: x[i], [x, i], notes={"how": how})
    if how == "int":
        k = draw(st.integers(-x.shape[0], x.shape[0] - 1))
        return Case(lambda x: x[k], [x], notes={"how": how, "k": k})
    if how == "vmap":
        i = places(draw, (x.shape[0], 3), x.shape[1], (I32, U32))
        return Case(lambda x, i: mx.vmap(lambda x, i: x[i])(x, i), [x, i], notes={"how": how})
    j = places(draw, i.shape, x.shape[1])
    if how == "two" or x.ndim < 3:
        return Case(lambda x, i, j: x[i, j], [x, i, j], notes={"how": how})
    j = places(draw, i.shape, x.shape[2])
    return Case(lambda x, i, j: x[i, :, j], [x, i, j], notes={"how": how})


@case("GatherAxis")
def gather_axis(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), ANY)
    axis = axis_in(draw, x)
    shape = [1 if draw(st.booleans()) else n for n in x.shape]
    shape[axis] = draw(st.integers(1, 4))
    i = places(draw, tuple(shape), x.shape[axis])
    return Case(lambda x, i: mx.take_along_axis(x, i, axis), [x, i])


@case("Scatter")
def scatter(draw, name):
    x = drawn(draw, draw(shapes(2, 4, empty=False)), (*FLOATS, I32), low=1, high=4, grid=True)
    kind = draw(st.sampled_from(["set", "add", "multiply", "maximum", "minimum", "grad"]))
    count = draw(st.integers(1, min(2, x.ndim)))
    axes = sorted(draw(st.permutations(range(x.ndim)))[:count])
    common = (draw(st.integers(1, 3)),)
    indices = [places(draw, common, x.shape[a], (I32, U32)) for a in axes]
    if kind == "set":  # which of several values for one element stays is not defined
        common, indices = (1,), [i[:1] for i in indices]
    neighbours = all(b - a == 1 for a, b in pairwise(axes))
    at = axes[0] if neighbours else 0
    rest = [n for i, n in enumerate(x.shape) if i not in axes]
    shape = (*rest[:at], *common, *rest[at:])

    def index(given):
        left = iter(given)
        return tuple(next(left) if i in axes else slice(None) for i in range(x.ndim))

    if kind == "grad":
        x = x.astype(mx.float32)
        weights = drawn(draw, shape, (F32,))
        return Case(
            lambda x, w, *given: mx.grad(lambda x: (x[index(given)] * w).sum())(x),
            [x, weights, *indices],
            k=4,
        )
    update = drawn(draw, shape, (F32,), low=1, high=3, grid=True).astype(x.dtype)

    def function(x, update, *given):
        if kind != "set":
            return getattr(x.at[index(given)], kind)(update)
        x = mx.array(x)
        x[index(given)] = update
        return x

    return Case(
        function, [x, update, *indices], exact=False, k=4, magnitude=64.0, notes={"kind": kind, "axes": axes}
    )


@case("ScatterAxis")
def scatter_axis(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), (*FLOATS, I32), grid=True)
    axis = axis_in(draw, x)
    n = draw(st.integers(1, x.shape[axis]))
    order = np.argsort(np.random.default_rng(draw(seeds)).random(x.shape), axis)
    where = mx.array(np.take(order, range(n), axis).astype(np.int32))
    if draw(st.booleans()):
        values = drawn(draw, where.shape, (F32,), grid=True).astype(x.dtype)
        return Case(lambda x, i, v: mx.put_along_axis(x, i, v, axis), [x, where, values])
    repeated = mx.concatenate([where, where], axis)
    x = x.astype(mx.float32)
    return Case(
        lambda x, i: mx.grad(lambda x: mx.square(mx.take_along_axis(x, i, axis)).sum())(x), [x, repeated], k=4
    )


@case("SliceUpdate")
def slice_update(draw, name):
    x = drawn(draw, draw(shapes(2, empty=False)), (*FLOATS, I32), low=1, high=4, grid=True)
    bounds = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in x.shape]
    step = draw(st.sampled_from([1, 2, -1]))
    index = [slice(lo, hi, 1) for lo, hi in bounds]
    lo, hi = bounds[0]
    index[0] = slice(lo, hi, step) if step > 0 else slice(hi - 1, lo - 1 if lo else None, -1)
    if all(s == slice(0, n, 1) for s, n in zip(index, x.shape, strict=True)):
        x = mx.concatenate([x, x], 0)
    kind = draw(st.sampled_from(["set", "add", "multiply", "maximum", "minimum", "subtract"]))
    update = drawn(draw, x[tuple(index)].shape, (F32,), low=1, high=3, grid=True).astype(x.dtype)

    def function(x, update):
        if kind != "set":
            return getattr(x.at[tuple(index)], kind)(update)
        x = mx.array(x)
        x[tuple(index)] = update
        return x

    return Case(function, [x, update], magnitude=16.0, notes={"kind": kind, "index": index})


@case("DynamicSlice", "DynamicSliceUpdate")
def dynamic(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), (*FLOATS, I32))
    axes = tuple(draw(st.permutations(range(x.ndim)))[: draw(st.integers(1, x.ndim))])
    sizes = tuple(draw(st.integers(1, n)) if i in axes else n for i, n in enumerate(x.shape))
    start = mx.array([draw(st.integers(0, x.shape[a] - sizes[a])) for a in axes], mx.int32)
    if name == "DynamicSlice":
        return Case(lambda x, i: mx.slice(x, i, axes, sizes), [x, start])
    update = drawn(draw, sizes, (F32,), grid=True).astype(x.dtype)
    return Case(lambda x, u, i: mx.slice_update(x, u, i, axes), [x, update, start])


@case("MaskedScatter")
def masked_scatter(draw, name):
    shape = draw(shapes(1, 3, empty=False))
    x, mask = drawn(draw, shape, (*FLOATS, I32)), drawn(draw, shape, (BOOL,))
    values = drawn(draw, draw(st.sampled_from([(), (mask.size,)])), (F32,), grid=True).astype(x.dtype)

    def function(x, mask, values):
        x = mx.array(x)
        x[mask] = values
        return x

    return Case(function, [x, mask, values])


# Transforms and random numbers


@case("Hadamard")
def hadamard(draw, name):
    n = draw(st.sampled_from([1, 2, 8, 12, 24, 20]))
    x = drawn(draw, (*draw(shapes(0, 2, empty=False)), n), FLOATS)
    scale = draw(st.sampled_from([None, 0.5]))
    return Case(lambda x: mx.hadamard_transform(x, scale), [x], exact=False, k=n, magnitude=9.0 * n)


@case("FFT")
def fft(draw, name):
    x = drawn(draw, draw(shapes(1, 3, empty=False)), (F32,))
    axis = axis_in(draw, x)
    function = draw(st.sampled_from(["fft", "ifft", "rfft", "irfft", "fftn", "rfftn", "irfftn"]))
    whole, n = getattr(mx.fft, function), draw(st.integers(1, 5))
    if function.endswith("n"):
        return Case(lambda x: whole(x), [x], k=x.size, magnitude=9.0 * x.size, notes={"f": function})
    return Case(
        lambda x: whole(x, n, axis), [x], k=x.size, magnitude=9.0 * x.size, notes={"f": function, "n": n}
    )


@case("Inverse", "Cholesky", "QRF", "SVD", "Eigh", "Eig")
def decomposition(draw, name):
    a = drawn(draw, (*draw(shapes(0, 1, empty=False)), 3, 3), (F32,), low=-1, high=1) + 4 * mx.eye(3)
    flag = draw(st.booleans())
    functions = {
        "Inverse": lambda a: mx.linalg.tri_inv(a, flag) if triangle else mx.linalg.inv(a),
        "Cholesky": lambda a: mx.linalg.cholesky(a @ mx.swapaxes(a, -1, -2), flag),
        "QRF": mx.linalg.qr,
        "SVD": lambda a: mx.linalg.svd(a, flag),
        "Eigh": lambda a: (mx.linalg.eigh if flag else mx.linalg.eigvalsh)(a, uplo),
        "Eig": mx.linalg.eig if flag else mx.linalg.eigvals,
    }
    triangle, uplo = draw(st.booleans()), draw(st.sampled_from("LU"))
    function = functions[name]
    exact = name in ("Inverse", "Cholesky")
    return Case(on_cpu(function), [a], reference=exact, k=3, magnitude=64.0, notes={"name": name})


def on_cpu(function):
    """`function` with its operations on the CPU, where the decompositions are."""

    def call(*arrays):
        with mx.stream(mx.cpu):
            return function(*arrays)

    return call


@case("RandomBits")
def random_bits(draw, name):
    shape = draw(shapes(0, 2, empty=False))
    functions = {
        "uniform": lambda key: mx.random.uniform(-1, 1, shape, key=key),
        "normal": lambda key: mx.random.normal(shape, key=key),
        "bernoulli": lambda key: mx.random.bernoulli(0.3, shape, key=key),
        "randint": lambda key: mx.random.randint(0, 9, shape, key=key),
        "split": lambda key: mx.random.split(key, 3),
        "permutation": lambda key: mx.random.permutation(7, key=key),
        "categorical": lambda key: mx.random.categorical(mx.zeros((2, 3)), key=key),
        "many": lambda key: mx.vmap(lambda k: mx.random.uniform(shape=shape, key=k))(mx.random.split(key, 2)),
    }
    kind = draw(st.sampled_from(sorted(functions)))
    seed = draw(st.integers(0, 99))
    # What is drawn from words near a border may be on its other side in float64.
    return Case(functions[kind], [mx.random.key(seed)], reference=kind == "split", notes={"f": kind})

"""(x - mean) / sqrt(var + eps), cast back, times a weight, plus a bias → layer_norm."""

from __future__ import annotations

from dataclasses import dataclass

import qgraph as qg
from qgraph.ir import Value
from qgraph.ops.reduce import Variance
from qgraph_passes.raise_fast.form import Form, Raised, Search
from qgraph_passes.raise_fast.rows import ROOTS, Normed, affine, normed, operand, vector
from qgraph_passes.raise_fast.walk import KERNELS, Path, Shape, is_squared, mean_of, uncast


@dataclass
class _Centred:
    """Rows less their mean."""

    x: Value
    axes: Shape
    path: Path


class RaiseLayerNorm(Form):
    """(x - mean(x)) * rsqrt(var(x) + eps) * w + b → layer_norm."""

    anchors = ROOTS
    size = 12

    def find(self, s: Search) -> Raised | None:
        found = normed(s)
        if found is None:
            return None
        centred = _centred(uncast(found.rows))
        axes = None if centred is None else _variance_axes(s, found, centred)
        if centred is None or axes is None:
            return None
        core, shape = uncast(centred.x), found.out.type.shape
        s.require(core.type.dtype.name in KERNELS, f"there is no kernel for {core.type.dtype}", core)
        last = (core.type.ndim - 1,)
        both = centred.axes == axes == last
        s.require(both, f"mean and variance are over axes {centred.axes} and {axes}, not the last one", core)
        aligned = found.path.aligned(shape, axes) and centred.path.aligned(shape, axes)
        s.require(core.type.shape == shape and aligned, "the mean of a row does not meet that row", found.out)
        s.inner(*found.path.values, found.rows)
        after = affine(s, found, core, with_bias=True)
        s.private(after.root)
        return Raised(
            after.root,
            lambda now: qg.layer_norm(
                operand(now, core, after),
                vector(now, after.weight),
                vector(now, after.bias),
                found.eps,
            ),
        )


def _centred(v: Value) -> _Centred | None:
    if v.op.name != "subtract":
        return None
    x, path = v.node.inputs[0], Path()
    mean = mean_of(path.strip(v.node.inputs[1]), path)
    if mean is None or uncast(mean[0]) is not uncast(x):
        return None
    return _Centred(x, mean[1], path)


def _variance_axes(s: Search, found: Normed, centred: _Centred) -> Shape | None:
    """The axes over which the statistic is the variance of the rows; None if it is something else."""
    op = found.statistic.op
    if isinstance(op, Variance) and op.name == "var":
        of_x = uncast(found.statistic.node.inputs[0]) is uncast(centred.x)
        return op.axes if of_x and op.ddof == 0 else None
    mean = mean_of(found.statistic, found.path)
    if mean is None:
        return None
    squared = is_squared(Path().strip(mean[0]))
    if squared is None or uncast(squared) is not uncast(found.rows):
        return None
    s.inner(mean[0])
    return mean[1]

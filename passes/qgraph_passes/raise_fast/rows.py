"""What rms_norm and layer_norm share: rows divided by a root, then scaled and shifted by vectors.

x * rsqrt(m + eps)      x / sqrt(m + eps)      x * (1 / sqrt(m + eps))      x * (m + eps) ** -0.5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import qgraph as qg
from qgraph.ir import Node, Value
from qgraph.ir.dtypes import DType, promote
from qgraph.ir.op import Input
from qgraph.ops.elementwise import Cast
from qgraph.ops.shape import Broadcast, Reshape
from qgraph_passes.raise_fast.form import Now, Search
from qgraph_passes.raise_fast.walk import Path, added, number, shaped, uncast

ROOTS = ("rsqrt", "sqrt", "power")


@dataclass
class Normed:
    """Rows times one over a root: the statistic under the root, and what was divided."""

    out: Value  # the rows after the division
    rows: Value  # what was divided, as it entered the product
    statistic: Value  # stripped
    eps: float
    path: Path = field(default_factory=Path)


def normed(s: Search) -> Normed | None:
    """The division of rows by the root that stands at the search's node."""
    node = s.node
    if node.op.name == "power" and number(node.inputs[1]) != -0.5:
        return None
    path = Path()
    out = _division(s, node, path)
    if out is None:
        return None
    path.values.reverse()  # found from the inside out
    pair = added(path.strip(node.inputs[0]))
    if pair is None:
        return None
    s.inner(path.values[-1])
    statistic = path.strip(pair[0])
    s.inner(*path.values)
    a, b = out.node.inputs
    rows = a if b in path.values else b
    return Normed(out, rows, statistic, pair[1], path)


def _division(s: Search, node: Node, path: Path) -> Value | None:
    """The product (or quotient) in which the root ends; the values on the way are added to the path."""
    v, by_product = node.outputs[0], node.op.name != "sqrt"
    path.values.append(v)
    while True:
        user = s.walk.user(v)
        if user is None or len(user.outputs) != 1:
            return None
        out = user.outputs[0]
        inverts = user.op.name == "reciprocal" or (user.op.name == "divide" and number(user.inputs[0]) == 1)
        if not by_product and inverts:
            by_product = True
        elif user.op.name == ("multiply" if by_product else "divide") and len(set(user.inputs)) == 2:
            if not by_product and user.inputs[1] is not v:
                return None
            return out
        elif not (isinstance(user.op, (Broadcast, Reshape)) or _is_float_cast(user)):
            return None
        v = out
        path.values.append(v)


def _is_float_cast(node: Node) -> bool:
    return isinstance(node.op, Cast) and node.op.dtype.is_float


@dataclass
class Affine:
    """What follows the division: a cast back, a weight, a bias."""

    root: Value
    dtype: DType  # of the normed rows before the weight
    weight: Value | None = None
    bias: Value | None = None


def affine(s: Search, found: Normed, core: Value, with_bias: bool) -> Affine:
    """Follow the normed rows to the product (and sum) with a vector, as long as nothing else reads them."""
    out = found.out
    after = s.walk.user(out)
    if after is not None and isinstance(after.op, Cast) and after.op.dtype is core.type.dtype:
        s.inner(out)
        out = after.outputs[0]
    made = Affine(out, out.type.dtype)
    weight = _vector(s, out, "multiply")
    if weight is not None:
        s.inner(out)
        made.root, made.weight = weight
    if with_bias:
        bias = _vector(s, made.root, "add")
        if bias is not None and (made.weight is not None or bias[0].type.dtype is made.root.type.dtype):
            s.inner(made.root)
            made.root, made.bias = bias
    return made


def _vector(s: Search, v: Value, op: str) -> tuple[Value, Value] | None:
    """The product (sum) of rows with a vector along them, as its only use: the result, and the vector."""
    user = s.walk.user(v)
    if user is None or user.op.name != op or len(set(user.inputs)) != 2:
        return None
    other = user.inputs[1] if user.inputs[0] is v else user.inputs[0]
    n, out = v.type.shape[-1], user.outputs[0]
    while isinstance(other.op, Broadcast):
        other = other.node.inputs[0]
    fits = other.type.shape[-1:] == (n,) and other.type.size == n and other.type.dtype.is_float
    # One row of activations looks like a weight: a weight has one axis, or is given as it is.
    inner = other.node.inputs[0] if isinstance(other.op, Reshape) else other
    fits = fits and other.type.packing is None and (inner.type.ndim < 2 or isinstance(inner.op, Input))
    return (out, other) if fits and out.type.shape == v.type.shape else None


def vector(now: Now, v: Value | None) -> Any:
    """A weight or bias as the op takes it."""
    return None if v is None else shaped(now(v), v.type.shape[-1:])


def operand(now: Now, core: Value, after: Affine) -> Any:
    """The rows in the dtype in which they were normed, unless the weight takes them there."""
    weight = after.weight
    if weight is not None and promote(core.type.dtype, weight.type.dtype) is after.dtype:
        return now(core)
    return qg.astype(now(core), after.dtype.mlx)


def same_rows(found: Normed, x: Value) -> bool:
    """Whether `x`, of which the statistic is, is what was divided."""
    return uncast(found.rows) is uncast(x)

"""exp(x - max(x)) / sum(exp(x - max(x))) → softmax, which MLX writes for all axes but the last."""

from __future__ import annotations

import qgraph as qg
from qgraph.ir import Node, Value
from qgraph.ops.reduce import Reduction
from qgraph_passes.raise_fast.form import Form, Raised, Search
from qgraph_passes.raise_fast.walk import Path, Shape, uncast


class RaiseSoftmax(Form):
    """e / sum(e) for e = exp(x - max(x)), or exp(x - logsumexp(x)) → softmax."""

    anchors = ("exp",)
    size = 5

    def find(self, s: Search) -> Raised | None:
        e = s.node.outputs[0]
        x = s.node.inputs[0]
        if not x.type.dtype.is_float:
            return None
        shifted = _less(x, ("logsumexp",))
        if shifted is not None:
            return _softmax(e, *shifted)
        return self._quotient(s, e, x)

    def _quotient(self, s: Search, e: Value, x: Value) -> Raised | None:
        users = s.walk.users(e)
        totals = [n for n in users if n.op.name == "sum"]
        if len(totals) != 1:
            return None
        total = totals[0]
        assert isinstance(total.op, Reduction)
        path = Path()
        root = _quotient_of(s, e, total, path)
        if root is None:
            return None
        path.values.reverse()
        axes = total.op.axes
        s.require(path.aligned(e.type.shape, axes), "the sum of a row does not meet that row", root)
        s.inner(e, *path.values)
        s.private(root)
        shifted = _less(x, ("max",))
        source = shifted[0] if shifted is not None and shifted[1] == axes else x
        return _softmax(root, source, axes)


def _softmax(root: Value, x: Value, axes: Shape) -> Raised:
    dtype = root.type.dtype
    return Raised(root, lambda now: qg.astype(qg.softmax(now(x), axis=axes), dtype.mlx))


def _less(v: Value, reductions: tuple[str, ...]) -> tuple[Value, Shape] | None:
    """``(x, axes)`` for x - r(x), r a reduction over axes."""
    if v.op.name != "subtract":
        return None
    x, path = v.node.inputs[0], Path()
    found = path.strip(v.node.inputs[1])
    if found.op.name not in reductions or not isinstance(found.op, Reduction):
        return None
    axes = found.op.axes
    same = uncast(found.node.inputs[0]) is uncast(x) and v.type.dtype is x.type.dtype
    return (x, axes) if same and path.aligned(x.type.shape, axes) else None


def _quotient_of(s: Search, e: Value, total: Node, path: Path) -> Value | None:
    """E / total, the total cast and broadcast on its way, or e * (1 / total)."""
    v, inverted = total.outputs[0], False
    while True:
        path.values.append(v)
        user = s.walk.user(v)
        if user is None:
            return None
        if user.op.name == "reciprocal" and not inverted:
            inverted = True
        elif user.op.name == ("multiply" if inverted else "divide"):
            fits = set(user.inputs) == {e, v} if inverted else user.inputs == (e, v)
            return user.outputs[0] if fits else None
        elif user.op.name not in ("broadcast_to", "reshape", "cast"):
            return None
        v = user.outputs[0]

"""softmax(scale * q @ k.T + mask) @ v → scaled_dot_product_attention.

The scale may stand at q, at k or at the scores; keys that serve several heads may be repeated, or broadcast
with the heads in two axes, as MLX does; sinks are a column beside the scores, cut off after the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import qgraph as qg
from qgraph.ir import Value
from qgraph.ir.dtypes import DType, promote
from qgraph.ops.attention import Attention
from qgraph.ops.dispatch import apply
from qgraph.ops.reduce import Softmax
from qgraph.ops.shape import Broadcast, Concatenate, Reshape, Slice, Transpose
from qgraph_passes.raise_fast.form import Form, Now, Raised, Search
from qgraph_passes.raise_fast.masks import Mask, Scores, fitted, read_scores
from qgraph_passes.raise_fast.walk import KERNELS, Shape, scaled, shaped, uncast


@dataclass(frozen=True)
class _Part:
    """Queries, keys or values as (batch, heads, …), and by what they were scaled."""

    value: Value
    shape: Shape
    turned: bool = False  # the last two axes are to be swapped
    scale: float = 1.0

    def now(self, now: Now, batch: int, dtype: DType) -> Any:
        """The operand of the op."""
        made = qg.astype(shaped(now(self.value), self.shape), dtype.mlx)
        made = qg.swapaxes(made, -1, -2) if self.turned else made
        return qg.broadcast_to(made, (batch, *made.shape[1:]))


@dataclass(frozen=True)
class _Sinks:
    """A column beside the scores."""

    column: Value
    kept: range  # of the columns, those that are scores


class RaiseAttention(Form):
    """softmax(scale * q @ k.T + mask) @ v → scaled_dot_product_attention."""

    anchors = ("softmax",)
    size = 5

    def find(self, s: Search) -> Raised | None:
        softmax, given = s.node.outputs[0], s.node.inputs[0]
        ndim = softmax.type.ndim
        assert isinstance(s.node.op, Softmax)
        if s.node.op.axes != (ndim - 1,) or not 2 <= ndim <= 5:
            return None
        masked, sinks = _without_sinks(s, given)
        out = _weighted(s, softmax, sinks)
        if out is None:
            return None
        scores = read_scores(masked)
        made_by = scores.product.op.name
        s.require(made_by == "dot", f"the scores are not q @ k.T but made by {made_by}", scores.product)
        s.inner(*scores.inside, scores.product)
        return _found(s, scores, sinks, out)


class RaiseCausal(Form):
    """scaled_dot_product_attention with a mask that is worked out here to be the causal one → without it."""

    anchors = ("scaled_dot_product_attention",)

    def find(self, s: Search) -> Raised | None:
        op = s.node.op
        assert isinstance(op, Attention)
        if op.mask != "array":
            return None
        q, k, v, mask, *sinks = s.node.inputs
        scores = (*q.type.shape[:3], k.type.shape[2])
        chooses = mask.type.dtype.name == "bool"
        if not fitted(s, Mask(mask, chooses), scores, (scores[1], 1)).causal:
            return None
        causal = replace(op, mask="causal")
        operands = (q, k, v, *sinks)
        return Raised(s.node.outputs[0], lambda now: apply(causal, *map(now, operands)))


def _without_sinks(s: Search, v: Value) -> tuple[Value, _Sinks | None]:
    """The scores without a column beside them."""
    wide = uncast(v)
    if not isinstance(wide.op, Concatenate) or len(wide.node.inputs) != 2:
        return v, None
    first, second = wide.node.inputs
    n, whole = wide.type.shape[-1], wide.op.axis == wide.type.ndim - 1
    if whole and first.type.shape[-1] == 1 and _is_repeated(first):
        s.inner(wide, v)
        return second, _Sinks(first, range(1, n))
    if whole and second.type.shape[-1] == 1 and _is_repeated(second):
        s.inner(wide, v)
        return first, _Sinks(second, range(n - 1))
    return v, None


def _is_repeated(column: Value) -> bool:
    """Whether a column is the same for all queries."""
    return isinstance(column.op, Broadcast) or column.type.shape[-2] == 1


def _weighted(s: Search, v: Value, sinks: _Sinks | None) -> Value | None:
    """The product of the weights with the values, the column of sinks cut off before."""
    cut = sinks is None
    while True:
        user = s.walk.user(v)
        if user is None or len(user.outputs) != 1:
            return None
        out = user.outputs[0]
        s.inner(v)
        if user.op.name == "dot":
            return out if cut and user.inputs[0] is v and user.inputs[1] is not v else None
        if isinstance(user.op, Slice) and not cut and sinks is not None:
            cut = _takes(user.op, v.type.shape, sinks.kept)
        elif user.op.name != "cast" or not out.type.dtype.is_float:
            return None
        v = out


def _takes(op: Slice, shape: Shape, columns: range) -> bool:
    *lead, last = op.ranges()
    return last == columns and lead == [range(n) for n in shape[:-1]]


def _found(s: Search, scores: Scores, sinks: _Sinks | None, out: Value) -> Raised:
    """The op in place of `out`. Errors: NoMatch."""
    q, k = scores.product.node.inputs
    v = out.node.inputs[1]
    s.require(min(x.type.ndim for x in (q, k, v)) > 1, "a product with a vector", out)
    s.require(not any(x.type.packing for x in (q, k, v)), "an operand of the products is packed", out)
    shape = scores.product.type.shape
    one = scores.product.type.ndim > 2 and k.type.ndim == 2
    s.require(not one, "all rows meet the same matrix: two layers, not attention", k)
    s.require(scores.product.type.size and out.type.size, "there is nothing to attend to", out)
    batch, split = _heads(shape)
    heads = split[0] * split[1]
    queries = _queries(s, q, (batch, heads, *q.type.shape[-2:]))
    keys, values = _served(s, k, shape, split, True), _served(s, v, shape, split, False)
    s.require(keys.shape[1] == values.shape[1], "keys and values have other numbers of heads", v)
    s.require(heads % keys.shape[1] == 0, "the heads do not fit those of the keys", k)
    s.require(len(scores.masks) < 2, "the scores are masked twice", scores.product)
    mask = fitted(s, scores.masks[0], shape, split) if scores.masks else None
    column = None if sinks is None else _per_head(s, sinks.column, shape, heads)
    root = out
    merged = s.walk.user(out)
    four = (batch, heads, shape[-2], v.type.shape[-1])
    if len(shape) == 5 and merged is not None and isinstance(merged.op, Reshape):
        s.inner(out)
        root = merged.outputs[0] if merged.outputs[0].type.shape == four else out
    s.private(root)
    added = [mask.value] if mask is not None and not mask.chooses and not mask.causal else []
    wide = [root, queries.value, keys.value, values.value, *added, *([] if column is None else [column])]
    dtype = promote(*(x.type.dtype for x in wide))
    s.require(dtype.name in KERNELS, f"there is no kernel for {dtype}", root)
    scale = scores.scale * queries.scale * keys.scale

    def make(now: Now) -> Any:
        made = qg.scaled_dot_product_attention(
            *(part.now(now, batch, dtype) for part in (queries, keys, values)),
            scale=scale,
            mask=None if mask is None else mask.now(now, dtype),
            sinks=None if column is None else qg.astype(shaped(now(column), (heads,)), dtype.mlx),
        )
        return qg.reshape(qg.astype(made, root.type.dtype.mlx), root.type.shape)

    return Raised(root, make)


def _heads(scores: Shape) -> tuple[int, tuple[int, int]]:
    """(batch, how many heads: groups times heads of a group) of scores of any rank."""
    lead = scores[:-2]
    if len(lead) == 3:
        return lead[0], (lead[1], lead[2])
    batch, heads = (1, 1, *lead)[-2:]
    return batch, (heads, 1)


def _queries(s: Search, q: Value, shape: Shape) -> _Part:
    """The queries, with all heads in one axis."""
    v, scale = q, 1.0
    while True:
        pair = scaled(v)
        if pair is not None and pair[0].type.shape == v.type.shape:
            v, scale = pair[0], scale * pair[1]
        elif isinstance(v.op, Reshape) and v.node.inputs[0].type.shape[-2:] == v.type.shape[-2:]:
            v = v.node.inputs[0]
        else:
            break
    s.require(q.type.size == v.type.size and prod(shape) == v.type.size, "queries are broadcast", q)
    return _Part(v, shape, False, scale)


def _served(s: Search, x: Value, scores: Shape, split: tuple[int, int], turned: bool) -> _Part:
    """Keys or values, without the copies of them for the heads that they serve.

    `turned`: the product wants them with the last two axes the other way round than the op does.
    """
    bare = _bare(x, turned)
    lead, v = scores[:-2], bare.value
    if len(lead) < 3:
        batch, heads = (1, 1, *v.type.shape[:-2])[-2:]
        repeated = _unrepeated(bare, batch, heads)
        return repeated or _part(bare, batch, heads)
    batch, groups, each = (1, 1, 1, *v.type.shape[:-2])[-3:]
    one = each == 1 and groups in (1, split[0])
    s.require(one or (groups, each) == split, "keys differ along one of the two axes of heads", x)
    return _part(bare, batch, groups * each)


def _bare(x: Value, turned: bool) -> _Part:
    """`x` before broadcasts to more heads, transposes of the last two axes, and scales."""
    v, scale = x, 1.0
    while True:
        pair = scaled(v)
        last = v.type.shape[-2:]
        if pair is not None and pair[0].type.shape == v.type.shape:
            v, scale = pair[0], scale * pair[1]
        elif isinstance(v.op, Broadcast) and v.node.inputs[0].type.shape[-2:] == last:
            v = v.node.inputs[0]
        elif isinstance(v.op, Transpose) and _swaps_last(v.op.axes):
            v, turned = v.node.inputs[0], not turned
        else:
            return _Part(v, v.type.shape, turned, scale)


def _swaps_last(axes: Shape) -> bool:
    n = len(axes)
    return n > 1 and axes == (*range(n - 2), n - 1, n - 2)


def _part(bare: _Part, batch: int, heads: int) -> _Part:
    return _Part(bare.value, (batch, heads, *bare.value.type.shape[-2:]), bare.turned, bare.scale)


def _unrepeated(bare: _Part, batch: int, heads: int) -> _Part | None:
    """The keys of which each stands several times in a row, as ``repeat`` writes it."""
    v = bare.value
    if not isinstance(v.op, Reshape) or v.node.inputs[0].type.ndim != 5:
        return None
    inner = _bare(v.node.inputs[0], bare.turned)
    b, few, each = v.node.inputs[0].type.shape[:3]
    before = ((1,) * 5 + inner.value.type.shape)[-5:-2]
    same = v.node.inputs[0].type.shape[-2:] == v.type.shape[-2:] and (b, few * each) == (batch, heads)
    if not same or before != (b, few, 1):
        return None
    scale = bare.scale * inner.scale
    return _part(_Part(inner.value, inner.shape, inner.turned, scale), batch, few)


def _per_head(s: Search, column: Value, scores: Shape, heads: int) -> Value:
    """One number for each head, of which a column consists."""
    v = column
    while isinstance(v.op, Broadcast):
        v = v.node.inputs[0]
    shape = (1,) * (len(scores) - v.type.ndim) + v.type.shape
    batch = 1 if len(scores) < 4 else shape[0]
    fits = shape[-2:] == (1, 1) and v.type.size == heads and batch == 1
    s.require(
        fits and v.type.dtype.is_float, "the column beside the scores is not one number for each head", v
    )
    return v

"""What is done to scores before their softmax: a mask that chooses, or that is added, or the causal one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import qgraph as qg
from qgraph.ir import Value
from qgraph.ir.dtypes import DType
from qgraph.ops.shape import Broadcast, Reshape
from qgraph_passes.raise_fast.form import Now, Search
from qgraph_passes.raise_fast.walk import Shape, Walk, number, scaled, shaped, uncast

SMALL = 1 << 16  # elements of a mask that is worked out whole
MASKED = -1e4  # a score from which on its exponential is 0 beside any other: 16-bit code uses no less


@dataclass(frozen=True)
class Mask:
    """A mask of scores: booleans that choose (or with `inverted` drop), or numbers to add; or the causal one.

    `low` is what takes the place of a score that was not chosen. `shape` is that of the value as it is
    broadcast to (batch, heads, queries, keys).
    """

    value: Value
    chooses: bool
    low: float = 0.0
    inverted: bool = False
    causal: bool = False
    shape: Shape = ()

    def now(self, now: Now, dtype: DType) -> Any:
        """The mask as the op takes it."""
        if self.causal:
            return "causal"
        value = shaped(now(self.value), self.shape)
        if not self.chooses:
            return qg.astype(value, dtype.mlx)
        value = qg.logical_not(value) if self.inverted else value
        if self.low > float("-inf"):
            return value
        # A row of -inf alone is NaN in what is replaced, and of a boolean mask the mean.
        zero, low = (qg.full((), x, dtype.mlx) for x in (0.0, self.low))
        return qg.where(value, zero, low)


@dataclass(frozen=True)
class Scores:
    """Scores as a product, and what was done to it."""

    product: Value
    scale: float
    masks: tuple[Mask, ...]
    inside: tuple[Value, ...]


def read_scores(v: Value) -> Scores:
    """Follow scores back to the product that they are, through masks, scales and casts to wider floats."""
    scale, masks, inside = 1.0, list[Mask](), list[Value]()
    while True:
        inside.append(v)
        pair = scaled(v)
        masked = (_choice(v) or _addition(v)) if scale == 1.0 else None
        if pair is not None:
            v, scale = pair[0], scale * pair[1]
        elif masked is not None:
            v = masked[0]
            masks.append(masked[1])
        elif uncast(v) is not v:
            v = v.node.inputs[0]
        else:
            return Scores(v, scale, tuple(masks), tuple(inside[:-1]))


def _choice(v: Value) -> tuple[Value, Mask] | None:
    """where(mask, scores, low) and where(mask, low, scores)."""
    if v.op.name != "where":
        return None
    condition, *branches = v.node.inputs
    for inverted, (scores, other) in enumerate((branches, branches[::-1])):
        low = number(other)
        if low is not None and low <= MASKED and scores.type.shape == v.type.shape:
            return scores, Mask(condition, True, low, bool(inverted))
    return None


def _addition(v: Value) -> tuple[Value, Mask] | None:
    """A sum of scores and a mask; the scores are the operand that is made of a product."""
    if v.op.name != "add":
        return None
    for scores, mask in (v.node.inputs, v.node.inputs[::-1]):
        if scores.type.shape == v.type.shape and _is_of_a_product(scores):
            return scores, Mask(mask, False)
    return None


def _is_of_a_product(v: Value) -> bool:
    for _ in range(8):
        if v.op.name == "dot":
            return True
        pair = scaled(v) or _choice(v)
        if pair is not None:
            v = pair[0]
        elif v.op.name == "cast":
            v = v.node.inputs[0]
        else:
            return False
    return False


def fitted(s: Search, mask: Mask, scores: Shape, split: tuple[int, int]) -> Mask:
    """The mask without what broadcast it, and its shape for (batch, heads, queries, keys).

    `scores` have the heads in one axis, or in the two of `split`.
    Errors: NoMatch for a mask that differs along one of the two.
    """
    value, rank = _smallest(mask.value, len(scores), split)
    shape = value.type.shape
    if rank == 5 and len(shape) > 2:
        batch, *two = (1, 1, 1, *shape[:-2])[-3:]
        fits = tuple(two) in (split, (1, 1))
        s.require(fits, f"a mask {shape} differs along one of the two axes of heads", value)
        shape = (batch, two[0] * two[1], *shape[-2:])
    mask = replace(mask, value=value, shape=shape)
    dtype = value.type.dtype
    s.require(value.type.packing is None, "the mask is packed", value)
    s.require(dtype.name == "bool" if mask.chooses else dtype.is_float, f"a mask of {dtype}", value)
    return replace(mask, causal=_is_causal(s.walk, mask, *scores[-2:]))


def _smallest(v: Value, rank: int, split: tuple[int, int]) -> tuple[Value, int]:
    """The value that was broadcast, and to how many axes."""
    heads = split[0] * split[1]
    while True:
        if isinstance(v.op, Broadcast):
            v = v.node.inputs[0]
            continue
        if not isinstance(v.op, Reshape) or rank != 5:
            return v, rank
        before, after = v.node.inputs[0].type.shape, v.type.shape
        if len(before) != 4 or len(after) != 5 or before[-2:] != after[-2:] or before[0] != after[0]:
            return v, rank
        if before[1] not in (1, heads):
            return v, rank
        v, rank = v.node.inputs[0], 4


# Comparisons as "query >= key": which operand is the query, and whether equal ones do not count.
COMPARED = {"greater_equal": (0, False), "less_equal": (1, False), "greater": (0, True), "less": (1, True)}


def _is_causal(walk: Walk, mask: Mask, rows: int, columns: int) -> bool:
    """Whether the mask, worked out here, lets every query see the keys up to its own, the last one all."""
    if mask.chooses and mask.value.op.name in COMPARED and mask.value.type.size > SMALL:
        return columns >= rows and _compares_positions(walk, mask, rows, columns)
    found = walk.known(mask.value)
    if found is None or columns < rows or any(n != 1 for n in found.shape[:-2]):
        return False
    if found.shape[-2:] != (rows, columns):
        return False
    found = found.reshape(rows, columns)
    causal: Any = np.tri(rows, columns, columns - rows, dtype=bool)
    if mask.chooses:
        return bool(np.array_equal(found, ~causal if mask.inverted else causal))
    return bool(np.all(found[causal] == 0) and np.all(found[~causal] <= MASKED))


def _compares_positions(walk: Walk, mask: Mask, rows: int, columns: int) -> bool:
    """The same of a comparison of two vectors, without the matrix that it makes."""
    query, strict = COMPARED[mask.value.op.name]
    if mask.inverted:  # not (a >= b) is b > a
        query, strict = 1 - query, not strict
    operands = mask.value.node.inputs
    a: Any = walk.known(operands[query])
    b: Any = walk.known(operands[1 - query])
    if a is None or b is None or mask.value.type.shape[-2:] != (rows, columns):
        return False
    if a.shape[-2:] != (rows, 1) or a.size != rows or b.shape[-1:] != (columns,) or b.size != columns:
        return False
    keys = b.reshape(-1)
    if not np.all(keys[1:] > keys[:-1]):
        return False
    # The keys that a query sees are the first ones: how many?
    seen = keys.searchsorted(a.reshape(-1), side="left" if strict else "right")
    return bool(np.array_equal(seen, np.arange(columns - rows + 1, columns + 1)))

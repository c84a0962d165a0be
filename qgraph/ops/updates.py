"""Writing by index, as functions: each gives an updated copy. Indices out of range write nothing."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.op import Operand, Types, literal
from qgraph.ir.types import Shape, TensorType, broadcast_shapes, normalize_axis
from qgraph.ops.blocks import like
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of, type_of
from qgraph.ops.indexed import Indexed, check_indices, in_range
from qgraph.ops.indexing import Subscript, TakeAlongAxis, index_operand
from qgraph.ops.reduce import widens
from qgraph.ops.shape import flatten, reshape, transpose

__all__ = ["At", "put_along_axis"]


@dataclass(frozen=True)
class PutAlongAxis(Indexed):
    """Replace one element for every index, in its own row along `axis`."""

    writes = True

    name = "put_along_axis"
    mlx = "mx.put_along_axis({0}, {1}, {2}, axis={axis})"
    flops_per_element = 0
    axis: int = -1

    def infer(self, a: TensorType, indices: TensorType, values: TensorType) -> TensorType:
        """The type of a."""
        shape = TakeAlongAxis(self.axis).shape_rule(a, indices)
        if _outside(shape, self.axis) != _outside(a.shape, self.axis):
            raise ShapeError(f"{self.name}: indices {indices.shape} do not fit {a.shape} outside the axis")
        if broadcast_shapes(shape, values.shape) != shape:
            raise ShapeError(f"{self.name}: values {values.shape} do not broadcast to {shape}")
        if values.dtype is not a.dtype:
            raise DTypeError(f"{self.name}: values of {values.dtype} in {a.dtype}", fix="cast the values")
        return a.dense()

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """The indices, of the axis."""
        axis = self.axis % inputs[0].ndim
        return {1: (axis, inputs[0].shape[axis])}

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.put_along_axis`."""
        return operands[0] if inputs[1].size == 0 else super().emit(operands, inputs, outputs)

    def reference(self, a: Any, indices: Any, values: Any) -> Any:
        """NumPy's put_along_axis, on a copy."""
        axis = self.axis % np.ndim(a)
        out = one_more(a, [axis])
        shape = (*a.shape[:axis], indices.shape[axis], *a.shape[axis + 1 :])
        where = np.broadcast_to(beside(indices, a.shape[axis]), shape)
        np.put_along_axis(out, where, np.broadcast_to(values, shape), axis)
        return out[tuple(builtins.slice(n) for n in a.shape)]


def one_more(a: Any, axes: Sequence[int]) -> Any:
    """In the reference: a copy with one more element on `axes`, where updates out of range go."""
    return np.pad(a, [(0, int(i in axes)) for i in range(np.ndim(a))]) if np.ndim(a) else np.array(a)


def beside(indices: Any, size: int) -> Any:
    """In the reference: the indices counted from the start; `size` for those out of range."""
    safe, valid = in_range(indices, size)
    return np.where(valid, safe, size)


def _outside(shape: Shape, axis: int) -> Shape:
    return tuple(s for i, s in enumerate(shape) if i != axis % len(shape))


@frontend
def put_along_axis(a: ArrayLike, /, indices: ArrayLike, values: ArrayLike, axis: int | None = None) -> Array:
    """`a` with `values` at `indices` along `axis` (None: of a flattened).

    Shape: a's; the values broadcast to the indices.  Which of several values for one element stays is
    undefined; an index out of range writes nothing.  Source: mlx.core.put_along_axis.
    """
    a = operand(a)
    flat, at = (flatten(a), 0) if axis is None else (a, normalize_axis(axis, len(shape_of(a))))
    where = index_operand(indices, shape_of(flat)[at], at)
    return reshape(apply(PutAlongAxis(at), flat, where, like(values, a)), shape_of(a))


# How each kind of update acts on a copy in the reference, with repeated indices counted each time.
_UPDATES: dict[str, Callable[..., Any]] = {
    "add": np.add.at,
    "subtract": np.subtract.at,
    "multiply": np.multiply.at,
    "divide": np.divide.at,
    "maximum": np.maximum.at,
    "minimum": np.minimum.at,
}
Entry = int | tuple[int, int, int] | str


@dataclass(frozen=True)
class IndexUpdate(Indexed):
    """``a[index] = v`` (or ``+= v`` …) on a copy.

    `index` has one entry for each of the first axes: an int, (start, stop, step), or ``"array"`` for the
    next one of the operands behind the update.
    """

    name = "index_update"
    writes = True
    kind: str = "set"
    index: tuple[Entry, ...] = ()

    def infer(self, a: TensorType, update: TensorType, *indices: TensorType) -> TensorType:
        """The type of a; the update broadcasts to what the index selects."""
        if self.kind != "set" and self.kind not in _UPDATES:
            raise DTypeError(f"index_update: no kind {self.kind!r}", fix=f"use set, {', '.join(_UPDATES)}")
        if update.dtype is not a.dtype:
            raise DTypeError(f"index_update: an update of {update.dtype} in {a.dtype}", fix="cast the update")
        for t in indices:
            check_indices(self.name, t)
        self._check_entries(a.shape)
        target = self.target(a.shape, [t.shape for t in indices])
        if broadcast_shapes(target, update.shape) != target:
            raise ShapeError(f"x.at[...].{self.kind}: {update.shape} does not broadcast to {target}")
        return a.dense()

    def _check_entries(self, shape: Shape) -> None:
        """What is written out must be in range; a graph written by hand may hold anything."""
        if len(self.index) > len(shape):
            raise ShapeError(f"index_update: {len(self.index)} indices for an array {shape}")
        for axis, (e, n) in enumerate(zip(self.index, shape, strict=False)):
            r = range(*e) if isinstance(e, tuple) else range(e, e + 1) if isinstance(e, int) else range(0)
            if r and not 0 <= min(r[0], r[-1]) <= max(r[0], r[-1]) < n:
                message = f"index_update: {e} is out of range for axis {axis} of {shape}"
                raise ShapeError(message, fix=f"stay within 0 … {n - 1}")

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """The operands behind the update, of the axes that say "array"."""
        axes = [i for i, e in enumerate(self.index) if e == "array"]
        return {k: (axis, inputs[0].shape[axis]) for k, axis in enumerate(axes, 2)}

    def target(self, shape: Shape, indices: Sequence[Shape]) -> Shape:
        """The shape of what the index selects."""
        entries = dict(enumerate(self.index))
        advanced = [i for i, e in entries.items() if not isinstance(e, tuple)]
        rest = [
            (i, len(range(*e)) if isinstance(e, tuple) else n)
            for i, (n, e) in enumerate((n, entries.get(i)) for i, n in enumerate(shape))
            if i not in advanced
        ]
        if "array" not in self.index:
            return tuple(n for _, n in rest)
        if advanced[-1] - advanced[0] != len(advanced) - 1:
            raise ShapeError(
                f"index_update: slices between the arrays in {self.index}", fix="transpose a first"
            )
        before = [n for i, n in rest if i < advanced[0]]
        after = [n for i, n in rest if i > advanced[0]]
        return (*before, *broadcast_shapes(*indices), *after)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """MLX's `at`; for "set", which it lacks, an assignment to a copy, as one expression."""
        a, update = operands[:2]
        if 0 in self.target(inputs[0].shape, [t.shape for t in inputs[2:]]):
            return a  # MLX divides by the size of an update
        index = self.subscript(operands[2:], inputs)
        if self.kind != "set":
            if not widens(inputs[0].dtype) or "array" not in self.index:
                return f"{a}.at[{index}].{self.kind}({update})"
            # An index may repeat, and MLX would keep the sum of its updates in 16 bit.
            a, update = (f"{x}.astype(mx.float32)" for x in (a, update))
            return f"{a}.at[{index}].{self.kind}({update}).astype({literal(outputs[0].dtype)})"
        return f"(copy := mx.array({a})).__setitem__(({index},), {update}) or copy"

    def subscript(self, indices: tuple[str, ...], inputs: Types) -> str:
        """The index as source.

        MLX cannot differentiate a scatter with slices behind the arrays: those become arrays too.
        """
        entries = list(self.index)
        while entries and entries[-1] == (0, inputs[0].shape[len(entries) - 1], 1):
            entries.pop()
        first = entries.index("array") if "array" in entries else len(entries)
        behind = [e for e in entries[first:] if isinstance(e, tuple)]
        left = zip(indices, inputs[2:], strict=True)
        parts: list[str] = []
        for i, e in enumerate(entries):
            if e == "array":
                name, t = next(left)
                parts.append(f"mx.reshape({name}, {(*t.shape, *[1] * len(behind))})" if behind else name)
            elif isinstance(e, tuple) and i > first:
                after = [1 for x in entries[i + 1 :] if isinstance(x, tuple)]
                parts.append(f"mx.arange{e}.reshape({(-1, *after)})")
            else:
                parts.append(_slice_text(*e) if isinstance(e, tuple) else str(e))
        return ", ".join(parts) or "..."

    def reference(self, a: Any, update: Any, *indices: Any) -> Any:
        """The same on a copy; with repeated indices, the last one set stays."""
        axes = [i for i, e in enumerate(self.index) if e == "array"]
        left = iter([beside(x, a.shape[axis]) for x, axis in zip(indices, axes, strict=True)])
        out = one_more(a, axes)
        index: list[Any] = []
        for e in self.index:
            if isinstance(e, tuple):
                start, stop, step = e
                index.append(builtins.slice(start, None if step < 0 and stop < 0 else stop, step))
            else:
                index.append(next(left) if e == "array" else e)
        if self.kind == "set":
            out[tuple(index)] = update
        else:
            _UPDATES[self.kind](out, tuple(index), update)
        return out[tuple(builtins.slice(n) for n in np.shape(a))]

    def flops(self, inputs: Types, outputs: Types) -> int:
        """One operation for every element of the update."""
        return inputs[1].size if self.kind != "set" else 0


def _entry(e: Any) -> Entry:
    return e if isinstance(e, int) else "array"


def _slice_text(start: int, stop: int, step: int) -> str:
    """A slice as source; a stop before the first element has no number: -1 would be the last one."""
    return f"slice({start}, {None if step < 0 and stop < 0 else stop}, {step})"


class At:
    """``x.at``: subscript it, then say what to do there. Every method gives an updated copy.

    The update is cast to the dtype of x and broadcast. Where an index repeats, `add` and its kin count
    every one; which value `set` leaves is undefined. An index out of range updates nothing.

    >>> import mlx.core as mx
    >>> At(mx.zeros(3))[mx.array([0, 0])].add(1.0).tolist()
    [2.0, 0.0, 0.0]
    """

    __slots__ = ("_a", "_index")

    def __init__(self, a: ArrayLike, index: Any = None) -> None:
        self._a = operand(a)
        self._index = index

    def __getitem__(self, index: Any) -> At:
        """The place to update: ints, slices and integer arrays."""
        return At(self._a, (index,))

    def set(self, values: ArrayLike) -> Array:
        """Replace the elements."""
        return self._update("set", values)

    def add(self, values: ArrayLike) -> Array:
        """Add to the elements."""
        return self._update("add", values)

    def subtract(self, values: ArrayLike) -> Array:
        """Subtract from the elements."""
        return self._update("subtract", values)

    def multiply(self, values: ArrayLike) -> Array:
        """Multiply the elements."""
        return self._update("multiply", values)

    def divide(self, values: ArrayLike) -> Array:
        """Divide the elements, which must be floats."""
        dtype = type_of(self._a).dtype
        if not (dtype.is_float or dtype.is_complex):
            raise DTypeError(f"x.at[...].divide: x is {dtype}", fix="cast x to a float dtype")
        return self._update("divide", values)

    def maximum(self, values: ArrayLike) -> Array:
        """Replace the elements that are smaller."""
        return self._update("maximum", values)

    def minimum(self, values: ArrayLike) -> Array:
        """Replace the elements that are larger."""
        return self._update("minimum", values)

    def _update(self, kind: str, values: ArrayLike) -> Array:
        if self._index is None:
            raise ShapeError(f"x.at.{kind}: no index given", fix=f"write x.at[index].{kind}(v)")
        s = Subscript(shape_of(self._a), self._index[0])
        if any(e is None for e in s.entries):
            raise ShapeError(f"x.at[None].{kind}: no new axes here", fix="reshape the values instead")
        entries: list[Any] = [e if isinstance(e, tuple) else _entry(e) for e in s.entries]
        order = list(range(len(entries)))
        # MLX writes in another order than it reads where slices stand between arrays.
        if s.arrays and s.front() == 0:
            order.sort(key=lambda i: isinstance(entries[i], tuple))
        op = IndexUpdate(kind, tuple(entries[i] for i in order))
        out = apply(op, transpose(self._a, order), like(values, self._a), *s.arrays)
        return transpose(out, [order.index(i) for i in range(len(order))])

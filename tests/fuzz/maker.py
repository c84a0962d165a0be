"""Builds a random graph value by value: an operand is found, adapted from what is there, or a new input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from math import prod
from typing import Any

from hypothesis import strategies as st

from qgraph.ir import Builder, Op, Packing, TensorType, Value
from qgraph.ir.dtypes import BF16, F16, F32, F64, U8, DType
from qgraph.ir.op import Constant
from qgraph.ir.origin import Origin, Source
from qgraph.ops.dispatch import interpreting
from qgraph.quant import Quantization
from qgraph.trace.tracer import Trace, Tracer
from tests.fuzz import domains

SCOPES = ["", "", "layers.0", "layers.1.attn.q_proj", "head", "dot", "a.1"]
SCHEMES = [
    *(Quantization(bits=b, group_size=32) for b in (4, 2, 3, 8)),
    Quantization(bits=4, group_size=64),
    *(Quantization.of_mode(m) for m in ("mxfp4", "mxfp8", "nvfp4")),
]
R = Op.registry
HALVES = (F16, BF16)
SHAPES = [(2, 3), (), (1,), (4,), (1, 1), (2, 1, 3), (3, 4), (0, 3), (2, 64), (1, 2, 2, 3)]


class Maker:
    """The state of one drawing. `narrow`: all floats are f32, for which MLX can be held to most."""

    def __init__(self, draw: Callable[[Any], Any], narrow: bool) -> None:
        self.draw = draw
        self.narrow = narrow
        self.half = F32 if narrow else self.one(HALVES)  # what the floats of the graph are, or most of them
        self.mixed = not narrow and self.chance(2)
        self.builder = Builder()
        self.inputs: list[Value] = []
        self.values: list[Value] = []  # what later ops may read and the graph may return
        self.scope = ""
        self.trace = Trace(self.builder, origin=self.origin)

    # Choices

    def n(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one(self, items: Sequence[Any]) -> Any:
        return items[self.draw(st.integers(0, len(items) - 1))]

    def chance(self, of: int) -> bool:
        """True once in `of` times."""
        return self.n(0, of - 1) == of - 1

    def float(self) -> DType:
        return self.one([self.half, self.half, F32, F16, BF16]) if self.mixed else self.half

    # Nodes

    def origin(self) -> Origin:
        return Origin((Source(None, 0),), self.scope)  # reports follow nodes by their sources

    def add(self, op: Op, *operands: Value) -> Value:
        return self.builder.add(op, operands, self.origin()).outputs[0]

    def keep(self, *values: Value | Tracer) -> None:
        self.values += [v.value if isinstance(v, Tracer) else v for v in values]

    @contextmanager
    def tracing(self):
        """Functions of qg record nodes."""
        with interpreting(self.trace):
            yield

    def traced(self, value: Value) -> Any:
        return Tracer(self.trace, value)

    def constant(self, dtype: DType, *data: float, shape: tuple[int, ...] = ()) -> Value:
        kind = bool if dtype.name == "bool" else int if dtype.is_int else float
        return self.add(Constant(tuple(map(kind, data)), shape, dtype))

    def input(self, t: TensorType, domain: Any = None) -> Value:
        label = f"x{len(self.inputs)}"
        if isinstance(domain, str):
            label = f"{label}.{domain}"
        elif domain is not None:
            label = domains.within(label, *domain)
        value = self.builder.input(label, t, self.origin())
        self.inputs.append(value)
        if t.packing or domain is None:  # what was made for one use may not suit another
            self.values.append(value)
        return value

    # Operands

    def dense(self, shape: Sequence[int], dtype: DType | None = None, within: Any = None) -> Value:
        """A value of that type; inside a domain (numbers from … to, or the domain's text) if one is given."""
        t = TensorType(tuple(shape), dtype or self.float())
        if isinstance(within, str):
            return self.input(t, within)
        if within is not None:
            return self.limited(t, *within)
        how = self.n(0, 5)
        exact = [v for v in self.values if v.type == t] if how < 3 else []
        if exact:
            return self.one(exact)
        source = self.source(t) if how < 4 else None
        return self.input(t) if source is None else self.adapted(source, t)

    def source(self, t: TensorType) -> Value | None:
        """Something that can be turned into a `t`."""
        found = [v for v in self.values if v.type.size and not v.type.dtype.is_complex]
        if not found or t.dtype.is_complex:
            return None
        return self.one(found[-6:])

    def limited(self, t: TensorType, low: int, high: int) -> Value:
        """Numbers from low to high: an input, a constant, or another value forced into the range."""
        how = self.n(0, 3)
        label = f".in.{low}.{high}"
        if how == 0:
            same = [v for v in self.inputs if v.type == t and v.op.label.endswith(label)]
            if same:
                return self.one(same)
        if how == 1 and 0 < t.size <= 8:
            return self.constant(t.dtype, *(self.n(low, high) for _ in range(t.size)), shape=t.shape)
        source = self.source(t) if how == 2 else None
        if source is None or (t.dtype.name[0] == "u" and low < 0):
            return self.input(t, (low, high))
        x = self.adapted(source, t)
        if t.dtype.is_int:
            count = high - low + 1
            if t.dtype.name in ("i8", "u8") and count > 100:
                return self.input(t, (low, high))
            x = self.add(R["remainder"](), x, self.constant(t.dtype, count))
            return self.add(R["add"](), x, self.constant(t.dtype, low)) if low else x
        x = self.add(R["maximum"](), x, self.constant(t.dtype, low))
        return self.add(R["minimum"](), x, self.constant(t.dtype, high))

    def adapted(self, v: Value, t: TensorType) -> Value:
        """`v` cast and reshaped to `t`, by any of the ways that programs use."""
        v = self.cast(v, t.dtype)
        return self.shaped(v, t.shape)

    def cast(self, v: Value, dtype: DType) -> Value:
        """`v` as `dtype`; floats become integers from a range that every integer type has."""
        if v.type.dtype is dtype:
            return v
        if dtype.is_int and v.type.dtype.name[0] != "u" and v.type.dtype.name != "bool":
            low = 0 if dtype.name[0] == "u" else -8
            v = self.add(R["maximum"](), v, self.constant(v.type.dtype, low))
            v = self.add(R["minimum"](), v, self.constant(v.type.dtype, 8))
        return self.add(R["cast"](dtype), v)

    def shaped(self, v: Value, shape: tuple[int, ...]) -> Value:
        """The elements of `v`, some of them or all of them repeatedly, under `shape`."""
        old = v.type.shape
        if old == shape:
            return v
        if sorted(old) == sorted(shape) and self.n(0, 1) == 0:
            free = list(range(len(old)))
            axes = []
            for s in shape:
                axes.append(next(a for a in free if old[a] == s))
                free.remove(axes[-1])
            return self.add(R["transpose"](tuple(axes)), v)
        tail = shape[len(shape) - len(old) :]
        if len(old) <= len(shape) and all(a in (1, b) for a, b in zip(old, tail, strict=True)):
            return self.add(R["broadcast_to"](shape), v)
        size, wanted = prod(old), prod(shape)
        if size < wanted and size:
            times = -(-wanted // size)
            if times <= 3 and old:
                v = self.add(R["concatenate"](self.n(0, len(old) - 1)), *[v] * times)
            else:
                v = self.add(R["broadcast_to"]((times, *old)), v)
            size *= times
        if size != wanted:
            v = self.add(R["reshape"]((size,)), v) if v.type.ndim != 1 else v
            start = self.n(0, size - wanted)
            v = self.add(R["slice"]((start,), (start + wanted,), (1,)), v)
        return v if v.type.shape == shape else self.add(R["reshape"](shape), v)

    def packed(self, lead: Sequence[int], k: int | None = None, schemes: Sequence[Any] = SCHEMES) -> Value:
        """A packed value whose storage is (*lead, k), with the packed axis where it is stored: last."""
        if k is None:
            found = [
                v
                for v in self.values
                if v.type.packing and v.type.packing.axis == -1 and v.type.shape[:-1] == tuple(lead)
            ]
            if found and self.n(0, 2) == 0:
                return self.one(found)
        q = self.one(schemes if k is None else [s for s in schemes if k % s.group_size == 0])
        k = k or max(32, q.group_size) * self.one([1, 1, 2])
        t = self.packed_type((*lead, k), q)
        same = [v for v in self.values if v.type == t]
        if same and self.n(0, 2) == 0:
            return self.one(same)
        if not self.chance(6):
            return self.input(t)
        dense = self.dense(t.shape, t.dtype)
        scale = (self.constant(F32, self.one([1, 3])),) if t.packing and t.packing.global_scale else ()
        return self.add(R["quantize"](q), dense, *scale)

    def packed_type(self, shape: tuple[int, ...], q: Quantization) -> TensorType:
        dtype = self.float()
        scales = (dtype if not self.chance(4) else self.float()) if q.has_biases else U8
        extra = q.mode == "nvfp4" and self.chance(2)
        return TensorType(shape, dtype, Packing(q, scales, -1, extra))

    def retyped(self, t: TensorType) -> TensorType:
        """`t` without 16-bit floats where the graph is narrow."""
        if not self.narrow:
            return t
        dtype = F32 if t.dtype in (*HALVES, F64) else t.dtype
        p = t.packing
        if p is not None and p.scales in HALVES:
            p = replace(p, scales=F32)
        return TensorType(t.shape, dtype, p)

    def retyped_op(self, op: Op) -> Op:
        if not self.narrow or isinstance(op, Constant):
            return op
        changed = {f.name: F32 for f in fields(op) if getattr(op, f.name) in HALVES}
        return replace(op, **changed) if changed else op

"""Elementwise primitives. MLX writes every broadcast out; ops broadcast by themselves, so those go."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.capture.primitives.table import Meaning, Primitive, primitive
from qgraph.ir import Value
from qgraph.ir.dtypes import C64
from qgraph.ir.op import Op
from qgraph.ir.types import broadcast_shapes
from qgraph.ops.elementwise import Cast
from qgraph.ops.shape import Broadcast

# MLX's names, and the ops that are the same function.
SAME = {
    "Add": "add",
    "ArcCos": "arccos",
    "ArcCosh": "arccosh",
    "ArcSin": "arcsin",
    "ArcSinh": "arcsinh",
    "ArcTan": "arctan",
    "ArcTan2": "arctan2",
    "ArcTanh": "arctanh",
    "Ceil": "ceil",
    "Cos": "cos",
    "Cosh": "cosh",
    "Divide": "divide",
    "Erf": "erf",
    "Exp": "exp",
    "Expm1": "expm1",
    "Floor": "floor",
    "FloorDivide": "floor_divide",
    "Greater": "greater",
    "GreaterEqual": "greater_equal",
    "Less": "less",
    "LessEqual": "less_equal",
    "Log1p": "log1p",
    "LogAddExp": "logaddexp",
    "LogicalAnd": "logical_and",
    "LogicalNot": "logical_not",
    "LogicalOr": "logical_or",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Multiply": "multiply",
    "Negative": "negative",
    "NotEqual": "not_equal",
    "Power": "power",
    "Remainder": "remainder",
    "Round": "round",
    "Select": "where",
    "Sigmoid": "sigmoid",
    "Sign": "sign",
    "Sin": "sin",
    "Sinh": "sinh",
    "Square": "square",
    "Subtract": "subtract",
    "Tan": "tan",
    "Tanh": "tanh",
}
# By the number with which MLX encodes which function it is.
LOGARITHMS: tuple[str, ...] = ("log2", "log10", "log")
BITWISE: tuple[str, ...] = ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift")


def op(name: str) -> Op:
    """The op of a name, which has no parameters."""
    return Op.registry[name]()


def broadcasting(p: Primitive, name: str, operands: Sequence[Value] | None = None) -> Value:
    """A node of the op `name` on operands without the broadcasts that it does by itself."""
    values = list(p.inputs if operands is None else operands)
    shape = p.outputs[0].shape
    for i, v in enumerate(values):
        if isinstance(v.op, Broadcast):
            tried = [*values[:i], v.node.inputs[0], *values[i + 1 :]]
            if broadcast_shapes(*(x.type.shape for x in tried)) == shape:
                values = tried
    return p.add(op(name), *values)


def _same(name: str) -> Meaning:
    return lambda p: broadcasting(p, name)


for _mlx, _name in SAME.items():
    primitive(_mlx)(_same(_name))


@primitive("Abs")
def absolute(p: Primitive) -> Value:
    """MLX's primitive gives a complex result for a complex operand, its function the real part of that."""
    out = p.add(op("abs"), p.inputs[0])
    return p.add(Cast(C64), out) if p.outputs[0].dtype is C64 else out


@primitive("Sqrt")
def sqrt(p: Primitive) -> Value:
    """[reciprocal]."""
    return p.add(op("rsqrt" if p.arguments[0] else "sqrt"), *p.inputs)


@primitive("Log")
def log(p: Primitive) -> Value:
    """[base]."""
    return p.add(op(LOGARITHMS[int(p.arguments[0])]), *p.inputs)


@primitive("Equal")
def equal(p: Primitive) -> Value:
    """[whether NaN equals NaN]."""
    same = broadcasting(p, "equal")
    if not p.arguments[0]:
        return same
    both = broadcasting(p, "logical_and", [p.add(op("isnan"), v) for v in p.inputs])
    return p.add(op("logical_or"), same, both)


@primitive("BitwiseBinary")
def bitwise(p: Primitive) -> Value:
    """[function]."""
    return broadcasting(p, BITWISE[int(p.arguments[0])])


@primitive("AsType")
def cast(p: Primitive) -> Value:
    """[dtype]; of a copy that MLX writes as a cast to the same dtype, the operand."""
    x, dtype = p.inputs[0], p.outputs[0].dtype
    return x if x.type.dtype is dtype else p.add(Cast(dtype), x)


@primitive("Copy", "StopGradient", "Contiguous", "Full")
def identity(p: Primitive) -> Value:
    """The same numbers: where they lie, and their derivative, are no matter of the graph's."""
    return p.inputs[0]


@primitive("Depends")
def depends(p: Primitive) -> Sequence[Value]:
    """The first operands, made after the others: an order that matters to effects only."""
    return p.inputs[: len(p.outputs)]

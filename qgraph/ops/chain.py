"""Several element-wise ops as one: what a native kernel computes block by block, without arrays in between.

    %y = elementwise{steps=(('silu', (0,)), ('multiply', (2, 1)))}(%gate, %up) : bf16[1,3072]

A step names an op, its operands and then its parameters. Operands are numbers: those of the chain first, then
the steps in order; the last step is the result. Each step means what its op means, and is rounded to the
dtype that the op has, as if its result had been written to memory and read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from qgraph._errors import QGraphError
from qgraph.ir.dtypes import BF16, BOOL, F16, F32, I32, DType
from qgraph.ir.op import NATIVE, Constant, Op, Operand, Types
from qgraph.ir.types import TensorType
from qgraph.ops import native
from qgraph.ops.elementwise import Cast

Step = tuple[Any, ...]  # name, numbers of the operands, parameters …

FLOATS = (F32, BF16, F16)
AXES = 8  # of a result, in the kernel
# What the kernel calls as the op is called. (`cast` is to a float.)
FUNCTIONS = (
    *("abs", "cast", "ceil", "cos", "erf", "exp", "expm1", "floor", "log", "log1p", "negative", "reciprocal"),
    *("relu", "round", "rsqrt", "sigmoid", "sin", "sqrt", "square", "tanh"),
    *("add", "divide", "logaddexp", "maximum", "minimum", "multiply", "power", "subtract", "where"),
)
TRUTHS = (
    *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
    *("logical_and", "logical_or", "logical_not"),
)
# Ops of several functions, on an operand "x" and steps by their place here: in float32, and rounded once.
COMPOSED: dict[str, tuple[tuple[str, tuple[int | str, ...]], ...]] = {
    "silu": (("sigmoid", ("x",)), ("multiply", ("x", 0))),
    "gelu": (
        ("constant", ("0.7071067811865476",)),
        ("multiply", ("x", 0)),
        ("erf", (1,)),
        ("constant", ("1.0",)),
        ("add", (2, 3)),
        ("constant", ("0.5",)),
        ("multiply", (4, 5)),
        ("multiply", ("x", 6)),
    ),
}
POWERS = {2.0: "square", 3.0: "cube", -1.0: "reciprocal"}  # by constants


def computed(op: Op, inputs: Types, output: TensorType) -> bool:
    """Whether the kernel has the op on these types."""
    if any(t.packing for t in (*inputs, output)) or output.ndim > AXES:
        return False
    if isinstance(op, Constant):
        return output.shape == () and output.dtype in (*FLOATS, BOOL)
    if isinstance(op, Cast):
        return inputs[0].dtype in (*FLOATS, BOOL, I32) and output.dtype in FLOATS
    if any(t.dtype not in (*FLOATS, BOOL) for t in inputs):
        return False
    return op.name in TRUTHS or (output.dtype in FLOATS and (op.name in FUNCTIONS or op.name in COMPOSED))


@dataclass(frozen=True)
class Chain(Op):
    """Element-wise ops applied to one another; see the module's text.

    >>> chain = Chain((("silu", (0,)), ("multiply", (2, 1))))
    >>> print(chain.infer(TensorType((2, 8), BF16), TensorType((8,), BF16)))
    bf16[2,8]
    >>> chain.program((TensorType((2, 8), BF16), TensorType((8,), BF16)))
    'sigmoid(0):f32 multiply(0,2):bf16 multiply(3,1):bf16'
    """

    name = "elementwise"
    elementwise = True
    steps: tuple[Step, ...] = ()
    kernel: str = ""

    def __post_init__(self) -> None:
        # As Constant: steps may hold -0.0 and NaN, which must be what they print as.
        object.__setattr__(self, "_key", (repr(self.steps), self.kernel))

    def __eq__(self, other: object) -> bool:
        """Equal when they print equally."""
        return isinstance(other, Chain) and self._key == other._key  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

    def __hash__(self) -> int:
        """Of the printed steps."""
        return hash(self._key)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType]

    def ops(self, arity: int) -> list[tuple[Op, tuple[int, ...]]]:
        """The op and the operands of each step, given how many operands the chain has.

        Errors: QGraphError for an op that is not element-wise, and for an operand that is no earlier one.
        """
        out: list[tuple[Op, tuple[int, ...]]] = []
        for i, (name, numbers, *parameters) in enumerate(self.steps, arity):
            kind = Op.registry.get(name)
            if kind is None or not (kind.elementwise or kind is Constant):
                raise QGraphError(f"elementwise: {name!r} is no element-wise op")
            if any(not 0 <= n < i for n in numbers):
                raise QGraphError(f"elementwise: {name} takes {numbers}, of which some are made after it")
            out.append((kind(*parameters), tuple(numbers)))
        if not out:
            raise QGraphError("elementwise: no steps", fix="give one at least")
        return out

    def names(self) -> list[str]:
        """The names of the ops, constants left out.

        >>> Chain((("silu", (0,)), ("multiply", (2, 1)))).names()
        ['silu', 'multiply']
        """
        return [name for name, *_ in self.steps if name != Constant.name]

    def types(self, inputs: Types) -> list[TensorType]:
        """Of the operands and of every step."""
        out = [t.dense() for t in inputs]
        for op, numbers in self.ops(len(inputs)):
            out.append(cast(TensorType, op.infer(*(out[n] for n in numbers))))
        return out

    def infer(self, *types: TensorType) -> TensorType:
        """What the ops infer, one after the other."""
        return self.types(types)[-1]

    def reference(self, *arrays: Any) -> Any:
        """What the ops mean, one after the other."""
        values = list(arrays)
        for op, numbers in self.ops(len(arrays)):
            values.append(op.reference(*(values[n] for n in numbers)))
        return values[-1]

    def flops(self, inputs: Types, outputs: Types) -> int:
        """Those of the ops."""
        return sum(op.flops(given, (made,)) for op, _, given, made in self._typed(inputs))

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """Where the kernel has every step."""
        known = inputs and all(computed(op, given, made) for op, _, given, made in self._typed(inputs))
        return replace(self, kernel=NATIVE) if known else None

    def _typed(self, inputs: Types) -> list[tuple[Op, tuple[int, ...], Types, TensorType]]:
        """Op, operands, their types and its own, of each step."""
        types, n = self.types(inputs), len(inputs)
        steps = enumerate(self.ops(n), n)
        return [(op, numbers, tuple(types[k] for k in numbers), types[i]) for i, (op, numbers) in steps]

    def emit(self, operands: tuple[Operand, ...], inputs: Types, outputs: Types) -> Operand:
        """`native.elementwise`, or the ops in MLX's form, each with a name of its own."""
        names = [str(operand) for operand in operands]
        if self.kernel:
            return native.call("elementwise", f"[{', '.join(names)}]", repr(self.program(inputs)))
        values = [f"v{i}" for i in range(len(inputs) + len(self.steps))]
        lines: list[str] = []
        for name, (op, numbers, given, made) in zip(values[len(inputs) :], self._typed(inputs), strict=True):
            lines.append(f"{name} := {op.emit(tuple(values[k] for k in numbers), given, (made,))}")
        return f"(lambda {', '.join(values[: len(inputs)])}: ({', '.join(lines)},)[-1])({', '.join(names)})"

    def program(self, inputs: Types) -> str:
        """The steps as the kernel reads them."""
        writer = _Writer(len(inputs))
        constants: dict[int, float] = {}
        for i, (op, numbers, _, made) in enumerate(self._typed(inputs), len(inputs)):
            if isinstance(op, Constant):
                constants[i] = float(op.data[0])
                writer.write("constant", (repr(constants[i]),), made.dtype)
            elif op.name == "power" and constants.get(numbers[1]) in POWERS:
                writer.write(POWERS[constants[numbers[1]]], writer.places(numbers[:1]), made.dtype)
            elif op.name in COMPOSED:
                writer.compose(COMPOSED[op.name], numbers[0], made.dtype)
            else:
                writer.write(op.name, writer.places(numbers), made.dtype)
            writer.done()
        return writer.text()


class _Writer:
    """Lines of the kernel's program, and the place in it of every value of the chain."""

    def __init__(self, operands: int) -> None:
        self._operands = operands
        self._lines: list[str] = []
        self._places = list(range(operands))

    def write(self, function: str, operands: Sequence[int | str], dtype: DType) -> int:
        """Append a step; its place."""
        self._lines.append(f"{function}({','.join(map(str, operands))}):{dtype}")
        return self._operands + len(self._lines) - 1

    def compose(self, steps: Sequence[tuple[str, tuple[int | str, ...]]], x: int, dtype: DType) -> None:
        """Append the steps of one op, of which only the last is rounded to `dtype`."""
        made: list[int] = []
        for i, (function, operands) in enumerate(steps):
            places = [self._places[x] if o == "x" else made[o] if isinstance(o, int) else o for o in operands]
            made.append(self.write(function, places, dtype if i == len(steps) - 1 else F32))

    def places(self, numbers: Sequence[int]) -> list[int]:
        """Where the values with these numbers are."""
        return [self._places[n] for n in numbers]

    def done(self) -> None:
        """The step of the chain that was at hand is the last line."""
        self._places.append(self._operands + len(self._lines) - 1)

    def text(self) -> str:
        """The program."""
        return " ".join(self._lines)

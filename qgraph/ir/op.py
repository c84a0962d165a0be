"""What an op is: the one declaration that tracer, verifier, printer, executor and reference share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, ClassVar, NamedTuple, cast

from qgraph._errors import QGraphError
from qgraph.ir.dtypes import DType
from qgraph.ir.types import Packing, TensorType
from qgraph.quant.scheme import Quantization

Types = tuple[TensorType, ...]


class Storage(NamedTuple):
    """The expressions (or arrays) that store a quantized value, packed axis last."""

    packed: Any
    scales: Any
    biases: Any = None
    global_scale: Any = None

    def parts(self) -> tuple[Any, ...]:
        """The ones that exist, in the order of `Packing.components`."""
        return tuple(part for part in self if part is not None)


Operand = str | Storage

# The parameter of an op that has more than one way to be computed: "" is MLX's own, "native" a kernel of
# `qgraph.kernels`. It changes no meaning, is set by passes that know the device, and printed where set.
KERNEL = "kernel"
NATIVE = "native"  # what programs call the module of native kernels
NATIVE_KERNELS = (NATIVE, "int8")


def _not_a_view(op: Op, *types: TensorType) -> Packing | str:
    del types
    return f"{op.name} is not a view: its result is not packed"


@dataclass(frozen=True)
class Op:
    """An operation with its parameters (the fields). Subclass, freeze, and say what it means.

    A subclass gives `name`, ``infer(*types)`` (the type rule), ``reference(*arrays)`` (its meaning in
    NumPy, on logical values), and either `mlx` (a template of MLX source: operands by number, parameters
    by name, the result's type as ``out``) or its own ``emit``. Any op may be given a quantized operand:
    it then means the op on the dequantized value, and the legalize pass makes that explicit unless
    `packed` says that the op reads storage.
    """

    name: ClassVar[str] = ""
    mlx: ClassVar[str] = ""
    commutes: ClassVar[bool] = False  # f(a, b) == f(b, a)
    view: ClassVar[bool] = False  # moves no data or next to none: free to share and to recompute
    elementwise: ClassVar[bool] = False
    packed: ClassVar[bool] = False  # reads the storage of quantized operands itself
    flops_per_element: ClassVar[int] = 1

    infer: ClassVar[Callable[..., TensorType | Types]]
    # The packing of the result of a view of quantized operands, or why it cannot stay packed.
    carry: ClassVar[Callable[..., Packing | str]] = _not_a_view
    reference: ClassVar[Callable[..., Any]]
    registry: ClassVar[dict[str, type[Op]]] = {}

    def __init_subclass__(cls) -> None:
        """Register the op by name, for the parser and the sweep test."""
        if cls.__dict__.get("name"):
            other = Op.registry.get(cls.name)
            if other is not None and other.__qualname__ != cls.__qualname__:
                raise QGraphError(f"two ops are named {cls.name!r}: {other} and {cls}")
            Op.registry[cls.name] = cls

    def emit(self, operands: tuple[Operand, ...], inputs: Types, outputs: Types) -> Operand:
        """MLX source of the op on `operands` (names); a Storage of expressions for a packed result."""
        del inputs
        return self.mlx.format(*operands, out=_TypeText(outputs[0]), **self.literals())

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """The op as one of qgraph's native CPU kernels computes it; None where none does, or none gains."""
        del inputs, outputs
        return None

    def without_native(self) -> Op:
        """The op as MLX computes it, where `native` chose a kernel: for a machine that has none."""
        native = getattr(self, KERNEL, "") in NATIVE_KERNELS
        return replace(self, **{KERNEL: ""}) if native else self

    def aside(self, operands: tuple[Operand, ...], inputs: Types) -> dict[int, str]:
        """What `emit` is to be given for some operands (by number): source that is made once, before it."""
        del operands, inputs
        return {}

    def literals(self) -> dict[str, str]:
        """The parameters as Python source."""
        return {f.name: literal(getattr(self, f.name)) for f in fields(self)}

    def flops(self, inputs: Types, outputs: Types) -> int:
        """Floating-point operations of one evaluation."""
        del inputs
        return 0 if self.view else self.flops_per_element * sum(prod(t.shape) for t in outputs)

    def __str__(self) -> str:
        """``name{param=value}``, as in the text form."""
        shown = [
            (f.name, getattr(self, f.name)) for f in fields(self) if f.name != KERNEL or getattr(self, KERNEL)
        ]
        text = ", ".join(f"{k}={v if isinstance(v, Quantization) else repr(v)}" for k, v in shown)
        return f"{self.name}{{{text}}}" if text else self.name


class _TypeText:
    """Gives templates ``{out.dtype}`` and ``{out.shape}`` as source."""

    def __init__(self, type: TensorType) -> None:
        self.dtype = literal(type.dtype)
        self.shape = literal(type.shape)


def literal(value: object) -> str:
    """`value` as source that the emitted program can contain.

    >>> literal((1, 2)), literal(float("inf"))
    ('(1, 2)', "float('inf')")
    """
    if isinstance(value, DType):
        return f"mx.{value.mlx_name}"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"float('{value}')"
    if isinstance(value, tuple):
        items = [literal(item) for item in cast(tuple[object, ...], value)]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    return repr(value)


@dataclass(frozen=True)
class Input(Op):
    """A named input of the graph."""

    name = "input"
    label: str = ""
    type: TensorType | None = None

    def infer(self) -> TensorType:
        """The declared type."""
        assert self.type is not None
        return self.type

    def __str__(self) -> str:
        """Name and type."""
        return f"input{{label={self.label!r}, type={self.type}}}"


@dataclass(frozen=True)
class Constant(Op):
    """A literal: a scalar or a small array, its elements in row-major order.

    >>> from qgraph.ir.dtypes import BF16
    >>> print(Constant((2.0,), (), BF16))
    constant{data=(2.0,), shape=(), dtype=bf16}
    """

    name = "constant"
    view = True
    mlx = "mx.array({data}, {dtype}).reshape({shape})"
    data: tuple[float | int | bool, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: DType = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        # -0.0 == 0.0, 1 == 1.0 == True and nan != nan: as keys they must be what they print as.
        object.__setattr__(self, "_key", (repr(self.data), self.shape, self.dtype.name))

    def __eq__(self, other: object) -> bool:
        """Equal when the bits are."""
        return isinstance(other, Constant) and self._key == other._key  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

    def __hash__(self) -> int:
        """Of the printed elements."""
        return hash(self._key)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType]

    def infer(self) -> TensorType:
        """The declared shape and dtype."""
        return TensorType(self.shape, self.dtype)

    def emit(self, operands: tuple[Operand, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.array`, which takes no number above int64's: those are given by their bits."""
        if self.dtype.name != "u64" or max(self.data, default=0) < 2**63:
            return super().emit(operands, inputs, outputs)
        bits = tuple(int(x) - 2**64 if x >= 2**63 else int(x) for x in self.data)
        return f"mx.array({bits}, mx.int64).view(mx.uint64).reshape({self.shape})"

    def reference(self) -> Any:
        """The elements as a NumPy array: float64 for floats."""
        import numpy as np

        kind = np.float64 if self.dtype.is_float else np.dtype(self.dtype.mlx_name.rstrip("_"))
        return np.array(self.data, kind).reshape(self.shape)

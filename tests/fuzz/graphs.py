"""The strategy of whole graphs: every op of the registry, and the forms that the rules look for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qgraph._errors import QGraphError
from qgraph.execute.reference import to_numpy
from qgraph.ir import Graph, Op, TensorType, Value
from qgraph.ops.dispatch import type_of
from qgraph.ops.indexed import Indexed
from tests.fuzz.maker import SCOPES, SHAPES, Maker
from tests.fuzz.motifs import MOTIFS
from tests.ops.table import TABLE

# Decompositions want matrices that are not what comes out of other ops: see tests/ops/test_linalg.
DECOMPOSITIONS = ("inverse", "cholesky", "qr", "svd", "eigh", "eig")
NAMES = sorted(set(TABLE) - set(DECOMPOSITIONS))
# Motifs that qgraph itself refused, by reason: counted, not hidden.
REFUSED: Counter[str] = Counter()

# Operands whose numbers must stay among those that the op's case was drawn with.
ROOTS = ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal")
LIMITED: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((*ROOTS, "arccosh", "arctanh", "arcsin", "arccos", "cumprod"), (0,)),
    **dict.fromkeys(("power", "left_shift"), (0, 1)),
    **dict.fromkeys(("divide", "floor_divide", "remainder", "right_shift"), (1,)),
    "pack": (1,),
    "rope_angles": (0, 1),
    "erfinv": (0,),
    **dict.fromkeys(("take", "quantized_take", "take_along_axis", "rope"), (1, 2)),
    **dict.fromkeys(("random_randint", "random_bernoulli", "random_uniform"), (1, 2)),
    "random_truncated_normal": (1, 2),
}
# Every whole-numbered operand but the first is a place in the first.
INDEXING = ("gather", "dynamic_slice", "gather_mm", "gather_qmm", "slice_update")


def within(op: Op, i: int, x: Any, wide: bool) -> Any:
    """The domain of operand `i` of a drawn case."""
    t = type_of(x)
    if op.name == "put_along_axis" and i == 1:
        return "permutation"
    if op.name == "searchsorted" and i == 0:
        return (0, 0)  # in order
    limited = i in LIMITED.get(op.name, ())
    limited |= op.name in INDEXING and i > 0 and t.dtype.is_int
    limited |= op.name == "index_update" and i > 1
    limited |= op.name == "cast" and not op.dtype.is_float
    if not limited or t.packing or t.dtype.name == "bool":
        return None
    numbers = to_numpy(x)
    if not numbers.size:
        return (0, 0)
    low, high = int(np.floor(numbers.min())), int(np.ceil(numbers.max()))
    if isinstance(op, Indexed) and wide:
        return (low if t.dtype.name[0] == "u" else low - 9, high + 2)  # some are out of range
    return low, high


def operand(m: Maker, op: Op, i: int, x: Any, first: TensorType) -> Value:
    """A value for operand `i` of a drawn case: of its type, from its domain."""
    t = m.retyped(type_of(x))
    if t.packing is not None:
        same = [v for v in m.values if v.type == t]
        return m.one(same) if same and m.n(0, 1) == 0 else m.input(t)
    domain = within(op, i, x, m.chance(4))
    if domain == "permutation":
        domain = f"perm.{op.axis}.{first.shape[op.axis]}"
    return m.dense(t.shape, t.dtype, domain)


def any_op(m: Maker) -> None:
    """One op with the parameters and operand types that the op table draws."""
    case = m.draw(TABLE[m.one(NAMES)])
    op = m.retyped_op(case.op)
    first = type_of(case.operands[0]) if case.operands else TensorType((), m.float())
    operands = [operand(m, op, i, x, first) for i, x in enumerate(case.operands)]
    m.keep(*m.builder.add(op, operands, m.origin()).outputs)


def motif(m: Maker) -> None:
    make = m.one(MOTIFS)
    before = len(m.builder._nodes)
    try:
        with m.tracing():
            m.keep(*make(m))
    except QGraphError as error:
        REFUSED[f"{make.__name__}: {type(error).__name__}: {error.message[:60]}"] += 1
    if m.chance(6):  # let others read what is inside
        m.values += [v for n in list(m.builder._nodes.values())[before:] for v in n.outputs if n.inputs]


def outputs(m: Maker) -> list[Value]:
    """What nothing reads, and some more: inner values, inputs, one twice."""
    read = {v for n in m.builder._nodes.values() for v in n.inputs}
    leaves = [v for v in m.values if v not in read][-6:]
    more = [m.one(m.values) for _ in range(m.one([0, 0, 0, 1, 2]))] if m.values else []
    return [*leaves, *more] or m.inputs[:1]


@st.composite
def graphs(draw: Any, pieces: int = 7) -> Graph:
    """A valid graph: drawn ops and motifs on each other's results."""
    m = Maker(draw, narrow=draw(st.integers(0, 4)) < 3)
    m.input(TensorType(m.one(SHAPES), m.float()))
    for _ in range(m.n(2, pieces)):
        m.scope = m.one(SCOPES)
        (any_op if m.n(0, 9) < 5 else motif)(m)
    return Graph(m.inputs, outputs(m), m.builder)

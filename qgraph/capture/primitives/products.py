"""Products of matrices, dense and packed."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.capture.primitives.table import Primitive, primitive
from qgraph.ir import Value
from qgraph.ir.dtypes import BF16, DType
from qgraph.ops.creation import Arange
from qgraph.ops.elementwise import Cast
from qgraph.ops.indexing import Take
from qgraph.ops.linear import AddMm, Dot
from qgraph.ops.moe import GatherMm, GatherQmm
from qgraph.ops.quantize import Quantize
from qgraph.ops.quantized import Dequantize, QuantizedMatmul, QuantizedTake
from qgraph.ops.shape import Broadcast, Reshape
from qgraph.ops.storage import Pack, QuantizeParts
from qgraph.quant import Quantization
from qgraph.quant.scheme import Mode

MODES: tuple[Mode, ...] = ("affine", "mxfp4", "mxfp8", "nvfp4")


def scheme(group_size: int, bits: int, mode: int) -> Quantization:
    """The scheme of MLX's three numbers."""
    return Quantization(bits=bits, group_size=group_size, mode=MODES[mode])


@primitive("Matmul")
def matmul(p: Primitive) -> Value:
    """Both have two axes or more."""
    a, b = (_one_copy(x) for x in p.inputs)
    if Dot().infer(a.type, b.type) != p.outputs[0]:  # nothing else has the axis that was repeated
        a, b = p.inputs
    return p.add(Dot(), a, b)


def _one_copy(x: Value) -> Value:
    """A stack of matrices before it was repeated for every batch: `mx.matmul` and `dot` do that themselves.

    MLX writes the copies out, and those of a packed weight would have to be stored.
    """
    stack = x.node.inputs[0] if isinstance(x.op, Broadcast) else x
    return stack if stack.type.ndim > 2 and stack.type.shape[-2:] == x.type.shape[-2:] else x


@primitive("AddMM")
def addmm(p: Primitive) -> Value:
    """[alpha, beta]; operands a, b, c."""
    a, b, c = p.inputs
    alpha, beta = p.arguments
    if isinstance(c.op, Broadcast):  # which the op does by itself
        c = c.node.inputs[0]
    return p.add(AddMm(float(alpha), float(beta)), c, a, b)


@primitive("GatherMM")
def gather_mm(p: Primitive) -> Value:
    """[whether the indices of a are sorted, those of b]."""
    a, b, *indices = p.inputs
    lhs, rhs, ordered, chosen = _chosen(a, b, indices, *p.arguments)
    return p.add(GatherMm(lhs, rhs, ordered), a, b, *chosen)


@primitive("GatherQMM")
def gather_qmm(p: Primitive) -> Value:
    """[group size, bits, mode, transpose, whether the indices of x are sorted, those of w]."""
    group_size, bits, mode, transpose, *ordered = p.arguments
    x, *parts, left, right = p.inputs
    w = packed(p, parts, scheme(group_size, bits, mode), x.type.dtype)
    lhs, rhs, in_order, chosen = _chosen(x, w, [left, right], *ordered)
    return p.add(GatherQmm(lhs, rhs, in_order, bool(transpose)), x, w, *chosen)


def _chosen(
    a: Value, b: Value, indices: Sequence[Value], left_sorted: bool, right_sorted: bool
) -> tuple[bool, bool, bool, list[Value]]:
    """Which sides have indices of their own, whether those are sorted, and the indices.

    MLX writes out what it assumes where none are given: all matrices in order. It is told that indices are
    sorted only where one side has none, and so is `mx.gather_mm` when the program runs.
    """
    batch = tuple(int(n) for n in _common(indices))
    given = [not _all_in_order(i, m.type.shape[:-2], batch) for i, m in zip(indices, (a, b), strict=True)]
    lhs, rhs = given
    if not lhs and not rhs:
        # Without indices both stacks must broadcast to the batch, as they do with them.
        return False, False, bool(left_sorted or right_sorted), []
    ordered = (right_sorted and not lhs) or (left_sorted and not rhs)
    return lhs, rhs, bool(ordered), [i for i, own in zip(indices, given, strict=True) if own]


def _common(indices: Sequence[Value]) -> tuple[int, ...]:
    return max((i.type.shape for i in indices), key=len)


def _all_in_order(index: Value, stack: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    """Whether these are the numbers of all matrices of a stack, in order, broadcast to the batch."""
    if isinstance(index.op, Broadcast) and index.op.shape == batch:
        index = index.node.inputs[0]
    if index.type.shape != stack:
        return False
    if isinstance(index.op, Reshape):
        index = index.node.inputs[0]
    return isinstance(index.op, Arange) and (index.op.start, index.op.step) == (0, 1) and index.type.ndim == 1


@primitive("QuantizedMatmul")
def quantized_matmul(p: Primitive) -> Value:
    """[group size, bits, mode, transpose]."""
    group_size, bits, mode, transpose = p.arguments
    x, *parts = p.inputs
    w = packed(p, _one_copy_each(parts), scheme(group_size, bits, mode), x.type.dtype)
    if w.type.ndim > 2 and x.type.ndim < 3:  # MLX multiplies by the first matrix only, and so do we
        w = _first_matrix(p, w)
    op, once = QuantizedMatmul(bool(transpose)), _one_copy(x)
    if op.infer(once.type, w.type) == p.outputs[0]:
        return p.add(op, once, w)
    if op.infer(x.type, w.type) != p.outputs[0]:  # nothing else has the axis that was repeated
        w = packed(p, parts, scheme(group_size, bits, mode), x.type.dtype)
    return p.add(op, x, w)


def _one_copy_each(parts: Sequence[Value]) -> list[Value]:
    """Words, scales and biases before they were repeated for every batch, all of them in one way or none."""
    stacks = [_one_copy(x) for x in parts]
    return stacks if len({s.type.shape[:-2] for s in stacks}) == 1 else list(parts)


def _first_matrix(p: Primitive, w: Value) -> Value:
    from qgraph.capture.primitives.shapes import sliced

    *lead, rows, columns = w.type.shape
    first = sliced(p, w, [*((0, 1, 1) for _ in lead), (0, rows, 1), (0, columns, 1)])
    return p.add(Reshape((rows, columns)), first)


@primitive("Quantize")
def quantize(p: Primitive) -> Value | Sequence[Value]:
    """[group size, bits, mode, whether this is the way back]."""
    group_size, bits, mode, back = p.arguments
    q = scheme(group_size, bits, mode)
    if not back:
        return p.node(QuantizeParts(q), *p.inputs)
    dtype = p.outputs[0].dtype
    out = _rows(p, q, dtype) or p.add(Dequantize(), packed(p, p.inputs, q, dtype))
    return out if out.type.dtype is dtype else p.add(Cast(dtype), out)


def _rows(p: Primitive, q: Quantization, dtype: DType) -> Value | None:
    """Rows of an embedding: what `quantized_take` reads of words, scales and biases by the same indices."""
    taken = [v.node.inputs for v in p.inputs if isinstance(v.op, Take) and v.op.axis == 0]
    if len(taken) < len(p.inputs) or len({index for _, index in taken}) > 1 or taken[0][0].type.ndim < 2:
        return None
    whole = packed(p, [part for part, _ in taken], q, dtype)
    return p.add(QuantizedTake(0), whole, taken[0][1])


def packed(p: Primitive, parts: Sequence[Value], q: Quantization, dtype: DType) -> Value:
    """The quantized value that arrays store, its logical dtype that of affine scales or else `dtype`.

    What was just quantized is that value.
    """
    scales = parts[1].type.dtype
    logical = scales if q.has_biases else dtype if dtype.is_float else BF16
    made = parts[0].node
    if made.op == QuantizeParts(q) and tuple(parts) == (*made.outputs, *made.inputs[1:]):
        whole = p.add(Quantize(q), *made.inputs)
        if whole.type.dtype is logical:
            return whole
    return p.add(Pack(q, logical), *parts)

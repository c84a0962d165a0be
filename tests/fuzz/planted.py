"""Wrong rewrites to install for a test: each keeps all types, so that only numbers can show it."""

from __future__ import annotations

from typing import Any

import qgraph as qg
from qgraph.ir.op import Constant
from qgraph.ops.dispatch import apply
from qgraph.ops.elementwise import Cast
from qgraph.ops.moe import GatherQmm
from qgraph.ops.quantized import QuantizedMatmul, QuantizedTake
from qgraph.ops.shape import Slice
from qgraph_passes import canonicalize, fold_transpose, fuse_lora, legalize, quantize_dot, quantize_take


def transposes_composed_backwards(m: Any) -> None:
    def rewrite(self, m, x):
        outer, inner = m.root.op.axes, m.op("inner").axes
        made = qg.transpose(x, [outer[a] for a in inner])
        right = [inner[a] for a in outer]
        return made if made._type == m.type else qg.transpose(x, right)

    m.setattr(fold_transpose.ComposeTransposes, "rewrite", rewrite)


def scale_of_a_lora_branch_dropped(m: Any) -> None:
    right = fuse_lora._fused
    m.setattr(
        fuse_lora, "_fused", lambda m, x, w, a, b, s, transpose=None: right(m, x, w, a, b, 1.0, transpose)
    )


def lora_branch_dropped(m: Any) -> None:
    right = fuse_lora._fused
    m.setattr(
        fuse_lora, "_fused", lambda m, x, w, a, b, s, transpose=None: right(m, x, w, a, b, 0.0, transpose)
    )


def lora_branch_not_finite(m: Any) -> None:
    right = fuse_lora._fused

    def fused(m, x, w, a, b, s, transpose=None):
        return right(m, x, w, a, b, s * float("nan"), transpose)

    m.setattr(fuse_lora, "_fused", fused)


def casts_that_lose_dropped(m: Any) -> None:
    def cast(self, first):
        source = first.inputs[0]
        return source if source.type == self.node.outputs[0].type else None

    m.setattr(canonicalize._Simpler, "cast", cast)


def casts_that_round_dropped(m: Any) -> None:
    """Only rounding shows it."""
    right = canonicalize._Simpler.cast

    def cast(self, first):
        source, out = first.inputs[0], self.node.outputs[0]
        if source.type == out.type and source.type.dtype.is_float and first.outputs[0].type.dtype.is_float:
            return source
        return right(self, first)

    m.setattr(canonicalize._Simpler, "cast", cast)


def two_taken_for_one(m: Any) -> None:
    m.setattr(canonicalize, "_is_one", lambda v: isinstance(v.op, Constant) and set(v.op.data) <= {1, 2})


def one_divided_by_x_taken_for_x(m: Any) -> None:
    right = canonicalize._Simpler.value

    def value(self, inputs):
        if self.node.op.name == "divide" and canonicalize._is_one(inputs[0]):
            return inputs[1] if inputs[1].type == self.node.outputs[0].type else None
        return right(self, inputs)

    m.setattr(canonicalize._Simpler, "value", value)


def concatenated_in_the_other_order(m: Any) -> None:
    right = fold_transpose._beyond
    m.setattr(
        fold_transpose,
        "_beyond",
        lambda graph, node, inputs, step: right(
            graph, node, inputs[::-1] if node.op.name == "concatenate" else inputs, step
        ),
    )


def slice_below_the_transpose_one_off(m: Any) -> None:
    right = fold_transpose._inner_op

    def inner_op(op, axes, inputs):
        made = right(op, axes, inputs)
        if made is None or not isinstance(op, Slice):
            return made
        moved, outer = made
        sizes = inputs[0].node.inputs[0].type.shape
        room = [stop < n and step == 1 for stop, n, step in zip(moved.stop, sizes, moved.step, strict=True)]
        room[inputs[0].node.inputs[0].type.packing.axis] = False
        start = tuple(s + r for s, r in zip(moved.start, room, strict=True))
        stop = tuple(s + r for s, r in zip(moved.stop, room, strict=True))
        return Slice(start, stop, moved.step), outer

    m.setattr(fold_transpose, "_inner_op", inner_op)


def experts_of_one_side_taken_by_the_other(m: Any) -> None:
    def rewrite(self, m, x, w, i, j):
        transpose, op = w.type.packing.axis == -2, m.root.op
        stored = qg.swapaxes(w, -1, -2) if transpose else w
        gather = GatherQmm(op.lhs, op.rhs, op.sorted_indices, transpose)
        swapped = i.shape == j.shape
        order = (j, i) if swapped else (i, j)
        return quantize_dot.kernel(lambda x, w: apply(gather, x, w, *order), x, stored, m.type.dtype)

    m.setattr(quantize_dot.GatherBoth, "rewrite", rewrite)


def left_operand_not_turned_back(m: Any) -> None:
    right = quantize_dot.LeftOperand.rewrite

    def rewrite(self, m, w, x):
        made = right(self, m, w, x)
        if x.ndim == 1 or made.shape[-1] != made.shape[-2]:
            return made
        return qg.swapaxes(made, -1, -2)

    m.setattr(quantize_dot.LeftOperand, "rewrite", rewrite)


def taken_rows_reversed(m: Any) -> None:
    right = quantize_take.TakeRows.rewrite

    def rewrite(self, m, w, ids):
        return right(self, m, w, ids[::-1] if ids.ndim == 1 else ids)

    m.setattr(quantize_take.TakeRows, "rewrite", rewrite)


def branch_dropped_where_the_device_has_no_kernel(m: Any) -> None:
    right = legalize._Legal.dense_product

    def dense_product(self, inputs):
        op = self.node.op
        if op.name != "quantized_lora_matmul":
            return right(self, inputs)
        base = legalize._Legal(self.builder, self.node, self.context)
        w = base.add(legalize.Dequantize(), inputs[1])
        if op.transpose:
            w = base.add(legalize.Transpose((1, 0)), w)
        return base.cast(base.add(legalize.Dot(), inputs[0], w))

    m.setattr(legalize._Legal, "dense_product", dense_product)


def result_rounded_to_bfloat16(m: Any) -> None:
    """Only MLX can show it: in the ideal reference no float rounds."""

    def accumulate(self, inputs):
        made = self.add(self.node.op, *inputs)
        dtype = self.node.outputs[0].type.dtype
        return self.add(Cast(dtype), self.add(Cast(qg.ir.dtypes.BF16), made))

    m.setattr(legalize._Legal, "accumulate_in_f32", accumulate)


def rows_of_the_emitted_take_shifted(m: Any) -> None:
    """Only MLX can show it: the graph is right, and the source that is made of it is not."""
    right = QuantizedTake.emit
    m.setattr(
        QuantizedTake,
        "emit",
        lambda self, operands, inputs, outputs: (
            right(self, (operands[0], f"({operands[1]} + 1)"), inputs, outputs)
            if inputs[0].shape[self.axis] > 1
            else right(self, operands, inputs, outputs)
        ),
    )


def sign_of_the_emitted_product_lost(m: Any) -> None:
    """Only MLX can show it."""
    right = QuantizedMatmul.emit
    m.setattr(QuantizedMatmul, "emit", lambda self, *args: f"(-({right(self, *args)}))")


PLANTED = [f for f in list(globals().values()) if callable(f) and getattr(f, "__module__", "") == __name__]

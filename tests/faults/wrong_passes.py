"""Faults in the passes: what a careless rewrite could do."""

from __future__ import annotations

from tests.faults.fault import Fault

_QUANTIZE_DOT = [
    Fault(
        "left-operand-not-transposed-back",
        "qgraph_passes.quantize_dot",
        "return qg.swapaxes(qg.dot(qg.swapaxes(x, -1, -2), flipped), -1, -2)",
        "return qg.reshape(qg.dot(qg.swapaxes(x, -1, -2), flipped), m.type.shape)",
        ("tests/passes/test_quantize_dot.py",),
    ),
    Fault(
        "left-operand-not-flipped",
        "qgraph_passes.quantize_dot",
        "flipped = qg.swapaxes(w, -1, -2)",
        "flipped = w if w.shape[-1] == w.shape[-2] else qg.swapaxes(w, -1, -2)",
        ("tests/passes/test_quantize_dot.py",),
    ),
    Fault(
        "experts-of-the-wrong-side",
        "qgraph_passes.quantize_dot",
        "gather = GatherQmm(op.lhs, op.rhs, op.sorted_indices, transpose)",
        "gather = GatherQmm(op.rhs, op.lhs, op.sorted_indices, transpose)",
        ("tests/passes/test_guard_indices.py",),
    ),
    Fault(
        "experts-always-transposed",
        "qgraph_passes.quantize_dot",
        "transpose, op = w.type.packing.axis == -2, m.root.op",
        "transpose, op = True, m.root.op",
        ("tests/passes/test_quantize_dot.py",),
    ),
    Fault(
        "batch-groups-as-columns",
        "qgraph_passes.quantize_dot",
        'm.require(axis in (-1, -2), f"groups run along axis {axis}, a batch axis of the product", w)',
        "pass",
        ("tests/passes/test_packed_axes.py",),
    ),
]

_FUSE_LORA = [
    Fault(
        "lora-scale-dropped",
        "qgraph_passes.fuse_lora",
        "out = qg.quantized_lora_matmul(wide, w, a, b, s, transpose=transpose)",
        "out = qg.quantized_lora_matmul(wide, w, a, b, 1.0, transpose=transpose)",
        ("tests/passes/test_fuse_lora.py",),
    ),
    Fault(
        "lora-transpose-lost",
        "qgraph_passes.fuse_lora",
        "transpose = base.transpose",
        "transpose = base.transpose or w.shape[0] == w.shape[1]",
        ("tests/passes/test_packed_axes.py",),
    ),
    Fault(
        "lora-of-any-rank",
        "qgraph_passes.fuse_lora",
        'm.require(a.shape[1] <= min(a.shape[0], b.shape[1]), f"rank {a.shape[1]} is not low", a)',
        "pass",
        ("tests/passes/test_fuse_lora.py",),
    ),
    Fault(
        "lora-branch-dropped-in-dense-fallback",
        "qgraph_passes.legalize",
        'if op.name != "quantized_lora_matmul":',
        "if True:",
        ("tests/passes/test_other_passes.py",),
    ),
    Fault(
        "lora-branch-not-scaled-when-emitted",
        "qgraph.ops.quantized",
        'low = f"mx.matmul({x}, {a}) * mx.reshape({scale}, ())"',
        'low = f"mx.matmul({x}, {a})"',
        ("tests/ops/test_accumulation.py",),
    ),
]

_VIEWS = [
    Fault(
        "transposes-composed-backwards",
        "qgraph_passes.fold_transpose",
        "[inner.axes[a] for a in outer.axes]",
        "[outer.axes[a] for a in inner.axes]",
        ("tests/passes/test_other_passes.py",),
    ),
    Fault(
        "slice-sunk-on-the-wrong-axes",
        "qgraph_passes.fold_transpose",
        "back = [axes.index(i) for i in range(len(axes))]",
        "back = list(axes)",
        ("tests/passes/test_packed_axes.py",),
    ),
    Fault(
        "concatenate-sunk-on-the-wrong-axis",
        "qgraph_passes.fold_transpose",
        "return Concatenate(axes[op.axis]), axes",
        "return Concatenate(axes.index(op.axis)), axes",
        ("tests/passes/test_packed_axes.py",),
    ),
    Fault(
        "reshape-sunk-with-axes-in-the-wrong-order",
        "qgraph_passes.fold_transpose",
        "position = {new[k]: len(ones) + rank for rank, k in enumerate(stored)}",
        "position = {new[k]: len(ones) + k for rank, k in enumerate(stored)}",
        ("tests/passes/test_packed_axes.py",),
    ),
    Fault(
        "packed-axis-lost-in-a-transpose",
        "qgraph.ops.packed",
        "moved = axes.index(t.ndim + t.packing.axis)",
        "moved = axes[t.ndim + t.packing.axis]",
        ("tests/ops/test_sweep.py",),
    ),
    Fault(
        "slices-that-cut-the-last-group",
        "qgraph.ops.packed",
        "if step != 1 or start % group or stop % group or start >= stop:",
        "if step != 1 or start % group or start >= stop:",
        ("tests/ops/test_sweep.py",),
    ),
    Fault(
        "words-counted-as-if-of-four-bits",
        "qgraph.ops.packed",
        "words = q.group_size * q.bits // 32",
        "words = q.group_size * 4 // 32",
        ("tests/ops/test_sweep.py",),
    ),
    Fault(
        "take-moves-the-wrong-axis-back",
        "qgraph_passes.quantize_take",
        "packed if packed < taken else packed - 1 + ids.ndim",
        "packed",
        ("tests/passes/test_packed_axes.py",),
    ),
    Fault(
        "take-counts-the-packed-axis",
        "qgraph_passes.quantize_take",
        "axis=taken - (packed < taken)",
        "axis=min(taken, w.ndim - 2)",
        ("tests/passes/test_packed_axes.py",),
    ),
]

_CANONICALIZE = [
    Fault(
        "one-over-x-is-x",
        "qgraph_passes.canonicalize",
        'if op.name == "multiply" and _is_one(x)',
        "if _is_one(x)",
        ("tests/passes/test_other_passes.py",),
    ),
    Fault(
        "zero-counts-as-one",
        "qgraph_passes.canonicalize",
        "set(value.op.data) == {1}",
        "set(value.op.data) <= {0, 1}",
        ("tests/passes/test_other_passes.py",),
    ),
    Fault(
        "rounding-casts-dropped",
        "qgraph_passes.canonicalize",
        "if source.type.packing or not _holds(between, source.type.dtype):",
        "if source.type.packing:",
        ("tests/passes/test_other_passes.py",),
    ),
    Fault(
        "sixteen-bit-constants-folded-unrounded",
        "qgraph_passes.canonicalize",
        "any(d.is_complex or (d.is_float and d.size == 2) for d in dtypes)",
        "any(d.is_complex for d in dtypes)",
        ("tests/passes/test_other_passes.py",),
    ),
]


WRONG_PASSES = [*_QUANTIZE_DOT, *_FUSE_LORA, *_VIEWS, *_CANONICALIZE]

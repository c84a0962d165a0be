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

_RAISE_FAST = [
    Fault(
        "mean-over-any-axis-raised",
        "qgraph_passes.raise_fast.rms_norm",
        "s.require(axes == (core.type.ndim - 1,),",
        "s.require(True,",
        ("tests/passes/raise_fast/test_norms.py",),
    ),
    Fault(
        "rows-divided-by-the-root-of-other-rows",
        "qgraph_passes.raise_fast.rms_norm",
        "s.require(same_rows(found, squared),",
        "s.require(True,",
        ("tests/passes/raise_fast/test_norms.py",),
    ),
    Fault(
        "means-of-rows-along-columns-raised",
        "qgraph_passes.raise_fast.walk",
        "return not missing",
        "return True",
        ("tests/passes/raise_fast/test_norms.py",),
    ),
    Fault(
        "unbiased-variance-raised",
        "qgraph_passes.raise_fast.layer_norm",
        "if of_x and op.ddof == 0 else None",
        "if of_x else None",
        ("tests/passes/raise_fast/test_norms.py",),
    ),
    Fault(
        "what-others-read-raised-all-the-same",
        "qgraph_passes.raise_fast.form",
        "if foreign is not None:",
        "if False:",
        ("tests/passes/raise_fast/test_norms.py",),
    ),
    Fault(
        "halves-exchanged-in-rope",
        "qgraph_passes.raise_fast.rope",
        "if (start, by) == (0, step) and (x, second, step) in of_b",
        "if by == step",
        ("tests/passes/raise_fast/test_rope.py",),
    ),
    Fault(
        "base-read-roughly",
        "qgraph_passes.raise_fast.angles",
        "if base > 0 and np.allclose(speeds, base ** (-np.arange(half) / half), rtol=ROUNDED, atol=0):",
        "if base > 0:",
        ("tests/passes/raise_fast/test_rope.py",),
    ),
    Fault(
        "rope-offset-of-the-table-lost",
        "qgraph_passes.raise_fast.angles",
        "return step, round(start)",
        "return step, 0",
        ("tests/passes/raise_fast/test_rope.py",),
    ),
    Fault(
        "scale-of-the-keys-lost",
        "qgraph_passes.raise_fast.attention",
        "scale = scores.scale * queries.scale * keys.scale",
        "scale = scores.scale * queries.scale",
        ("tests/passes/raise_fast/test_attention.py",),
    ),
    Fault(
        "every-triangle-causal",
        "qgraph_passes.raise_fast.masks",
        "np.tri(rows, columns, columns - rows, dtype=bool)",
        "np.tri(rows, columns, dtype=bool)",
        ("tests/passes/raise_fast/test_attention.py",),
    ),
    Fault(
        "rows-of-minus-infinity-averaged",
        "qgraph_passes.raise_fast.masks",
        'if self.low > float("-inf"):',
        "if True:",
        ("tests/passes/raise_fast/test_attention.py",),
    ),
    Fault(
        "sinks-kept-in-the-sum-of-values",
        "qgraph_passes.raise_fast.attention",
        "return last == columns and lead ==",
        "return len(last) == len(columns) and lead ==",
        ("tests/passes/raise_fast/test_attention.py",),
    ),
    Fault(
        "tiled-keys-taken-for-repeated",
        "qgraph_passes.raise_fast.attention",
        "if not same or before != (b, few, 1):",
        "if not same:",
        ("tests/passes/raise_fast/test_attention.py",),
    ),
    Fault(
        "attention-rounded-to-16-bit",
        "qgraph_passes.raise_fast.attention",
        "wide = [root, queries.value,",
        "wide = [queries.value,",
        ("tests/passes/raise_fast/test_attention.py",),
    ),
    Fault(
        "bits-of-a-word-in-any-order",
        "qgraph_passes.raise_fast.dequantize",
        "return _Codes(source, bits) if in_order and along",
        "return _Codes(source, bits) if along",
        ("tests/passes/raise_fast/test_dequantize.py",),
    ),
    Fault(
        "rows-taken-by-other-indices",
        "qgraph_passes.raise_fast.dequantize",
        "same = all(p.node.inputs[1] is ids for p in parts) and",
        "same =",
        ("tests/passes/raise_fast/test_dequantize.py",),
    ),
]


WRONG_PASSES = [*_QUANTIZE_DOT, *_FUSE_LORA, *_VIEWS, *_CANONICALIZE, *_RAISE_FAST]

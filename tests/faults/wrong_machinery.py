"""Faults around the passes: lowering, matcher, graph, the keys of the jit, the checks of files."""

from __future__ import annotations

from tests.faults.fault import Fault

HOSTILE = "tests/quant/hostile/test_hostile.py::test_a_hostile_checkpoint_is_refused_with_one_error"


_LOWERING = [
    Fault(
        "scales-and-biases-swapped",
        "qgraph.ops.quantized",
        'f"mx.quantized_matmul({x}, {w.packed}, {w.scales}, {w.biases}, "',
        'f"mx.quantized_matmul({x}, {w.packed}, {w.biases}, {w.scales}, "',
        ("tests/ops/test_accumulation.py",),
    ),
    Fault(
        "eight-bits-in-half-groups",
        "qgraph.ops.quantized",
        'return f"group_size={q.group_size}, bits={q.bits}, mode={q.mode!r}"',
        "b, g = (8, 32) if (q.bits, q.group_size) == (4, 64) else (q.bits, q.group_size)\n"
        '    return f"group_size={g}, bits={b}, mode={q.mode!r}"',
        ("tests/passes/test_fuse_lora.py",),
    ),
    Fault(
        "global-scale-dropped",
        "qgraph.ops.quantized",
        "    if w.global_scale is None:\n        return call",
        "    if w is not None:\n        return call",
        ("tests/passes/test_quantize_dot.py",),
    ),
    Fault(
        "sums-in-bfloat16",
        "qgraph_passes.legalize",
        '        if self.context.device == "cpu":\n            return self.accumulate_in_f32(inputs)',
        '        if self.context.device == "npu":\n            return self.accumulate_in_f32(inputs)',
        ("tests/passes/test_other_passes.py",),
    ),
    Fault(
        "softmax-in-bfloat16",
        "qgraph.ops.reduce",
        '", precise=True" if self.precise',
        '", precise=False" if self.precise',
        ("tests/ops/test_accumulation.py",),
    ),
    Fault(
        "running-sums-in-bfloat16",
        "qgraph.ops.scan",
        "if not widens(inputs[0].dtype):",
        "if widens(inputs[0].dtype) or True:",
        ("tests/ops/test_accumulation.py",),
    ),
    Fault(
        "dense-fallback-not-transposed",
        "qgraph_passes.legalize",
        "        if op.transpose:\n            axes",
        "        if op.transpose and w.type.shape[-1] != w.type.shape[-2]:\n            axes",
        ("tests/passes/test_packed_axes.py",),
    ),
    Fault(
        "strided-storage-on-a-gpu",
        "qgraph_passes.legalize",
        "return permutation == tuple(range(len(permutation))) and _is_plain(w.node.inputs[0])",
        "return True",
        ("tests/passes/test_packed_axes.py",),
    ),
    Fault(
        "strict-ignored",
        "qgraph_passes.legalize",
        "if self.strict:",
        "if not self.after:",
        ("tests/passes/test_other_passes.py",),
    ),
]

_ENGINE = [
    Fault(
        "second-user-ignored",
        "qgraph.rewrite.driver",
        'if rule.shared != "refuse":',
        'if rule.shared == "refuse":',
        ("tests/rewrite/test_rules.py",),
    ),
    Fault(
        "a-variable-matches-two-values",
        "qgraph.rewrite.match",
        "        if bound is value:\n            return then()",
        "        if bound is not None:\n            return then()",
        ("tests/rewrite/test_rules.py",),
    ),
    Fault(
        "only-one-order-of-operands",
        "qgraph.rewrite.match",
        "commutes = node.op.commutes and",
        "commutes = False and",
        ("tests/rewrite/test_rules.py",),
    ),
    Fault(
        "skipped-casts-lost",
        "qgraph.rewrite.driver",
        "            match.refuse_unasked()",
        "            pass",
        ("tests/rewrite/test_rules.py",),
    ),
    Fault(
        "overlapping-rewrites",
        "qgraph.rewrite.driver",
        "if not self.done.isdisjoint(found.nodes):",
        "if not found.nodes:",
        ("tests/rewrite/test_rules.py",),
    ),
    Fault(
        "ops-shared-whatever-their-parameters",
        "qgraph.ir.graph",
        "        key = (op, *inputs)",
        "        key = (op.name if inputs else op, *inputs)",
        ("tests/ir/test_digest.py",),
    ),
    Fault(
        "negative-zero-is-zero",
        "qgraph.ir.op",
        "(repr(self.data), self.shape, self.dtype.name)",
        "(self.data, self.shape, self.dtype.name)",
        ("tests/ir/test_digest.py",),
    ),
    Fault(
        "digests-without-parameters",
        "qgraph.ir.digest",
        "h = blake2b(str(node.op).encode(), digest_size=16)",
        "h = blake2b(node.op.name.encode(), digest_size=16)",
        ("tests/ir/test_digest.py",),
    ),
    Fault(
        "types-not-verified",
        "qgraph.ir.verify",
        "    if types != node.types:",
        "    if len(types) != len(node.types):",
        ("tests/ir/test_verify.py",),
    ),
]

_JIT = [
    Fault(
        "stale-closure",
        "qgraph.trace.surroundings",
        "            yield place, _content(cell)",
        "            yield place, None",
        ("tests/jit/test_cache_machine.py",),
    ),
    Fault(
        "stale-global",
        "qgraph.trace.surroundings",
        "            yield place, module.get(place[1])",
        "            yield place, None",
        ("tests/jit/test_checklist.py",),
    ),
    Fault(
        "aliases-confused",
        "qgraph.trace.surroundings",
        'spec.append(("alias", i, first))',
        "pass",
        ("tests/trace/test_surroundings.py",),
    ),
    Fault(
        "true-is-one",
        "qgraph.trace.tree",
        "    return kind, value\n",
        "    return object, value\n",
        ("tests/jit/test_cache_and_trees.py",),
    ),
    Fault(
        "dtypes-not-in-the-key",
        "qgraph.trace.tracer",
        "(x.shape, x.dtype) if type(x) is mx.array",
        "(x.shape,) if type(x) is mx.array",
        ("tests/jit/test_cache_and_trees.py",),
    ),
]

_FILES = [
    Fault(
        "rows-of-scales-unchecked",
        "qgraph.quant.triplet",
        "if scales[:-1] != weight[:-1] or len(scales) != len(weight):",
        "if len(scales) != len(weight):",
        (f"{HOSTILE}[C04 one row of scales]",),
    ),
    Fault(
        "nan-scales-accepted",
        "qgraph.quant.checkpoint",
        "        if not allow_nonfinite:",
        "        if not layout:",
        (f"{HOSTILE}[C14 NaN in the scales]",),
    ),
    Fault(
        "duplicate-keys-accepted",
        "qgraph.quant.strict_file",
        "if len(found) != len(items):",
        "if not items and found:",
        (f"{HOSTILE}[A32 one name twice, same span]",),
    ),
    Fault(
        "holes-accepted",
        "qgraph.quant.safetensors_file",
        "        if entry.start != at:",
        "        if entry.start < at:",
        (f"{HOSTILE}[B39 a hole]",),
    ),
]


_TRAPS = [
    Fault(
        "one-index-too-many",
        "qgraph.rewrite.guard",
        "        if high >= size:",
        "        if high > size:",
        ("tests/passes/test_guard_indices.py",),
    ),
    Fault(
        "index-of-the-wrong-end",
        "qgraph.rewrite.guard",
        'limited = self.apply("maximum", limited, self.number(-size, dtype))',
        'limited = self.apply("maximum", limited, self.number(0, dtype))',
        ("tests/passes/test_guard_indices.py",),
    ),
    Fault(
        "a-remainder-of-nothing",
        "qgraph.ops.bounds",
        "return a if a[0] >= 0 and a[1] < b[0] else (0, b[1] - 1)",
        "return a if a[0] >= 0 and a[1] < b[0] else (0, 0)",
        ("tests/passes/test_guard_indices.py",),
    ),
    Fault(
        "arrays-not-checked-against-their-types",
        "qgraph.execute.program",
        "        self.check(arrays)",
        "        pass",
        ("tests/ir/test_storage.py",),
    ),
    Fault(
        "storms-in-silence",
        "qgraph.trace.storms",
        "        if len(group) < STORM:",
        "        if group:",
        ("tests/jit/test_storms.py",),
    ),
    Fault(
        "two-writers-at-once",
        "qgraph.quant.lock",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("tests/quant/crash/test_crash.py::test_a_second_writer_is_refused_and_a_killed_one_holds_nothing",),
    ),
]

WRONG_MACHINERY = [*_LOWERING, *_ENGINE, *_JIT, *_FILES, *_TRAPS]

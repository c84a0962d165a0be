"""Make the graph one that MLX runs rightly on the device.

op(w) with w packed           → op(dequantize(w))                unless op reads packed words; with a reason
op on a CPU                   → op{kernel='native'}              where `qgraph.kernels` has one
quantized_matmul without      → cast(quantized_matmul(cast(x)))  in 16 bit MLX accumulates in 16 bit there
                              → quantized_matmul{kernel='tiled'} for many rows, see `qgraph.ops.tiled`
kernels that the GPU lacks    → dot(x, dequantize(w))            with a reason
sliced or permuted storage    → contiguous(w)                    before a kernel of a GPU
softmax{precise=False}        → softmax{precise=True}            in 16 bit, which captured code may ask for
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import qgraph as qg
from qgraph._errors import QGraphError, RuleError, StrictError
from qgraph.ir import Builder, Graph, Node, Value
from qgraph.ir.dtypes import F32
from qgraph.ir.op import Op
from qgraph.ir.origin import Origin, Step
from qgraph.ops import tiled
from qgraph.ops.elementwise import Cast
from qgraph.ops.linear import Dot
from qgraph.ops.moe import GatherMm, GatherQmm
from qgraph.ops.packed import storage_permutation
from qgraph.ops.quantized import PRODUCTS, Dequantize, QuantizedMatmul, reads_storage
from qgraph.ops.reduce import Softmax, widens
from qgraph.ops.shape import Contiguous, Transpose
from qgraph.rewrite import Context
from qgraph.rewrite.report import make_report


@dataclass(frozen=True)
class Legalize(qg.Pass):
    """Unpack where there is no kernel, and say why; keep the rules of the device.

    With `strict`, a packed operand of a product that would have to be unpacked is an error. With
    ``activations="int8"``, native products with packed weights round their activations to 8 bits in groups,
    which is faster and less exact (about 0.6 % of the result).
    """

    name = "legalize"
    after = ("canonicalize", "fold-transpose", "quantize-dot", "quantize-take", "fuse-lora", "guard-indices")
    strict: bool = False
    activations: str = ""

    def __post_init__(self) -> None:
        if self.activations not in ("", "int8"):
            raise RuleError(f"legalize: activations={self.activations!r}", fix="leave it out, or say int8")

    def run(self, graph: Graph, context: Context) -> Graph:
        """One sweep. Errors: QGraphError where activations are to be rounded and no kernel does it."""
        if self.activations and not context.native:
            raise QGraphError(
                f"activations={self.activations!r} needs the native CPU kernels, which are not in use",
                fix="leave it out; `qgraph doctor` says why there are none",
            )

        def rebuild(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
            return _Legal(graph.builder, node, context, self.activations).results(inputs)

        after = graph.rewritten(rebuild)
        if self.strict:
            missed = make_report(context.traced or graph, after, context).missed
            if missed:
                raise StrictError(
                    "\n".join(map(str, missed)), fix="see the reasons; or compile without strict=True"
                )
        return after


class _Legal:
    """The legal form of one node."""

    def __init__(self, builder: Builder, node: Node, context: Context, activations: str = "") -> None:
        self.activations = activations
        self.builder = builder
        self.node = node
        self.context = context

    def add(self, op: Op, *inputs: Value) -> Value:
        """A node that stands for (a part of) the one at hand."""
        origin = self.node.origin
        step = Step("legalize", op.name, self.context.ordinal)
        return self.builder.add(
            op, inputs, Origin(origin.sources, origin.scope, (*origin.steps, step))
        ).outputs[0]

    def results(self, inputs: tuple[Value, ...]) -> Sequence[Value]:
        """The values that replace the node's results."""
        node = self.node
        if node.op.name in PRODUCTS:
            x, w, *others = inputs  # the weight is the one operand that a kernel reads packed
            return (self.product((self.unpack(x), w, *map(self.unpack, others))),)
        if any(v.type.packing for v in inputs) and not reads_storage(node):
            inputs = tuple(self.unpack(v) for v in inputs)
        if isinstance(node.op, Softmax) and not node.op.precise and widens(node.types[0].dtype):
            return (self.add(self.best(replace(node.op, precise=True), inputs), *inputs),)
        if (op := self.best(node.op, inputs)) is not node.op:
            return (self.add(op, *inputs),)
        if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
            return node.outputs
        return self.builder.add(node.op, inputs, node.origin).outputs

    def best(self, op: Op, inputs: tuple[Value, ...]) -> Op:
        """`op`, in the place of the node's, by a native kernel where there is one."""
        if not self.context.native:
            return op
        return op.native(tuple(v.type for v in inputs), self.node.types) or op

    def unpack(self, v: Value) -> Value:
        """`v` as numbers."""
        if v.type.packing is None:
            return v
        self.context.notes.setdefault(self.node, f"{self.node.op.name} has no kernel for packed operands")
        return self.add(self.unpacker(v), self.plain(v))

    def unpacker(self, v: Value) -> Op:
        """The op that unpacks `v`."""
        op = Dequantize()
        return (self.context.native and op.native((v.type,), (v.type.dense(),))) or op

    def plain(self, w: Value) -> Value:
        """`w` with its storage in row-major order, which the kernels of the GPUs rely on."""
        return w if self.context.device == "cpu" or _is_plain(w) else self.add(Contiguous(), w)

    def product(self, inputs: tuple[Value, ...]) -> Value:
        """A quantized product under the device's rules."""
        refusal = self.refusal(inputs)
        if refusal:
            self.context.notes[self.node] = refusal
            return self.dense_product(inputs)
        op = self.best(self.node.op, inputs)
        if op is not self.node.op:
            assert isinstance(op, (QuantizedMatmul, GatherQmm))
            return self.add(replace(op, kernel=self.activations or op.kernel), *inputs)
        if self.context.device == "cpu":
            return self.accumulate_in_f32(inputs)
        return self.add(self.node.op, inputs[0], self.plain(inputs[1]), *inputs[2:])

    def accumulate_in_f32(self, inputs: tuple[Value, ...]) -> Value:
        """MLX's CPU kernel sums in the dtype of its result: give it f32, and round once."""
        x, dtype = inputs[0], self.node.outputs[0].type.dtype
        wide = self.add(Cast(F32), x) if dtype is not F32 and x.type.dtype is not F32 else x
        op = self.node.op
        if isinstance(op, QuantizedMatmul) and op.transpose and tiled.gains(wide.type, inputs[1].type):
            op = replace(op, kernel="tiled")
        if dtype is F32 and op is self.node.op and inputs == self.node.inputs:
            return self.node.outputs[0]
        return self.cast(self.add(op, wide, *inputs[1:]))

    def refusal(self, inputs: tuple[Value, ...]) -> str:
        """Why the device has no right kernel for this product, or nothing."""
        op, x, w = self.node.op, inputs[0].type, inputs[1].type
        device, transposed = self.context.device, getattr(op, "transpose", True)
        n, k = w.shape[-2:] if transposed else w.shape[:-3:-1]
        group = w.quantization.group_size if w.quantization else 1
        if device == "metal" and not transposed and n % 64:
            return f"on Metal transpose=False with {n} columns, not a multiple of 64, has returned garbage"
        if device == "cuda" and transposed and k % max(64, group):
            return f"the CUDA kernels contract multiples of {max(64, group)}; this one contracts {k}"
        if device == "cuda" and x.dtype.name == "f64":
            return "there is no CUDA kernel for float64"
        return ""

    def dense_product(self, inputs: tuple[Value, ...]) -> Value:
        """The same product on the unpacked weight."""
        op, w = self.node.op, self.add(Dequantize(), self.plain(inputs[1]))
        assert isinstance(op, (QuantizedMatmul, GatherQmm))
        if op.transpose:
            axes = list(range(w.type.ndim))
            w = self.add(Transpose((*axes[:-2], axes[-1], axes[-2])), w)
        if isinstance(op, GatherQmm):
            dense = GatherMm(op.lhs, op.rhs, op.sorted_indices)
            return self.cast(self.add(dense, inputs[0], w, *inputs[2:]))
        out = self.cast(self.add(Dot(), inputs[0], w))
        if op.name != "quantized_lora_matmul":
            return out
        low = self.apply(qg.multiply, self.add(Dot(), inputs[0], inputs[2]), inputs[4])
        return self.cast(self.apply(qg.add, out, self.add(Dot(), low, inputs[3])))

    def apply(self, function: Any, *values: Value) -> Value:
        """A qg function on values."""
        from qgraph.ops.dispatch import interpreting
        from qgraph.trace.tracer import Trace, Tracer

        trace = Trace(self.builder, origin=lambda: self.node.origin)
        with interpreting(trace):
            made: Tracer = function(*(Tracer(trace, v) for v in values))
        return made.value

    def cast(self, v: Value) -> Value:
        """`v` in the dtype of the node's result."""
        dtype = self.node.outputs[0].type.dtype
        return v if v.type.dtype is dtype else self.add(Cast(dtype), v)


def _is_plain(w: Value) -> bool:
    """Whether the storage is as it came in, or freshly made: no strided view of other storage."""
    op = w.op
    if op.name in ("input", "quantize", "concatenate", "contiguous"):
        return True
    if isinstance(op, Transpose):
        permutation = storage_permutation(w.node.inputs[0].type, w.type, op.axes)
        return permutation == tuple(range(len(permutation))) and _is_plain(w.node.inputs[0])
    return op.name in ("cast", "reshape") and _is_plain(w.node.inputs[0])

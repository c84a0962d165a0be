"""How often each rewrite fired and was refused.

Rules are counted by the driver's own statistics, pass by pass: fired = applied; refused = check or a foreign
user said no; near = the root's op matched, and something further in did not. The rewrites that are plain code
(canonicalize, the sinking of transposes, legalize) are counted at their functions: refused = the form that
the rewrite starts from was there, and it stayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import qgraph as qg
from qgraph.ir.op import Constant
from qgraph.ops.elementwise import Cast
from qgraph.ops.quantized import PRODUCTS, reads_storage
from qgraph.ops.shape import Concatenate, Reshape, Slice, Transpose
from qgraph.rewrite import guard
from qgraph_passes import canonicalize, fold_transpose, legalize

MARK = "mark-"


class Marked:
    """The passes with a mark after each, which takes its statistics."""

    def __init__(self, passes: Any, device: str, counts: Counter[str]) -> None:
        self.counts = counts
        self.device = device
        marks = [_mark(p.name, counts)() for p in passes]
        self.names = {m.name for m in marks}
        self.pipeline = qg.Pipeline(tuple(p for pair in zip(passes, marks, strict=True) for p in pair))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the rewrites that are not rules."""
        patched = [
            (canonicalize._Simpler, "value", _canonicalize),
            (canonicalize, "_with_dense_outputs", _dense_outputs),
            (fold_transpose, "_beyond", _sink),
            (guard._Guarded, "result", _guard),
            (legalize._Legal, "results", _legalize),
        ]
        before = [getattr(owner, name) for owner, name, _ in patched]
        for (owner, name, wrap), function in zip(patched, before, strict=True):
            setattr(owner, name, wrap(function, self.counts, self.device))
        try:
            yield
        finally:
            for (owner, name, _), function in zip(patched, before, strict=True):
                setattr(owner, name, function)


def _mark(after: str, counts: Counter[str]) -> Any:
    def run(self: Any, graph: Any, context: Any) -> Any:
        for rule, s in context.statistics.items():
            counts[f"fired {after} {rule}"] += s.applied
            counts[f"refused {after} {rule}"] += s.refused
            counts[f"near {after} {rule}"] += s.structure
        context.statistics.clear()
        return graph

    return type("Mark", (qg.Pass,), {"name": MARK + after, "run": run, "__module__": __name__})


def _count(counts: Counter[str], rule: str, fired: bool) -> None:
    counts[f"{'fired' if fired else 'refused'} {rule}"] += 1


def _canonicalize(function: Any, counts: Counter[str], device: str) -> Any:
    def value(self: Any, inputs: Any) -> Any:
        made = function(self, inputs)
        op = self.node.op
        if not inputs or len(self.node.outputs) != 1:
            return made
        fired = made is not None
        is_constant = [isinstance(v.op, Constant) for v in inputs]
        if op.name == "dequantize":
            _count(counts, "canonicalize dequantize", fired)
        elif isinstance(op, Reshape):
            if fired or isinstance(inputs[0].op, Reshape):
                _count(counts, "canonicalize reshape", fired)
        elif isinstance(op, Cast) and isinstance(inputs[0].op, Cast):
            _count(counts, "canonicalize cast", fired)
        elif op.elementwise and all(is_constant):
            _count(counts, "canonicalize fold", fired)
        elif op.name in ("multiply", "divide") and any(is_constant):
            _count(counts, f"canonicalize {op.name} by one", fired)
        return made

    return value


def _dense_outputs(function: Any, counts: Counter[str], device: str) -> Any:
    def with_dense_outputs(before: Any, after: Any) -> Any:
        made = function(before, after)
        put_back = sum(a is not b for a, b in zip(after.outputs, made.outputs, strict=True))
        counts["refused canonicalize dequantize"] += put_back
        return made

    return with_dense_outputs


def _sink(function: Any, counts: Counter[str], device: str) -> Any:
    def beyond(graph: Any, node: Any, inputs: Any, step: Any) -> Any:
        moved = function(graph, node, inputs, step)
        if isinstance(node.op, (Slice, Cast, Concatenate, Reshape)):
            near = any(isinstance(v.op, Transpose) and v.type.packing for v in inputs)
            if moved is not None or near:
                _count(counts, f"fold-transpose sink {node.op.name}", moved is not None)
        return moved

    return beyond


def _guard(function: Any, counts: Counter[str], device: str) -> Any:
    def result(self: Any) -> Any:
        made = function(self)
        does = "write" if self.op.writes else "read"
        _count(counts, f"guard-indices {does}", made is not self.node.outputs[0])
        return made

    return result


def _legalize(function: Any, counts: Counter[str], device: str) -> Any:
    def results(self: Any, inputs: Any) -> Any:
        made = function(self, inputs)
        node = self.node
        packed = [v for v in inputs if v.type.packing]
        if packed:
            unpacks = not reads_storage(node) or (
                node.op.name in PRODUCTS and any(v.type.packing for v in (inputs[0], *inputs[2:]))
            )
            _count(counts, "legalize unpack", unpacks)
        if node.op.name in PRODUCTS:
            _product(counts, device, self, made[0], inputs)
        return made

    return results


def _product(counts: Counter[str], device: str, legal: Any, made: Any, inputs: Any) -> None:
    name = legal.node.op.name
    inner = made.node.inputs[0] if isinstance(made.op, Cast) else made
    if device == "cpu":
        _count(counts, f"legalize cpu f32 {name}", isinstance(made.op, Cast))
        return
    _count(counts, f"legalize {device} no kernel {name}", inner.op.name != name)
    if inner.op.name == name:
        _count(counts, f"legalize {device} contiguous", inner.node.inputs[1].op.name == "contiguous")


RULES = [
    *(
        f"canonicalize {r}"
        for r in ("dequantize", "reshape", "cast", "fold", "multiply by one", "divide by one")
    ),
    *(
        f"raise-fast raise-{r}"
        for r in ("dequantize", "mxfp4", "layer-norm", "rms-norm", "rope", "softmax", "attention", "causal")
    ),
    *(f"fold-transpose sink {r}" for r in ("slice", "cast", "concatenate", "reshape")),
    *(f"{p} compose-transposes" for p in ("fold-transpose", "quantize-dot", "fuse-lora")),
    *(f"quantize-dot {r}" for r in ["both-operands", "right-operand", "left-operand"]),
    *(f"quantize-dot split-add-mm{r}" for r in ("", "-left")),
    *(f"quantize-dot {r}" for r in ["gather-both", "gather-one", "gather-none"]),
    "quantize-take take-rows",
    *(
        f"fuse-lora lora-{r}"
        for r in ("branch", "branch-biased", "branch-unscaled", "scale-in-a", "merged-weight")
    ),
    "guard-indices read",
    "guard-indices write",
    "legalize unpack",
    *(f"legalize cpu f32 {p}" for p in PRODUCTS),
    *(f"legalize {d} no kernel {p}" for d in ("metal", "cuda") for p in PRODUCTS),
    "legalize metal contiguous",
    "legalize cuda contiguous",
]
UNCHECKED = {f"{p} compose-transposes" for p in ("fold-transpose", "quantize-dot", "fuse-lora")} | {
    "quantize-dot both-operands",
    "raise-fast raise-causal",
}


def fired(counts: Counter[str], rule: str) -> int:
    return counts[f"fired {rule}"]


def refused(counts: Counter[str], rule: str) -> int:
    """Refusals; for a rule without conditions, near misses."""
    return counts[f"{'near' if rule in UNCHECKED else 'refused'} {rule}"]

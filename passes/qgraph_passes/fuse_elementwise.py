"""Element-wise ops that feed one another → one op, which a native CPU kernel computes block by block.

multiply(silu(gate), up) → elementwise{steps=(silu, multiply)}(gate, up)

A group is a value and everything element-wise of its shape that only the group reads; it has one result, and
what is read by others ends it. Scalar constants become steps. Every op keeps its dtype and its rounding, so
that the numbers stay what they were, but for the last bits of exp and the like. One op alone is taken where
it computes floats: MLX's code is slow in 16 bits and in functions of libm, and an op of its own between
kernels costs a step's time to set up (see `source/primitives/replay.h`).

Under QGRAPH_DEBUG_NAN=1 ops stay what they are, so that the one at fault has its own name and line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import qgraph as qg
from qgraph.execute.nonfinite import debugging
from qgraph.ir import Graph, Node, Value
from qgraph.ir.op import NATIVE, Constant, Op
from qgraph.ir.origin import Step, merge_origins
from qgraph.ops.chain import Chain, computed
from qgraph.rewrite import Context

OPERANDS, STEPS = 8, 24  # of a group at most: their blocks are to fit into the first-level cache
SMALL = 64  # elements: below, one op alone is not worth it


@dataclass(frozen=True)
class FuseElementwise(qg.Pass):
    """Join element-wise ops for the native kernel, on a CPU that has it."""

    name = "fuse-elementwise"
    after = (
        *("canonicalize", "raise-fast", "fold-transpose", "quantize-dot", "quantize-take", "fuse-lora"),
        *("share-rope", "turn-dot", "guard-indices", "legalize"),
    )

    def run(self, graph: Graph, context: Context) -> Graph:
        """One sweep from the results back to find the groups, and one forth to make them."""
        groups = _groups(graph) if context.native and not debugging() else {}
        new: dict[Value, Value] = {}

        def rebuild(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
            new.update(zip(node.inputs, inputs, strict=True))
            group = groups.get(node)
            if group is not None and context.burn():
                return (_fused(graph, group, new, context.ordinal),)
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            return node.outputs if same else graph.builder.add(node.op, inputs, node.origin).outputs

        return graph.rewritten(rebuild)


class _Group:
    """Nodes, the first of which is the result, and the values that they read from outside."""

    def __init__(self, result: Node) -> None:
        self.nodes: dict[Node, None] = {}
        self.operands: dict[Value, None] = {}
        self.shape = result.types[0].shape
        self.add(result)

    def takes(self, node: Node) -> bool:
        """Whether there is room for the node, which the group reads."""
        read = {v for v in (*self.operands, *node.inputs) if not _is_scalar(v)} - {node.outputs[0]}
        return node.types[0].shape == self.shape and len(read) <= OPERANDS and len(self.nodes) < STEPS

    def add(self, node: Node) -> None:
        """Make the node one of the group."""
        self.nodes[node] = None
        self.operands.pop(node.outputs[0], None)
        self.operands.update(dict.fromkeys(node.inputs))

    def worth(self) -> bool:
        """Whether one kernel is faster than MLX's."""
        if all(_is_scalar(v) for v in self.operands):
            return False  # nothing to read: a matter of constants
        (node, *others) = self.nodes
        if others:
            return True
        floats = any(v.type.dtype.is_float for v in (*node.inputs, *node.outputs))
        return node.types[0].size >= SMALL and node.op.name != "cast" and floats


def _groups(graph: Graph) -> dict[Node, _Group]:
    """The groups, by the node of their result.

    A node is met after all that read it, when it is known what they are in: where that is one group, the node
    may join it, and no path leaves the group and comes back.
    """
    of: dict[Node, _Group] = {}
    results: dict[Node, _Group] = {}
    for node in reversed(graph.nodes):
        if not _is_chainable(node):
            continue
        value = node.outputs[0]
        readers = {of.get(user) for user in graph.users(value)}
        group = readers.pop() if len(readers) == 1 and not graph.is_output(value) else None
        if group is not None and group.takes(node):
            group.add(node)
        else:
            group = results[node] = _Group(node)
        of[node] = group
    return {node: group for node, group in results.items() if group.worth()}


def _is_chainable(node: Node) -> bool:
    """Whether the node is an op of the kernel, and has elements at all."""
    if not node.op.elementwise or len(node.outputs) != 1 or not node.types[0].size:
        return False
    return computed(node.op, tuple(v.type for v in node.inputs), node.types[0])


def _is_scalar(v: Value) -> bool:
    return isinstance(v.op, Constant) and computed(v.op, (), v.type)


def _fused(graph: Graph, group: _Group, new: dict[Value, Value], ordinal: int) -> Value:
    """The chain of a group on the values that its operands have become."""
    nodes = list(reversed(group.nodes))  # operands first
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v in group.operands)
    operands = [v for v in read if not _is_scalar(v)]
    nodes[:0] = [v.node for v in read if _is_scalar(v)]
    number = {v: i for i, v in enumerate(operands)}
    steps: list[tuple[Any, ...]] = []
    for node in nodes:
        steps.append((node.op.name, tuple(number[v] for v in node.inputs), *_parameters(node.op)))
        number[node.outputs[0]] = len(number)
    origin = merge_origins([n.origin for n in nodes], Step("fuse-elementwise", "fuse-elementwise", ordinal))
    chain = Chain(tuple(steps), NATIVE)
    return graph.builder.add(chain, [new[v] for v in operands], origin).outputs[0]


def _parameters(op: Op) -> tuple[Any, ...]:
    return tuple(getattr(op, f.name) for f in fields(op))

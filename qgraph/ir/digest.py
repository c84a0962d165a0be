"""Digests: equal for graphs that are equal up to names and provenance, in every process."""

from __future__ import annotations

from hashlib import blake2b

from qgraph.ir.graph import Graph, Node
from qgraph.ir.op import Input


def node_digest(node: Node) -> bytes:
    """The Merkle digest of a node whose operands' digests are known."""
    known = node._digest
    if known is None:
        h = blake2b(str(node.op).encode(), digest_size=16)
        if isinstance(node.op, Input):
            h.update(str(node.op.type).encode())
        for v in node.inputs:
            h.update(node_digest(v.node) + v.index.to_bytes(4, "little"))
        known = h.digest()
        object.__setattr__(node, "_digest", known)
    return known


def digest(graph: Graph) -> str:
    r"""The digest of a graph: its inputs in order and its outputs, with all that they compute.

    The names of inputs count, since callers bind weights by them; those of other values do not.

    >>> from qgraph.ir.text import parse_graph
    >>> a = parse_graph("graph(%x: f32[2]) {\n %a = exp(%x) : f32[2]\n return %a\n}")
    >>> b = parse_graph("graph(%x: f32[2]) {\n %b = exp(%x) : f32[2]  // renamed\n return %b\n}")
    >>> digest(a) == digest(b)
    True
    """
    h = blake2b(digest_size=16)
    for node in graph.nodes:  # operands first, so that no call recurses
        node_digest(node)
    for value in (*graph.inputs, *graph.outputs):
        h.update(node_digest(value.node) + value.index.to_bytes(4, "little"))
    h.update(len(graph.inputs).to_bytes(4, "little"))
    return h.hexdigest()

"""Indices out of range get their meaning, by ops that can be seen in the graph.

take(a, i)            → where(clip(i) == i, take(a, clip(i)), NaN)     and every other op that reads by arrays
index_update(a, v, i) → index_update(pad(a), v, i or the new row)[:n]  and put_along_axis

MLX does not check indices. One that is in range for sure (a constant, a position that argmax or a top k
gave, a remainder) is left alone. A pipeline without this pass is safe too: emission guards what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import qgraph as qg
from qgraph.ir import Graph
from qgraph.rewrite import Context
from qgraph.rewrite.guard import PASS, guard_indices


@dataclass(frozen=True)
class GuardIndices(qg.Pass):
    """Keep indices from reading or writing other memory."""

    name = PASS
    after = ("canonicalize", "fold-transpose", "quantize-dot", "quantize-take", "fuse-lora")

    def run(self, graph: Graph, context: Context) -> Graph:
        """One sweep."""
        return guard_indices(graph, context.ordinal)

"""take from a packed value → quantized_take: an embedding reads its rows, and unpacks only those.

take(w, ids, axis)   → quantized_take(w, ids, axis)     unless axis is the packed one

A tied head reads the same words through `quantize-dot`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import qgraph as qg
from qgraph.ops.indexing import Take


class TakeRows(qg.Rule):
    """take(w, ids) → quantized_take(w, ids)."""

    def pattern(self, w: qg.Quantized, ids: qg.Array) -> Any:
        return qg.take(w, ids)

    def check(self, m: qg.Match, w: Any, ids: Any) -> None:
        axis = w.ndim + w.type.packing.axis
        m.require(_axis(m) != axis, f"it takes along axis {axis}, which is packed", w)

    def rewrite(self, m: qg.Match, w: Any, ids: Any) -> qg.Array:
        packed, taken = w.ndim + w.type.packing.axis, _axis(m)
        stored = qg.moveaxis(w, packed, -1)
        out = qg.quantized_take(stored, ids, axis=taken - (packed < taken))
        return qg.moveaxis(out, -1, packed if packed < taken else packed - 1 + ids.ndim)


def _axis(m: qg.Match) -> int:
    assert isinstance(m.root.op, Take)
    return m.root.op.axis


@dataclass(frozen=True)
class QuantizeTake(qg.Pass):
    """Read rows of packed tables without unpacking the rest."""

    name = "quantize-take"
    after = ("fold-transpose",)
    rules = (TakeRows,)

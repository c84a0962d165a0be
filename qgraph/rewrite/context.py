"""What a pipeline run knows and counts: device, fuel, statistics, misses and notes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import mlx.core as mx

from qgraph import kernels
from qgraph._errors import RuleError
from qgraph.ir.graph import Graph, Node
from qgraph.rewrite.match import Miss


def device_kind() -> str:
    """The default device as the passes distinguish it: "cpu", "metal" or "cuda"."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@dataclass
class Statistics:
    """How often a rule was tried, and what happened."""

    candidates: int = 0
    structure: int = 0  # the pattern did not match
    refused: int = 0  # it matched, but check or a foreign user said no
    applied: int = 0
    seconds: float = 0.0


def _fuel() -> int | None:
    text = os.environ.get("QGRAPH_FUEL", "")
    if text and not text.isdecimal():
        raise RuleError(f"QGRAPH_FUEL={text!r} is not a number of rewrites", fix="set it to 0, 1, 2, …")
    return int(text) if text else None


@dataclass
class Context:
    """One run of a pipeline.

    `fuel` bounds the number of rewrites (``QGRAPH_FUEL=n`` stops after the n-th, for bisecting); every
    rewrite has an ordinal below it. `native` is whether ops may be given native CPU kernels; unless said,
    where the device is a CPU that has them. `traced` is the graph before all passes. `notes` are sentences by
    node: why something was not rewritten.
    """

    device: str = field(default_factory=device_kind)
    native: bool = None  # pyright: ignore[reportAssignmentType]  (until __post_init__)
    fuel: int | None = field(default_factory=_fuel)
    traced: Graph | None = None
    ordinal: int = 0
    statistics: dict[str, Statistics] = field(default_factory=dict[str, Statistics])
    misses: dict[tuple[str, Node], Miss] = field(default_factory=dict[tuple[str, Node], Miss])
    notes: dict[Node, str] = field(default_factory=dict[Node, str])

    def __post_init__(self) -> None:
        if self.native is None:  # pyright: ignore[reportUnnecessaryComparison]
            self.native = self.device == "cpu" and kernels.library() is not None

    def burn(self) -> bool:
        """Take fuel for one rewrite; False when it is used up."""
        if self.fuel is not None and self.ordinal >= self.fuel:
            return False
        self.ordinal += 1
        return True

    def of(self, rule: str) -> Statistics:
        """The statistics of a rule."""
        found = self.statistics.get(rule)
        return found if found is not None else self.statistics.setdefault(rule, Statistics())

"""Plain code → the ops for which MLX has a kernel of its own.

On a CPU MLX writes `mx.fast.*`, `dequantize` and most softmaxes as primitives, so that a plain capture has no
such op; and users write them by hand. Raised, they are one node again: a GPU runs its kernel. A CPU writes
them out again when the program runs, so that there a raise costs nothing and gains nothing. In 16 bit the
raised ops sum in float32, where plain code may round in between: numbers change within the tolerance, to the
better.
"""

from __future__ import annotations

from dataclasses import dataclass

import qgraph as qg
from qgraph.ir import Graph
from qgraph.rewrite import Context, Rule
from qgraph_passes.raise_fast.attention import RaiseAttention, RaiseCausal
from qgraph_passes.raise_fast.dequantize import RaiseDequantize, RaiseMxfp4
from qgraph_passes.raise_fast.form import Form, apply_forms
from qgraph_passes.raise_fast.layer_norm import RaiseLayerNorm
from qgraph_passes.raise_fast.rms_norm import RaiseRmsNorm
from qgraph_passes.raise_fast.rope import RaiseRope
from qgraph_passes.raise_fast.softmax import RaiseSoftmax

# Those of one sweep do not see what each other made: attention is found around a softmax.
SWEEPS: tuple[tuple[type[Form], ...], ...] = (
    (RaiseDequantize, RaiseMxfp4),
    (RaiseLayerNorm, RaiseRmsNorm, RaiseRope, RaiseSoftmax),
    (RaiseAttention, RaiseCausal),
)


@dataclass(frozen=True)
class RaiseFast(qg.Pass):
    """Recover norms, rope, softmax, attention and packed weights from the code that spells them out."""

    name = "raise-fast"
    after = ("canonicalize",)
    exact = False  # it reads 1 / N, and the logarithm of a base, from float32

    def active_rules(self) -> tuple[Rule, ...]:
        """The forms, which are rules with a search of their own."""
        return tuple(form() for sweep in SWEEPS for form in sweep)

    def run(self, graph: Graph, context: Context) -> Graph:
        """The forms in turn."""
        for sweep in SWEEPS:
            graph = apply_forms(graph, [form() for form in sweep], self.name, context)
        return graph

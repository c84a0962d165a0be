"""The passes that qgraph ships: one file each. `ALL` is the order of the default pipeline."""

from qgraph_passes.canonicalize import Canonicalize as Canonicalize
from qgraph_passes.fold_transpose import FoldTranspose as FoldTranspose
from qgraph_passes.fuse_elementwise import FuseElementwise as FuseElementwise
from qgraph_passes.fuse_lora import FuseLora as FuseLora
from qgraph_passes.guard_indices import GuardIndices as GuardIndices
from qgraph_passes.legalize import Legalize as Legalize
from qgraph_passes.quantize_dot import QuantizeDot as QuantizeDot
from qgraph_passes.quantize_take import QuantizeTake as QuantizeTake
from qgraph_passes.raise_fast import RaiseFast as RaiseFast
from qgraph_passes.share_rope import ShareRope as ShareRope
from qgraph_passes.turn_dot import TurnDot as TurnDot

ALL = (
    Canonicalize,
    RaiseFast,
    FoldTranspose,
    QuantizeDot,
    QuantizeTake,
    FuseLora,
    ShareRope,
    TurnDot,
    GuardIndices,
    Legalize,
    FuseElementwise,
)

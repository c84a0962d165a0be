"""qgraph: a graph compiler for MLX in which quantization is a rewrite, not a special layer.

The public names. The functions of arrays are those of `qgraph.ops`, named as in mlx.core.
"""

from typing import TYPE_CHECKING

from qgraph import ir as ir
from qgraph import numeric as numeric
from qgraph import rewrite as rewrite
from qgraph._cache import CacheInfo as CacheInfo
from qgraph._errors import CheckpointError as CheckpointError
from qgraph._errors import DTypeError as DTypeError
from qgraph._errors import NonFiniteError as NonFiniteError
from qgraph._errors import QGraphError as QGraphError
from qgraph._errors import RecompileWarning as RecompileWarning
from qgraph._errors import RuleError as RuleError
from qgraph._errors import ShapeError as ShapeError
from qgraph._errors import StrictError as StrictError
from qgraph._errors import TraceError as TraceError
from qgraph._errors import VerifyError as VerifyError
from qgraph._jit import JitFunction as JitFunction
from qgraph._jit import jit as jit
from qgraph.inspector.inspect import inspect as inspect
from qgraph.ops import *  # noqa: F403  (qgraph.ops.__all__ lists them)
from qgraph.ops.dispatch import Array as Array
from qgraph.quant import Quantization as Quantization
from qgraph.quant import QuantizedTensor as QuantizedTensor
from qgraph.quant import from_quantized as from_quantized
from qgraph.quant import is_quantized as is_quantized
from qgraph.quant import load as load
from qgraph.quant import load_config as load_config
from qgraph.quant import save as save
from qgraph.rewrite import Match as Match
from qgraph.rewrite import Pass as Pass
from qgraph.rewrite import Pipeline as Pipeline
from qgraph.rewrite import Quantized as Quantized
from qgraph.rewrite import Rule as Rule
from qgraph.rewrite import Scalar as Scalar
from qgraph.rewrite import any_of as any_of
from qgraph.rewrite import register as register
from qgraph.trace.tracer import scope as scope

if TYPE_CHECKING:
    from qgraph import lm as lm
    from qgraph._optimize import optimize as optimize

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`qg.lm` and the frontend of `qg.optimize` are imported when they are first asked for."""
    if name == "optimize":
        from qgraph._optimize import optimize

        return optimize
    if name == "lm":
        import qgraph.lm

        return qgraph.lm
    raise AttributeError(f"module 'qgraph' has no attribute {name!r}")

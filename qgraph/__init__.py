"""qgraph: a graph compiler for MLX in which quantization is a rewrite.

The public names. Functions of arrays follow mlx.core in name and signature.
"""

from qgraph import ir as ir
from qgraph import numeric as numeric
from qgraph import rewrite as rewrite
from qgraph._errors import CheckpointError as CheckpointError
from qgraph._errors import DTypeError as DTypeError
from qgraph._errors import QGraphError as QGraphError
from qgraph._errors import RuleError as RuleError
from qgraph._errors import ShapeError as ShapeError
from qgraph._errors import StrictError as StrictError
from qgraph._errors import TraceError as TraceError
from qgraph._errors import VerifyError as VerifyError
from qgraph._jit import CacheInfo as CacheInfo
from qgraph._jit import jit as jit
from qgraph.ops.dispatch import Array as Array
from qgraph.ops.elementwise import *  # noqa: F403
from qgraph.ops.indexing import *  # noqa: F403
from qgraph.ops.linear import *  # noqa: F403
from qgraph.ops.moe import *  # noqa: F403
from qgraph.ops.nn import *  # noqa: F403
from qgraph.ops.attention import *  # noqa: F403
from qgraph.ops.updates import *  # noqa: F403
from qgraph.ops.quantized import dequantize as dequantize
from qgraph.ops.quantized import quantize as quantize
from qgraph.ops.quantized import quantized_lora_matmul as quantized_lora_matmul
from qgraph.ops.quantized import quantized_matmul as quantized_matmul
from qgraph.ops.quantized import quantized_take as quantized_take
from qgraph.ops.reduce import *  # noqa: F403
from qgraph.ops.shape import *  # noqa: F403
from qgraph.quant import Quantization as Quantization
from qgraph.quant import QuantizedTensor as QuantizedTensor
from qgraph.quant import from_quantized as from_quantized
from qgraph.quant import is_quantized as is_quantized
from qgraph.rewrite import Match as Match
from qgraph.rewrite import Pass as Pass
from qgraph.rewrite import Pipeline as Pipeline
from qgraph.rewrite import Quantized as Quantized
from qgraph.rewrite import Rule as Rule
from qgraph.rewrite import Scalar as Scalar
from qgraph.rewrite import any_of as any_of
from qgraph.rewrite import register as register
from qgraph.trace.tracer import scope as scope

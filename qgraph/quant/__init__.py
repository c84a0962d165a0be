"""Quantized weights: the scheme, the packed tensor, checkpoints and adapters."""

from qgraph.quant.adapter import Adapter as Adapter
from qgraph.quant.adapter import load_adapter as load_adapter
from qgraph.quant.adapter import merge_adapter as merge_adapter
from qgraph.quant.checkpoint import load as load
from qgraph.quant.checkpoint import load_flat as load_flat
from qgraph.quant.config import QuantizationConfig as QuantizationConfig
from qgraph.quant.config import load_config as load_config
from qgraph.quant.config import read_quantization as read_quantization
from qgraph.quant.save import save as save
from qgraph.quant.scheme import Mode as Mode
from qgraph.quant.scheme import Quantization as Quantization
from qgraph.quant.tensor import QuantizedTensor as QuantizedTensor
from qgraph.quant.tensor import from_quantized as from_quantized
from qgraph.quant.tensor import is_quantized as is_quantized
from qgraph.quant.tensor import pack as pack
from qgraph.quant.tensor import unpack as unpack

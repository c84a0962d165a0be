"""The intermediate representation: typed, immutable, hash-consed graphs."""

from qgraph.ir.digest import digest as digest
from qgraph.ir.dtypes import DType as DType
from qgraph.ir.graph import Builder as Builder
from qgraph.ir.graph import Graph as Graph
from qgraph.ir.graph import Node as Node
from qgraph.ir.graph import Value as Value
from qgraph.ir.op import Op as Op
from qgraph.ir.origin import Origin as Origin
from qgraph.ir.text import parse_graph as parse_graph
from qgraph.ir.text import print_graph as print_graph
from qgraph.ir.types import Packing as Packing
from qgraph.ir.types import TensorType as TensorType
from qgraph.ir.types import parse_type as parse_type
from qgraph.ir.verify import verify as verify

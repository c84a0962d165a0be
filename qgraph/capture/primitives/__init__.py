"""MLX's primitives, a file per family; importing this package fills the table."""

import qgraph.ops as _ops  # every op is registered by its module
from qgraph.capture.primitives import decompositions as decompositions
from qgraph.capture.primitives import elementwise as elementwise
from qgraph.capture.primitives import fused as fused
from qgraph.capture.primitives import indexing as indexing
from qgraph.capture.primitives import others as others
from qgraph.capture.primitives import products as products
from qgraph.capture.primitives import reductions as reductions
from qgraph.capture.primitives import shapes as shapes
from qgraph.capture.primitives.table import MEANINGS as MEANINGS
from qgraph.capture.primitives.table import Primitive as Primitive
from qgraph.capture.primitives.table import primitive as primitive

del _ops

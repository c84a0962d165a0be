"""MLX's primitives, a file per family; importing this package fills the table."""

from qgraph.capture.primitives.table import MEANINGS as MEANINGS
from qgraph.capture.primitives.table import Primitive as Primitive
from qgraph.capture.primitives.table import primitive as primitive

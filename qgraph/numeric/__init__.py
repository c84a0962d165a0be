"""Numbers: do two graphs compute the same, and how near must a result be?"""

from qgraph.numeric.equivalence import Mismatch as Mismatch
from qgraph.numeric.equivalence import compare as compare
from qgraph.numeric.equivalence import random_inputs as random_inputs
from qgraph.numeric.equivalence import relative_error as relative_error
from qgraph.numeric.tolerance import Tolerance as Tolerance
from qgraph.numeric.tolerance import tolerance as tolerance

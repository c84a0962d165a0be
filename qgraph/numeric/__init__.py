"""Numbers: do two graphs compute the same?"""

from qgraph.numeric.equivalence import Mismatch as Mismatch
from qgraph.numeric.equivalence import compare as compare
from qgraph.numeric.equivalence import random_inputs as random_inputs

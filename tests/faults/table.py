"""The seeded faults: wrong rewrites, lowerings, keys and checks, each a change of one place in one module.

A row says what a careless change could do; `tests` are where one expects it to be caught. They are planted by
QGRAPH_FAULT=name (`tests.faults.plant`); ``python -m tests.faults`` plants all and prints what caught them.
"""

from __future__ import annotations

from tests.faults.wrong_kernels import WRONG_KERNELS
from tests.faults.wrong_machinery import WRONG_MACHINERY
from tests.faults.wrong_passes import WRONG_PASSES
from tests.faults.wrong_primitives import WRONG_PRIMITIVES

FAULTS = {fault.name: fault for fault in (*WRONG_PASSES, *WRONG_MACHINERY, *WRONG_PRIMITIVES, *WRONG_KERNELS)}

"""Every tolerance of the tests, from (dtype, length of the sums, path of the computation).

The bounds are those of the standard error analysis with (6 + sqrt K) u32 in place of the worst case K u32,
u being the unit roundoff. `A` is the product of the magnitudes of the operands, |X| |W|, to which the
error of a sum is relative; `Y` the result.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np

from qgraph.ir.dtypes import F32, DType


class Tolerance(NamedTuple):
    """Allowed: ``terms * A + result * |Y|``, elementwise."""

    terms: float
    result: float

    def allows(self, found, exact, magnitude=0.0):
        """Where `found` is near enough to `exact`; NaN and infinities must be equal."""
        found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
        limit = self.terms * np.asarray(magnitude, np.float64) + self.result * np.abs(exact)
        with np.errstate(invalid="ignore"):
            near = np.abs(found - exact) <= limit
        return near | (found == exact) | (np.isnan(found) & np.isnan(exact))


# Roundings on the way of one element: functions of libm and of MLX's vector code are good to a few ulp.
ELEMENTWISE = 16


def tolerance(dtype: DType, k: int = 1, path: str = "elementwise") -> Tolerance:
    """The tolerance of a result of `dtype` whose sums have `k` terms.

    Paths: "elementwise", a few roundings in float32 and one to dtype; "P1", the weights dequantized to
    dtype, then a product with float32 sums; "P2", everything in float32 and one rounding to dtype.
    """
    u, u32 = dtype.unit_roundoff, F32.unit_roundoff
    if path == "elementwise":
        return Tolerance(ELEMENTWISE * u32, u if u > u32 else ELEMENTWISE * u32)
    if path == "P1":
        return Tolerance(2 * u + (6 + sqrt(k)) * u32, u)
    if path == "P2":
        return Tolerance((6 + sqrt(k)) * u32, u)
    raise ValueError(path)

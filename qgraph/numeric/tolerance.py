"""Every tolerance, from (dtype, length of the sums, path of the computation): one function, four checks.

The element bounds are those of the standard error analysis, with the probabilistic (6 + sqrt K) u32 in place
of the worst case K u32, u being the unit roundoff (float32 2^-24, float16 2^-11, bfloat16 2^-8). `A` is the
product of the magnitudes of the operands, |X| |W|, for an affine weight |X| (|scales| q + |biases|): the
error of a sum is relative to it, and with cancellation A is far larger than the result `Y`.

A loose element bound and random data together hide a bad accumulator, so there are four checks: every
element; the relative Frobenius norm; the worst row, which shows one bad row or tile; and exact data (ones,
one-hot rows, powers of two), which must come out exact and is a matter of the data, not of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np

from qgraph.ir.dtypes import F32, DType

Path = Literal["elementwise", "composed", "P1", "P2", "lora", "graph", "model", "reference"]

# Roundings on the way of one element: functions of libm and of MLX's vector code are good to a few ulp.
ELEMENTWISE = 16
# A norm of fewer elements than this fluctuates as much as they do; the element bound speaks for them.
ROW = 8


@dataclass(frozen=True)
class Tolerance:
    """What may differ: ``terms * A + result * |Y|`` in an element, `frobenius` in the norm of all.

    `k` is the length of the sums: the norm is relative to the larger of |Y| and A / sqrt(k), which are
    of one size for independent terms; with cancellation the second is what the error is relative to.
    """

    terms: float
    result: float
    frobenius: float
    k: int = 1

    def allows(self, found: Any, exact: Any, magnitude: Any = 0.0) -> Any:
        """Where `found` is near enough to `exact`; NaN and infinities must be equal."""
        found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
        with np.errstate(invalid="ignore"):  # 0 * inf and inf - inf: such elements must be equal
            limit = self.terms * np.asarray(magnitude, np.float64) + self.result * np.abs(exact)
            near = np.isfinite(exact) & (np.abs(found - exact) <= limit)
        return near | (found == exact) | (np.isnan(found) & np.isnan(exact))

    def problem(self, found: Any, exact: Any, magnitude: Any = 0.0) -> str:
        """Which of the three checks on values `found` fails, and by how much; empty if none.

        >>> from qgraph.ir.dtypes import BF16
        >>> exact = np.ones((4, 64))
        >>> tolerance(BF16, 64, "P2").problem(exact * (1 + 2.0**-9), exact, exact)
        ''
        >>> tolerance(BF16, 64, "P2").problem(exact * (1 + 2.0**-6), exact, exact).split(":")[0]
        'element (0, 0)'
        """
        found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
        if found.shape != exact.shape:
            return f"the shape is {found.shape}, expected {exact.shape}"
        near = self.allows(found, exact, magnitude)
        if not np.all(near):
            at = tuple(int(i) for i in np.argwhere(~near)[0])
            shown = f"found {found[at]!r}, expected {exact[at]!r}"
            return f"element {at}: {shown} ({np.sum(~near)} beyond {self})"
        finite = np.isfinite(exact)
        error = np.where(finite, found, 0.0) - np.where(finite, exact, 0.0)
        scale = np.where(finite, np.broadcast_to(magnitude, exact.shape), 0.0) / sqrt(self.k)
        size = np.where(finite, np.abs(exact), 0.0)
        whole = _ratio(error, size, scale, axis=None)
        if exact.size >= ROW and whole > self.frobenius:
            return f"relative Frobenius error {whole:.3g} beyond {self.frobenius:.3g}"
        if exact.ndim > 1 and exact.shape[-1] >= ROW:
            rows = _ratio(error, size, scale, axis=-1)
            if np.max(rows, initial=0.0) > 2 * self.frobenius:
                at = tuple(int(i) for i in np.unravel_index(int(np.argmax(rows)), rows.shape))
                return f"row {at}: relative error {rows[at]:.3g} beyond {2 * self.frobenius:.3g}"
        return ""


def _ratio(error: Any, size: Any, scale: Any, axis: int | None) -> Any:
    """The norm of the error, relative to the larger norm of the two sizes."""
    of = np.maximum(np.linalg.norm(size, axis=axis), np.linalg.norm(scale, axis=axis))
    norm = np.linalg.norm(error, axis=axis)
    return np.where(norm == 0, 0.0, norm / np.where(of == 0, np.finfo(np.float64).tiny, of))


def tolerance(dtype: DType, k: int = 1, path: Path = "elementwise") -> Tolerance:
    """The tolerance of a result of `dtype` whose sums have `k` terms.

    Paths:
        elementwise: a few roundings in float32 and one to dtype.
        composed: a function that MLX composes of a few ops, each of which rounds to dtype.
        P1: the weights dequantized to dtype, then a product with float32 sums.
        P2: everything in float32 and one rounding to dtype: what qgraph promises on every device.
        lora: a P2 base, and a low-rank branch whose two products and scale each round to dtype.
        graph: a few such steps in a row; A is the largest element of the result.
        model: logits of a whole model in float32 against another implementation of it; A is their root
            mean square.
        reference: two evaluations of one meaning in float64, in another order; A as for graph.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 3.1; Higham and Mary (2019) for sqrt K.

    >>> tolerance(F32, 64, "P2").terms == 14 * 2.0**-24
    True
    """
    u, u32 = dtype.unit_roundoff, F32.unit_roundoff
    k = max(1, k)
    root = sqrt(k)
    if path == "elementwise":
        worst = u if u > u32 else ELEMENTWISE * u32
        return Tolerance(ELEMENTWISE * u32, worst, ELEMENTWISE * u32 + worst, k)
    if path == "composed":
        return Tolerance(4 * max(u, u32), 4 * max(u, u32), 4 * max(u, u32), k)
    if path == "P1":
        return Tolerance(2 * u + (6 + root) * u32, u, 4 * u + root * u32, k)
    if path == "P2":
        return Tolerance((6 + root) * u32, u, u + root * u32, k)
    if path == "lora":
        return Tolerance(3 * u + (6 + root) * u32, u, 3 * u + root * u32, k)
    whole = {"graph": max(4 * u, 64 * u32), "model": 1e-4, "reference": 1e-9}[path]
    return Tolerance(whole, 0.0, whole, k)

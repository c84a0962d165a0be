"""x / sqrt(mean(x²) + eps), cast back, times a weight → rms_norm.

MLX writes this on a CPU; users write it with the weight before or after the cast, or as 1 + w (Gemma).
"""

from __future__ import annotations

import qgraph as qg
from qgraph_passes.raise_fast.form import Form, Raised, Search
from qgraph_passes.raise_fast.rows import ROOTS, affine, normed, operand, same_rows, vector
from qgraph_passes.raise_fast.walk import KERNELS, Path, is_squared, mean_of, uncast


class RaiseRmsNorm(Form):
    """x * rsqrt(mean(x * x) + eps) * w → rms_norm."""

    anchors = ROOTS
    size = 7

    def find(self, s: Search) -> Raised | None:
        found = normed(s)
        if found is None:
            return None
        mean = mean_of(found.statistic, found.path)
        if mean is None:
            return None
        squares, axes = mean
        squared = is_squared(Path().strip(squares))
        if squared is None:
            return None
        s.inner(squares, *found.path.values)
        core, shape = uncast(squared), found.out.type.shape
        s.require(same_rows(found, squared), "what is divided is not what was squared", found.rows)
        s.require(core.type.dtype.name in KERNELS, f"there is no kernel for {core.type.dtype}", core)
        s.require(axes == (core.type.ndim - 1,), f"the mean is over axes {axes}, not the last one", squares)
        aligned = core.type.shape == shape and found.path.aligned(shape, axes)
        s.require(aligned, "the mean of a row does not meet that row", found.out)
        after = affine(s, found, core, with_bias=False)
        s.private(after.root)
        return Raised(
            after.root,
            lambda now: qg.rms_norm(operand(now, core, after), vector(now, after.weight), found.eps),
        )

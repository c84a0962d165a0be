"""What an index out of range means: the ops that index by arrays, and their meaning in the reference.

Reading gives `missing`, writing writes nothing; negative indices count from the end. MLX checks none of
it and would read and write other memory: `qgraph.rewrite.guard` puts this meaning into the graph.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from qgraph._errors import DTypeError
from qgraph.ir.dtypes import BOOL, DType, int_range
from qgraph.ir.op import Op, Types
from qgraph.ir.types import TensorType


class Indexed(Op):
    """An op with operands that hold indices. Out of range they read `missing`, or write nothing."""

    writes: ClassVar[bool] = False
    from_the_end: ClassVar[bool] = True  # MLX's kernel counts negative indices from the end

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """For every operand that holds indices: the axis of operand 0 that they index, and its size.

        The axis means something for ops that write only.
        """
        raise NotImplementedError

    def behind(self, inputs: Types) -> int:
        """How many axes of the result stand behind those of the indices; for ops that read."""
        raise NotImplementedError


def missing(dtype: DType) -> float | int | bool:
    """What reading out of range gives: a number that shows, and that as an index is out of range again.

    >>> from qgraph.ir.dtypes import F32, I32, U8
    >>> missing(F32), missing(I32), missing(U8)
    (nan, -2147483648, 255)
    """
    if dtype is BOOL:
        return True
    if not dtype.is_int:
        return float("nan")
    low, high = int_range(dtype)
    return low if low < 0 else high


def check_indices(op: str, t: TensorType) -> None:
    """Refuse indices that are not integers."""
    if not t.dtype.is_int:
        hint = "choose elements with qg.where(mask, x, y)" if t.dtype.name == "bool" else "cast with .astype"
        raise DTypeError(f"{op}: the indices are {t.dtype}, not integers", fix=hint)


def in_range(indices: Any, size: int) -> tuple[Any, Any]:
    """In the reference: indices counted from the start, 0 for those out of range; and which are in range."""
    valid = (indices >= -size) & (indices < size)
    safe: Any = np.where(valid, indices, 0).astype(np.int64)
    return safe % max(size, 1), valid


def read(found: Any, valid: Any, behind: int) -> Any:
    """In the reference: `found` where the index was valid, else `missing`; `behind` as `Indexed.behind`."""
    kind = np.asarray(found).dtype
    fill: Any = np.nan if kind.kind in "fc" else True
    if kind.kind in "iu":
        fill = np.iinfo(kind).min or np.iinfo(kind).max
    where = np.reshape(valid, (*np.shape(valid), *[1] * behind))
    return np.where(where, found, np.asarray(fill, kind))

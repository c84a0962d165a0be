"""Indexing."""

from __future__ import annotations

from typing import Any

from qgraph.ops.dispatch import Array, ArrayLike


class At:
    """An updated copy."""

    def __init__(self, a: ArrayLike) -> None:
        self.a = a


def getitem(a: ArrayLike, index: Any) -> Array:
    """Placeholder."""
    raise NotImplementedError

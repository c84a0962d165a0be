"""Flat names and nested parameters: `model.layers.0.mlp.weight` and a tree of dicts and lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx.utils import tree_unflatten

_MAX_PARTS = 64  # tree_unflatten recurses
_MAX_INDEX = 100_000  # and fills the gaps of a list


def nest(flat: Mapping[str, object], refuse: Callable[[str, str], Exception]) -> Any:
    """The tree of flat names, as `mlx.utils.tree_unflatten` makes it.

    Parts that are all numbers make a list. Errors: whatever `refuse(name, cause)` returns is
    raised, for names that have no tree: one tensor inside another, or a huge list index.

    >>> nest({"layers.0.w": 1, "layers.1.w": 2, "norm": 3}, lambda name, cause: ValueError(cause))
    {'layers': [{'w': 1}, {'w': 2}], 'norm': 3}
    """
    groups: set[str] = set()
    for name in flat:
        parts = name.split(".")
        cause = _bad_part(parts)
        if cause:
            raise refuse(name, cause)
        groups.update(".".join(parts[:n]) for n in range(1, len(parts)))
    for name in flat:
        if name in groups:
            raise refuse(name, "is a tensor and has tensors inside it")
    return tree_unflatten(list(flat.items()))


def _bad_part(parts: list[str]) -> str | None:
    if len(parts) > _MAX_PARTS:
        return f"the name has more than {_MAX_PARTS} parts"
    for part in parts:
        if not part:
            return "the name has an empty part"
        if part.isascii() and part.isdigit():
            if len(part) > 6 or int(part) > _MAX_INDEX:
                return f"the name has a list index above {_MAX_INDEX}"
            if part != str(int(part)):
                return "the name has a list index with leading zeros"
        elif part.lstrip("+-").replace("_", "").isdecimal():
            return "the name has a number that is not a plain list index"
    return None

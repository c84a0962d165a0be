"""Flat names and nested parameters: `model.layers.0.mlp.weight` and a tree of dicts and lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx.utils import tree_unflatten

_MAX_PARTS = 32  # tree_unflatten recurses, and makes a dict for every part
_MAX_INDEX = 100_000
_MAX_ITEMS = 1_000_000  # of all lists together: tree_unflatten fills their gaps


def nest(flat: Mapping[str, object], refuse: Callable[[str, str], Exception]) -> Any:
    """The tree of flat names, as `mlx.utils.tree_unflatten` makes it.

    Parts that are all numbers make a list. Errors: whatever `refuse(name, cause)` returns is
    raised, for names that have no tree: one tensor inside another, or huge list indices.

    >>> nest({"layers.0.w": 1, "layers.1.w": 2, "norm": 3}, lambda name, cause: ValueError(cause))
    {'layers': [{'w': 1}, {'w': 2}], 'norm': 3}
    """
    lengths: dict[int, int] = {}  # of each list, by the hash of its path: paths can be long
    items = 0
    for name in flat:
        cause = _bad_name(name)
        if cause:
            raise refuse(name, cause)
        at = -1
        for part in name.split("."):
            inside, at = name[: max(at, 0)], at + 1 + len(part)
            if at < len(name) and name[:at] in flat:
                raise refuse(name[:at], "is a tensor and has tensors inside it")
            index = _as_index(part)
            if index is not None:
                before = lengths.get(hash(inside), 0)
                lengths[hash(inside)] = max(before, index + 1)
                items += max(0, index + 1 - before)
        if items > _MAX_ITEMS:
            raise refuse(name, f"the list indices up to here make more than {_MAX_ITEMS} items")
    return tree_unflatten(list(flat.items()))


def _bad_name(name: str) -> str | None:
    if name.count(".") >= _MAX_PARTS:
        return f"the name has more than {_MAX_PARTS} parts"
    for part in name.split("."):
        if not part:
            return "the name has an empty part"
        number = _as_index(part)
        if number is not None and str(number) != part:
            return "the name has a number that is not a plain list index"
        if number is not None and number > _MAX_INDEX:
            return f"the name has a list index above {_MAX_INDEX}"
    return None


def _as_index(part: str) -> int | None:
    """What tree_unflatten takes the part for: it asks `int`, which reads " 1", "01", "1_0" and "+1", too."""
    try:
        return int(part)
    except ValueError:  # a name, or thousands of digits, which int refuses
        return None

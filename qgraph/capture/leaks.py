"""Modules that a captured function writes into get back what they held.

``model.update(params)`` with traced arrays would leave the model with arrays that have no numbers, for good.
Modules are found as they are written to, since a function may reach them in ways that nobody can follow.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from qgraph.capture.records import CAPTURING
from qgraph.capture.weights import Weights


@contextmanager
def modules_restored() -> Generator[None]:
    """Undo what this thread writes into `mlx.nn` modules meanwhile."""
    kind: Any = import_module("mlx.nn").Module
    thread = threading.get_ident()
    kept: list[tuple[Any, dict[Any, Any]]] = []
    seen: dict[int, Any] = {}

    def keep(holder: Any) -> None:
        if threading.get_ident() == thread and id(holder) not in seen:
            seen[id(holder)] = holder
            kept.append((holder, dict(holder)))

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        for holder in Weights(self).holders():
            if isinstance(holder, dict):
                keep(holder)
        return real_update(self, *args, **kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        keep(self)
        real_set(self, name, value)

    with CAPTURING:
        real_update, real_set = kind.update, kind.__setattr__
        kind.update, kind.__setattr__ = update, set_attribute
        try:
            yield
        finally:
            kind.update, kind.__setattr__ = real_update, real_set
            for holder, items in kept:
                if items.keys() != dict(holder).keys() or any(holder[k] is not x for k, x in items.items()):
                    dict.clear(holder)
                    dict.update(holder, items)

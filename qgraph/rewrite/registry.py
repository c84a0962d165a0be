"""The passes by name: registered in this process, or found through the entry points `qgraph.passes`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from qgraph._errors import RuleError
from qgraph.rewrite.passes import Pass
from qgraph.rewrite.rule import Rule

T = TypeVar("T", bound=type[Rule] | type[Pass])

_passes: dict[str, type[Pass]] = {}
_discovered = False
_discovering = threading.RLock()  # a thread that asks while another one loads waits for all of them


def register(name: str) -> Callable[[T], T]:
    """Make a Rule or a Pass available to pipelines under `name`.

    Errors: RuleError when another class has the name.

    >>> import qgraph as qg
    >>> @qg.register("drop-double-negation")
    ... class DropDoubleNegation(qg.Rule):
    ...     def pattern(self, x): return -(-x)
    ...     def rewrite(self, m, x): return x
    """

    def add(cls: T) -> T:
        cls.name = name
        made: Any = _pass_of(cls) if issubclass(cls, Rule) else cls
        _add(made, replace=_passes.get(name))
        return cls

    return add


def _pass_of(rule: type[Rule]) -> type[Pass]:
    """The pass that applies one rule."""
    body = {"name": rule.name, "rules": (rule,), "__module__": rule.__module__, "__doc__": rule.__doc__}
    return type(rule.__name__, (Pass,), body)


def _add(made: type[Pass], replace: type[Pass] | None) -> None:
    where = (made.__module__, made.__qualname__)
    if replace is not None and (replace.__module__, replace.__qualname__) != where:
        raise RuleError(
            f"two passes are named {made.name!r}: {replace.__module__}.{replace.__qualname__} and "
            f"{made.__module__}.{made.__qualname__}",
            fix="rename one of them",
        )
    _passes[made.name] = made


def passes() -> dict[str, type[Pass]]:
    """All passes by name; the installed distributions are asked once."""
    global _discovered
    with _discovering:
        if not _discovered:
            for point in entry_points(group="qgraph.passes"):
                for made in point.load():
                    _add(made, _passes.get(made.name))
            _discovered = True
        return dict(_passes)


def pass_named(name: str) -> type[Pass]:
    """The pass called `name`. Errors: RuleError that lists what there is."""
    found = passes().get(name)
    if found is None:
        known = ", ".join(sorted(_passes)) or "none: is the package qgraph_passes installed?"
        raise RuleError(f"no pass is named {name!r}", fix=f"known passes: {known}")
    return found

"""Is a function a function? Two traces of it with the same arguments must give the same graph."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np

from qgraph._errors import TraceError
from qgraph.ir.digest import digest, node_digest
from qgraph.ir.graph import Graph, Node
from qgraph.quant import QuantizedTensor


@dataclass(frozen=True)
class Traced:
    """What a trace gave: the graph, the arrays of its captured inputs, and the tree that was returned."""

    graph: Graph
    captures: tuple[Any, ...]
    spec: list[Any]


class HiddenDraws:
    """The generators behind mx.random, random and numpy.random: has anybody drawn from them since?"""

    def __init__(self) -> None:
        self._before = _states()

    def happened(self, made: Iterable[Any]) -> bool:
        """Whether one of them moved; `made` are the arrays that the function made of nothing it was given.

        Another thread may have moved it, and an array may come from an explicit key: a second trace tells.
        """
        mlx, *others = _states()
        if mlx is not self._before[0] or others != self._before[1:]:
            return True
        return not _in_main_thread() and any(map(_is_drawn, made))


def _states() -> list[Any]:
    name, keys, *position = np.random.get_state()
    # To look at MLX's state in another thread than the main one makes the process abort when it ends.
    key = cast(Any, mx.random.state)[0] if _in_main_thread() else None
    return [key, random.getstate(), (name, np.asarray(keys).tobytes(), position)]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_drawn(x: Any) -> bool:
    """Whether random bits are among what an array, not yet evaluated, is computed from."""
    if not isinstance(x, mx.array):
        return False
    text = io.StringIO()
    mx.export_to_dot(text, x)
    return "RandomBits" in text.getvalue()


def refuse_difference(name: str, one: Traced, two: Traced) -> None:
    """Errors: TraceError with the first node in which two traces of the function `name` differ."""
    found = _difference(one, two)
    if found is None:
        return
    what, node = found
    raise TraceError(
        f"{name} is not a function of its arguments: {what}",
        node=str(node.op) if node else None,
        where=node.origin.source.sentence() if node else None,
        fix="the time, random numbers, files and the environment are read once, when the function is traced: "
        "pass what changes as an argument; draw with qg.random and a key",
    )


def _difference(one: Traced, two: Traced) -> tuple[str, Node | None] | None:
    """What differs, and at which node of the second trace."""
    for a, b in zip(one.graph.nodes, two.graph.nodes, strict=False):
        if node_digest(a) != node_digest(b):
            return f"traced twice, it made {_shown(a)}, then {_shown(b)}", b
    longest = max((one, two), key=lambda t: len(t.graph.nodes)).graph.nodes
    if len(one.graph.nodes) != len(two.graph.nodes):
        extra = longest[min(len(one.graph.nodes), len(two.graph.nodes))]
        return f"traced twice, one of the traces made {_shown(extra)} too", extra
    captured = two.graph.inputs[len(two.graph.inputs) - len(two.captures) :]
    for a, b, value in zip(one.captures, two.captures, captured, strict=True):
        if a is not b and not _equal(a, b):
            return f"traced twice, it used two different arrays {value.type} made inside", value.node
    if one.spec != two.spec or digest(one.graph) != digest(two.graph):
        return "traced twice, it returned two different trees", None
    return None


def _shown(node: Node) -> str:
    return f"{node.op} : {', '.join(map(str, node.types))}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, QuantizedTensor):
        return all(_equal(x, y) for x, y in zip(a.components(), b.components(), strict=True))
    try:
        return bool(mx.array_equal(a, b, equal_nan=True).item())
    except ValueError:  # inside a transformation of MLX, which evaluates nothing
        return False

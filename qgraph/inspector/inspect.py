"""`qg.inspect`: one run of the pipeline, with every view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

from qgraph._errors import QGraphError
from qgraph.inspector.dump import render
from qgraph.inspector.part import part_of
from qgraph.inspector.summary import Summary, summarize
from qgraph.inspector.why import explain
from qgraph.ir.graph import Graph
from qgraph.rewrite import Report, Result


@runtime_checkable
class Compiled(Protocol):
    """What `qg.jit` makes, and `qg.lm.load`: something that tells what its passes did."""

    def result(self, *args: Any, **kwargs: Any) -> Result:
        """The pipeline run for these arguments."""
        ...


_jit: list[Callable[[Callable[..., Any]], Compiled]] = []


def install_jit(jit: Callable[[Callable[..., Any]], Any]) -> None:
    """Set how a plain function is compiled; called once, by `qgraph._jit`."""
    _jit[:] = [jit]


def compiled(function: Any) -> Compiled:
    """`function` itself if it tells what its passes did, else ``qg.jit(function)``.

    Errors: QGraphError for what is not a function.
    """
    function = getattr(function, "qgraph", function)  # of an optimized module
    if isinstance(function, Compiled):
        return function
    if not callable(function):
        raise QGraphError(
            f"cannot inspect a {type(function).__name__}", fix="pass a function, and its arguments"
        )
    return _jit[0](cast("Callable[..., Any]", function))


class Inspection:
    """The pipeline run of one function for one kind of arguments; made by `qg.inspect`."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def summary(self) -> Summary:
        """What the passes changed, in one screen."""
        return summarize(self.result)

    def graph(self, after: str = "", scope: str = "") -> Graph:
        """The graph after the named pass, after all by default; ``"trace"`` is the one before all.

        With `scope` one module of it: its name, or a pattern as in ``layers.*.attn``.
        Errors: RuleError for a pass that did not run, QGraphError for a module that is not there.
        """
        graph = self.result.after(after) if after else self.result.graph
        return part_of(graph, scope) if scope else graph

    def dump(self, format: str = "text", after: str = "", scope: str = "") -> str:
        """The graph, or one module of it, as "text", "json" or "dot"."""
        return render(self.graph(after, scope), format)

    def report(self) -> Report:
        """What every use of a quantized value became, or why it did not."""
        return self.result.report

    def why(self, rule: str = "", scope: str = "") -> str:
        """The report as text; with `rule`, where that rule nearly fired.  Errors: RuleError."""
        return explain(self.result, rule, scope)

    def __repr__(self) -> str:
        return str(self.summary())


def inspect(function: Any, *args: Any, **kwargs: Any) -> Inspection:
    """Trace and rewrite `function` for these arguments, and show what happened. Nothing is run.

    `function` is jitted, or plain and then jitted by the defaults.  Errors: as tracing it.

    >>> import mlx.core as mx, qgraph as qg
    >>> found = inspect(lambda x, w: x @ w.T, mx.ones((1, 64)), qg.quantize(mx.ones((32, 64))))
    >>> found.report().counts(), found.graph().histogram()
    ({'quantized_matmul': 1}, {'quantized_matmul': 1})
    """
    return Inspection(compiled(function).result(*args, **kwargs))

"""Pipelines: passes in order, as text that parses back, run with verification and a history."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from time import perf_counter
from typing import Any

from qgraph._errors import QGraphError, RuleError, VerifyError
from qgraph.ir.digest import digest
from qgraph.ir.graph import Graph
from qgraph.ir.verify import verify
from qgraph.rewrite.context import Context
from qgraph.rewrite.passes import Pass
from qgraph.rewrite.registry import pass_named
from qgraph.rewrite.report import Report, make_report

DEFAULT = (
    "canonicalize,raise-fast,fold-transpose,quantize-dot,quantize-take,fuse-lora,share-rope,turn-dot,"
    "guard-indices,legalize,fuse-elementwise"
)

NumericCheck = Callable[[Graph, Graph, str, bool], None]
_numeric: list[NumericCheck] = []


def install_numeric_check(check: NumericCheck) -> None:
    """Set what ``QGRAPH_VERIFY=2`` and ``3`` run on the graphs around a pass; `qgraph.numeric` does."""
    _numeric[:] = [check]


@dataclass(frozen=True)
class Stage:
    """One pass of a run: the graph after it, whether it changed anything, and what it cost."""

    name: str
    graph: Graph
    changed: bool
    seconds: float


@dataclass(frozen=True)
class Result:
    """A run of a pipeline: the graph, every stage, and the report."""

    before: Graph
    graph: Graph
    history: tuple[Stage, ...]
    context: Context
    report: Report

    def after(self, name: str) -> Graph:
        """The graph after the last pass of that name ("trace": before all of them)."""
        if name == "trace":
            return self.before
        for stage in reversed(self.history):
            if stage.name == name:
                return stage.graph
        ran = ", ".join(s.name for s in self.history)
        raise RuleError(f"no pass {name!r} ran", fix=f"the passes that ran: trace, {ran}")


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    >>> str(Pipeline.parse("canonicalize, fuse-lora{reassociate=true}"))
    'canonicalize,fuse-lora{reassociate=true}'
    """

    passes: tuple[Pass, ...] = field(default=())

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read ``name{option=value, …},name…``."""
        items = re.findall(r"\s*([\w\-]+)\s*(?:\{([^}]*)\})?\s*(,|$)", text)
        again = ",".join(f"{n}{{{o}}}" if o else n for n, o, _ in items)
        if re.sub(r"\s", "", again) != re.sub(r"\s|\{\}", "", text):
            raise RuleError(
                f"cannot read the pipeline {text!r}", fix="write e.g. canonicalize,legalize{strict=true}"
            )
        pipeline = cls(tuple(_parse_pass(name, options) for name, options, _ in items if name))
        pipeline.check_order()
        return pipeline

    @classmethod
    def chosen(cls, text: str | None, strict: bool, activations: str) -> Pipeline:
        """The passes of `text`, or the default ones, with the options that callers of the compiler give."""
        passes = cls.parse(DEFAULT if text is None else text)
        if strict:
            passes = passes.with_option("strict", True)
        return passes.with_option("activations", activations) if activations else passes

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return ",".join(map(str, self.passes))

    def with_option(self, name: str, value: object) -> Pipeline:
        """The same passes with the option set wherever a pass has it.

        Errors: RuleError when none has it: an option that does nothing would look like one that holds.
        """
        having = [any(f.name == name for f in fields(p)) for p in self.passes]
        if not any(having):
            raise RuleError(
                f"no pass of {str(self)!r} has the option {name}", fix="add the pass that has it: legalize"
            )
        pairs = zip(self.passes, having, strict=True)
        return Pipeline(tuple(replace(p, **{name: value}) if has else p for p, has in pairs))

    def check_order(self) -> None:
        """Errors: RuleError when a pass stands before one that it must follow."""
        position = {p.name: i for i, p in enumerate(self.passes)}
        for i, p in enumerate(self.passes):
            for earlier in p.after:
                if position.get(earlier, -1) > i:
                    raise RuleError(f"{p.name} stands before {earlier}", fix=f"put {earlier} first")

    def run(self, graph: Graph, context: Context | None = None) -> Result:
        """Run every pass, verifying the graph after each that changed it.

        ``QGRAPH_VERIFY``: 0 nothing; 1 types and order of new nodes (default); 2 also every pass against
        the float64 reference on small graphs' inputs; 3 the same on every graph.
        """
        context = context or Context()
        context.traced = graph
        level = verify_level()
        history: list[Stage] = []
        current = graph
        for p in self.passes:
            start = perf_counter()
            after = _run_pass(p, current, context, history)
            changed = _check(p, current, after, level)
            current = after if changed else current
            history.append(Stage(p.name, current, changed, perf_counter() - start))
        return Result(graph, current, tuple(history), context, make_report(graph, current, context))


def verify_level() -> int:
    """``QGRAPH_VERIFY`` as a number from 0 to 3; 1 when unset."""
    text = os.environ.get("QGRAPH_VERIFY", "1")
    if text not in ("0", "1", "2", "3"):
        raise QGraphError(f"QGRAPH_VERIFY={text!r}", fix="set it to 0, 1, 2 or 3")
    return int(text)


def _run_pass(p: Pass, graph: Graph, context: Context, history: list[Stage]) -> Graph:
    try:
        after = p.run(graph, context)
    except Exception as error:  # of any kind: the note says whose it is
        ran = ", ".join(s.name for s in history) or "none"
        error.add_note(f"in pass {p.name}; passes before it: {ran}")
        raise
    if not isinstance(after, Graph):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RuleError(f"pass {p.name} returned {type(after).__name__}", fix="run returns a Graph")
    return after


def _check(p: Pass, before: Graph, after: Graph, level: int) -> bool:
    if after is before:
        return False
    changed = digest(after) != digest(before)
    if not changed or level == 0:
        return changed
    try:
        verify(after, frozenset(before.nodes))
        _same_interface(before, after)
    except VerifyError as error:
        error.add_note(f"the graph after pass {p.name} is not valid")
        raise
    if level >= 2 and _numeric:
        _numeric[0](before, after, p.name, p.exact)
    return True


def _same_interface(before: Graph, after: Graph) -> None:
    if before.inputs != after.inputs:
        raise VerifyError("a pass changed the inputs of the graph", fix="keep graph.inputs")
    types = [[str(v.type) for v in g.outputs] for g in (before, after)]
    if types[0] != types[1]:
        raise VerifyError(f"a pass changed the types of the outputs from {types[0]} to {types[1]}")


def _parse_pass(name: str, options: str) -> Pass:
    kind = pass_named(name)
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for item in filter(None, (o.strip() for o in options.split(","))):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in known or not equals:
            raise RuleError(
                f"{name} has no option {item!r}", fix=f"its options: {', '.join(known) or 'none'}"
            )
        values[key] = _option(name, key, text, known[key].default)
    return kind(**values)


def _option(name: str, key: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise RuleError(f"{name}: {key}={text}", fix=f"write {key}=true or {key}=false")
        return text.lower() == "true"
    try:
        return type(default)(text) if isinstance(default, (int, float)) else text
    except ValueError:
        raise RuleError(f"{name}: {key}={text} is not a number", fix=f"e.g. {key}={default}") from None

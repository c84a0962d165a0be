"""Reductions, running results and sorting. MLX keeps the axes that it reduces; a squeeze follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from qgraph.capture.primitives.table import Primitive, primitive
from qgraph.ir import Value
from qgraph.ir.op import Op
from qgraph.ops.elementwise import Cast
from qgraph.ops.positions import Argmax, Argmin
from qgraph.ops.reduce import Softmax
from qgraph.ops.sorting import Argpartition, Argsort, Partition, Sort

# By the number with which MLX encodes which function it is.
REDUCTIONS: tuple[str, ...] = ("all", "any", "sum", "prod", "min", "max")
SCANS: tuple[str, ...] = ("cummax", "cummin", "cumsum", "cumprod", "logcumsumexp")


def of_family(name: str, *parameters: Any) -> Op:
    """The op of a name with its parameters in order."""
    make = cast(Callable[..., Op], Op.registry[name])
    return make(*parameters)


@primitive("Reduce")
def reduce(p: Primitive) -> Value:
    """[function, axes]."""
    function, axes = p.arguments
    out = p.add(of_family(REDUCTIONS[int(function)], tuple(sorted(axes)), True), *p.inputs)
    dtype = p.outputs[0].dtype
    return out if out.type.dtype is dtype else p.add(Cast(dtype), out)


@primitive("LogSumExp")
def logsumexp(p: Primitive) -> Value:
    """Over the last axis."""
    return p.add(of_family("logsumexp", (p.inputs[0].type.ndim - 1,), True), *p.inputs)


@primitive("ArgReduce")
def arg_reduce(p: Primitive) -> Value:
    """[minimum or maximum, axis]."""
    largest, axis = p.arguments
    return p.add((Argmax if largest else Argmin)(axis, True), *p.inputs)


@primitive("Scan")
def scan(p: Primitive) -> Value:
    """[function, axis, from the end, whether an element counts for itself]."""
    function, axis, reverse, inclusive = p.arguments
    return p.add(of_family(SCANS[int(function)], axis, bool(reverse), bool(inclusive)), *p.inputs)


@primitive("Softmax")
def softmax(p: Primitive) -> Value:
    """[precise], over the last axis."""
    return p.add(Softmax((p.inputs[0].type.ndim - 1,), bool(p.arguments[0])), *p.inputs)


@primitive("Sort")
def sort(p: Primitive) -> Value:
    """[axis]."""
    return p.add(Sort(p.arguments[0]), *p.inputs)


@primitive("ArgSort")
def argsort(p: Primitive) -> Value:
    """[axis]."""
    return p.add(Argsort(p.arguments[0]), *p.inputs)


@primitive("Partition")
def partition(p: Primitive) -> Value:
    """[position, axis]."""
    return p.add(Partition(*p.arguments), *p.inputs)


@primitive("ArgPartition")
def argpartition(p: Primitive) -> Value:
    """[position, axis]."""
    return p.add(Argpartition(*p.arguments), *p.inputs)

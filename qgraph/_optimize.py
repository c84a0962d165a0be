"""`qg.optimize`: unmodified MLX code, captured by MLX's own tracer, rewritten, run in its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from qgraph._errors import QGraphError, TraceError
from qgraph._jit import Call, JitFunction, labels_of
from qgraph._modules import optimize_module
from qgraph.capture.capture import capture
from qgraph.capture.leaks import modules_restored
from qgraph.ir import Builder
from qgraph.ir.origin import depth_of_user
from qgraph.ops.dispatch import type_of
from qgraph.rewrite import Pipeline
from qgraph.trace.tree import flatten, unflatten
from qgraph.trace.twice import Traced


class OptimizedFunction(JitFunction):
    """A function of MLX's arrays, compiled by qgraph; made by `qg.optimize`. Call it as the original."""

    def __init__(
        self, function: Callable[..., Any], pipeline: Pipeline, maxsize: int, fallback: bool = False
    ) -> None:
        super().__init__(function, pipeline, maxsize)
        self.fallback = fallback
        self._gave_up = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; unevaluated MLX arrays come back."""
        if self._gave_up:
            return self.function(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except TraceError as error:
            if not self.fallback:
                raise
            self._gave_up = True
            say_fallback(self._name, error)
            return self.function(*args, **kwargs)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original function."""
        return self.function(*args, **kwargs)

    def _trace(self, call: Call, outer: list[Any]) -> Traced:
        builder = Builder()
        labels = labels_of(self.function, call.args, call.kwargs)
        inputs = [builder.input(n, type_of(x)) for n, x in zip(labels, call.leaves, strict=True)]
        spec: list[Any] = []

        def flat(*arrays: mx.array) -> list[mx.array]:
            args, kwargs = unflatten(["tuple", 2, *call.spec], list(arrays))
            leaves: list[mx.array] = []
            spec.clear()
            flatten(self.function(*args, **kwargs), leaves, spec)
            return leaves

        with modules_restored():
            captured = capture(flat, inputs, builder, outer=_evaluated(outer))
        return Traced(captured.graph, captured.captures, spec)


def _evaluated(outer: list[Any]) -> list[mx.array]:
    """The arrays that a function reads from outside, evaluated: lazy ones would be traced as well."""
    found = [x for x in outer if isinstance(x, mx.array)]
    mx.eval(found)
    return found


def say_fallback(name: str, error: TraceError) -> None:
    """The one warning of a function that runs as it is from now on."""
    warnings.warn(f"{name} runs without qgraph: {error}", stacklevel=depth_of_user())


def optimize(
    target: Any,
    /,
    *,
    pipeline: str | None = None,
    strict: bool = False,
    activations: str = "",
    fallback: bool = False,
    maxsize: int = 24,
) -> Any:
    """Compile code that was written for MLX and not for qgraph; what comes back is used as the original.

    `target` is a function of arrays and trees of them, an `mlx.nn.Module` (an mlx-lm model, dense or
    quantized), or the path of an ``.mlxfn`` file. The code is run once for every kind of arguments under
    MLX's own tracer, as `mx.compile` would; the graph is rewritten by qgraph's passes. QuantizedTensors may
    stand where a dense array is expected, among the arguments or as weights of the module.

    For a module an object of the same class comes back, which shares the module's attributes and children;
    ``fast.qgraph`` has graph, optimized, report, source, result, cache_info and clear_cache, as the functions
    that `qg.jit` makes. Weights are read at every call. mlx-lm's caches are updated as by the original.

    `pipeline` replaces the default passes; `strict` raises StrictError where a quantized operand would be
    unpacked; ``activations="int8"`` lets a CPU's native kernels round what they multiply packed weights by to
    8 bits, which is faster and less exact; `fallback` runs the original where it cannot be captured, and says
    so once; `maxsize` bounds the programs that are kept.
    Errors: TraceError for what cannot be captured, with the module and the line.

    >>> import mlx.core as mx, mlx.nn as nn, qgraph as qg
    >>> layer = nn.Linear(64, 32)
    >>> layer.weight = qg.quantize(layer.weight)
    >>> fast = qg.optimize(layer)
    >>> fast(mx.ones((1, 64))).shape, fast.qgraph.report(mx.ones((1, 64))).counts()
    ((1, 32), {'quantized_matmul': 1})
    """
    passes = Pipeline.chosen(pipeline, strict, activations)
    if isinstance(target, import_module("mlx.nn").Module):
        return optimize_module(target, passes, maxsize, fallback)
    if isinstance(target, (str, Path)):
        return OptimizedFunction(_imported(Path(target)), passes, maxsize, fallback)
    if not callable(target):
        raise QGraphError(
            f"cannot optimize a {type(target).__name__}",
            fix="pass a function, an mlx.nn.Module, or the path of an .mlxfn file",
        )
    return OptimizedFunction(target, passes, maxsize, fallback)


def _imported(path: Path) -> Callable[..., Any]:
    """The function in an .mlxfn file. Errors: QGraphError for a file that MLX cannot read."""
    if not path.is_file():
        raise QGraphError(f"{path.name}: no such file", fix="pass a file written by mx.export_function")
    try:
        function = cast(Any, mx.import_function(str(path)))
    except (RuntimeError, ValueError) as error:
        raise QGraphError(
            f"{path.name} is not a function that MLX can import: {error}", fix="export it again"
        ) from error

    def imported(*args: mx.array, **kwargs: mx.array) -> Any:
        return function(*args, **kwargs)

    imported.__name__ = path.stem
    return imported

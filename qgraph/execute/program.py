"""Programs: emitted source, loaded and wrapped in `mx.compile` where that pays."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any

import mlx.core as mx

from qgraph import kernels
from qgraph._errors import DTypeError, ShapeError
from qgraph.execute.emit import GUARD, Emitted, emit
from qgraph.execute.nonfinite import debugging, watched
from qgraph.execute.vmap import refuse_vmap
from qgraph.ir.dtypes import dtype_of
from qgraph.ir.graph import Graph
from qgraph.ir.op import NATIVE, Input
from qgraph.ir.types import TensorType
from qgraph.kernels.exporting import is_exporting
from qgraph.ops import random_bits, tiled

Flat = Callable[..., tuple[mx.array, ...]]


class Program:
    """A runnable graph: `run` takes flat arrays and gives flat arrays, unevaluated.

    `trusted` is the same without a check of the arrays, for a caller that knows their types. MLX checks
    little of them: it reads past the end of scales that have too few rows.
    """

    __slots__ = ("emitted", "graph", "trusted")

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.emitted = emit(graph)
        function = load(self.emitted)
        program: Flat = mx.compile(function) if compiling() else self._taped(function)
        self.trusted: Flat = watched(program, graph, load) if debugging() else program

    def _taped(self, function: Flat) -> Flat:
        """`function` without Python an op from its second call on, where there are native kernels.

        ``QGRAPH_COMPILE=0`` leaves it as it is, to be stepped through.
        """
        library = kernels.library()
        if library is None or os.environ.get("QGRAPH_COMPILE") == "0":
            return function
        tape: Flat = library.Taped(function)
        exported: list[Flat] = []

        def run(*arrays: mx.array) -> tuple[mx.array, ...]:
            if not is_exporting():
                return tape(*arrays)
            if not exported:
                exported.append(load(emit(self.graph, native=False)))
            return exported[0](*arrays)

        return run

    def run(self, *arrays: mx.array) -> tuple[mx.array, ...]:
        """The results for the components of the inputs in order (`TensorType.storage`).

        Errors: ShapeError, DTypeError for arrays that the types do not have.
        """
        self.check(arrays)
        return self.trusted(*arrays)

    def check(self, arrays: Sequence[mx.array]) -> None:
        """Raise unless there is one array of the right shape and dtype for every component of an input."""
        wanted = [(v, part) for v in self.graph.inputs for part in v.type.storage]
        if len(wanted) != len(arrays):
            parts = ", ".join(f"{len(v.type.storage)} for {v.type}" for v in self.graph.inputs)
            raise ShapeError(f"a program of {len(wanted)} arrays got {len(arrays)}", fix=f"pass {parts}")
        for (v, part), array in zip(wanted, arrays, strict=True):
            found = TensorType(tuple(array.shape), dtype_of(array.dtype))
            if found != TensorType(part.shape, part.dtype):
                kind = DTypeError if found.shape == part.shape else ShapeError
                label = v.op.label if isinstance(v.op, Input) else ""
                what = f"input {label!r}" + (f", {part.name} of {v.type}" if part.name else "")
                raise kind(
                    f"{what}: {found}, expected {TensorType(part.shape, part.dtype)}",
                    fix="pass the arrays that the type stores, see TensorType.storage",
                )

    @property
    def source(self) -> str:
        """The Python source that runs."""
        return self.emitted.source


def load(emitted: Emitted) -> Flat:
    """The function that `emitted` defines, its constants made."""
    functions = {random_bits.FUNCTION: random_bits.draw, tiled.FUNCTION: tiled.tiled_matmul}
    namespace: dict[str, Any] = {"mx": mx, NATIVE: kernels.library(), GUARD: refuse_vmap, **functions}
    exec(compile(emitted.source, "<qgraph program>", "exec"), namespace)
    constants = [namespace[name] for name, _ in emitted.constants]
    if constants and not _in_transformation(constants):
        mx.eval(*constants)
    return namespace["program"]


def _in_transformation(arrays: list[mx.array]) -> bool:
    """Whether MLX refuses to evaluate because a compile or vmap is being traced."""
    try:
        mx.eval(arrays[0])
    except ValueError:
        return True
    return False


def compiling() -> bool:
    """Whether programs go through `mx.compile` on the default device.

    ``QGRAPH_COMPILE=1`` and ``=0`` decide it. Unset: yes on a GPU; no on a CPU, where MLX runs a C++
    compiler for about half a second for every fused kernel that it has not met.
    """
    wanted = os.environ.get("QGRAPH_COMPILE", "")
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    if wanted not in ("", "auto"):
        return wanted != "0" and (on_gpu or cpu_kernels_are_safe())
    return on_gpu


@cache
def cpu_kernels_are_safe() -> bool:
    """Whether MLX's CPU kernel folder is ours alone; warns once when it is not.

    MLX loads libraries from ``TMPDIR/mlx`` without asking who wrote them.
    """
    if which("g++") is None and which("c++") is None:
        return False
    folder = Path(tempfile.gettempdir()) / "mlx"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if hasattr(os, "getuid") and stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
        if status.st_mode & 0o077:
            folder.chmod(0o700)
        return True
    warnings.warn(
        f"{folder} belongs to another user: programs run without mx.compile. "
        "Fix: set TMPDIR to a private folder",
        stacklevel=2,
    )
    return False

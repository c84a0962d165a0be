"""What MLX's tracer reports of a function: its primitives, its constants, and the names between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qgraph.ir.dtypes import dtype_of
from qgraph.ir.types import TensorType
from qgraph.kernels.exporting import exporting

Flat = Callable[..., Sequence[mx.array]]


@dataclass(frozen=True)
class Record:
    """One primitive: arrays by name, and its arguments as MLX encodes them."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: tuple[TensorType, ...]  # of the outputs
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Recording:
    """A function of arrays as MLX's tracer saw it. Equal computations are one, dead ones are gone."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, mx.array]
    records: tuple[Record, ...]  # operands first


# The tracer is told things that are global to the process: one capture at a time.
CAPTURING = threading.RLock()


def record(function: Flat, arrays: Sequence[mx.array]) -> Recording:
    """Trace `function`, which takes `arrays` one by one and returns a list of arrays. Nothing is evaluated.

    Source: mlx.core.export_function, whose callback reports a graph instead of writing a file.
    """
    found: dict[str, Any] = {}
    records: list[Record] = []

    def note(message: dict[str, Any]) -> None:
        if message["type"] == "primitive":
            records.append(_record(message))
        else:
            found[message["type"]] = message

    with _plain_tracing(), exporting():
        mx.export_function(note, function, tuple(arrays))
    return Recording(
        tuple(name for name, _, _ in found["inputs"]["inputs"]),
        tuple(name for name, _, _ in found["outputs"]["outputs"]),
        dict(found["constants"]["constants"]),
        tuple(records),
    )


def _record(message: dict[str, Any]) -> Record:
    outputs = message["outputs"]
    return Record(
        message["name"],
        tuple(name for name, _, _ in message["inputs"]),
        tuple(name for name, _, _ in outputs),
        tuple(TensorType(tuple(shape), dtype_of(dtype)) for _, shape, dtype in outputs),
        tuple(message["arguments"]),
    )


@contextmanager
def _plain_tracing() -> Generator[None]:
    """Without mx.compile: a compiled function of constants would be one opaque primitive."""
    was_on = _compile_is_on()
    mx.disable_compile()
    try:
        yield
    finally:
        if was_on:
            mx.enable_compile()


def _compile_is_on() -> bool:
    """Whether MLX compiles: it cannot be asked, but a compiled function is run by Python once only."""
    runs: list[int] = []

    def probe(x: mx.array) -> mx.array:
        runs.append(1)
        return x

    compiled: Any = mx.compile(probe)
    for _ in range(2):
        compiled(mx.zeros(1))
    return len(runs) == 1


def address(x: mx.array) -> int:
    """Where the numbers of an evaluated array lie: MLX reports constants as new Python objects.

    >>> x = mx.array([1, 2, 3])
    >>> address(x) == address(x[:])
    True
    """
    import numpy as np

    bits = x if x.dtype != mx.bfloat16 else x.view(mx.uint16)
    array: Any = np.array
    return array(bits, copy=False).__array_interface__["data"][0]

"""One result on every instruction set, with one thread and with two, and whether it is near enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.execute.reference import to_numpy
from qgraph.numeric import tolerance
from qgraph.ops.dispatch import type_of


def everywhere(native: ModuleType, build: Callable[[], mx.array]) -> Iterator[tuple[str, mx.array]]:
    """(instruction set, result of `build`) for each set; the threads must not change a bit of it."""
    instruction_set, threads = native.instruction_set(), native.threads()
    try:
        for name in native.instruction_sets():
            native.use(name)
            results = []
            for count in (1, 2):
                native.set_threads(count)
                results.append(build())
                mx.eval(results[-1])
            assert same_bits(*results), name
            yield name, results[0]
    finally:
        native.use(instruction_set)
        native.set_threads(threads)


def same_bits(a: mx.array, b: mx.array) -> bool:
    unsigned = mx.uint32 if a.dtype == mx.float32 else mx.uint16
    # Not a view: the result's memory may be in another order than its axes.
    return bool(mx.all(mx.contiguous(a).view(unsigned) == mx.contiguous(b).view(unsigned)))


def problem(found: mx.array, exact: Any, magnitude: Any, k: int) -> str:
    """What float32 sums of `k` terms and one rounding do not allow; empty if `found` is near enough."""
    limit = tolerance(type_of(found).dtype, k, "P2")
    if found.dtype == mx.float16:  # below 2^-14 its steps no longer shrink
        magnitude = magnitude + float(np.finfo(np.float16).smallest_subnormal) / limit.terms
    return limit.problem(to_numpy(found), exact, magnitude)

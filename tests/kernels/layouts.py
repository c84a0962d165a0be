"""Arrays of the same numbers that lie differently in memory, and every way to run a kernel on them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from types import ModuleType

import mlx.core as mx
import numpy as np

LAYOUTS = ("plain", "transposed", "reversed", "sliced", "strided", "broadcast")
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def laid_out(values: np.ndarray, layout: str, dtype: mx.Dtype = mx.float32) -> mx.array:
    """`values` as an array of `dtype`; "broadcast" repeats the first of the first axis.

    transposed: the last axis lies outermost. reversed: the axes before the last lie the other way round.
    sliced: a part of something larger, the last axis whole. strided: every second number of it.
    """
    n = values.ndim
    if layout == "broadcast":
        return mx.broadcast_to(mx.array(values[:1]).astype(dtype), values.shape)
    if layout in ("transposed", "reversed"):
        order = [n - 1, *range(n - 1)] if layout == "transposed" else [*reversed(range(n - 1)), n - 1]
        stored = mx.array(np.ascontiguousarray(values.transpose(order))).astype(dtype)
        return stored.transpose([order.index(i) for i in range(n)])
    if layout in ("sliced", "strided"):
        step = [2] * (n - 1) + [2 if layout == "strided" else 1]
        larger = np.full(
            [size * s + 3 for size, s in zip(values.shape, step, strict=True)], np.nan, np.float32
        )
        part = tuple(slice(1, 1 + size * s, s) for size, s in zip(values.shape, step, strict=True))
        larger[part] = values
        return mx.array(larger).astype(dtype)[part]
    return mx.array(values).astype(dtype)


def everywhere(native: ModuleType, call: Callable[[], mx.array]) -> Generator[tuple[str, mx.array]]:
    """The result of `call` by every instruction set; two threads must give the bits of one."""
    chosen, threads = native.instruction_set(), native.threads()
    try:
        for name in native.instruction_sets():
            native.use(name)
            results = []
            for n in (1, 2):
                native.set_threads(n)
                results.append(call())
                mx.eval(results)
            assert bits(results[0]) == bits(results[1]), f"{name}: two threads give something else than one"
            yield name, results[0]
    finally:
        native.use(chosen)
        native.set_threads(threads)


def bits(x: mx.array) -> bytes:
    """The numbers of an array as they are stored, in row-major order."""
    return np.array(x.view(mx.uint16) if x.dtype.size == 2 else x).tobytes()


def exactly(x: mx.array) -> np.ndarray:
    """An array's numbers in float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)

"""Arrays and weights of order 1 for the tests of the jit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import qgraph as qg


def weight(seed: int = 0, shape: tuple[int, ...] = (32, 64), **options: Any) -> qg.QuantizedTensor:
    return qg.quantize(mx.random.normal(shape, key=mx.random.key(seed)), **options)


def normal(*shape: int, seed: int = 7) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def first(x: mx.array) -> float:
    """The first element."""
    return x.reshape(-1)[0].item()


def together(bodies: list[Callable[[], Any]], patience: float = 60.0) -> list[Any]:
    """Results (or errors) of functions that start at once, each in a thread; a hang is a failure."""
    barrier = threading.Barrier(len(bodies))
    found: list[Any] = [None] * len(bodies)

    def work(i: int) -> None:
        try:
            barrier.wait()
            found[i] = bodies[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(bodies))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(patience)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    return found

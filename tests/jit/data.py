"""Arrays and weights of order 1 for the tests of the jit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg


def weight(seed: int = 0, shape: tuple[int, ...] = (32, 64), **options: Any) -> qg.QuantizedTensor:
    return qg.quantize(mx.random.normal(shape, key=mx.random.key(seed)), **options)


def normal(*shape: int, seed: int = 7) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))

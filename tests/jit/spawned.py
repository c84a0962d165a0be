"""What the processes of a pool run: to be imported, since they do not inherit it."""

from __future__ import annotations

import mlx.core as mx

import qgraph as qg


def work(n: int) -> float:
    return qg.jit(lambda x: qg.sum(x * 2))(mx.ones(n)).item()

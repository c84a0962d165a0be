"""Random words of a key, which all random numbers of MLX are made of; MLX has no function for them.

The generator is Threefry-2x32 with 20 rounds: a word pair for every pair of counters. Of n words, those at i
and h + i come from the counters (i, h + i), h being half of n, rounded up; for an odd n the middle one comes
from (its position, 0).  Source: Salmon and others, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import U32
from qgraph.ir.op import Op, Operand, Types
from qgraph.ir.types import Shape, TensorType

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
FUNCTION = "random_bits"  # what `draw` is called in programs


@dataclass(frozen=True)
class RandomBits(Op):
    """Random words; of several keys, an equal share of the words from each."""

    name = "random_bits"
    shape: tuple[int, ...] = ()
    flops_per_element = 20

    def infer(self, keys: TensorType) -> TensorType:
        """`shape`, u32."""
        if keys.dtype is not U32 or keys.shape[-1:] != (2,):
            raise DTypeError(
                f"random_bits: the keys are {keys}, not u32[…, 2]", fix="pass qg.random.key(seed)"
            )
        if not keys.size or prod(self.shape) % (keys.size // 2):
            raise ShapeError(f"random_bits: {self.shape} words from {keys.size // 2} keys")
        return TensorType(self.shape, U32)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """A call of `draw`."""
        return f"{FUNCTION}({operands[0]}, {self.shape})"

    def reference(self, keys: Any) -> Any:
        """The generator itself."""
        keys = np.asarray(keys, np.uint32).reshape(-1, 2)
        n = prod(self.shape) // len(keys)
        half, middle = (n + 1) // 2, n // 2
        first = np.arange(half, dtype=np.uint32)
        second = first + np.uint32(half)
        if n % 2:
            second[middle] = 0
        a, b = threefry(keys[:, :1], keys[:, 1:], first, second)
        return np.concatenate([a, b], 1)[:, :n].reshape(self.shape)


def threefry(k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """The two words of every pair of counters, in unsigned 32-bit arithmetic of NumPy or MLX."""
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for by in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << by) | (x1 >> (32 - by))) ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + (i + 1)
    return x0, x1


def draw(keys: mx.array, shape: Shape) -> mx.array:
    """The words from MLX's own generator, which `mx.random.split` gives in pairs.

    An odd number of words is one less than an even one, but for the middle word.

    >>> draw(mx.random.key(3), (4,)).tolist() == mx.random.split(mx.random.key(3), 2).reshape(-1).tolist()
    True
    """
    keys = keys.reshape(-1, 2)
    n = prod(shape) // keys.shape[0]
    drawn: list[mx.array] = []
    for k in range(keys.shape[0]):
        words = mx.random.split(keys[k], max(1, (n + 1) // 2)).reshape(-1)
        if n % 2:
            k0, k1 = keys[k, 0], keys[k, 1]
            zero = mx.array(0, mx.uint32)
            middle = threefry(k0, k1, mx.array(n // 2, mx.uint32), zero)[0]
            words = mx.concatenate([words[: n // 2], middle.reshape(1), words[n // 2 + 1 : n]])
        drawn.append(words[:n])
    return mx.concatenate(drawn).reshape(shape)

"""The reference on one set of inputs, with every value kept: graphs that share nodes share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from qgraph.execute.reference import round_to
from qgraph.ir import Graph, Node, Value
from qgraph.ir.dtypes import F32, DType
from qgraph.numeric import tolerance

# What MLX's functions are accurate relative to, where that is not the result: its erf to a few ulp of 1, a
# packed number s * q + b to those of its parts.
SCALES: dict[str, Callable[..., Any]] = {"erf": lambda x: 1.0, "gelu": np.abs}


def noise_of(dtype: DType) -> float:
    """What functions of a dtype may be off by; in 16 bit MLX composes some of a few that round."""
    return tolerance(dtype).terms if dtype.size > 2 else tolerance(dtype, path="composed").terms


class Evaluation:
    """Values of a graph and of what passes make of it, in float64.

    With `noise` (a seed and a sign), every float is disturbed by as much as arithmetic of its dtype might,
    and overflows where it does: what that does to the results is what a comparison with MLX has to allow.
    A `faithful` evaluation rounds every result to its dtype, the numbers of packed values too.
    """

    def __init__(
        self, inputs: dict[Value, Any], noise: tuple[int, int] | None = None, faithful: bool = False
    ) -> None:
        self.faithful = faithful
        self._noise = None if noise is None else np.random.default_rng(noise[0])
        self._sign = noise[1] if noise else 0
        self.values: dict[Value, Any] = {v: self._rounded(v, x) for v, x in inputs.items()}
        self.undefined = False  # a float became an integer that cannot hold it

    def outputs(self, graph: Graph) -> list[Any]:
        with np.errstate(all="ignore"):
            for node in graph.nodes:
                if node.outputs[0] not in self.values:
                    self._run(node)
        return [self.values[v] for v in graph.outputs]

    def _run(self, node: Node) -> None:
        operands = [self.values[v] for v in node.inputs]
        if node.op.name == "cast" and node.op.dtype.is_int:
            self.undefined |= _overflows(operands[0], node.op.dtype)
        made = self._meaning(node)(*operands)
        results: Iterable[Any] = made if len(node.outputs) > 1 else (made,)
        for v, x in zip(node.outputs, results, strict=True):
            size = SCALES[node.op.name](*operands) if node.op.name in SCALES else 0.0
            self.values[v] = self._rounded(v, np.asarray(x), size)

    def _meaning(self, node: Node) -> Callable[..., Any]:
        """The reference; of addmm in steps that round, where every op does."""
        if not self.faithful or node.op.name != "addmm":
            return node.op.reference
        dtype, op = node.outputs[0].type.dtype, node.op

        def steps(c: Any, a: Any, b: Any) -> Any:
            product = round_to(dtype, op.alpha * round_to(dtype, np.matmul(a, b)))
            return product + round_to(dtype, op.beta * np.asarray(c))

        return steps

    def _rounded(self, v: Value, x: Any, size: Any = 0.0) -> Any:
        if self.faithful:
            return round_to(v.type.dtype, x)
        largest = np.max(np.abs(x), initial=0.0) if v.type.packing else 0.0
        return self._disturbed(v, x, np.maximum(size, largest))

    def _disturbed(self, v: Value, x: Any, size: Any) -> Any:
        if self._noise is None or x.dtype.kind not in "fc":
            return x
        dtype = F32 if v.type.dtype.is_complex else v.type.dtype
        noise = self._noise.choice((-1, 1), x.shape) * self._noise.uniform(1 / 2, 1, x.shape)
        y = x + self._sign * noise_of(dtype) * np.maximum(np.abs(x), size) * noise
        # What may be on either side of 0 may be 0.
        x = np.where((x.real * y.real < 0) & (self._noise.random(x.shape) < 1 / 2), 0.0, y)
        return round_to(dtype, x) if x.dtype.kind == "f" else x


def _overflows(x: Any, dtype: Any) -> bool:
    if x.dtype.kind != "f":
        return False
    info = np.iinfo(dtype.mlx_name)
    return not bool(np.all((x > float(info.min) - 1) & (x < float(info.max))))

"""Compile time: trace + default pipeline + emission, per node; and single passes from 1k to 100k nodes.

    python bench/compile_time.py

Budgets: 150 µs/node for the whole, 15 µs/node for a pattern pass that fires on half of the nodes,
2 µs/node for one that matches nothing, both linear in the size.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("QGRAPH_COMPILE", "0")

import mlx.core as mx

import qgraph as qg
from qgraph._jit import without_collector
from qgraph.execute.program import Program
from qgraph.ir import Builder, Graph
from qgraph.ir.op import Op
from qgraph.ir.types import parse_type
from qgraph.rewrite import Context
from qgraph.rewrite.driver import apply_rules
from qgraph_examples.qwen3 import forward, make_cache
from qwen3_types import QWEN3_8B, parameters


def median(function, repeat=5):
    times = []
    for _ in range(repeat):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return statistics.median(times)


class MultiplyAdd(qg.Rule):
    """Fires on half of the nodes of the chain."""

    def pattern(self, x, a, b):
        return x * a + b

    def rewrite(self, m, x, a, b):
        return qg.maximum(qg.minimum(x, a), b)


class Nowhere(qg.Rule):
    """Has candidates nowhere: the cost of looking."""

    def pattern(self, x):
        return qg.exp(qg.exp(x))

    def rewrite(self, m, x):
        return x


OPS = Op.registry["multiply"](), Op.registry["add"]()


def chain(n):
    builder = Builder()
    x, a, b = (builder.input(name, parse_type("f32[4]")) for name in "xab")
    value = x
    for i in range(n):
        value = builder.add(OPS[i % 2], (value, (a, b)[i % 2])).outputs[0]
    graph = Graph([x, a, b], [value], builder)
    _ = graph.nodes
    return graph


def whole():
    params = parameters(QWEN3_8B)
    cache = make_cache(QWEN3_8B, 1, 1024, mx.bfloat16)
    args = (params, mx.zeros((1, 1), mx.int32), cache, mx.array(0), QWEN3_8B)
    step = qg.jit(forward)

    def once():
        step.clear_cache()
        step.result(*args)

    seconds = median(once)
    result = step.result(*args)
    nodes = len(result.before.nodes)
    print(f"Qwen3-8B: {nodes} nodes traced, {len(result.graph.nodes)} after the passes")
    print(f"  trace + pipeline + emission   {seconds:6.3f} s   {seconds / nodes * 1e6:6.1f} µs/node   (150)")
    for stage in result.history:
        print(f"    {stage.name:28}  {stage.seconds * 1e6 / nodes:6.1f} µs/node")
    emission = median(lambda: Program(result.graph))
    print(f"    {'emission':28}  {emission * 1e6 / nodes:6.1f} µs/node")


def passes():
    print("one pass over a chain of n nodes, µs/node")
    for n in (1_000, 10_000, 100_000):
        fires, built = without_collector(  # as while compiling
            lambda n=n: (
                median(lambda: apply_rules(chain(n), (MultiplyAdd(),), "bench", Context()), 3),
                median(lambda: chain(n), 3),
            )
        )
        graph = chain(n)
        nothing = median(lambda graph=graph: apply_rules(graph, (Nowhere(),), "bench", Context()), 3)
        per = 1e6 / n
        print(f"  {n:7}   fires {(fires - built) * per:6.2f} (15)   no match {nothing * per:6.2f} (2)")


def imports():
    code = "import time; t = time.perf_counter(); import qgraph; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(5)
    ]
    print(f"import qgraph: {statistics.median(times):.3f} s (0.25)")


if __name__ == "__main__":
    imports()
    whole()
    passes()

"""Memory over many calls: ``python -m tests.jit.memory --calls 100000`` prints it early and at the end.

Exit code 1 if the resident memory of a scenario grows by more than 1 MiB between the two.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

import qgraph as qg
from tests.jit.data import normal, weight

MIB = 1 << 20
PAGE = 4096


def resident() -> int:
    """Bytes of this process in memory now."""
    gc.collect()
    mx.clear_cache()
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * PAGE


def same_signature() -> Callable[[int], Any]:
    f, w, x = qg.jit(lambda x, w: qg.silu(x @ w.T)), weight(), normal(2, 64)
    return lambda i: mx.eval(f(x, w))


def more_signatures_than_entries() -> Callable[[int], Any]:
    f = qg.jit(maxsize=4)(lambda x: x * 2 + 1)
    f.warns = False
    arrays = [normal(n + 1) for n in range(6)]
    return lambda i: mx.eval(f(arrays[i % 6]))


def functions_that_are_rebound() -> Callable[[int], Any]:
    held: list[Any] = [None]
    f = qg.jit(maxsize=4)(lambda x: held[0](x))
    f.warns = False
    x = normal(4)

    def call(i: int) -> None:
        held[0] = lambda x: x * 2.5
        mx.eval(f(x))

    return call


def eager_ops() -> Callable[[int], Any]:
    w, x = weight(), normal(2, 64)
    return lambda i: mx.eval(qg.silu(qg.dot(x, w.T)))


def errors_at_every_call() -> Callable[[int], Any]:
    f = qg.jit(lambda x, y: x @ y)
    x, y = normal(2, 3), normal(4, 5)

    def call(i: int) -> None:
        try:
            f(x, y)
        except qg.ShapeError:
            return
        raise AssertionError("no error")

    return call


SCENARIOS = {
    "same signature": same_signature,
    "more signatures than entries": more_signatures_than_entries,
    "functions that are rebound": functions_that_are_rebound,
    "eager ops": eager_ops,
    "an error at every call": errors_at_every_call,
}


def growth(name: str, calls: int, early: int = 2000) -> tuple[int, int]:
    """Resident bytes after `early` calls and after all."""
    call = SCENARIOS[name]()
    for i in range(early):
        call(i)
    before = resident()
    for i in range(early, calls):
        call(i)
    return before, resident()


def main() -> int:
    """Run every scenario and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.jit.memory", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--early", type=int, default=2000)
    parser.add_argument("names", nargs="*", default=list(SCENARIOS))
    chosen = parser.parse_args()
    warnings.simplefilter("error")
    grew = False
    for name in chosen.names:
        before, after = growth(name, chosen.calls, chosen.early)
        grew |= after - before > MIB
        shown = f"{before / MIB:8.2f} MiB at call {chosen.early}, {after / MIB:8.2f} at call {chosen.calls}"
        print(f"{name:30} {shown}: {(after - before) / MIB:+.2f} MiB", flush=True)
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())

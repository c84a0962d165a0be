"""Eight threads on one jitted function with mixed shapes: ``python -m tests.jit.threads --seconds 60``.

Every result is compared with one that was computed beforehand, alone. Exit code 1 if one is wrong, a call
raises, or the function was traced more often than there are signatures.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import warnings
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from tests.agree import difference
from tests.jit.data import normal, weight

WEIGHTS = {
    "dense": normal(32, 64),
    "affine4": weight(),
    "affine8g32": weight(bits=8, group_size=32),
    "mxfp4": weight(mode="mxfp4"),
}
ROWS = (1, 2, 3, 5, 9)
SCALES = (0.5, 2.0)
SIGNATURES = [(n, name, scale) for n in ROWS for name in WEIGHTS for scale in SCALES]


@dataclass
class Count:
    """What happened."""

    calls: int = 0
    traces: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not self.wrong and not self.errors and self.traces == len(SIGNATURES)

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {len(self.wrong)} wrong, {len(self.errors)} exceptions, "
            f"{self.traces} traces of {len(SIGNATURES)} signatures"
        )


def run(seconds: float, threads: int = 8) -> Count:
    """Call from all threads until the time is over, and until every signature was called."""
    count, traces, lock = Count(), [], threading.Lock()

    def body(x: Any, w: Any, scale: float) -> Any:
        traces.append(1)
        return qg.silu(x @ w.T) * scale + qg.sum(x, axis=-1, keepdims=True)

    f = qg.jit(body)
    f.warns = False
    mx.eval([w if isinstance(w, mx.array) else w.components() for w in WEIGHTS.values()])
    data = {n: np.array(normal(n, 64, seed=n)) for n in ROWS}
    expected = {
        (n, name, s): np.array(f.eager(mx.array(data[n]), w, s))
        for n, name, s in SIGNATURES
        for w in [WEIGHTS[name]]
    }
    traces.clear()
    barrier, end = threading.Barrier(threads), monotonic() + seconds

    def work(number: int) -> None:
        draw, calls = random.Random(number), 0
        order = SIGNATURES * 1
        draw.shuffle(order)
        try:
            barrier.wait()
            while monotonic() < end or order:
                n, name, scale = key = order.pop() if order else draw.choice(SIGNATURES)
                found = np.array(f(mx.array(data[n]), WEIGHTS[name], scale))
                calls += 1
                problem = difference(found, expected[key], k=64)
                if problem:
                    count.wrong.append(f"{key}: {problem}")
        except BaseException as error:
            count.errors.append(error)
        with lock:
            count.calls += calls

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds + 120)
        if worker.is_alive():
            count.errors.append(TimeoutError("a thread hangs"))
    count.traces = len(traces)
    return count


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.jit.threads", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    chosen = parser.parse_args()
    warnings.simplefilter("error")
    count = run(chosen.seconds, chosen.threads)
    print(count)
    for problem in (count.wrong + list(map(repr, count.errors)))[:5]:
        print(problem)
    return 0 if count.right else 1


if __name__ == "__main__":
    sys.exit(main())

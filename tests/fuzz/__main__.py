"""python -m tests.fuzz --count 10000 [--seed N] [--workers 2]: the long run, in worker processes.

MLX can end a process; a batch whose worker dies is reported with its seed and the graph at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.batch import Batch, run, write
from tests.fuzz.report import targets, text

SIZE = 500  # graphs of a batch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="graphs in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first graph")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--batch", help=argparse.SUPPRESS)  # a worker: where its answer goes
    args = parser.parse_args()
    if args.batch:
        return worker(args.seed, args.count, Path(args.batch))
    sizes = [min(SIZE, args.count - done) for done in range(0, args.count, SIZE)]
    total = Batch()
    with ThreadPoolExecutor(args.workers) as pool:
        for n, batch in enumerate(
            pool.map(batch_of, range(args.seed, args.seed + args.count, SIZE), sizes), 1
        ):
            total.add(batch)
            print(f"batch {n} of {len(sizes)}: {total.counts['failures']} failures", file=sys.stderr)
    print(text(total))
    for failure in total.failures:
        if not failure[0].startswith("crash"):
            print(f"written: {write(failure).name}")
    missed = targets(total)
    print("\n".join(f"MISSED: {m}" for m in missed) or "all targets met")
    return 1 if total.counts["failures"] or (missed and args.count >= 10000) else 0


def worker(seed: int, count: int, out: Path) -> int:
    batch = run(seed, count, current=out.with_suffix(".qg"))
    out.write_text(json.dumps({"counts": batch.counts, "failures": batch.failures}))
    return 0


def batch_of(seed: int, count: int) -> Batch:
    """Run one batch in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "batch.json"
        command = [sys.executable, "-m", "tests.fuzz", "--seed", str(seed), "--count", str(count)]
        done = subprocess.run(
            [*command, "--batch", str(out)], check=False, capture_output=True, text=True, env=os.environ
        )
        if done.returncode == 0:
            found = json.loads(out.read_text())
            return Batch(Counter(found["counts"]), [tuple(f) for f in found["failures"]])
        graph = out.with_suffix(".qg")
        at_hand = graph.read_text() if graph.exists() else ""
    detail = f"a worker ended with {done.returncode}: {done.stderr[-2000:]}"
    batch = Batch(Counter({"failures": 1}), [("crash", detail, at_hand)])
    if at_hand:  # run what stands before and behind the graph that did it
        at = int(at_hand.split("\n", 1)[0].removeprefix("// seed "))
        for start, end in ((seed, at), (at + 1, seed + count)):
            if start < end:
                batch.add(batch_of(start, end - start))
    return batch


if __name__ == "__main__":
    sys.exit(main())

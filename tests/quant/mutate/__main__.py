"""Mutated checkpoints against the strict rules: ``python -m tests.quant.mutate --count 20000``."""

from __future__ import annotations

import argparse
import sys

from tests.quant.mutate.run import report, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tally = run(options.first, options.count, options.workers)
    print(report(tally))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())

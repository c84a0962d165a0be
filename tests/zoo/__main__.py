"""python -m tests.zoo [--only NAME …] [--part PART …]: a line for each architecture, and totals."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import mlx.core as mx
import mlx_lm

from tests.zoo.configs import ABSENT, architectures
from tests.zoo.survey import LISTED, PARTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="these architectures")
    parser.add_argument("--part", action="append", choices=PARTS, help="these parts")
    args = parser.parse_args()
    parts = args.part or list(PARTS)
    names = args.only or architectures()
    good: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    bad: list[str] = []
    for name in names:
        if name in ABSENT:
            continue
        line: list[str] = []
        for part in parts:
            answer = PARTS[part](name)
            good[part] += not answer.problem
            seconds[part] += answer.seconds
            line.append(f"{part} {'BAD' if answer.problem else 'ok'} {answer.seconds:.2f}s ({answer.note})")
            if answer.problem:
                bad.append(f"{name} {part}: {answer.problem}")
                line.append(answer.problem[:300])
        print(f"{name:22s} " + "  ".join(line), flush=True)
        mx.clear_cache()
    asked = [name for name in names if name not in ABSENT]
    print(f"\nmlx-lm {mlx_lm.__version__}: {len(names)} architectures, {len(asked)} of them run here")
    for name in set(names) & set(ABSENT):
        print(f"absent: {name}: {ABSENT[name]}")
    for (name, part), reason in LISTED.items():
        if name in names and part in parts:
            print(f"listed: {name}, {part}: {reason}")
    for part in parts:
        print(f"{part}: {good[part]} of {len(asked)} in {seconds[part]:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.faults``: plant every seeded fault in turn and print which test caught it.

A fault is looked for in the folders of tests that its row names, in order, and at last in all tests.
Exit code 1 if one gets through.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.faults.fault import Fault
from tests.faults.plant import switch
from tests.faults.table import FAULTS

EVERYTHING = ("tests",)
LIMIT = 900  # seconds for one run of tests


def caught_by(fault: Fault) -> str:
    """The first test that fails with the fault in place; empty when all pass."""
    for tests in (fault.tests, EVERYTHING):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        ignored = ["--ignore=tests/faults", "--ignore=tests/test_packaging.py"]
        environment = switch(fault) | {"HYPOTHESIS_PROFILE": "faults"}
        run = subprocess.run(
            [*command, *ignored], env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
        if failed:
            return failed[1]
        if run.returncode not in (0, 1):  # e.g. the process died
            return f"exit code {run.returncode} of {' '.join(tests)}: {run.stdout[-200:] + run.stderr[-200:]}"
    return ""


def main() -> int:
    """Run the faults, some at a time, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="faults to plant; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(FAULTS)
    if unknown:
        parser.error(f"no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    faults = [FAULTS[n] for n in chosen.names or FAULTS]
    width = max(len(f.name) for f in faults)
    missed = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for fault, test in zip(faults, pool.map(caught_by, faults), strict=True):
            missed += not test
            print(f"{fault.name:{width}}  {fault.module:38}  {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(faults)} faults planted, {len(faults) - missed} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the workers, notices those that die or hang, and counts."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
HANG = 30  # seconds for one of them; a load takes milliseconds
FAULTS = (
    "crash",
    "hang",
    "accepted, but wrong",
    "refused, but right",
    "other numbers",
    "other exception",
    "bad message",
)


@dataclass
class Tally:
    """How many there were of each change and outcome, and the faults with their seeds."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[tuple[str, int, str]] = field(default_factory=list)

    def add(self, what: str, line: dict[str, Any]) -> None:
        kind = line["outcome"] if line["outcome"] in ("accepted", "refused") else "other"
        self.outcomes[what, kind] += 1
        if line["fault"]:
            self.faults.append((line["fault"], line["seed"], f"{line.get('rule')}: {line.get('text', '')}"))


def run(first: int, count: int, workers: int = 1) -> Tally:
    tally = Tally()
    step = -(-count // workers)
    spans = [(at, min(at + step, first + count)) for at in range(first, first + count, step)]
    with ThreadPoolExecutor(workers) as pool:
        for part in pool.map(lambda span: _span(*span), spans):
            tally.outcomes += part.outcomes
            tally.faults += part.faults
    return tally


def _span(first: int, stop: int) -> Tally:
    tally = Tally()
    while first < stop:
        first = _worker(first, stop, tally)
    return tally


def _worker(first: int, stop: int, tally: Tally) -> int:
    """Run one process, from `first` on; where to go on when it ended."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(WORKER), str(first), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        following, what, pending = first, "", b""
        while True:
            if b"\n" not in pending:
                ready, _, _ = select.select([child.stdout], [], [], HANG)
                more = os.read(child.stdout.fileno(), 65536) if ready else b""
                if not more:
                    break
                pending += more
                continue
            raw, _, pending = pending.partition(b"\n")
            line = json.loads(raw)
            if "begin" in line:
                what = line["begin"]
                continue
            tally.add(what, line)
            following, what = line["seed"] + 1, ""
        hung = bool(not ready)
        child.kill()
    if following >= stop:
        return stop
    tally.outcomes[what or "making", "other"] += 1
    about = f"{what or 'making it'}: the process ended with {child.returncode}"
    tally.faults.append(("hang" if hung else "crash", following, about))
    return following + 1


def report(tally: Tally) -> str:
    """The table that is printed."""
    kinds = ("refused", "accepted", "other")
    lines = [f"{'changed':18}" + "".join(f"{kind:>10}" for kind in kinds)]
    for what in sorted({what for what, _ in tally.outcomes}):
        lines.append(f"{what:18}" + "".join(f"{tally.outcomes[what, kind]:10}" for kind in kinds))
    sums = [sum(n for (_, k), n in tally.outcomes.items() if k == kind) for kind in kinds]
    lines += [f"{'all ' + str(sum(sums)):18}" + "".join(f"{n:10}" for n in sums), ""]
    counts = Counter(fault for fault, _, _ in tally.faults)
    lines += [f"{fault:22}{counts[fault]:6}" for fault in FAULTS]
    lines += [f"seed {seed}: {fault}: {about}" for fault, seed, about in tally.faults[:20]]
    return "\n".join(lines)

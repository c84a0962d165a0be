"""Make the module for this machine, once: compiled, tried in another process, put into the cache."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from qgraph.kernels import selftest, toolchain
from qgraph.kernels.build import BuildError, build
from qgraph.kernels.progress import shown
from qgraph.kernels.store import Failed, Slot, Unusable
from qgraph.kernels.toolchain import Recipe

TEST_SECONDS = 120


def make(slot: Slot, what: Recipe, *, again: bool) -> None:
    """See that the slot holds a module that works; `again` even where that failed before.

    Errors: Failed, Unusable, toolchain.Missing.
    """
    cxx = toolchain.compiler()
    with slot.locked():
        if slot.built() is not None:
            return  # by another process, while this one waited
        if not again and (reason := slot.failure(cxx.identity)):
            raise Failed(f"{reason} (in an earlier run; the compiler's words: {slot.log})")
        try:
            begun = time.monotonic()
            with slot.workplace() as work, shown() as report:
                module = build(work / slot.file.name, cxx, what, report=report)
                try_out(module)
                record = {"compiler": cxx.version, "seconds": round(time.monotonic() - begun, 1)}
                slot.publish(module, record)
        except BuildError as error:
            slot.remember(str(error), error.said, cxx.identity)
            raise Failed(f"{error} (the compiler's words: {slot.log})") from None
        except OSError as error:
            raise Unusable(f"{slot.folder} cannot be written to: {error.strerror}") from None


def try_out(module: Path) -> None:
    """Load a module in another process, and compare its results with NumPy's. Errors: BuildError."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QGRAPH_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    # -P: the program's own folder holds modules of ours, not of the standard library
    command = [sys.executable, "-P", selftest.__file__, str(module)]
    try:
        found = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"the built module did not pass its test in {TEST_SECONDS} s", "") from None
    if found.returncode != 0:
        said = found.stderr.strip().rpartition("\n")[2] or f"it ended by signal {-found.returncode}"
        raise BuildError(f"the built module fails its test: {said}", f"{shlex.join(command)}\n{found.stderr}")

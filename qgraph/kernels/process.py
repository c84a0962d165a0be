"""The native module of this process, found or built at its first use."""

from __future__ import annotations

import threading
import warnings
from types import ModuleType

from qgraph.kernels.state import Found, Status


class _Process:
    """What this process found; decided once."""

    lock = threading.Lock()
    found: Found | None = None


_PROCESS = _Process()


def library() -> ModuleType | None:
    """The module of native kernels, or None where there is none: then MLX's own ops do the work.

    The first call in a process finds the module and loads it. Where there is none yet, it is compiled, which
    takes about half a minute, and kept for all later processes; where it cannot be, a warning says why, once.

    Errors: QGraphError, for a value of QGRAPH_KERNELS, QGRAPH_ISA or QGRAPH_THREADS that means nothing.
    """
    found = _PROCESS.found
    if found is None:
        from qgraph.kernels import finder  # what only the first call needs

        with _PROCESS.lock:
            decided = _PROCESS.found
            found = _PROCESS.found = decided or finder.find(build=True)
        if not decided and found.notice:
            warnings.warn(found.notice, stacklevel=2)
    return found.module


def status() -> Status:
    """What `library` gives, or would: this loads a module that is built, and builds none."""
    from qgraph.kernels import finder

    with _PROCESS.lock:
        found = _PROCESS.found or finder.find(build=False)
        if found.module is not None:
            _PROCESS.found = found
    return found.status


def prepare() -> Status:
    """Build the module for this machine if it is not there, even where that failed before.

    Errors: QGraphError, where it cannot be built.
    """
    from qgraph.kernels import finder

    return finder.prepare()

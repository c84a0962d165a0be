"""After os.fork(): MLX's threads do not exist in the child, where a computation would wait for ever."""

from __future__ import annotations

import os

from qgraph._errors import QGraphError


class _Process:
    """Whether this process is a fork of one that had imported qgraph."""

    forked = False


PROCESS = _Process()


def refuse_after_fork() -> None:
    """Errors: QGraphError in a child of os.fork()."""
    if PROCESS.forked:
        raise QGraphError(
            "called after fork(): MLX does not survive it, and the call would never return",
            fix='start processes with multiprocessing.get_context("spawn") or "forkserver", or as commands; '
            "a server that preloads: import the model in the worker",
        )


def _in_child() -> None:
    PROCESS.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

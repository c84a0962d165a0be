"""While MLX writes down a function's ops for export, programs must be made of ops that MLX can write down."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager


class _Thread(threading.local):
    exporting = False


_THREAD = _Thread()


def is_exporting() -> bool:
    """Whether this thread is inside `exporting`."""
    return _THREAD.exporting


@contextmanager
def exporting() -> Generator[None]:
    """Programs called inside leave native kernels alone."""
    before, _THREAD.exporting = _THREAD.exporting, True
    try:
        yield
    finally:
        _THREAD.exporting = before

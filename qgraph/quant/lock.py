"""One writer at a time: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from qgraph.quant.strict_file import refuse

_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def locked(lock: Path, target: Path) -> Generator[None, None, None]:
    """Hold the lock file `lock` while `target` is written.

    Errors: CheckpointError if another process or thread holds it; OSError if it cannot be made.
    """
    descriptor = _take(lock)
    if descriptor is None:
        cause = "is being saved by another process or thread"
        raise refuse(target, cause, fix=f"save again when it is done ({lock.name} is its lock)")
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is held, so that nobody else holds it
        os.close(descriptor)


def _take(lock: Path) -> int | None:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            held = _flock(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        if held and _is(lock, descriptor):
            return descriptor
        os.close(descriptor)
        if not held:
            return None
        # It was unlinked by the last holder between the two calls: take the new one.


def _is(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _flock(descriptor: int) -> bool:
    """Whether the lock was free. The system drops it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _process_lock(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return _process_lock(descriptor)
    return True


def _process_lock(descriptor: int) -> bool:
    """Where files cannot be locked: the process id in the file, which counts while that process lives."""
    text = os.read(descriptor, 32)
    if text.isdigit() and _lives(int(text)):
        return False
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode("ascii"))
    return True


def _lives(process: int) -> bool:
    if os.name == "nt":  # there os.kill ends the process, whatever the signal
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True

"""How much memory a load may take: what the machine has, or what this process may use of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from qgraph.quant.strict_file import refuse

_CGROUPS, _GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def check_memory(path: str | os.PathLike[str], total: int) -> None:
    """Refuse what does not fit, before allocating: a failed allocation kills the process.

    A file need not hold what it claims, so its size says nothing: a sparse one can claim any size.
    Errors: CheckpointError.
    """
    has = usable_bytes()
    if has is not None and total > has:
        cause = f"needs {total / 1e9:.1f} GB, this machine has {has / 1e9:.1f} GB for it"
        raise refuse(path, cause, fix="use a machine with more memory, or check the file")


def usable_bytes() -> int | None:
    """The least of what the machine, its container and the limits of this process allow; None if unknown.

    >>> usable_bytes() is None or usable_bytes() > 0
    True
    """
    return min(filter(None, [_machine(), *_cgroup_limits(), *_process_limits()]), default=None)


def _machine() -> int:
    """The memory of the machine; that of the device if it is larger, where arrays live there."""
    try:
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        ram = 0
    if ram <= 0 or mx.default_device() == mx.Device(mx.cpu):
        return max(ram, 0)
    device = mx.device_info()  # Metal names it the one way, CUDA the other
    return max(ram, *(int(device.get(name, 0)) for name in ("memory_size", "total_memory")))


def _process_limits() -> Iterator[int]:
    try:
        import resource
    except ImportError:
        return
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            yield soft


def _cgroup_limits() -> Iterator[int]:
    """The limits of the Linux control groups above this process, of both versions."""
    if not sys.platform.startswith("linux"):
        return
    try:
        groups = _GROUPS.read_text("utf-8", "replace")
    except OSError:
        return
    for controllers, name in re.findall(r"^\d+:(.*?):/?(.*)$", groups, re.MULTILINE):
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        # In a container the path may be that outside of it: then only the root is there.
        for folder in (root / name, *(root / name).parents):
            if not folder.is_relative_to(root):
                break
            yield _number(folder / file)


def _number(file: Path) -> int:
    """The number in a file; 0 for none, or the word max."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeError):
        return 0
    return int(text) if text.strip().isdigit() else 0

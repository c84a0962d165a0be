"""The native CPU kernels, compiled on the user's machine at their first use."""

from __future__ import annotations

import os
import sys
import threading
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from qgraph._errors import QGraphError

__all__ = ["library"]

_LOCK = threading.RLock()


def library() -> ModuleType | None:
    """The module of native kernels, or None where there is none."""
    with _LOCK:
        return _library()


@cache
def _library() -> ModuleType | None:
    wanted = os.environ.get("QGRAPH_KERNELS", "auto")
    if wanted == "off":
        return None
    if wanted.endswith(".so"):
        return _load(wanted)
    if wanted in ("", "auto"):
        return None
    raise QGraphError(f"QGRAPH_KERNELS is {wanted!r}", fix="auto, off, or the path of a built module (.so)")


def _load(path: str) -> ModuleType:
    import mlx.core  # noqa: F401  (the module links to its library)

    name = "qgraph.kernels._native"
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module

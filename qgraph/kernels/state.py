"""What became of the native kernels in a process."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

State = Literal["loaded", "not built", "off", "unsupported", "missing", "failed"]


@dataclass(frozen=True)
class Status:
    """What became of the native kernels in this process.

    Attributes:
        state: "loaded": in use. "not built": their first use will build them. "off": by QGRAPH_KERNELS.
            "unsupported": not a machine for them. "missing": something that the build needs. "failed": the
            build did, or its test.
        reason: Why they are not in use.
        fix: What to do about it.
        path: The file of the module, in use or to be.
        instruction_set: The one in use.
        instruction_sets: Those that the module holds.
        threads: That a kernel uses at most.
        key: The name of the build: it differs where another version of MLX, say, needs another module.
        compiler: The compiler that built the module, in its own words.
    """

    state: State
    reason: str = ""
    fix: str = ""
    path: str = ""
    instruction_set: str = ""
    instruction_sets: tuple[str, ...] = ()
    threads: int = 0
    key: str = ""
    compiler: str = ""


@dataclass(frozen=True)
class Found:
    """The module, if there is one, and what the user should be told once."""

    status: Status
    module: ModuleType | None = None
    notice: str = ""

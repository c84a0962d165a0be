"""The test-only switch: with QGRAPH_FAULT=name in the environment, one module is imported wrong.

`switch` gives the environment; with it `site/sitecustomize.py` plants the fault in every process of a run.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType

from tests.faults.fault import Fault
from tests.faults.table import FAULTS


class Wrong(SourceFileLoader):
    """Loads a module from its source, with the fault in it; bytecode is neither read nor written."""

    def __init__(self, name: str, path: str, fault: Fault) -> None:
        super().__init__(name, path)
        self.fault = fault

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode("utf-8")
        return self.source_to_code(self.fault.applied_to(source).encode("utf-8"), self.path)


class Planter(MetaPathFinder):
    """Finds the one module that gets the fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != self.fault.module:
            return None
        spec = PathFinder.find_spec(name, path)  # pyright: ignore[reportArgumentType]
        assert spec is not None
        assert spec.origin is not None
        spec.loader = Wrong(name, spec.origin, self.fault)
        return spec


def switch(fault: Fault) -> dict[str, str]:
    """The environment of a process in which, and in whose children, `fault` is planted."""
    root = Path(__file__).parents[2]
    paths = [str(Path(__file__).with_name("site")), str(root), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "QGRAPH_FAULT": fault.name,
        "QGRAPH_KERNELS": fault.kernels,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def plant() -> None:
    """Plant the fault that QGRAPH_FAULT names. To be called before qgraph is imported."""
    fault = FAULTS[os.environ["QGRAPH_FAULT"]]
    assert fault.module not in sys.modules, f"{fault.module} is imported already"
    sys.meta_path.insert(0, Planter(fault))

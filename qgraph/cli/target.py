"""What a command looks at: ``FILE.py:FUNCTION``, or the folder of a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, cast

from qgraph._errors import QGraphError
from qgraph.inspector.inspect import Inspection, inspect

HELP = "TARGET is FILE.py:FUNCTION, or the folder of a model."


def inspected(target: str, length: int = 1) -> Inspection:
    """Trace what `target` names.

    ``FILE.py:FUNCTION``: a jitted or a plain function at the top level of the file. Its example
    arguments are what ``FUNCTION_example()`` in the same file returns, a tuple; a function without
    parameters needs none. A folder: one step of that model on `length` tokens.

    Errors: QGraphError for a target that cannot be read, CheckpointError for a bad folder.
    """
    path, colon, name = target.rpartition(":")
    if colon and path.endswith(".py"):
        return _function(Path(path), name)
    if target.endswith(".py"):
        raise QGraphError(f"{target}: which function?", fix=f"write {target}:FUNCTION")
    if not os.path.isdir(target):
        raise QGraphError(f"{target}: no such folder", fix="pass FILE.py:FUNCTION, or the folder of a model")
    from qgraph import lm

    return Inspection(lm.load(target).result(length))


def _function(path: Path, name: str) -> Inspection:
    module = _import(path)
    function = getattr(module, name, None)
    if not callable(function):
        found = ", ".join(n for n, v in vars(module).items() if _listed(module, n, v)) or "none"
        raise QGraphError(f"{path} has no function {name!r}", fix=f"its functions: {found}")
    example = getattr(module, f"{name}_example", None)
    if example is None:
        if _takes_arguments(function):
            raise QGraphError(
                f"{path} does not say what {name} is called with",
                fix=f"add to the file a function {name}_example() that returns its arguments as a tuple",
            )
        return inspect(function)
    arguments = example()
    if not isinstance(arguments, tuple):
        raise QGraphError(
            f"{path}: {name}_example() returned a {type(arguments).__name__}",
            fix=f"return the arguments of {name} as a tuple, e.g. `return (x, w)`",
        )
    return inspect(function, *cast("tuple[Any, ...]", arguments))


def _listed(module: ModuleType, name: str, value: object) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return callable(value) and own and not name.startswith("_") and not name.endswith("_example")


def _takes_arguments(function: Callable[..., Any]) -> bool:
    from inspect import Parameter, signature

    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return any(p.default is Parameter.empty and p.kind not in variadic for p in parameters)


def _import(path: Path) -> ModuleType:
    """The file as a module; what lies beside it can be imported while it runs, as if it were a script."""
    if not path.is_file():
        raise QGraphError(f"{path}: no such file", fix="pass FILE.py:FUNCTION, or the folder of a model")
    name = f"qgraph_target_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except QGraphError:
        raise
    except Exception as error:
        where = next((f for f in reversed(extract_tb(error.__traceback__)) if f.filename == str(path)), None)
        raise QGraphError(
            f"{path} cannot be imported: {type(error).__name__}: {error}",
            where=f"{path.name}:{where.lineno}:  {where.line}" if where else None,
            fix="make `python -c` import it without an error first",
        ) from error
    finally:
        sys.path.remove(folder)
    return module

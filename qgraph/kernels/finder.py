"""Find the native module: named by the user, kept from an earlier build, or built now."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgraph._errors import QGraphError
from qgraph.kernels import selftest, toolchain
from qgraph.kernels.state import Found, Status
from qgraph.kernels.store import Failed, Slot, Unusable, root, temporary

_OTHER_CACHE = "QGRAPH_CACHE=/a/folder/of/your/own"
_TRY_AGAIN = "correct that, then `qgraph doctor --build`"


def prepare() -> Status:
    """See `qgraph.kernels.prepare`."""
    if reason := toolchain.unsupported():
        raise QGraphError(reason)
    slot, what = _slot()
    try:
        _make(slot, what, again=True)
    except toolchain.Missing as error:
        raise QGraphError(error.reason, fix=error.fix) from None
    except Failed as error:
        raise QGraphError(str(error)) from None
    except Unusable as error:
        raise QGraphError(str(error), fix=_OTHER_CACHE) from None
    record = slot.built() or {}
    return Status("not built", path=str(slot.file), key=what.key, compiler=record.get("compiler", ""))


def find(*, build: bool) -> Found:
    """What this process is to use; without `build`, nothing that takes time is done.

    Errors: QGraphError, for a variable of the environment that means nothing.
    """
    wanted = os.environ.get("QGRAPH_KERNELS") or "auto"
    _check_threads()
    if wanted == "off":
        return Found(Status("off", "QGRAPH_KERNELS=off"))
    if wanted.endswith(".so"):
        return _named(wanted)
    if wanted != "auto":
        raise QGraphError(
            f"QGRAPH_KERNELS={wanted} means nothing", fix="auto, off, or the path of a built module (.so)"
        )
    if reason := toolchain.unsupported():
        return Found(Status("unsupported", reason))
    return _automatic(build=build)


def _named(path: str) -> Found:
    """The module that QGRAPH_KERNELS names: all there is to it is whether it loads."""
    try:
        module = selftest.load(str(Path(path).absolute()))
    except ImportError as error:
        message = f"QGRAPH_KERNELS={path} does not load: {error}"
        raise QGraphError(message, fix="unset it, or build again") from error
    return _used(module, Status("loaded", path=path))


def _automatic(*, build: bool) -> Found:
    try:
        slot, what = _slot()
    except toolchain.Missing as error:
        return _without(Status("missing", error.reason, error.fix))
    try:
        return _from_cache(slot, what, build=build)
    except toolchain.Missing as error:
        return _without(Status("missing", error.reason, error.fix, key=what.key))
    except Failed as error:
        return _without(Status("failed", str(error), _TRY_AGAIN, key=what.key))
    except Unusable as error:
        unusable = str(error)
    if not build:
        return Found(Status("not built", unusable, _OTHER_CACHE, key=what.key))
    return _for_this_process(what, unusable)


def _slot() -> tuple[Slot, toolchain.Recipe]:
    what = toolchain.recipe(_sets(), toolchain.FLAGS)
    return Slot(root() / what.key), what


def _from_cache(slot: Slot, what: toolchain.Recipe, *, build: bool) -> Found:
    if record := slot.built():
        try:
            return _loaded(slot, what, record)
        except ImportError:  # something changed that the key does not tell: built again
            with slot.locked():
                slot.forget()
    if not build:
        compiler = toolchain.compiler()
        if reason := slot.failure(compiler.identity):
            raise Failed(f"{reason} (the compiler's words: {slot.log})")
        return Found(Status("not built", path=str(slot.file), key=what.key, compiler=compiler.version))
    _make(slot, what, again=False)
    return _loaded_now(slot, what)


def _make(slot: Slot, what: toolchain.Recipe, *, again: bool) -> None:
    from qgraph.kernels import maker  # and with it what only a build needs

    maker.make(slot, what, again=again)


def _for_this_process(what: toolchain.Recipe, unusable: str) -> Found:
    """Where the cache cannot be used: built for this process alone."""
    try:
        with temporary() as slot:
            _make(slot, what, again=True)
            found = _loaded_now(slot, what)
    except toolchain.Missing as error:
        return _without(Status("missing", error.reason, error.fix, key=what.key))
    except (Failed, Unusable) as error:
        return _without(Status("failed", f"{unusable}; {error}", _TRY_AGAIN, key=what.key))
    notice = f"qgraph's CPU kernels were compiled for this process only: {unusable}. Fix: {_OTHER_CACHE}"
    return Found(found.status, found.module, notice)


def _loaded_now(slot: Slot, what: toolchain.Recipe) -> Found:
    record = slot.built()
    if record is None:
        raise Failed(f"{slot.file} was changed after it was built")
    try:
        return _loaded(slot, what, record)
    except ImportError as error:
        raise Failed(f"the built module does not load here: {error}") from None


def _loaded(slot: Slot, what: toolchain.Recipe, record: dict[str, Any]) -> Found:
    module = selftest.load(str(slot.file))
    status = Status("loaded", path=str(slot.file), key=what.key, compiler=str(record.get("compiler", "")))
    return _used(module, status)


def _used(module: Any, status: Status) -> Found:
    sets: list[str] = module.instruction_sets()
    wanted = os.environ.get("QGRAPH_ISA", "")
    if wanted not in ("", "all"):
        if wanted not in sets:
            raise QGraphError(f"QGRAPH_ISA={wanted} is not among those of {status.path}", fix=", ".join(sets))
        module.use(wanted)
    known = replace(
        status,
        instruction_set=module.instruction_set(),
        instruction_sets=tuple(sets),
        threads=module.threads(),
    )
    return Found(known, module)


def _without(status: Status) -> Found:
    notice = (
        "qgraph's CPU kernels are not used, so quantized models run several times slower on this CPU: "
        f"{status.reason}. Fix: {status.fix} (QGRAPH_KERNELS=off does without them, silently)"
    )
    return Found(status, notice=notice)


def _sets() -> tuple[toolchain.InstructionSet, ...]:
    """The instruction sets to build: the best, the one that QGRAPH_ISA names, or all of this CPU."""
    here = toolchain.of_this_cpu()
    wanted = os.environ.get("QGRAPH_ISA", "")
    if wanted == "all":
        return here
    chosen = [s for s in here if s.name == wanted] if wanted else here[:1]
    if not chosen:
        known = ", ".join(s.name for s in here)
        raise QGraphError(f"QGRAPH_ISA={wanted} is no instruction set of this CPU", fix=f"{known}, or all")
    return tuple(chosen)


def _check_threads() -> None:
    wanted = os.environ.get("QGRAPH_THREADS")
    if wanted and not (wanted.isascii() and wanted.isdigit() and 0 < int(wanted) <= 1024):
        raise QGraphError(f"QGRAPH_THREADS={wanted} is no number of threads", fix="1 to 1024, or unset it")

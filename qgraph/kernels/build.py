"""Compile and link the kernels. For work on them: `python -m qgraph.kernels.build FOLDER [SET,SET…]`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from qgraph.kernels.toolchain import (
    FLAGS,
    SOURCE,
    SUFFIX,
    Compiler,
    InstructionSet,
    Missing,
    Recipe,
    compiler,
    named,
    of_this_cpu,
    python_headers,
    recipe,
)

SECONDS = 900  # for a whole build

Report = Callable[[int, int], None]
"""Told, as the work goes on, how many of the files are compiled, and of how many."""


class BuildError(Exception):
    """The compiler failed: what it did last, and all that it said."""

    def __init__(self, reason: str, said: str) -> None:
        super().__init__(reason)
        self.said = said


def build(
    to: Path,
    cxx: Compiler,
    what: Recipe,
    *,
    report: Report = lambda done, of: None,
    extra: Sequence[str] = (),
    objects: Path | None = None,
) -> Path:
    """Compile the module of `what` to the file `to`; sets that the compiler does not know are left out.

    Args:
        to: The file to make, in a folder that exists.
        cxx: The compiler.
        what: The instruction sets, and where the headers are.
        report: Called after each file.
        extra: More flags, for the compiler and the linker.
        objects: Where the object files go, and are taken from while they are newer than the source.

    Errors: BuildError, Missing.
    """
    sets = [s for s in what.sets if cxx.knows(*s.flags)]
    if not sets:
        raise BuildError(f"{cxx.command[0]} ({cxx.version}) does not know C++20, or not this CPU", "")
    common = [*cxx.command, *FLAGS, *extra, *_includes(what), _table_of(sets)]
    objects = objects or to.parent
    objects.mkdir(exist_ok=True)
    jobs: list[tuple[Path, Path, list[str]]] = []
    for file, flags in _files(what, sets):
        target = objects / f"{file.parent.name}-{file.stem}.o"
        jobs.append((file, target, [*common, *flags, "-c", str(file), "-o", str(target)]))
    work = _Work(time.monotonic() + SECONDS)
    stale = [job for job in jobs if not _fresh(job[1], job[0])]
    work.all([(str(file), command) for file, _, command in stale], report)
    link = [*cxx.command, "-shared", *extra, *(str(target) for _, target, _ in jobs)]
    work.one("the module", [*link, f"-L{what.mlx / 'lib'}", "-lmlx", "-lpthread", "-o", str(to)])
    return to


def _files(what: Recipe, sets: Sequence[InstructionSet]) -> list[tuple[Path, Sequence[str]]]:
    """The files to compile, each with its flags; the longest work first."""
    files: list[tuple[Path, Sequence[str]]] = [(SOURCE / "isa" / f"{s.name}.cpp", s.flags) for s in sets]
    files += [(SOURCE / "glue.cpp", ()), (what.nanobind / "src" / "nb_combined.cpp", ())]
    return [*files, (SOURCE / "pool.cpp", ()), (SOURCE / "cpu.cpp", ())]


def _includes(what: Recipe) -> list[str]:
    folders = (
        what.mlx / "include",
        what.nanobind / "include",
        what.nanobind / "ext/robin_map/include",
        python_headers(),
        SOURCE,
    )
    return [f"-I{folder}" for folder in folders]


def _table_of(sets: Sequence[InstructionSet]) -> str:
    return "-DQGRAPH_SETS=" + " ".join(f"X({s.name})" for s in sets)


def _fresh(target: Path, file: Path) -> bool:
    if not target.is_file():
        return False
    included = SOURCE.rglob("*.[ch]*") if file.is_relative_to(SOURCE) else ()
    return all(target.stat().st_mtime > source.stat().st_mtime for source in (file, *included))


class _Work:
    """Commands that run side by side until one fails or the time is over."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.running: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.over = False

    def all(self, commands: Sequence[tuple[str, list[str]]], report: Report) -> None:
        """Run the commands, as many at once as there are cores for this process."""
        report(0, len(commands))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            results = [threads.submit(self.one, what, command) for what, command in commands]
            try:
                for done, result in enumerate(as_completed(results), 1):
                    result.result()
                    report(done, len(commands))
            finally:
                self.stop()
                threads.shutdown(cancel_futures=True)
        self.over = False

    def one(self, what: str, command: list[str]) -> None:
        """Run one command. Errors: BuildError."""
        with self.lock:
            if self.over:
                return
            process = _start(command)
            self.running.add(process)
        try:
            said, _ = process.communicate(timeout=max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process)
            process.communicate()
            raise BuildError(f"the compiler took more than {SECONDS} s", shlex.join(command)) from None
        finally:
            with self.lock:
                self.running.discard(process)
        if process.returncode != 0:
            found = next(
                (line for line in said.splitlines() if "error" in line), f"exit {process.returncode}"
            )
            raise BuildError(f"{command[0]} failed at {what}: {found}", f"{shlex.join(command)}\n{said}")

    def stop(self) -> None:
        with self.lock:
            self.over = True
            for process in self.running:
                _end(process)


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that the compiler's own processes can be ended with it
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}", shlex.join(command)) from None


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _main(folder: str, sets: str = "") -> None:
    """Build into a folder, compiling again only what changed, and print the path."""
    chosen = tuple(map(named, sets.split(","))) if sets else of_this_cpu()
    to = Path(folder).absolute()
    to.mkdir(parents=True, exist_ok=True)
    try:
        made = build(to / f"_native{SUFFIX}", compiler(), recipe(chosen, FLAGS), objects=to / "objects")
    except (BuildError, Missing) as error:
        sys.exit(f"{getattr(error, 'said', '')}\n{error}")
    print(made)


if __name__ == "__main__":
    _main(*sys.argv[1:])

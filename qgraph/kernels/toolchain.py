"""What the machine has for a build: the CPU's instruction sets, a C++ compiler, the headers of MLX."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from qgraph.kernels.selftest import mlx_version

SOURCE = Path(__file__).parent / "source"
SUFFIX = EXTENSION_SUFFIXES[0]

FLAGS = (  # without -march: code for a CPU that may lack it stays in the files of isa/
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"),
    *("-fno-strict-aliasing", "-ffp-contract=off"),
    *("-DNDEBUG", "-DNB_DOMAIN=mlx", "-DNB_COMPACT_ASSERTIONS"),
)


class Missing(Exception):
    """Something that a build needs is not there; `fix` says how to get it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True)
class InstructionSet:
    """Kernels compiled once more, for CPUs with `features` (the names of /proc/cpuinfo)."""

    name: str
    machine: str
    features: frozenset[str]
    flags: tuple[str, ...]


def _set(name: str, machine: str, features: str, flags: str) -> InstructionSet:
    return InstructionSet(name, machine, frozenset(features.split()), tuple(flags.split()))


_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
SETS = (  # the best first
    _set(
        "avx512vnni",
        "x86_64",
        "avx512f avx512bw avx512dq avx512vl avx512_vnni fma f16c",
        f"{_AVX512} -mavx512vnni",
    ),
    _set("avx512", "x86_64", "avx512f avx512bw avx512dq avx512vl fma f16c", _AVX512),
    _set("avx2", "x86_64", "avx2 fma f16c", "-mavx2 -mfma -mf16c"),
    _set("neon", "aarch64", "asimd", ""),
    _set("portable", "", "", ""),
)


def named(name: str) -> InstructionSet:
    """The instruction set of that name."""
    return next(s for s in SETS if s.name == name)


def of_this_cpu() -> tuple[InstructionSet, ...]:
    """The sets whose kernels this CPU can run, the best first."""
    machine, features = platform.machine(), cpu_features()
    return tuple(s for s in SETS if s.machine in ("", machine) and s.features <= features)


@cache
def cpu_features() -> frozenset[str]:
    """What the first core of /proc/cpuinfo says that it has."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def unsupported() -> str:
    """Why nothing is built on this kind of machine; empty where it is."""
    if sys.platform != "linux":
        return f"no kernels of our own on {platform.system()}: MLX has its own there"
    if sys.implementation.name != "cpython" or not sys.executable:
        return "kernels are built for CPython programs only"
    return ""


@dataclass(frozen=True)
class Recipe:
    """What a built module depends on; equal keys can share one.

    The compiler is not among it, unless CXX names one: a module stays usable where the compiler was
    upgraded or, as in a container, removed after the build.
    """

    mlx: Path
    nanobind: Path
    sets: tuple[InstructionSet, ...]
    key: str


def recipe(sets: tuple[InstructionSet, ...], flags: Iterable[str]) -> Recipe:
    """The build of the kernels for `sets`. Errors: Missing."""
    import mlx.core as mx

    mlx = Path(mx.__file__ or "").parent
    library = mlx / "lib" / "libmlx.so"
    if not library.is_file() or not (mlx / "include/mlx/backend/cpu/encoder.h").is_file():
        raise Missing(f"MLX's C++ headers are not in {mlx}", "pip install 'mlx[cpu]'")
    found = find_spec("nanobind")
    if found is None or not found.origin:
        raise Missing("the package nanobind is not installed", "pip install 'qgraph[cpu]'")
    depends = [
        f"mlx {mlx_version()} {library.stat().st_size}",
        f"nanobind {_version('nanobind')}",
        f"python {SUFFIX}",
        f"machine {platform.machine()} {_libc()}",
        f"CXX {os.environ.get('CXX', '')}",
        *(f"set {s.name} {' '.join(s.flags)}" for s in sets),
        *flags,
        source_digest(SOURCE),
    ]
    digest = hashlib.sha256("\n".join(depends).encode()).hexdigest()
    key = f"mlx{mlx_version()}-{sets[0].name}-{digest[:16]}"
    return Recipe(mlx, Path(found.origin).parent, sets, key)


def python_headers() -> Path:
    """The folder of Python.h. Errors: Missing."""
    import sysconfig

    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise Missing(f"Python's C headers are not in {folder}", "install them (apt install python3-dev)")
    return folder


def source_digest(folder: Path) -> str:
    """A hash of every file of `folder`, with the names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, and the first line that it says of its version."""

    command: tuple[str, ...]
    version: str

    @property
    def identity(self) -> str:
        """What changes when another compiler, or another version of it, takes its place."""
        file = Path(self.command[0]).resolve()
        return f"{' '.join(self.command)} {file.stat().st_size} {self.version}"

    def knows(self, *flags: str) -> bool:
        """Whether it takes these flags, for C++20."""
        checked = ("-std=c++20", *flags, "-fsyntax-only", "-x", "c++", "/dev/null")
        return _output(*self.command, *checked) is not None


def compiler() -> Compiler:
    """CXX, or the first of g++, c++ and clang++. Errors: Missing."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name, *options in [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]:
        path = which(name)
        says = _output(path, *options, "--version") if path else None
        if path and says is not None:
            return Compiler((path, *options), says.partition("\n")[0].strip())
    if wanted:
        raise Missing(f"CXX={os.environ['CXX']} is no C++ compiler that runs", "set CXX to one, or unset it")
    raise Missing("there is no C++ compiler", "install g++ (Debian, Ubuntu: apt install g++)")


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails."""
    import subprocess  # not where a built module is there

    try:
        found = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None

"""`qgraph doctor`: is everything there, and what does a bug report need?"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from shutil import which
from typing import TYPE_CHECKING

import click

from qgraph.cli.errors import friendly_errors

if TYPE_CHECKING:
    from qgraph.kernels import Status

PACKAGES = (
    "qgraph",
    "mlx",
    "mlx-cpu",
    "mlx-metal",
    "mlx-cuda-12",
    "mlx-cuda-13",
    "mlx-lm",
    "numpy",
    "safetensors",
)


@click.command()
@click.option(
    "--build", is_flag=True, help="Build the native CPU kernels first, even where that failed before."
)
@friendly_errors()
def doctor(build: bool) -> None:
    """Print versions, the device, how programs run there, and every QGRAPH_ variable that is set."""
    import mlx.core as mx

    from qgraph import kernels
    from qgraph.execute.program import compiling, cpu_kernels_are_safe
    from qgraph.rewrite import passes
    from qgraph.rewrite.context import device_kind

    if build:
        kernels.prepare()
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows += [
        (name, found) for name in PACKAGES if (found := _version(name)) != "not installed" or name == "mlx-lm"
    ]
    rows += [("device", f"{mx.default_device()} ({device_kind()})")]
    rows += [
        ("mx.compile", "used" if compiling() else "not used (a CPU's default; QGRAPH_COMPILE=1 turns it on)")
    ]
    if device_kind() == "cpu":
        compiler = which("g++") or which("c++")
        rows += [("C++ compiler", compiler or "none: mx.compile cannot be used on this CPU")]
        safe = cpu_kernels_are_safe()
        rows += [
            ("kernel cache", "private" if safe else "not usable (no compiler, or another user's folder)")
        ]
    rows += _native(kernels.status())
    rows += [("passes", ", ".join(passes()) or "none: is qgraph_passes installed?")]
    rows += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("QGRAPH_")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _native(found: Status) -> list[tuple[str, str]]:
    """The rows about the native kernels: which, or why none and what to do."""
    if found.state == "loaded":
        others = ", ".join(s for s in found.instruction_sets if s != found.instruction_set)
        kind = f"{found.instruction_set}{f' (also built: {others})' if others else ''}"
        rows = [("native kernels", f"{kind}, at most {found.threads} threads")]
    elif found.state == "not built" and not found.reason:
        rows = [("native kernels", "not built yet: their first use does, or `qgraph doctor --build` now")]
    else:
        rows = [("native kernels", f"{found.state}: {found.reason}")]
    more = (("fix", found.fix), ("module", found.path), ("compiler", found.compiler))
    return rows + [(f"  {name}", value) for name, value in more if value]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

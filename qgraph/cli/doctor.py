"""`qgraph doctor`: is everything there, and what does a bug report need?"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from shutil import which

import click

from qgraph.cli.errors import friendly_errors

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
@friendly_errors()
def doctor() -> None:
    """Print versions, the device, how programs run there, and every QGRAPH_ variable that is set."""
    import mlx.core as mx

    from qgraph.execute.program import compiling, cpu_kernels_are_safe
    from qgraph.rewrite import passes
    from qgraph.rewrite.context import device_kind

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
    rows += [("passes", ", ".join(passes()) or "none: is qgraph_passes installed?")]
    rows += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("QGRAPH_")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

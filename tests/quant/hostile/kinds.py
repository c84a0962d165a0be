"""Makes files that are no files, or that would run code or give a secret away."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from tests.quant.hostile.craft import (
    SECRET,
)


def link(name: str, target: str) -> Any:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def secret(name: str) -> Any:
    """`name` is a link to a file outside of the folder, that holds the marker."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside.txt"
        outside.write_text(f"root:{SECRET}:0:0:{SECRET}:/root:/bin/sh\n")
        link(name, str(outside))(folder)

    return change


def pipe(name: str) -> Any:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def made_folder(name: str) -> Any:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def socket(name: str) -> Any:
    def change(folder: Path) -> None:
        import socket

        (folder / name).unlink(missing_ok=True)
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(name)
        finally:
            os.chdir(here)

    return change


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("open('ran', 'w').close()",))


PICKLE = pickle.dumps(_RunsCode())
EVIL = "open('ran', 'w').close()\n"


def only_a_pickle(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    return folder

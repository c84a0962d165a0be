"""The record of a save whose files are complete but not all in place: from it on, the new files count.

Several files cannot be renamed at once. So a save writes all of them beside their targets, then this
record, in one rename; whoever reads the folder takes the new files from where they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qgraph._errors import CheckpointError
from qgraph.quant.strict_file import as_object, read_json, refuse

RECORD = ".qgraph-save.json"
_TARGET = r"config\.json|model\.safetensors\.index\.json|model[A-Za-z0-9_-]*\.safetensors"
_TEMP = re.compile(rf"\.({_TARGET})\.[0-9a-f]{{16}}\.tmp")
_FIX = f"save again into an empty folder; or remove {RECORD}, if the other files are whole"


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A complete file under the name `temp`; size and time tell it from the one that it replaces."""

    temp: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Pending:
    """The files of an unfinished save by their final names, in the order in which they are renamed."""

    folder: Path
    files: Mapping[str, PendingFile]

    def to_json(self) -> dict[str, object]:
        """What the record contains."""
        return {"files": {n: [f.temp, f.size, f.mtime_ns] for n, f in self.files.items()}}

    def where(self, name: str) -> Path:
        """The path that holds a file now. Errors: CheckpointError if it is not the one of the record."""
        file = self.files[name]
        temp = self.folder / file.temp
        path = temp if os.path.lexists(temp) else self.folder / name
        try:
            status = os.stat(path)
        except OSError:
            raise self._broken(name, "is missing") from None
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise self._broken(name, "is not the file that it wrote")
        return path

    def _broken(self, name: str, cause: str) -> CheckpointError:
        return refuse(self.folder / RECORD, f"records an unfinished save, but {name} {cause}", fix=_FIX)


def read_pending(folder: Path) -> Pending | None:
    """The unfinished save of a folder, None if there is none. Errors: CheckpointError for a bad record."""
    record = folder / RECORD
    if not os.path.lexists(record):
        return None
    files: dict[str, PendingFile] = {}
    for name, value in as_object(read_json(record).get("files"), record, "files").items():
        match value:
            case [str(temp), int(size), int(mtime)] if _is_temp_of(temp, name):
                files[name] = PendingFile(temp, size, mtime)
            case _:
                raise refuse(record, "is not the record of a save", fix=_FIX)
    return Pending(folder, files)


def _is_temp_of(temp: str, name: str) -> bool:
    match = _TEMP.fullmatch(temp)
    return match is not None and match[1] == name


def current(path: Path) -> Path:
    """Where the content of `path` is: elsewhere only during a save, and after one that was cut off."""
    pending = read_pending(path.parent)
    return pending.where(path.name) if pending is not None and path.name in pending.files else path

"""Replaces files so that a crash at any point leaves all the old ones or all the new ones."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qgraph.quant.lock import locked
from qgraph.quant.pending import RECORD, Pending, PendingFile, read_pending
from qgraph.quant.strict_file import refuse

Writer = Callable[[Path], None]

_LOCK = ".qgraph-save.lock"
_FIX = "check the free space and the permissions, then save again"


@contextmanager
def writing(target: Path) -> Generator[None, None, None]:
    """Be the only writer of a file or a folder, after what an earlier one left behind is put in order.

    Errors: CheckpointError if there is another writer, or the disk fails.
    """
    single = target.suffix == ".safetensors"
    folder = target.parent if single else target
    lock = folder / (f".{target.name}.lock" if single else _LOCK)
    try:
        with locked(lock, target):
            if single and os.path.lexists(folder / RECORD):
                with locked(folder / _LOCK, folder):
                    _finish_earlier(folder)
            else:
                _finish_earlier(folder)
            _sweep(folder, [target.name] if single else None)
            yield
    except OSError as error:
        cause = f"cannot be written: {error.strerror or error}"
    else:
        return
    raise refuse(target, cause, fix=_FIX)


def replace_file(target: Path, write: Writer) -> None:
    """Write a file beside its target, then rename it. Errors: OSError; then the old file stands."""
    temp = _temp(target)
    try:
        write(temp)
        _sync(temp)
        os.replace(temp, target)
    finally:
        temp.unlink(missing_ok=True)
    _sync(target.parent)


def replace_all(folder: Path, files: Mapping[str, Writer]) -> None:
    """Replace files of a folder together; they are renamed in the order given.

    Errors: OSError while the old ones stand; CheckpointError when the new ones count already.
    """
    temps = {name: _temp(folder / name) for name in files}
    record, record_temp = folder / RECORD, _temp(folder / RECORD)
    try:
        for name, write in files.items():
            write(temps[name])
            _sync(temps[name])
        pending = Pending(folder, {name: _pending(temp) for name, temp in temps.items()})
        record_temp.write_text(json.dumps(pending.to_json()), "utf-8")
        _sync(record_temp)
        _sync(folder)  # the record must not outlive what it names
        os.replace(record_temp, record)  # from here on, the new files count
        _sync(folder)
    except BaseException:
        with suppress(OSError):
            if os.path.lexists(record):
                record.unlink()
                _sync(folder)
            for temp in (*temps.values(), record_temp):
                temp.unlink(missing_ok=True)
        raise
    _finish(pending)


def _finish_earlier(folder: Path) -> None:
    pending = read_pending(folder)
    if pending is not None:
        _finish(pending)


def _finish(pending: Pending) -> None:
    """Put the files of a record in place. It can be cut off and begun again at any point."""
    folder = pending.folder
    left = [name for name in pending.files if pending.where(name) != folder / name]
    shards = [name for name in left if name.endswith(".safetensors")]
    try:
        if sum(name.endswith(".safetensors") for name in pending.files) > 1:
            # mlx-lm merges whatever shards it finds: better it finds too few than a mixture.
            for name in shards:
                (folder / name).unlink(missing_ok=True)
        for name in left:
            os.replace(folder / pending.files[name].temp, folder / name)
        _sync(folder)
        (folder / RECORD).unlink()
        _sync(folder)
    except OSError as error:
        cause = f"is saved, but not yet in place: {error.strerror or error}"
    else:
        return
    raise refuse(folder, cause, fix="it loads as it is; save again to finish it")


def _sweep(folder: Path, names: list[str] | None) -> None:
    """Remove what killed writers left: half-written files, which nothing refers to."""
    which = "|".join(map(re.escape, names)) if names else r"config\.json|model.*|" + re.escape(RECORD)
    dead = re.compile(rf"\.({which})\.[0-9a-f]{{16}}\.tmp", re.DOTALL)
    for name in os.listdir(folder):
        if dead.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def _temp(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


def _pending(temp: Path) -> PendingFile:
    status = os.stat(temp)
    return PendingFile(temp.name, status.st_size, status.st_mtime_ns)


def _sync(path: Path) -> None:
    """Ask the disk to keep what was written; a folder cannot be opened for this on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

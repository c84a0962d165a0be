"""Where built modules are kept: folders that nobody else can write to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraph.kernels.toolchain import SUFFIX

WAIT = 1800  # seconds, for another process that builds


class Failed(Exception):
    """There is no module, and why."""


class Unusable(Exception):
    """The cache cannot be used: not private, or not writable."""


def root() -> Path:
    """QGRAPH_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("QGRAPH_CACHE"):
        return Path(chosen).expanduser().absolute() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of XDG_CACHE_HOME: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qgraph" / "kernels"


def trusted() -> tuple[int, ...]:
    """Whose files are loaded: root's and one's own."""
    return (0, os.getuid())


def check_private(path: Path) -> None:
    """Only this user, and root, can have put there what is there. Errors: Unusable, OSError.

    The folder itself must not be writable by others; above it, nobody else may be able to put another
    folder in its place.
    """
    real = path.resolve(strict=True)
    for place in (real, *real.parents):
        status = place.stat()
        if status.st_uid not in trusted():
            raise Unusable(f"{place} belongs to another user")
        if stat.S_IMODE(status.st_mode) & _others(status, exact=place == real):
            raise Unusable(f"{place} can be written to by others")


def _others(status: os.stat_result, *, exact: bool) -> int:
    """The permissions that let others change a file, or what a folder above it holds."""
    if exact:
        return stat.S_IWGRP | stat.S_IWOTH
    if status.st_mode & stat.S_ISVTX:  # /tmp: a name can be taken away by its owner only
        return 0
    own_group = status.st_gid == os.getgid()  # many systems let the user's own group write
    return stat.S_IWOTH if own_group else stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Slot:
    """The folder of one key: the built module, or why there is none."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"_native{SUFFIX}"

    @property
    def log(self) -> Path:
        return self.folder / "build.log"

    def built(self) -> dict[str, Any] | None:
        """What is known of the module that lies there; None where there is none, or not as it was built.

        Errors: Unusable.
        """
        try:
            check_private(self.folder)
            check_private(self.file)
            record = json.loads((self.folder / "built.json").read_text())
            intact = record["sha256"] == hashlib.sha256(self.file.read_bytes()).hexdigest()
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return record if intact else None

    def failure(self, identity: str) -> str:
        """Why the last build with that compiler failed; empty where it did not."""
        try:
            record = json.loads((self.folder / "failed.json").read_text())
            return str(record["reason"]) if record["compiler"] == identity else ""
        except (OSError, ValueError, LookupError, TypeError):
            return ""

    def remember(self, reason: str, said: str, identity: str) -> None:
        """Note that a build failed, so that it is not tried again at every start."""
        self.log.write_text(said)
        self._write("failed.json", {"reason": reason, "compiler": identity})

    def publish(self, module: Path, record: dict[str, Any]) -> None:
        """Put a module in its place; who reads at that moment sees the old one, the new one or none."""
        digest = hashlib.sha256(module.read_bytes()).hexdigest()
        module.chmod(0o600)
        os.replace(module, self.file)
        self._write("built.json", {**record, "sha256": digest})
        (self.folder / "failed.json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Take away a module that does not load, or a note of a failure."""
        for name in ("built.json", "failed.json"):
            (self.folder / name).unlink(missing_ok=True)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
            json.dump(record, file)
        os.replace(file.name, self.folder / name)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the folder, made where it is not there; waits while another process builds in it.

        Errors: Unusable.
        """
        try:
            _make(self.folder)
            check_private(self.folder)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unusable(f"{self.folder} cannot be written to: {error.strerror}") from None
        try:
            _wait_for(lock)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def workplace(self) -> Generator[Path]:
        """A new folder inside, for a build; with what killed builds left taken away. Needs the lock."""
        for left in self.folder.glob("building-*"):
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="building-", dir=self.folder))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _make(folder: Path) -> None:
    """Make a folder and those above it, for this user alone whatever the umask."""
    if not folder.parent.is_dir():
        _make(folder.parent)
    folder.mkdir(exist_ok=True, mode=0o700)


def _wait_for(lock: int) -> None:
    import fcntl  # not on every system that can import this module

    until = time.monotonic() + WAIT
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise Unusable("another process has been building for too long") from None
        except OSError as error:
            raise Unusable(f"the cache's folder takes no locks: {error.strerror}") from None
        time.sleep(0.05)


@contextmanager
def temporary() -> Generator[Slot]:
    """A slot for this process alone. A module stays loaded after its file is gone."""
    with tempfile.TemporaryDirectory(prefix="qgraph-kernels-") as folder:
        yield Slot(Path(folder))

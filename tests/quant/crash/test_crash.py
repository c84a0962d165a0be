"""Whatever ends a save, the old checkpoint loads or the new one: never a mixture, never neither."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qgraph._errors import CheckpointError
from qgraph.quant import save
from tests.quant.crash.saver import parameters, store, stored, visible

SAVER = Path(__file__).with_name("saver.py")
LAYOUTS = ["model", "model.safetensors"]  # a folder with shards, and a single file


def start(path: Path, first: int, mode: str, *more: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SAVER), str(path), str(first), mode, *map(str, more)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> str:
    out, _ = child.communicate(timeout=60)
    return out


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def content(path: Path) -> dict[str, bytes]:
    files = path.iterdir() if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def check_next_save(path: Path, step: int) -> None:
    store(path, step)
    assert stored(path) == step
    assert not leftovers(path if path.is_dir() else path.parent)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_crash_at_any_call_leaves_the_old_checkpoint_or_the_new_one(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "it" / layout
    path.parent.mkdir()
    found: list[int] = []
    for number in range(1, 200):
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
        store(path, 1)
        child = start(path, 2, "crash", number)
        if "done" in finish(child):
            break
        assert child.returncode == 9
        found.append(stored(path))
        assert not path.is_dir() or len(visible(path)) <= 1, "mlx-lm would load a mixture"
    else:
        pytest.fail("the save never ended")
    # Old up to one call, new from there on: the switch is one call.
    assert found == sorted(found)
    assert set(found) == {1, 2}
    check_next_save(path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_kills_during_saves_leave_the_old_checkpoint_or_the_new_one(
    layout: str, tmp_path: Path
) -> None:
    path = tmp_path / "it" / layout
    path.parent.mkdir()
    drawn = random.Random(layout)
    store(path, 1)
    last = 1
    for n in range(50):
        child = start(path, last + 1, "run")
        assert child.stdout is not None
        child.stdout.readline()  # it has begun
        time.sleep(drawn.uniform(0, 0.05))
        child.send_signal(signal.SIGTERM if n % 5 == 0 else signal.SIGKILL)
        lines = finish(child).split()
        done = int(lines[-1]) if lines else last
        last = stored(path)
        assert last in (done, done + 1)
        assert not path.is_dir() or len(visible(path)) <= 1
    assert last > 10  # it did save between the kills
    check_next_save(path, last + 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_leaves_the_old_checkpoint(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "it" / layout
    path.parent.mkdir()
    store(path, 1)
    before = content(path)
    text = finish(start(path, 2, "full", 100_000))
    assert text.startswith(f"{layout}: cannot be written: File too large\n  fix: check the free space")
    assert content(path) == before
    assert not leftovers(path.parent)
    assert stored(path) == 1
    check_next_save(path, 2)


def mounted(folder: Path, options: str) -> bool:
    """Whether this process may mount a disk of its own."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_real_disk_that_is_full_or_read_only_leaves_the_old_checkpoint(layout: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if not mounted(disk, "size=500k"):
        pytest.skip("no right to mount a disk; the limit on file sizes is tested above")
    try:
        path = disk / layout
        store(path, 1)
        before = content(path)
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            store(path, 2)
        assert content(path) == before
        assert stored(path) == 1
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
            store(path, 2)
        assert stored(path) == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Disk:
    """Records what is asked of the disk, by name; the call `fail` raises an OSError instead."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, fail: int = 0) -> None:
        self.folder, self.calls, self.fail = folder, list[tuple[str, str]](), fail
        self.fsync, self.replace, unlink = os.fsync, os.replace, Path.unlink
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "replace", self._replace)

        def remove(file: Path, missing_ok: bool = False) -> None:
            if os.path.lexists(file):
                self._note("unlink", file.name)
            unlink(file, missing_ok)

        monkeypatch.setattr(Path, "unlink", remove)

    def _note(self, call: str, name: str) -> None:
        self.calls.append((call, name))
        if len(self.calls) == self.fail:
            raise OSError(5, "Input/output error")

    def _fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        names = [".", *os.listdir(self.folder)]
        self._note("fsync", next(n for n in names if os.path.samestat(status, os.stat(self.folder / n))))
        self.fsync(descriptor)

    def _replace(self, source: Path, target: Path) -> None:
        self._note("rename", f"{source.name} > {target.name}")
        self.replace(source, target)


def test_a_single_file_is_synced_then_renamed_then_its_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    disk = Disk(tmp_path, monkeypatch)
    store(path, 1)
    (sync, temp), (rename, names), *rest = disk.calls
    assert (sync, rename) == ("fsync", "rename")
    assert temp.endswith(".tmp")
    assert names == f"{temp} > model.safetensors"
    assert rest == [("fsync", "."), ("unlink", ".model.safetensors.lock")]


def test_a_folder_switches_with_one_rename_after_all_is_synced_and_the_index_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, 1)
    disk = Disk(tmp_path, monkeypatch)
    store(tmp_path, 2)
    record = ".qgraph-save.json"
    renames = [name for call, name in disk.calls if call == "rename"]
    switch = next(i for i, (call, name) in enumerate(disk.calls) if name.endswith(f"> {record}"))
    before = disk.calls[:switch]
    assert disk.calls[switch][0] == "rename"
    assert before[-1] == ("fsync", ".")
    assert disk.calls[switch + 1] == ("fsync", ".")
    # Every file is on the disk before anything old is touched.
    assert {call for call, _ in before} == {"fsync"}
    assert {name.partition(" > ")[0] for name in renames} == {name for _, name in before} - {"."}
    targets = [name.partition(" > ")[2] for name in renames]
    assert targets[0] == record
    assert targets[-2:] == ["config.json", "model.safetensors.index.json"]
    assert sum(name.endswith(".safetensors") for name in targets) == 5
    # The record goes when all is in place, and on the disk.
    assert disk.calls[-4:] == [
        ("fsync", "."),
        ("unlink", record),
        ("fsync", "."),
        ("unlink", ".qgraph-save.lock"),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_fails_at_any_call_is_one_error_and_never_a_mixture(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / layout
    for fail in range(1, 100):
        store(path, 1)
        with monkeypatch.context() as patch:
            disk = Disk(path if path.is_dir() else tmp_path, patch, fail)
            failed = ""
            try:
                store(path, 2)
            except CheckpointError as error:
                failed = str(error)
        step = stored(path)
        if len(disk.calls) < fail:
            break
        call, name = disk.calls[fail - 1]
        if call == "unlink" and name.endswith(".lock"):
            assert step == 2  # a lock file that stays locks nothing
            continue
        assert "Input/output error" in failed
        # A folder says so when the new files count already; a file may be new and not yet on the disk.
        assert (step == 2) == ("is saved, but not yet in place" in failed) or layout == "model.safetensors"
    else:
        pytest.fail("the save never went well")
    check_next_save(path, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_writer_is_refused_and_a_killed_one_holds_nothing(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "it" / layout
    path.parent.mkdir()
    store(path, 1)
    child = start(path, 2, "hold")
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match="is being saved by another process or thread") as caught:
        store(path, 3)
    assert caught.value.fix
    assert stored(path) == 1  # readers are not locked out
    child.kill()
    finish(child)
    check_next_save(path, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_files_cannot_be_locked_the_process_id_counts(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    path = tmp_path / "it" / layout
    path.parent.mkdir()
    store(path, 1)
    lock = path / ".qgraph-save.lock" if path.is_dir() else path.parent / f".{layout}.lock"
    lock.write_text(str(os.getppid()))
    with pytest.raises(CheckpointError, match="is being saved by another process"):
        store(path, 2)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock.write_text(str(gone.pid))
    check_next_save(path, 2)


def test_a_save_over_a_record_that_cannot_be_completed_touches_nothing(tmp_path: Path) -> None:
    store(tmp_path, 1)
    (tmp_path / ".qgraph-save.json").write_text('{"files": {"config.json": [".config.json.tmp", 1, 1]}}')
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=r"\.qgraph-save\.json: is not the record of a save"):
        save(tmp_path, parameters(2))
    assert content(tmp_path) == before

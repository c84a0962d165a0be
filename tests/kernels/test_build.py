"""The native module is built once, kept privately, and never in the way where it cannot be built."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from qgraph import kernels
from qgraph._errors import QGraphError
from qgraph.cli import main
from qgraph.kernels import build, finder, progress, store, toolchain
from qgraph.kernels.state import Found

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux only")


def find() -> Found:
    return finder.find(build=True)


def slot() -> store.Slot:
    return finder._slot()[0]


def test_built_once_and_then_taken_from_the_cache(fake, capfd):
    assert kernels.status().state == "not built"
    assert (fake.count(), capfd.readouterr().err) == (0, "")
    found = find()
    assert found.status.state == "loaded"
    assert found.notice == ""
    assert found.status.compiler == "fake 1.0"
    assert found.status.path == str(slot().file)
    assert "compiling qgraph's CPU kernels, once" in capfd.readouterr().err
    assert kernels.status().state == "loaded"
    os.remove(fake.command)  # as in a container that has no compiler any more
    assert find().status == found.status
    assert (fake.count(), capfd.readouterr().err) == (1, "")


def test_what_lies_in_the_cache_is_private(fake, tmp_path):
    find()
    folder = slot().folder
    assert folder.parent.parent == tmp_path / "cache"
    for place in (folder, folder.parent):
        assert place.stat().st_mode & 0o777 == 0o700
    assert slot().file.stat().st_mode & 0o077 == 0
    assert {p.name for p in folder.iterdir()} == {slot().file.name, "built.json", "lock"}


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for name in ("QGRAPH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert store.root() == Path("/home/somebody/.cache/qgraph/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert store.root() == Path("/home/somebody/.cache/qgraph/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert store.root() == Path("/xdg/qgraph/kernels")
    monkeypatch.setenv("QGRAPH_CACHE", "~/mine")
    assert store.root() == Path("/home/somebody/mine/kernels")


def test_a_failure_is_told_once_and_remembered_for_that_compiler(fake):
    fake.become("dies")
    with pytest.warns(UserWarning, match="error: there is no such thing.*build.log.*doctor --build"):
        assert kernels.library() is None
    assert kernels.library() is None  # without another warning
    assert kernels.status().state == "failed"
    assert "there is no such thing" in slot().log.read_text()
    fake.become("good")  # but the same compiler by its name, size and version
    assert "in an earlier run" in find().status.reason
    assert kernels.prepare().path == str(slot().file)  # the user asks: tried again
    assert find().status.state == "loaded"


def test_another_version_of_a_compiler_that_failed_is_tried(fake):
    fake.become("dies")
    assert find().status.state == "failed"
    fake.become("good", version="fake 2.0")
    assert find().status.state == "loaded"


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("garbage", "fails its test: .*(invalid ELF header|file too short)"),
        ("crash", "fails its test: it ended by signal 6"),
        ("wrong", "fails its test: AssertionError: .* rows are off by"),
        ("foreign", r"fails its test: .*is built for MLX 0\.0\.1"),
    ],
)
def test_a_module_that_does_not_work_is_not_loaded_here(fake, mode, reason):
    fake.become(mode)
    found = find()
    assert found.module is None
    assert found.status.state == "failed"
    assert list(store.root().rglob("*.so")) == []
    with pytest.raises(QGraphError, match=reason):
        kernels.prepare()
    assert fake.count() == 2


def test_a_compiler_that_hangs_is_ended(fake, monkeypatch):
    monkeypatch.setattr(build, "SECONDS", 1)
    fake.become("hangs")
    assert "took more than 1 s" in find().status.reason
    assert fake.hanging()
    for process_id in fake.hanging():
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_without_a_compiler_and_without_nanobind(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    assert "CXX=/no/such/compiler -O1 is no C++ compiler" in find().status.reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"there is no C\+\+ compiler.*apt install g\+\+"):
        assert kernels.library() is None
    assert kernels.status().state == "missing"
    with pytest.raises(QGraphError, match="there is no C"):
        kernels.prepare()
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    assert "nanobind is not installed" in find().status.reason


def test_without_the_headers_of_python(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert find().status.fix == "install them (apt install python3-dev)"


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_nothing_is_built_on_other_systems(fake, monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.library() is None
    assert kernels.status().state == "unsupported"
    with pytest.raises(QGraphError, match="no kernels of our own"):
        kernels.prepare()
    assert fake.count() == 0


def test_off_is_silent(fake, monkeypatch):
    monkeypatch.setenv("QGRAPH_KERNELS", "off")
    assert kernels.library() is None
    assert (kernels.status().state, fake.count()) == ("off", 0)


def test_a_module_named_by_the_user(fake, monkeypatch):
    monkeypatch.setenv("QGRAPH_KERNELS", str(fake.folder / "good.so"))
    assert kernels.library().threads() == 2
    assert (kernels.status().path, fake.count()) == (str(fake.folder / "good.so"), 0)
    for wrong, says in (("foreign.so", r"built for MLX 0\.0\.1"), ("none.so", "No such file")):
        monkeypatch.setenv("QGRAPH_KERNELS", str(fake.folder / wrong))
        with pytest.raises(QGraphError, match=f"does not load: .*{says}"):
            find()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("QGRAPH_KERNELS", "yes", "fix: auto, off, or the path of a built module"),
        ("QGRAPH_ISA", "sse9", "no instruction set of this CPU\n  fix: .*portable, or all"),
        ("QGRAPH_THREADS", "0", "QGRAPH_THREADS=0 is no number of threads"),
        ("QGRAPH_THREADS", "two", "QGRAPH_THREADS=two is no number of threads"),
        ("QGRAPH_THREADS", "²", "is no number of threads"),
    ],
)
def test_variables_that_mean_nothing_are_refused(fake, monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(QGraphError, match=says):
            kernels.library()
    assert fake.count() == 0


def test_the_instruction_set_named_is_built_and_used(fake, monkeypatch):
    best = slot()
    monkeypatch.setenv("QGRAPH_ISA", "portable")
    assert find().status.instruction_set == "portable"
    assert slot() != best or len(toolchain.of_this_cpu()) == 1
    monkeypatch.setenv("QGRAPH_ISA", "all")
    assert find().status.instruction_sets == ("portable", "avx2")
    assert finder._slot()[1].sets == toolchain.of_this_cpu()


@pytest.mark.parametrize(
    ("machine", "lacks", "best"),
    [
        ("x86_64", "", "avx512vnni"),
        ("x86_64", "avx512_vnni", "avx512"),
        ("x86_64", "avx512f", "avx2"),
        ("x86_64", "f16c", "portable"),
        ("aarch64", "", "neon"),
        ("riscv64", "", "portable"),
    ],
)
def test_the_best_set_of_a_cpu(monkeypatch, machine, lacks, best):
    every = frozenset().union(*(s.features for s in toolchain.SETS))
    monkeypatch.setattr(toolchain.platform, "machine", lambda: machine)
    monkeypatch.setattr(toolchain, "cpu_features", lambda: every - {lacks})
    assert toolchain.of_this_cpu()[0].name == best
    assert toolchain.of_this_cpu()[-1].name == "portable"


def test_the_key_follows_all_that_the_module_depends_on(fake, monkeypatch, tmp_path):
    def key(flags=toolchain.FLAGS, sets=toolchain.SETS[-1:]) -> str:
        return toolchain.recipe(sets, flags).key

    first = key()
    assert key() == first
    assert key(flags=[*toolchain.FLAGS, "-O3"]) != first
    assert key(sets=toolchain.SETS[-2:]) != first
    for name, value in (("mlx_version", lambda: "0.32.5"), ("SUFFIX", ".x.so"), ("_libc", lambda: "other")):
        with monkeypatch.context() as changed:
            changed.setattr(toolchain, name, value)
            assert key() != first, name
    (tmp_path / "source").mkdir()
    with monkeypatch.context() as changed:
        changed.setattr(toolchain, "SOURCE", tmp_path / "source")
        keys = [first, key()]
        for text in ("one", "two"):
            (tmp_path / "source" / "a.h").write_text(text)
            keys.append(key())
        (tmp_path / "source" / "a.h").rename(tmp_path / "source" / "b.h")
        assert len({*keys, key()}) == 5


def test_a_damaged_module_is_built_again(fake):
    find()
    file = slot().file
    whole = file.read_bytes()
    damages = (whole[:-1], whole[:100], b"", bytes([whole[0] ^ 1]) + whole[1:])
    for count, damage in enumerate(damages, 2):
        file.unlink()  # this process has that file loaded: it must not change
        file.write_bytes(damage)
        file.chmod(0o600)
        assert find().status.state == "loaded"
        assert (file.read_bytes(), fake.count()) == (whole, count)
    (slot().folder / "built.json").write_text("{")
    assert find().status.state == "loaded"


def test_a_module_that_does_not_load_any_more_is_built_again(fake):
    kernels.prepare()
    bad = slot().folder / "bad"
    bad.write_text("the library of another C library, say")
    slot().publish(bad, {"compiler": "another"})
    assert find().status.compiler == "fake 1.0"
    assert fake.count() == 2


def test_a_cache_that_cannot_be_written_to(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("QGRAPH_CACHE", "/dev/null/none")
    neighbours = [tmp_path / "temporary" / f"of another program {i}" for i in range(20)]
    for neighbour in neighbours:
        neighbour.mkdir()
    with pytest.warns(UserWarning, match="for this process only: .*cannot be written to.*QGRAPH_CACHE="):
        assert kernels.library() is not None
    assert set((tmp_path / "temporary").iterdir()) == set(neighbours)  # ours went, nothing else did
    with pytest.raises(QGraphError, match="cannot be written to"):
        kernels.prepare()


def test_nothing_in_the_cache_but_our_own_is_touched(fake):
    root = store.root()
    others = [root / f"other{i}" for i in range(20)]
    for other in others:
        other.mkdir(parents=True)
        (other / "file").write_text("kept")
    find()
    fake.become("dies", version="fake 2.0")
    (slot().folder / "built.json").unlink()
    find()
    assert all((other / "file").read_text() == "kept" for other in others)


@pytest.mark.parametrize("where", ["folder", "file", "parent"])
def test_nothing_is_loaded_that_others_can_write(fake, tmp_path, where):
    find()
    place = {"folder": slot().folder, "file": slot().file, "parent": tmp_path / "cache"}[where]
    place.chmod(place.stat().st_mode | 0o002)
    status = finder.find(build=False).status
    assert (status.state, status.reason) == ("not built", f"{place} can be written to by others")
    assert "for this process only" in find().notice  # built elsewhere, in the end
    place.chmod(0o700)
    assert finder.find(build=False).status.state == "loaded"


def test_nothing_is_loaded_that_belongs_to_others(fake, monkeypatch):
    find()
    monkeypatch.setattr(store, "trusted", lambda: (12345678,))
    assert "belongs to another user" in finder.find(build=False).status.reason
    found = find()
    assert found.module is None
    assert "belongs to another user" in found.status.reason


def test_eight_threads_build_once(fake):
    fake.become("slow")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: kernels.library(), range(8)))
    assert (len({id(m) for m in found}), fake.count()) == (1, 1)
    assert found[0] is not None


ASK = "from qgraph import kernels; print(kernels.library().__file__)"


def ask() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True)


def test_two_processes_build_once(fake):
    fake.become("slow")
    both = [ask(), ask()]
    said = {process.communicate(timeout=60)[0].strip() for process in both}
    assert (said, fake.count()) == ({str(slot().file)}, 1)


def test_a_builder_that_is_killed_leaves_nothing_broken(fake):
    fake.become("hangs")
    killed = ask()
    until = time.monotonic() + 60
    while not fake.hanging() and time.monotonic() < until:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    for process_id in fake.hanging():
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    assert list(slot().folder.glob("building-*")) != []
    fake.become("good")
    assert find().status.state == "loaded"
    assert list(slot().folder.glob("building-*")) == []


def test_a_terminal_sees_a_bar(monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.shown() as report:
            report(3, 17)
        shown = ""
        while "3/17" not in shown:
            shown += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert progress.TEXT in shown


def test_an_import_finds_and_builds_nothing(fake):
    code = "import sys, qgraph; print([m for m in ('nanobind', 'qgraph.kernels.finder') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (found.stdout.strip(), found.stderr, fake.count()) == ("[]", "", 0)


def doctor(*arguments: str) -> tuple[int, dict[str, str], str]:
    """The exit code, the rows by their names, and what else was said."""
    result = CliRunner().invoke(main, ["doctor", *arguments])
    rows = dict(line.strip().split("  ", 1) for line in result.stdout.splitlines())
    return result.exit_code, {name: value.strip() for name, value in rows.items()}, result.stderr


def test_doctor_tells_of_the_kernels(fake):
    code, rows, _ = doctor()
    assert (code, fake.count()) == (0, 0)
    assert rows["native kernels"].startswith("not built yet")
    assert (rows["compiler"], rows["module"]) == ("fake 1.0", str(slot().file))
    code, rows, said = doctor("--build")
    assert (code, rows["native kernels"]) == (0, "portable (also built: avx2), at most 2 threads")
    assert progress.TEXT in said


def test_doctor_tells_why_there_are_none(fake, monkeypatch):
    fake.become("dies")
    code, rows, said = doctor("--build")
    assert (code, rows) == (1, {})
    assert "Error: " in said
    assert "there is no such thing" in said
    code, rows, _ = doctor()
    assert code == 0
    assert rows["native kernels"].startswith("failed: ")
    assert "doctor --build" in rows["fix"]
    monkeypatch.setenv("QGRAPH_KERNELS", "off")
    assert doctor()[1]["native kernels"] == "off: QGRAPH_KERNELS=off"

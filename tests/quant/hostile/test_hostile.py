"""Every row of the table, each in its own process: one error, or the bytes of the file; never more."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quant.hostile import adapters, folders, right, values
from tests.quant.hostile.craft import SECRET, Case
from tests.quant.hostile.files import FILES

PARTS = [
    FILES,
    values.TRIPLETS,
    values.BLOCKS,
    folders.D_CONFIG,
    folders.D_INDEX,
    folders.D_KINDS,
    folders.D_RECORD,
    adapters.ADAPTERS,
    right.LOAD,
]
CASES: dict[str, Case] = {name: case for part in PARTS for name, case in part.items()}
REFUSED = [name for name, case in CASES.items() if case.cause is not None]
LOADED = [name for name, case in CASES.items() if case.cause is None]
PROBE = Path(__file__).with_name("probe.py")
HANG = 60  # seconds; a load takes less than 2, but the machine may be busy


def run(case: Case, folder: Path) -> dict:
    """What the process said about the checkpoint of a case, made in `folder`."""
    work = folder / "model"
    work.mkdir()
    try:
        path = case.make(work)
    except OSError as error:
        if error.errno == errno.EFBIG:
            pytest.skip("no sparse files of this size here")
        raise
    done = subprocess.run(
        [sys.executable, str(PROBE), os.fspath(path), "adapter" if case.adapter else "model"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr}"
    assert not done.stderr
    assert SECRET not in done.stdout
    for foreign in (folder / "outside.txt", Path("/etc/passwd")):  # nor as a number
        if foreign.exists():
            assert str(int.from_bytes(foreign.read_bytes()[:8], "little")) not in done.stdout
    assert not list(folder.rglob("ran")), "code of the checkpoint was run"
    found = json.loads(done.stdout)
    assert found["open"] == 0, "files were left open"
    foreign = ("evil", "modeling", "torch", "transformers", "mlx_lm", "safetensors", "qgraph_examples")
    assert not [m for m in found["imported"] if m.startswith(foreign)]
    if os.path.isdir("/proc/self"):  # elsewhere the peak is that of the whole life of the process
        assert found["growth"] <= case.growth * 1024
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_checkpoint_is_refused_with_one_error(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = run(case, tmp_path)
    assert found["loaded"] is None
    assert found.get("error") == "CheckpointError", found
    assert found["alone"], "the error carries others"
    text = found["text"]
    assert len(text) <= 400
    lines = text.split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 2
    assert lines[1].startswith("  fix: ")
    assert lines[0].startswith(case.file)
    assert case.cause in text
    if case.tensor is not None:
        assert f": tensor '{case.tensor}': " in lines[0] or f": tensor '{case.tensor}' is " in lines[0]


@pytest.mark.parametrize("name", LOADED)
def test_an_odd_but_right_checkpoint_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = run(case, tmp_path)
    assert "error" not in found, found
    expected = {
        name: [list(stored.shape), hashlib.sha256(stored.data).hexdigest()]
        for name, stored in case.loaded().items()
    }
    assert found["loaded"] == expected


def test_the_table_has_the_rows_that_were_asked_for() -> None:
    assert sum(map(len, PARTS)) == len(CASES), "an id stands twice"
    assert (len(REFUSED), len(LOADED)) >= (120, 12)

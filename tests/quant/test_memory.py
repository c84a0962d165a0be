"""How much a load may take: the machine, its device, its container and the limits of the process."""

import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from qgraph._errors import CheckpointError
from qgraph.quant import memory
from tests.quant.hostile.files import sparse

LIMITED = """
import resource, sys
from qgraph._errors import CheckpointError
from qgraph.quant import load, load_adapter
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
try:
    load(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the control groups of Linux")
@pytest.mark.parametrize(
    ("listing", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000\n"}, 5000),
        ("0::/a/b\n", {"a/b/memory.max": "4000\n", "a/memory.max": "5000\n"}, 4000),
        ("0::/outside\n", {"memory.max": "3000\n"}, 3000),
        ("4:memory:/a\n1:cpu:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "2000\n"}, 2000),
        ("0::/../..\n", {"memory.max": "1000\n"}, 1000),
    ],
)
def test_the_limit_of_a_container_counts(
    listing: str, limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "listing").write_text(listing)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "listing")
    assert memory.usable_bytes() == expected
    memory.check_memory("m", expected)
    with pytest.raises(CheckpointError, match="m: needs"):
        memory.check_memory("m", expected + 1)


@pytest.mark.parametrize("name", ["memory_size", "total_memory"])
def test_a_device_with_more_memory_than_the_machine_counts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = memory._machine()
    monkeypatch.setattr(memory.mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(memory.mx, "device_info", lambda: {name: 2 * machine})
    assert memory._machine() == 2 * machine
    monkeypatch.setattr(memory.mx, "device_info", lambda: {name: machine // 2})
    assert memory._machine() == machine


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform == "darwin", reason="no limit to set")
def test_the_limit_of_the_process_counts(tmp_path: Path) -> None:
    file = sparse(8 << 30)(tmp_path)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model.safetensors: needs 8.6 GB, this machine has 6.4 GB for it")

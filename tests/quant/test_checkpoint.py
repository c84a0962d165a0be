"""Loading what mlx-lm wrote: the words, the tree, shards and folders, and reading itself."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportCallIssue=false, reportArgumentType=false
# (the stubs of mlx.core.load, save_safetensors and eval are partial)

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph._errors import CheckpointError
from qgraph.quant import (
    Quantization,
    QuantizedTensor,
    load,
    load_config,
    load_flat,
    pack,
    save,
    unpack,
)

Model = Callable[[str], Path]
Raw = Callable[..., bytes]
LAYER = "model.layers.0.mlp.up_proj"
W = f"{LAYER}.weight"
KINDS = ["affine8", "affine4", "affine3", "mixed", "mxfp4", "mxfp8", "nvfp4", "untied"]


def raw_bytes(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_words_are_those_of_the_file(kind: str, written: Model) -> None:
    folder = written(kind)
    stored: Any = mx.load(str(folder / "model.safetensors"))
    loaded = load_flat(folder)
    seen: set[str] = set()
    for name, leaf in loaded.items():
        if isinstance(leaf, mx.array):
            seen.add(name)
            assert raw_bytes(leaf) == raw_bytes(stored[name])
            continue
        module = name.removesuffix("weight")
        parts = ["weight", "scales", "biases"][: len(leaf.components())]
        for part, array in zip(parts, leaf.components(), strict=True):
            seen.add(module + part)
            assert raw_bytes(array) == raw_bytes(stored[module + part])
    assert seen == set(stored)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("affine8", "affine8g64"),
        ("affine3", "affine3g32"),
        ("mxfp4", "mxfp4"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
    ],
)
def test_every_mode_of_mlx_loads_as_declared(kind: str, expected: str, written: Model) -> None:
    weight = load(written(kind))["model"]["layers"][1]["self_attn"]["k_proj"]["weight"]
    assert str(weight.quantization) == expected
    assert (weight.shape, weight.dtype) == ((64, 64), mx.bfloat16)


def test_layers_may_differ_or_stay_dense(written: Model) -> None:
    layer = load(written("mixed"))["model"]["layers"][0]
    assert str(layer["self_attn"]["v_proj"]["weight"].quantization) == "affine8g32"
    assert str(layer["mlp"]["down_proj"]["weight"].quantization) == "affine6g64"
    assert str(layer["mlp"]["up_proj"]["weight"].quantization) == "affine4g64"
    assert isinstance(layer["self_attn"]["o_proj"]["weight"], mx.array)


def test_the_tree_has_a_list_of_layers_and_a_dict_for_each_module(written: Model) -> None:
    params = load(written("untied"))
    assert set(params) == {"model", "lm_head"}
    assert isinstance(params["model"]["layers"], list)
    assert len(params["model"]["layers"]) == 2
    assert params["model"]["norm"]["weight"].shape == (64,)
    assert params["lm_head"]["weight"].shape == (96, 64)
    assert "lm_head" not in load(written("affine4"))


def test_a_packed_weight_unpacks_to_what_mlx_computes(written: Model) -> None:
    stored: Any = mx.load(str(written("affine4") / "model.safetensors"))
    expected = mx.dequantize(*(stored[f"{LAYER}.{part}"] for part in ("weight", "scales", "biases")), 64, 4)
    weight = load_flat(written("affine4"))[f"{LAYER}.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert mx.array_equal(unpack(weight), expected)


def test_a_dense_model_loads_too(written: Model) -> None:
    assert all(isinstance(leaf, mx.array) for leaf in load_flat(written("dense")).values())


def test_loaded_arrays_can_be_used_in_another_thread(written: Model) -> None:
    loaded = load_flat(written("affine4"))
    found: list[float] = []

    def use() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            for leaf in loaded.values():
                for array in leaf.components() if isinstance(leaf, QuantizedTensor) else (leaf,):
                    found.append(mx.sum(array.astype(mx.float32)).item())  # type: ignore[arg-type]

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(found) == sum(
        len(leaf.components()) if isinstance(leaf, QuantizedTensor) else 1 for leaf in loaded.values()
    )


def test_progress_ends_at_the_total(written: Model, tmp_path: Path) -> None:
    params = load_flat(written("affine4"))
    save(tmp_path, params, max_shard_bytes=20_000)
    calls: list[tuple[int, int]] = []
    load(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 2
    assert calls == sorted(calls)
    total = sum(leaf.nbytes for leaf in params.values())
    assert calls[-1] == (total, total)


# --- shards and folders -------------------------------------------------------------------------


@pytest.fixture
def sharded(written: Model, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    source = written("affine4")
    save(folder, load_flat(source), config=load_config(source), max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def test_shards_load_as_one(sharded: Path, written: Model) -> None:
    one, many = load_flat(written("affine4")), load_flat(sharded)
    assert one.keys() == many.keys()


def test_a_single_file_takes_its_config_from_beside_it(model: Model) -> None:
    folder = model("affine4")
    assert load_flat(folder / "model.safetensors").keys() == load_flat(folder).keys()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no quantization block"):
        load(folder / "model.safetensors")


# --- reading ------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read_is_refused(model: Model) -> None:
    folder = model("affine4")
    file = folder / "model.safetensors"

    def touch(done: int, total: int) -> None:
        os.utime(file, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        load(folder, progress=touch)


def test_a_failed_read_gives_nothing_and_closes_the_file(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qgraph.quant import checkpoint

    folder = model("affine4")
    file = folder / "model.safetensors"
    mx_load = mx.load

    def cut(path: str, **options: Any) -> Any:
        arrays = mx_load(path, **options)
        os.truncate(file, file.stat().st_size // 2)
        return arrays

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    monkeypatch.setattr(checkpoint.mx, "load", cut)
    monkeypatch.setattr(checkpoint, "_BATCH_BYTES", 1000)  # so that most is not read when it fails
    before = open_files()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read") as caught:
        load(folder)
    assert open_files() == before  # although the traceback still holds the frames
    assert caught.tb is not None


def test_a_load_returns_when_its_file_is_closed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from qgraph.quant import checkpoint

    file = model("affine4") / "model.safetensors"
    mx_load = mx.load
    late: list[threading.Timer] = []

    def slow(path: str, **options: Any) -> Any:
        descriptor = os.open(path, os.O_RDONLY)  # as MLX's reading threads hold it for a moment
        late.append(threading.Timer(0.03, os.close, [descriptor]))
        late[0].start()
        return mx_load(path, **options)

    monkeypatch.setattr(checkpoint.mx, "load", slow)
    load_flat(file)
    assert not late[0].is_alive()


STATUS = """
import os, sys
import mlx.core as mx
from qgraph._errors import CheckpointError
from qgraph.quant import load
def kib(field):  # not ru_maxrss, which a child inherits from its parent
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
mx.eval(mx.zeros(4))
"""
MEASURE = """
before = kib("VmRSS")
params = load(sys.argv[1])
print(kib("VmHWM") - before)
"""
FAIL = """
import ctypes
import mlx.core as mx
held = []
def fail(path, progress=None):
    try:
        load(path, progress=progress)
    except CheckpointError as error:
        held.append(error)  # with whatever it refers to
def cut(done, total):
    os.truncate(sys.argv[3], done // 2)
fail(sys.argv[1])
before, active = kib("VmRSS"), mx.get_active_memory()
fail(sys.argv[2])
fail(sys.argv[3], cut)
fail(sys.argv[4])
peak = kib("VmHWM") - before
trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
if trim:
    trim(0)  # what the allocator keeps for later is held by nobody
arrays = mx.get_active_memory() - active
print(len(held), peak, kib("VmRSS") - before, arrays, len(os.listdir("/proc/self/fd")))
"""


def measured(script: str, *files: Path) -> list[int]:
    out = subprocess.run(
        [sys.executable, "-c", STATUS + script, *map(str, files)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in out.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_loading_takes_the_memory_of_the_file_and_less_than_a_tenth_more(tmp_path: Path) -> None:
    layer = pack(mx.random.normal((2048, 4096)).astype(mx.bfloat16), Quantization())
    layers = [{"up_proj": {"weight": layer}} for _ in range(24)]
    # The largest tensor is a quarter of it, and stands last in the file.
    embedding = mx.random.normal((8192, 2304)).astype(mx.bfloat16)
    save(tmp_path / "m.safetensors", {"layers": layers, "z": embedding})
    size = (tmp_path / "m.safetensors").stat().st_size
    (grown,) = measured(MEASURE, tmp_path / "m.safetensors")
    assert 0.5 * size < grown * 1024 <= 1.1 * size


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_load_that_fails_gives_its_memory_back_though_its_error_is_kept(tmp_path: Path, raw: Raw) -> None:
    bad = pack(mx.random.normal((64, 128)), Quantization())
    bad = QuantizedTensor(bad.packed, bad.scales * float("nan"), bad.biases, bad.quantization)
    large = {f"t{n}": mx.random.normal((1024, 4096)) for n in range(12)}  # 200 MB, several batches
    small, last, cut, text = (tmp_path / f"{name}.safetensors" for name in ("small", "last", "cut", "text"))
    save(small, {"weight": bad})
    save(last, large | {"weight": bad})
    save(cut, large)
    text.write_bytes(raw('{"' + "x" * 50_000_000 + '": [}'))
    failed, peak, rest, arrays, files = measured(FAIL, small, last, cut, text)
    assert failed == 4
    assert peak > 150 * 1024  # it had read them
    assert rest <= 5 * 1024
    assert arrays <= 5 * 1024 * 1024
    assert files == 4  # stdin, stdout, stderr and the listing


# --- what the config decides


def edit_config(folder: Path, change: Callable[[Any], None]) -> None:
    """Change both copies of the quantization block."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization"])
    config["quantization_config"] = config["quantization"]
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    file = str(folder / "model.safetensors")
    tensors = dict(mx.load(file))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(file, tensors)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_shapes_that_fit_twice_are_read_as_the_config_says(model: Model) -> None:
    folder = model("affine4")
    edit_config(folder, lambda block: block.update(bits=8, group_size=32))
    weight = load_flat(folder)[f"{LAYER}.weight"]
    assert weight.shape == (128, 32)  # half of the true 64: only the trace can tell


def replace(name: str, new: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], None]:
    return lambda tensors: tensors.__setitem__(name, new(tensors[name]))


def test_nonfinite_scales_load_on_request(model: Model) -> None:
    folder = model("affine4")
    edit_tensors(folder, replace(f"{LAYER}.scales", lambda a: a * float("nan")))
    weight = load(folder, allow_nonfinite=True)["model"]["layers"][0]["mlp"]["up_proj"]["weight"]
    assert mx.all(mx.isnan(weight.scales))


@pytest.mark.parametrize(("kind", "nan"), [("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0x7F)])
def test_the_nan_code_of_one_byte_scales_is_refused(kind: str, nan: int, model: Model) -> None:
    folder = model(kind)
    edit_tensors(
        folder,
        replace(f"{LAYER}.scales", lambda a: mx.where(mx.arange(128)[:, None] == 5, nan, a).astype(mx.uint8)),
    )
    with pytest.raises(CheckpointError, match="has NaN or infinity"):
        load(folder)


def test_a_global_scale_belongs_to_its_nvfp4_weight(model: Model) -> None:
    folder = model("nvfp4")
    name = f"{LAYER}.global_scale"
    edit_tensors(folder, lambda t: t.update({name: mx.array(3.0)}))
    flat = load_flat(folder)
    weight = flat[f"{LAYER}.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert weight.global_scale is not None
    assert name not in flat

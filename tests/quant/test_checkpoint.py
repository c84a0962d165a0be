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
LAYER = "model.layers.0.mlp.up_proj"
W = f"{LAYER}.weight"
KINDS = ["affine8", "affine4", "affine3", "mixed", "mxfp4", "mxfp8", "nvfp4", "untied"]


def raw_bytes(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert caught.value.fix
    assert len(text) <= 400
    assert text.replace("\n", "").isprintable()
    return text


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


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_shards_load_as_one(sharded: Path, written: Model) -> None:
    one, many = load_flat(written("affine4")), load_flat(sharded)
    assert one.keys() == many.keys()


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "a\\b.safetensors",
        "model\0.safetensors",
        "c:x.safetensors",
        ".safetensors",
        "..",
        "",
        7,
        None,
        ["x"],
    ],
)
def test_an_index_may_name_plain_files_only(file: object, sharded: Path) -> None:
    edit_index(sharded, lambda weights: weights.__setitem__(W, file))
    text = refusal(sharded)
    assert text.startswith("model.safetensors.index.json: tensor 'model.layers.0.mlp.up_proj")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    first.unlink()
    assert f"{first.name}: is missing" in refusal(sharded)


def test_a_tensor_in_another_shard_than_listed_is_refused(sharded: Path) -> None:
    def move(weights: dict[str, str]) -> None:
        weights[W] = next(file for file in weights.values() if file != weights[W])

    edit_index(sharded, move)
    assert f"tensor '{W}': model.safetensors.index.json lists it in" in refusal(sharded)


def test_a_ghost_an_unlisted_and_a_doubled_tensor_are_refused(sharded: Path) -> None:
    index = (sharded / "model.safetensors.index.json").read_text()
    edit_index(sharded, lambda weights: weights.__setitem__("ghost", weights[W]))
    assert "tensor 'ghost': is not in" in refusal(sharded)
    (sharded / "model.safetensors.index.json").write_text(index)
    edit_index(sharded, lambda weights: weights.pop(W))
    assert f"tensor '{W}': model.safetensors.index.json does not list it" in refusal(sharded)
    (sharded / "model.safetensors.index.json").write_text(index)
    files = sorted(sharded.glob("*.safetensors"))
    mx.save_safetensors(str(files[-1]), {W: mx.ones(2)})
    assert "CheckpointError" not in refusal(sharded)


def test_a_stale_file_beside_the_index_is_refused(sharded: Path) -> None:
    mx.save_safetensors(str(sharded / "model.safetensors"), {"x": mx.ones(2)})
    assert "model.safetensors: is not in model.safetensors.index.json" in refusal(sharded)


def test_several_files_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "and no model.safetensors.index.json" in refusal(sharded)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "is a list"),
        ("{}", "weight_map is null"),
        ('{"weight_map": {}}', "is empty"),
        ('{"weight_map": []}', "weight_map is a list"),
        ('{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}', "the key 'a' twice"),
        ("[" * 1_000_000, "deeper than 64"),
    ],
)
def test_a_malformed_index_is_refused(text: str, expected: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert expected in refusal(sharded)


def test_folders_without_a_model_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has no model.safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "only pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "absent")


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


MEASURE = """
import sys
import mlx.core as mx
from qgraph.quant import load
def kib(field):  # not ru_maxrss, which a child inherits from its parent
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
mx.eval(mx.zeros(4))
before = kib("VmRSS")
params = load(sys.argv[1])
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_loading_takes_the_memory_of_the_file_and_less_than_a_tenth_more(tmp_path: Path) -> None:
    layer = pack(mx.random.normal((2048, 4096)).astype(mx.bfloat16), Quantization())
    layers = [{"up_proj": {"weight": layer}} for _ in range(24)]
    # The largest tensor is a quarter of it, and stands last in the file.
    embedding = mx.random.normal((8192, 2304)).astype(mx.bfloat16)
    save(tmp_path / "m.safetensors", {"layers": layers, "z": embedding})
    size = (tmp_path / "m.safetensors").stat().st_size
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m.safetensors")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(out.stdout) * 1024
    assert 0.5 * size < grown <= 1.1 * size

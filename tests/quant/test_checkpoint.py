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
KINDS = ["affine8", "affine4", "affine3", "mixed", "mxfp4", "mxfp8", "nvfp4", "untied"]


def raw_bytes(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


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


# --- config against tensors ---------------------------------------------------------------------


def put(key: str, value: object) -> Callable[[Any], None]:
    return lambda block: block.__setitem__(key, value)


BLOCKS: dict[str, tuple[Callable[[Any], object], str]] = {
    "bits 0": (put("bits", 0), "bits is 0, supported: 1, 2, 3, 4, 5, 6, 8"),
    "bits 7": (put("bits", 7), "bits is 7"),
    "bits -4": (put("bits", -4), "bits is -4"),
    "bits as text": (put("bits", "4"), "bits is '4'"),
    "bits 4.5": (put("bits", 4.5), "bits is 4.5"),
    "bits 4.0": (put("bits", 4.0), "bits is 4.0"),
    "bits true": (put("bits", True), "bits is True"),
    "bits null": (put("bits", None), "bits is None"),
    "no bits": (lambda block: block.pop("bits"), "has no bits"),
    "group 0": (put("group_size", 0), "group_size is 0, supported: 32, 64, 128"),
    "group 48": (put("group_size", 48), "group_size is 48"),
    "group -32": (put("group_size", -32), "group_size is -32"),
    "group 2^62": (put("group_size", 2**62), "group_size is 4611686018427387904"),
    "unknown mode": (put("mode", "int4"), "mode is 'int4'"),
    "mode list": (put("mode", []), "mode is a list"),
    "bits contradict": (
        put("bits", 8),
        "is not the declared affine8g64; shapes fit affine2g128, affine4g64",
    ),
    "group contradicts": (put("group_size", 32), "is not the declared affine4g32"),
    "mode contradicts": (
        lambda block: block.update(mode="mxfp4", group_size=32),
        "declared mxfp4 needs U8",
    ),
    "override contradicts": (put(LAYER, {"bits": 8, "group_size": 64}), LAYER),
    "override group 0": (put(LAYER, {"bits": 4, "group_size": 0}), "group_size is 0"),
    "override bits 0": (put(LAYER, {"bits": 0, "group_size": 64}), "bits is 0"),
    "override is a list": (put(LAYER, [4, 64]), "is a list, expected an object or false"),
    "override is a number": (put(LAYER, 4), "is a number, expected an object or false"),
    "false over a triplet": (put(LAYER, False), "declared false"),
    "packing of another library": (put("quant_method", "awq"), "quant_method awq"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_quantization_block_that_does_not_fit_is_refused(case: str, model: Model) -> None:
    change, expected = BLOCKS[case]
    folder = model("affine4")
    edit_config(folder, change)
    assert expected in refusal(folder)


def test_shapes_that_fit_twice_are_read_as_the_config_says(model: Model) -> None:
    folder = model("affine4")
    edit_config(folder, lambda block: block.update(bits=8, group_size=32))
    weight = load_flat(folder)[f"{LAYER}.weight"]
    assert weight.shape == (128, 32)  # half of the true 64: only the trace can tell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not JSON"),
        ('{"quantization": ', "is not JSON"),
        ("[]", "is a list, not an object"),
        ("null", "is null"),
        ("{}", "no quantization block"),
        ('{"quantization": null}', "no quantization block"),
        ('{"quantization": []}', "the quantization block is a list"),
        ('{"quantization": 4}', "the quantization block is a number"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("[" * 1_000_000, "nests deeper than 64"),
        ('{"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {}}', "differ"),
        (
            '{"quantization": {"bits": 4, "group_size": 64},'
            ' "quantization_config": {"bits": 4.0, "group_size": 64}}',
            "differ",
        ),
    ],
)
def test_a_malformed_config_is_refused(text: str, expected: str, model: Model) -> None:
    folder = model("affine4")
    (folder / "config.json").write_text(text)
    assert expected in refusal(folder)


def test_a_missing_config_is_refused_and_a_pipe_is_not_waited_for(model: Model) -> None:
    folder = model("affine4")
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)
    os.mkfifo(folder / "config.json")
    assert "is a pipe" in refusal(folder)


def test_a_block_without_packed_layers_is_refused(model: Model) -> None:
    folder = model("dense")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert "no tensor has scales" in refusal(folder)


def test_an_override_for_a_dense_layer_is_refused_and_for_an_absent_one_ignored(
    model: Model,
) -> None:
    folder = model("mixed")
    edit_config(folder, put("lm_head", {"bits": 4, "group_size": 64}))
    load(folder)
    edit_config(folder, put("model.layers.0.self_attn.o_proj", {"bits": 4, "group_size": 64}))
    assert "o_proj.weight': is dense, but config.json declares it affine4g64" in refusal(folder)


def test_nothing_named_in_a_config_is_run(model: Model) -> None:
    folder = model("affine4")
    (folder / "evil.py").write_text("open('ran', 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_file": "evil.py", "auto_map": {"AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)
    assert "evil" not in sys.modules
    assert load_config(folder)["model_file"] == "evil.py"


# --- triplets -----------------------------------------------------------------------------------

W, S, B = (f"{LAYER}.{part}" for part in ("weight", "scales", "biases"))


def replace(name: str, new: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], None]:
    return lambda tensors: tensors.__setitem__(name, new(tensors[name]))


TENSORS: dict[str, tuple[Callable[[dict[str, mx.array]], object], str]] = {
    "no scales": (lambda t: t.pop(S), "is packed (U32) but has no scales beside it"),
    "biases alone": (lambda t: (t.pop(S), t.pop(W)), "up_proj.biases': has no scales"),
    "weight alone": (lambda t: (t.pop(S), t.pop(B)), "is packed (U32) but has no scales"),
    "no biases": (lambda t: t.pop(B), "has no biases beside it"),
    "no weight": (lambda t: t.pop(W), "has no packed weight beside it"),
    "one row of scales": (replace(S, lambda a: a[:1]), "up_proj.scales': has shape [1, 1]"),
    "one row too few": (replace(S, lambda a: a[:-1]), "needs [128, groups]"),
    "scales of another rank": (replace(S, lambda a: a[:, 0]), "has shape [128]"),
    "transposed scales": (replace(S, lambda a: a.T), "has shape [1, 128]"),
    "biases of another shape": (replace(B, lambda a: a[:-1]), "the scales have [128, 1]"),
    "one group too many": (replace(S, lambda a: mx.concatenate([a, a], 1)), "is not the declared"),
    "integer scales": (replace(S, lambda a: a.astype(mx.int32)), "is I32, declared affine4g64"),
    "other float biases": (replace(B, lambda a: a.astype(mx.float32)), "is F32, but the scales"),
    "signed words": (replace(W, lambda a: a.view(mx.int32)), "is I32, a packed weight is U32"),
    "float words": (replace(W, lambda a: a.astype(mx.float32)), "is F32, a packed weight is U32"),
    "vector of words": (
        lambda t: t.update({W: t[W][0], S: t[S][0], B: t[B][0]}),
        "expected rank 2 or more",
    ),
    "NaN in scales": (replace(S, lambda a: a * float("nan")), "up_proj.scales': has NaN"),
    "infinity in scales": (replace(S, lambda a: a * float("inf")), "up_proj.scales': has NaN"),
    "one NaN in biases": (
        replace(B, lambda a: mx.where(mx.arange(128)[:, None] == 77, float("nan"), a)),
        "up_proj.biases': has NaN or infinity",
    ),
    "global scale of affine": (
        lambda t: t.update({f"{LAYER}.global_scale": mx.array(1.0)}),
        "has no global scale",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_damaged_triplet_is_refused(case: str, model: Model) -> None:
    change, expected = TENSORS[case]
    folder = model("affine4")
    edit_tensors(folder, change)
    text = refusal(folder)
    assert expected in text
    assert text.startswith("model.safetensors: tensor 'model.layers.0.mlp.up_proj.")


def test_nonfinite_scales_load_on_request(model: Model) -> None:
    folder = model("affine4")
    edit_tensors(folder, replace(S, lambda a: a * float("nan")))
    weight = load(folder, allow_nonfinite=True)["model"]["layers"][0]["mlp"]["up_proj"]["weight"]
    assert mx.all(mx.isnan(weight.scales))


@pytest.mark.parametrize(("kind", "nan"), [("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0x7F)])
def test_the_nan_code_of_one_byte_scales_is_refused(kind: str, nan: int, model: Model) -> None:
    folder = model(kind)
    edit_tensors(
        folder,
        replace(S, lambda a: mx.where(mx.arange(128)[:, None] == 5, nan, a).astype(mx.uint8)),
    )
    assert "has NaN or infinity" in refusal(folder)


def test_biases_of_a_mode_without_biases_are_refused(model: Model) -> None:
    folder = model("mxfp4")
    edit_tensors(folder, lambda t: t.update({B: t[S]}))
    assert "declared mxfp4 has no biases" in refusal(folder)


def test_a_global_scale_belongs_to_its_nvfp4_weight(model: Model) -> None:
    folder = model("nvfp4")
    name = f"{LAYER}.global_scale"
    edit_tensors(folder, lambda t: t.update({name: mx.array(3.0)}))
    flat = load_flat(folder)
    weight = flat[f"{LAYER}.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert weight.global_scale is not None
    assert name not in flat
    edit_tensors(folder, lambda t: t.update({name: mx.ones(4)}))
    assert "is F32[4], expected an F32 scalar" in refusal(folder)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "a.b"], "'a': is a tensor and has tensors inside it"),
        (["layers.999999999.w"], "a list index above"),
        (["layers.01.w"], "leading zeros"),
        (["layers.1_0.w"], "not a plain list index"),
        (["a..b"], "an empty part"),
        ([".".join("a" * 5000)], "more than 64 parts"),
    ],
)
def test_names_without_a_tree_are_refused(names: list[str], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    mx.save_safetensors(str(file), {name: mx.ones(2) for name in names})
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor") as caught:
        load(file)
    assert expected in str(caught.value)
    assert set(load_flat(file)) == set(names)


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

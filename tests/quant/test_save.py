# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportArgumentType=false
# (the stubs of mlx.core are partial)

import json
import os
import stat
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
)

Model = Callable[[str], Path]
Q4 = Quantization(bits=4, group_size=64)


def stored_bytes(leaf: mx.array | QuantizedTensor) -> list[tuple[mx.Dtype, Any, bytes]]:
    arrays = leaf.components() if isinstance(leaf, QuantizedTensor) else (leaf,)
    return [
        (a.dtype, a.shape, np.array(mx.contiguous(a).view(mx.uint8)).tobytes() if a.ndim else b"")
        for a in arrays
    ]


def weights(n: int = 3, q: Quantization = Q4) -> dict[str, Any]:
    dense = [mx.random.normal((8, 128)).astype(mx.bfloat16) for _ in range(n)]
    return {"layers": [{"up": {"weight": pack(w, q)}} for w in dense]}


@pytest.mark.parametrize(
    "kind", ["dense", "affine8", "affine3", "mixed", "mxfp4", "mxfp8", "nvfp4", "untied"]
)
@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
def test_mlx_lm_and_qgraph_read_back_what_was_saved(
    kind: str, limit: int, written: Model, logits: Callable[[Path], mx.array], tmp_path: Path
) -> None:
    source = written(kind)
    save(tmp_path, load(source), config=load_config(source), max_shard_bytes=limit)
    before, after = load_flat(source), load_flat(tmp_path)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert stored_bytes(leaf) == stored_bytes(after[name])
        if isinstance(leaf, QuantizedTensor):
            again = after[name]
            assert isinstance(again, QuantizedTensor)
            assert (leaf.quantization, leaf.dtype) == (again.quantization, again.dtype)
    assert mx.array_equal(logits(source), logits(tmp_path))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit == 20_000)


def test_a_saved_folder_has_the_layout_of_mlx_lm(tmp_path: Path) -> None:
    params = weights()
    params["head"] = {"weight": pack(mx.ones((8, 64)), Quantization(bits=8))}
    save(tmp_path, params, config={"model_type": "toy"}, max_shard_bytes=1200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert all((tmp_path / file).stat().st_size < 1200 + 1000 for file in files)
    config = json.loads((tmp_path / "config.json").read_text())
    top = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config == {
        "model_type": "toy",
        "quantization": top | {"head": top | {"bits": 8}},
        "quantization_config": top | {"head": top | {"bits": 8}},
    }
    for file in files:
        _, metadata = mx.load(str(tmp_path / file), return_metadata=True)
        assert metadata == {"format": "mlx"}


def test_a_single_file_reads_back_without_a_config(tmp_path: Path) -> None:
    params = weights() | {"head": {"weight": pack(mx.ones((8, 64)), Quantization(bits=8))}}
    save(tmp_path / "w.safetensors", params)
    assert os.listdir(tmp_path) == ["w.safetensors"]
    loaded = load(tmp_path / "w.safetensors")
    assert str(loaded["layers"][2]["up"]["weight"].quantization) == "affine4g64"
    assert str(loaded["head"]["weight"].quantization) == "affine8g64"


def test_every_dtype_layout_and_size_is_written_bit_for_bit(tmp_path: Path) -> None:
    base = mx.random.normal((4, 6))
    arrays = {
        "f32": base,
        "f16": base.astype(mx.float16),
        "bf16": base.astype(mx.bfloat16),
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "broadcast": mx.broadcast_to(mx.array([1.5, 2.5], mx.bfloat16), (3, 2)),
        "scalar": mx.array(1.5, mx.bfloat16),
        "empty": mx.zeros((0, 3), mx.bfloat16),
        "bool": mx.array([True, False]),
        "complex": mx.array([1 + 2j]),
        "i64": mx.array([-(2**40)], mx.int64),
        "lazy": base * 2 + 1,
    }
    save(tmp_path / "w.safetensors", arrays)
    for name, array in load_flat(tmp_path / "w.safetensors").items():
        assert isinstance(array, mx.array)
        assert (array.dtype, array.shape) == (arrays[name].dtype, arrays[name].shape)
        assert mx.array_equal(array, arrays[name])


def test_a_global_scale_is_saved_beside_its_weight(tmp_path: Path) -> None:
    nvfp4 = Quantization.of_mode("nvfp4")
    save(tmp_path, {"up": {"weight": pack(mx.ones((8, 64)), nvfp4, mx.array(3.0))}})
    weight = load(tmp_path)["up"]["weight"]
    assert weight.global_scale.item() == 3.0


def test_a_config_in_the_folder_is_kept_and_its_blocks_renewed(tmp_path: Path) -> None:
    save(tmp_path, weights(), config={"model_type": "toy", "extra": [1]})
    save(tmp_path, weights(q=Quantization(bits=8)))
    config = load_config(tmp_path)
    assert config["extra"] == [1]
    assert config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    save(tmp_path, {"layers": [{"up": {"weight": mx.ones((2, 2))}}]})
    assert load_config(tmp_path) == {"model_type": "toy", "extra": [1]}
    assert load(tmp_path)["layers"][0]["up"]["weight"].shape == (2, 2)


def test_the_config_of_the_caller_is_not_changed(tmp_path: Path) -> None:
    config = {"quantization": {"bits": 8, "group_size": 64}, "a": {"b": 1}}
    before = json.dumps(config)
    save(tmp_path, weights(), config=config)
    assert json.dumps(config) == before


def turned() -> QuantizedTensor:
    t = pack(mx.ones((8, 64)), Q4)
    return QuantizedTensor(t.packed, t.scales, t.biases, Q4, axis=-2)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "other axis": (lambda: {"up": {"weight": turned()}}, "its groups run along axis -2"),
    "other key": (lambda: {"up": {"w": pack(mx.ones((8, 64)), Q4)}}, 'under the key "weight"'),
    "taken name": (
        lambda: {"up": {"weight": pack(mx.ones((8, 64)), Q4), "scales": mx.ones(2)}},
        "tensor 'up.scales': is also a part",
    ),
    "number": (lambda: {"up": {"weight": 1.0}}, "tensor 'up.weight': is a float"),
    "numpy": (lambda: {"up": np.ones(2)}, "is a ndarray"),
    "none": (lambda: {"up": None}, "is a NoneType"),
    "nothing": (lambda: {}, "no parameters"),
    "float64": (lambda: {"up": mx.ones(2, mx.float64, stream=mx.cpu)}, "float64"),
    "escape in a name": (lambda: {"a\x1b": mx.ones(2)}, "cannot be stored"),
    "one inside another": (lambda: {"a": mx.ones(2), "a.b": mx.ones(2)}, "tensors inside it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_loaded_is_not_saved(case: str, tmp_path: Path) -> None:
    make, expected = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "new", make())
    assert expected in str(caught.value)
    assert caught.value.fix
    assert not (tmp_path / "new").exists()


def test_weight_files_that_would_stay_are_not_mixed_in(tmp_path: Path) -> None:
    save(tmp_path, weights(), max_shard_bytes=600)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="would stay beside the new weights"):
        save(tmp_path, weights())
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_files_have_the_usual_mode(tmp_path: Path) -> None:
    save(tmp_path, weights())
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_reference_reader_finds_the_same_bytes(tmp_path: Path) -> None:
    from safetensors import safe_open

    arrays = {
        "f32": mx.random.normal((3, 5)),
        "f16": mx.random.normal((4, 2)).astype(mx.float16),
        "odd": mx.array([1, 2, 3], mx.uint8),
        "none": mx.zeros((0, 7)),
        "one": mx.array(2.5),
        "ünï": mx.array([7], mx.int64),
    }
    save(tmp_path / "w.safetensors", arrays)
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as reference:
        assert set(reference.keys()) == set(arrays)
        assert reference.metadata() == {"format": "mlx"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(reference.get_tensor(name), np.array(array), strict=True)
    start = (tmp_path / "w.safetensors").read_bytes()[:8]
    assert int.from_bytes(start, "little") % 8 == 0  # so that what MLX or others map is aligned


def test_saving_over_the_loaded_files_keeps_them_right(tmp_path: Path) -> None:
    save(tmp_path, weights())
    params = load(tmp_path)
    expected = stored_bytes(params["layers"][1]["up"]["weight"])
    save(tmp_path, params)
    assert stored_bytes(load(tmp_path)["layers"][1]["up"]["weight"]) == expected

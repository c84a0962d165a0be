"""What loading costs and leaves alone: placeholders, memory, the hands of mlx-lm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import qgraph as qg
from qgraph.lm import weights
from qgraph.lm.architecture import build, copy_of, slots
from tests.lm.peer import config_of, write

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "head_dim": 256,
    "vocab_size": 32000,
}
MEASURE = """
import sys
import mlx.core as mx
import qgraph as qg

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

small, large = sys.argv[1:]
qg.lm.load(small)  # everything is imported
mx.clear_cache()
mx.reset_peak_memory()
before, active = peak(), mx.get_active_memory()
model = qg.lm.load(large)
after = peak()
print(after - before, mx.get_peak_memory() - active)
assert "dequantize" not in model.optimized().histogram()
"""


def packed(folder: Path, size: dict[str, int]) -> int:
    """A checkpoint of random words in the shapes of a config, much faster than one that is quantized."""
    found = {**config_of(size, tied=True), "quantization": {"bits": 4, "group_size": 64}}
    tensors: dict[str, mx.array] = {}
    for i, (path, place) in enumerate(slots(build(found)).items()):
        shape = place.value.shape
        if len(shape) == 1:
            tensors[path] = mx.ones(shape)
            continue
        module, rows, groups = path.removesuffix(".weight"), shape[0], shape[1] // 64
        words = np.random.default_rng(i).integers(0, 2**32, (rows, shape[1] // 8), np.uint32)
        tensors[path] = mx.array(words)
        tensors[f"{module}.scales"] = mx.full((rows, groups), shape[1] ** -0.5 / 8)
        tensors[f"{module}.biases"] = mx.full((rows, groups), -(shape[1] ** -0.5))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(found))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return sum(array.nbytes for array in tensors.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_a_load_takes_the_size_of_the_checkpoint_and_a_tenth(tmp_path: Path) -> None:
    nbytes = packed(tmp_path / "large", LARGE)
    small = write(tmp_path / "small", quantization={"bits": 4})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(tmp_path / "large")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    resident, arrays = map(int, done.stdout.split())
    assert nbytes > 100e6, "small ones would be lost in what Python does"
    assert arrays <= nbytes * 1.1
    assert resident <= nbytes * 1.1


def test_placeholders_are_never_in_memory() -> None:
    """A model of 32 GB is described in no time and space."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "head_dim": 128, "vocab_size": 128_256}
    huge = config_of({**sizes, "num_hidden_layers": 80}, tied=False) | {"num_attention_heads": 64}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = build(huge)
    places = slots(copy_of(model))
    assert sum(place.value.nbytes for place in places.values()) > 100e9
    assert mx.get_peak_memory() - before < 1e6


def test_a_copy_of_the_structure_shares_arrays_and_nothing_else() -> None:
    model = build(
        config_of(
            {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "head_dim": 32,
                "vocab_size": 96,
            },
            tied=True,
        )
    )
    copied = copy_of(model)
    before = {path: place.value for path, place in slots(model).items()}
    assert all(place.value is before[path] for path, place in slots(copied).items())
    for place in slots(copied).values():
        place.fill(mx.zeros(1))
    copied.model.layers[0]["self_attn"] = None
    assert {path: place.value for path, place in slots(model).items()} == before


def test_mlx_lm_generates_with_the_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", quantization={"bits": 4})
    model = qg.lm.load(folder)
    peer = mlx_lm.utils.load_model(folder)[0]
    assert isinstance(model.model, type(peer))
    options: dict[str, Any] = {"prompt": "What is 2+2?", "max_tokens": 24}
    expected = mlx_lm.generate(peer, mlx_lm.utils.load_tokenizer(folder), **options)
    assert mlx_lm.generate(model.model, model.tokenizer, **options) == expected
    assert len(expected) > 4


def test_tokenizer_files_are_not_needed_for_a_graph(tmp_path: Path) -> None:
    packed(tmp_path / "model", {**LARGE, "vocab_size": 256, "num_hidden_layers": 1})
    assert qg.lm.load(tmp_path / "model").report().missed == ()


def changed(folder: Path, name: str, array: mx.array) -> Path:
    """The checkpoint with another tensor."""
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, mx.load(file) | {name: array})
    return folder


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none_are_refused(part: str, value: float, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", quantization={"bits": 4})
    name = f"layers.1.mlp.up_proj.{part}"
    scales = mx.load(str(folder / "model.safetensors"))[f"model.{name}"]
    scales[-1, -1] = value
    changed(folder, f"model.{name}", scales)
    with pytest.raises(qg.CheckpointError, match=rf"'model.{name}': has NaN or infinity"):
        qg.lm.load(folder)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", quantization={"bits": 4})
    evaluate = weights._evaluate

    def slow(*arguments: Any) -> None:
        evaluate(*arguments)
        with open(folder / "model.safetensors", "ab") as file:
            file.write(b"x")

    monkeypatch.setattr(weights, "_evaluate", slow)
    with pytest.raises(qg.CheckpointError, match="changed while it was read"):
        qg.lm.load(folder)


def test_what_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", quantization={"bits": 4})
    monkeypatch.setattr("qgraph.quant.memory.usable_bytes", lambda: 1000)
    monkeypatch.setattr(weights, "_evaluate", lambda *_: pytest.fail("it was read"))
    with pytest.raises(qg.CheckpointError, match=r"this machine has 0\.0 GB for it"):
        qg.lm.load(folder)


def test_files_are_closed_after_a_load_and_after_one_that_failed(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", quantization={"bits": 4}, shards=True)
    listing = Path("/dev/fd")

    def opened() -> list[str]:
        return [str(f.resolve()) for f in listing.iterdir() if "safetensors" in str(f.resolve())]

    model = qg.lm.load(folder)
    assert opened() == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    with pytest.raises(qg.CheckpointError):
        qg.lm.load(folder)
    assert opened() == []
    assert model.report().missed == ()


def test_infinity_may_be_spelt_out(tmp_path: Path) -> None:
    """As transformers writes it since JSON has none."""
    folder = write(tmp_path / "model", quantization={"bits": 4})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": {"__float__": "NaN"}}))
    with pytest.raises(qg.CheckpointError, match="rms_norm_eps is nan"):
        qg.lm.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"limit": [0.0, {"__float__": "Infinity"}]}))
    assert qg.lm.load(folder).config["limit"] == [0.0, float("inf")]

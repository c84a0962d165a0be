# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx-lm has no types, those of mlx.core are partial)

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph._errors import CheckpointError
from qgraph.execute.reference import to_numpy
from qgraph.quant import Adapter, QuantizedTensor, load, load_adapter, merge_adapter
from tests.agree import assert_close

Model = Callable[[str], Path]
Q = "model.layers.1.self_attn.q_proj"
CONFIG = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
}


def pair(inner: int = 64, out: int = 128, rank: int = 4) -> dict[str, mx.array]:
    a, b = mx.random.normal((inner, rank)), mx.random.normal((rank, out))
    return {f"{Q}.lora_a": a, f"{Q}.lora_b": b}


def write(folder: Path, tensors: dict[str, mx.array], **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def test_an_adapter_loads_with_the_scale_of_its_config(folder: Path) -> None:
    tensors = pair()
    adapter = load_adapter(write(folder, tensors))
    assert (adapter.rank, adapter.scale, adapter.modules) == (4, 20.0, (Q,))
    assert adapter.tensors.keys() == tensors.keys()
    assert all(mx.array_equal(adapter.tensors[name], tensors[name]) for name in tensors)


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        make()
    assert caught.value.fix
    assert len(str(caught.value)) <= 400
    return str(caught.value)


@pytest.mark.parametrize("kind", ["affine4", "affine3", "mxfp4", "dense"])
def test_merging_adds_the_pair_and_leaves_the_weights_alone(kind: str, written: Model, folder: Path) -> None:
    params = load(written(kind))
    adapter = load_adapter(write(folder, pair()))
    merged = merge_adapter(params, adapter)
    layer = merged["model"]["layers"][1]["self_attn"]["q_proj"]
    before = params["model"]["layers"][1]["self_attn"]["q_proj"]
    assert layer["weight"] is before["weight"]
    assert layer["lora_a"] is adapter.tensors[f"{Q}.lora_a"]
    assert layer["lora_b"] is adapter.tensors[f"{Q}.lora_b"]
    scale = layer["lora_scale"]
    assert (scale.shape, scale.dtype, scale.item()) == ((), mx.float32, 20.0)
    assert "lora_a" not in before
    assert "lora_a" not in merged["model"]["layers"][0]["self_attn"]["q_proj"]
    assert isinstance(merged["model"]["layers"], list)
    assert merged["model"]["layers"][0] is params["model"]["layers"][0]


def adapter_of(tensors: dict[str, mx.array]) -> Adapter:
    return Adapter(CONFIG, tensors)


def renamed(module: str) -> dict[str, mx.array]:
    return {name.replace(Q, module): array for name, array in pair().items()}


UNFIT: dict[str, tuple[dict[str, mx.array], str]] = {
    "other in": (pair(inner=32), "lora_a': has shape (32, 4), expected (64, 4)"),
    "other out": (pair(out=64), "lora_b': has shape (4, 64), expected (4, 128)"),
    "misspelt": (
        renamed("model.layers.1.self_attn.q_projj"),
        "no 'q_projj' there; did you mean 'q_proj'?",
    ),
    "no such layer": (renamed("model.layers.7.self_attn.q_proj"), "no '7' there"),
    "not an index": (renamed("model.layers.x.self_attn.q_proj"), "no 'x' there"),
    "a group": (renamed("model.layers.1.self_attn"), "the module has no weight"),
    "the list": (renamed("model.layers"), "the module has no weight"),
    "inside a weight": (renamed(f"{Q}.weight.x"), "no 'x' there"),
    "a vector": (renamed("model.norm"), "expected rank 2 or 3"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_of_another_model_is_refused(case: str, written: Model) -> None:
    tensors, expected = UNFIT[case]
    params = load(written("affine4"))
    text = refusal(lambda: merge_adapter(params, adapter_of(tensors)))
    assert expected in text
    assert text.startswith("adapters.safetensors: tensor 'model.")


def test_a_second_adapter_is_refused(written: Model) -> None:
    merged = merge_adapter(load(written("affine4")), adapter_of(pair()))
    assert "an adapter already" in refusal(lambda: merge_adapter(merged, adapter_of(pair())))


def test_embeddings_and_experts_have_their_own_shapes() -> None:
    embed = {"embed_tokens.lora_a": mx.zeros((96, 4)), "embed_tokens.lora_b": mx.zeros((4, 64))}
    merged = merge_adapter({"embed_tokens": {"weight": mx.zeros((96, 64))}}, adapter_of(embed))
    assert "lora_a" in merged["embed_tokens"]
    experts = {"up.lora_a": mx.zeros((3, 4, 64)), "up.lora_b": mx.zeros((3, 128, 4))}
    merged = merge_adapter({"up": {"weight": mx.zeros((3, 128, 64))}}, adapter_of(experts))
    assert "lora_a" in merged["up"]
    with pytest.raises(CheckpointError, match="expected"):
        merge_adapter({"up": {"weight": mx.zeros((2, 128, 64))}}, adapter_of(experts))


def test_an_adapter_of_mlx_lm_computes_the_same(written: Model, folder: Path) -> None:
    pytest.importorskip("mlx_lm")
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model: Any = load_model(written("affine4"))[0]
    linear_to_lora_layers(model, 2, CONFIG["lora_parameters"])  # pyright: ignore[reportArgumentType]
    names = dict(tree_flatten(model.parameters()))
    tensors = {
        name: mx.random.normal(array.shape)
        for name, array in names.items()
        if name.endswith(("lora_a", "lora_b"))
    }
    assert len(tensors) == 2 * 2 * 7
    model.load_weights(list(tensors.items()), strict=False)
    merged = merge_adapter(load(written("affine4")), load_adapter(write(folder, tensors)))
    layer = merged["model"]["layers"][1]["self_attn"]["q_proj"]
    x = mx.random.normal((3, 64))
    weight = layer["weight"]
    assert isinstance(weight, QuantizedTensor)
    low = (x @ layer["lora_a"]) @ layer["lora_b"]
    dense = mx.array(to_numpy(weight).astype(np.float32))  # unpack would round to the dtype of the scales
    ours = x @ dense.T + layer["lora_scale"] * low
    theirs = model.model.layers[1].self_attn.q_proj(x)
    size = abs(x) @ abs(dense).T + layer["lora_scale"] * (
        (abs(x) @ abs(layer["lora_a"])) @ abs(layer["lora_b"])
    )
    assert_close(ours, theirs, k=64, path="P2", magnitude=np.array(size))


def test_what_plain_code_cannot_compute_is_not_merged() -> None:
    params = {"up": {"weight": mx.zeros((128, 64))}}
    parts = {"up.lora_a.0": mx.zeros((64, 4)), "up.lora_b.0": mx.zeros((4, 128))}
    assert "adapts a part of a layer" in refusal(lambda: merge_adapter(params, adapter_of(parts)))
    dora = Adapter(CONFIG | {"fine_tune_type": "dora"}, {"up.m": mx.zeros(128)})
    assert "is dora, not lora" in refusal(lambda: merge_adapter(params, dora))
    full = Adapter({"fine_tune_type": "full"}, {"up.weight": mx.zeros((128, 64))})
    assert "is full, not lora" in refusal(lambda: merge_adapter(params, full))


def test_every_module_may_have_a_scale_of_its_own() -> None:
    a, b = mx.zeros((64, 4)), mx.zeros((4, 128))
    tensors = {f"{n}.lora_{x}": t for n in ("up", "down") for x, t in (("a", a), ("b", b))}
    params = {n: {"weight": mx.zeros((128, 64))} for n in ("up", "down")}
    merged = merge_adapter(params, Adapter(CONFIG, tensors, scales={"up": 3.0}))
    assert (merged["up"]["lora_scale"].item(), merged["down"]["lora_scale"].item()) == (3.0, 20.0)

"""A config that does not fit its tensors, and damaged tensors: each is refused by name."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportCallIssue=false, reportArgumentType=false
# (the stubs of mlx.core.load, save_safetensors and eval are partial)

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qgraph._errors import CheckpointError
from qgraph.quant import QuantizedTensor, load, load_config, load_flat
from tests.quant.test_checkpoint import LAYER, Model, W, refusal


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

S, B = (f"{LAYER}.{part}" for part in ("scales", "biases"))


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

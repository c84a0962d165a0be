# pyright: reportUnknownMemberType=false
"""Adapters of PEFT: what loads, and what each damage says. (That they compute the same: tests/lm.)"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qgraph._errors import CheckpointError
from qgraph.quant import load_adapter

Q = "model.layers.1.self_attn.q_proj"
AT = f"base_model.model.{Q}"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
Tensors = dict[str, mx.array]


def pair(dora: bool = False) -> Tensors:
    found = {
        f"{AT}.lora_A.weight": mx.random.normal((4, 64)),
        f"{AT}.lora_B.weight": mx.random.normal((128, 4)),
    }
    return found | ({f"{AT}.lora_magnitude_vector": mx.random.normal((128,))} if dora else {})


def write(folder: Path, tensors: Tensors, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    return folder


def test_names_orientation_and_scale_become_mlx_lms(tmp_path: Path) -> None:
    tensors = pair(dora=True)
    adapter = load_adapter(write(tmp_path / "a", tensors, use_dora=True))
    assert (adapter.kind, adapter.rank, adapter.scale_of(Q), adapter.modules) == ("dora", 4, 2.0, (Q,))
    assert (adapter.tensors[f"{Q}.lora_a"] == tensors[f"{AT}.lora_A.weight"].T).all()
    assert (adapter.tensors[f"{Q}.lora_b"] == tensors[f"{AT}.lora_B.weight"].T).all()
    assert (adapter.tensors[f"{Q}.m"] == tensors[f"{AT}.lora_magnitude_vector"]).all()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 0.75),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"k_proj": 2, "1.self_attn.q_proj": 6}}, 1.5),
        ({"alpha_pattern": {"proj": 2, "attn.q_proj": 2}}, 2.0),  # ends of words, not of paths
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, 2.0),
    ],
)
def test_the_scale_is_alpha_by_rank(settings: dict[str, Any], scale: float, tmp_path: Path) -> None:
    assert load_adapter(write(tmp_path / "a", pair(), **settings)).scale_of(Q) == scale


def test_other_spellings_of_names(tmp_path: Path) -> None:
    tensors = {name.replace(".weight", ".default.weight"): x for name, x in pair(dora=True).items()}
    tensors = {name.replace("vector", "vector.default.weight"): x for name, x in tensors.items()}
    assert len(load_adapter(write(tmp_path / "a", tensors, use_dora=True)).tensors) == 3
    column = pair(dora=True) | {f"{AT}.lora_magnitude_vector": mx.ones((1, 128))}
    found = load_adapter(write(tmp_path / "b", column, use_dora=True))
    assert found.tensors[f"{Q}.m"].shape == (128,)


def without(name: str) -> Callable[[], Tensors]:
    return lambda: {n: x for n, x in pair().items() if name not in n}


def with_(name: str, value: Callable[[], mx.array]) -> Callable[[], Tensors]:
    return lambda: pair() | {f"{AT}.{name}": value()}


BAD: dict[str, tuple[dict[str, Any], Callable[[], Tensors], str]] = {
    "method": ({"peft_type": "LOHA"}, pair, "peft_type LOHA is not LORA"),
    "method is a list": ({"peft_type": ["LORA"]}, pair, "peft_type a list is not LORA"),
    "rank 0": ({"r": 0}, pair, "r is not a whole number above 0"),
    "rank as text": ({"r": "4"}, pair, "r is not a whole number above 0"),
    "rank true": ({"r": True}, pair, "r is not a whole number above 0"),
    "another rank": ({"r": 8}, pair, "correct r in adapter_config.json"),
    "no alpha": ({"lora_alpha": None}, pair, "lora_alpha or the rank of model.layers"),
    "alpha as text": ({"lora_alpha": "8"}, pair, "lora_alpha or the rank"),
    "biases": ({"bias": "lora_only"}, pair, "bias is lora_only, which is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, pair, "modules_to_save is a list"),
    "after a token": ({"alora_invocation_tokens": [1, 2]}, pair, "alora_invocation_tokens is a list"),
    "experts": ({"target_parameters": ["experts.w"]}, pair, "target_parameters is a list"),
    "layers twice": ({"layer_replication": [[0, 1]]}, pair, "layer_replication is a list"),
    "a pattern": ({"rank_pattern": {"(a+)+$": 4}}, pair, "rank_pattern has the key '(a+)+$'"),
    "patterns in a list": ({"alpha_pattern": [1]}, pair, "alpha_pattern is a list, not an object"),
    "no tensors": ({}, dict, "has no tensors"),
    "half": ({}, without("lora_A"), "has no lora_a beside it"),
    "other half": ({}, without("lora_B"), "has no lora_b beside it"),
    "no magnitude": ({"use_dora": True}, pair, "has no m beside it"),
    "a magnitude": ({}, lambda: pair(dora=True), "is not base_model.model."),
    "mlx-lm's names": ({}, lambda: {f"{Q}.lora_a": mx.ones((64, 4))}, "is not base_model.model."),
    "integers": ({}, with_("lora_A.weight", lambda: mx.ones((4, 64), mx.int32)), "is I32"),
    "transposed": ({}, with_("lora_A.weight", lambda: mx.ones((64, 4))), "expected (4, in)"),
    "a vector": ({}, with_("lora_B.weight", lambda: mx.ones(128)), "expected (out, 4)"),
    "NaN": ({}, with_("lora_B.weight", lambda: mx.full((128, 4), float("nan"))), "has NaN"),
    "two names": ({}, with_("lora_A.default.weight", lambda: mx.ones((4, 64))), "under two names"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused(case: str, tmp_path: Path) -> None:
    changes, tensors, expected = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        load_adapter(write(tmp_path / "a", tensors(), **changes))
    assert expected in str(caught.value)
    assert caught.value.fix
    assert len(str(caught.value)) <= 400


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", pair())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        load_adapter(folder)

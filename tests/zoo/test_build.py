"""Every architecture of the installed mlx-lm is in the zoo and runs eagerly, or is listed with the reason."""

from dataclasses import dataclass

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.zoo.build import STEPS, build, generate
from tests.zoo.configs import ABSENT, architectures, fields


@pytest.mark.parametrize("name", architectures())
def test_an_architecture_runs_or_is_listed_with_the_reason(name):
    if name in ABSENT:
        with pytest.raises((RuntimeError, ValueError)):
            generate(build(name))
        return
    model = build(name)
    parameters = tree_flatten(model.parameters())
    assert sum(value.nbytes for _, value in parameters) < 10 * 2**20
    for path, value in parameters:
        assert value.dtype in (mx.float32, mx.uint32) or not mx.issubdtype(value.dtype, mx.floating), path
        one = value.size == 1 or mx.all(value == value.reshape(-1)[0]).item()
        assert not (one and value.size > 1), f"{path} holds one number: a dropped term would not show"
    tokens, logits = generate(model)
    assert len(tokens) == len(logits) == STEPS + 1
    assert not any(mx.any(mx.isnan(row)).item() for row in logits)


def test_nothing_is_listed_that_is_gone():
    assert set(ABSENT) <= set(architectures())


def test_a_model_is_the_same_for_the_same_seed():
    first, again, other = (tree_flatten(build("llama", seed).parameters()) for seed in (0, 0, 1))
    assert all(mx.array_equal(a, b).item() for (_, a), (_, b) in zip(first, again, strict=True))
    assert not any(mx.array_equal(a, b).item() for (_, a), (_, b) in zip(first, other, strict=True))


def test_arguments_that_nobody_has_met_get_values():
    @dataclass
    class ModelArgs:
        model_type: str
        hidden_size: int
        num_hidden_layers: int
        new_hidden_size: int
        num_new_things: int
        uses_a_new_thing: bool
        new_factor: float
        new_option: int = 7

    assert fields(ModelArgs) | {"model_type": ""} == {
        "model_type": "",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "new_hidden_size": 64,
        "num_new_things": 2,
        "uses_a_new_thing": False,
        "new_factor": 1.0,
    }

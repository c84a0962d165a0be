"""What cannot be captured is one error that names the module, the line and the way out; or runs as it is."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from tests.agree import normal

X = normal(3, 8)
READS = {
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x * len(x.tolist()),
    "if": lambda x: x if x.sum() > 0 else -x,
    "float": lambda x: x * float(x.sum()),
    "numpy": lambda x: mx.array(np.asarray(x)),
    "eval": lambda x: [mx.eval(x * 2), x][1],
}


class Holder(nn.Module):
    """A model with one layer that does something in its midst."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = [nn.Linear(8, 8), Odd(function), nn.Linear(8, 8)]

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def __call__(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", READS)
def test_numbers_that_are_read_are_refused_with_the_module_and_the_line(name):
    with pytest.raises(qg.TraceError) as caught:
        qg.optimize(Holder(READS[name]))(X)
    error = caught.value
    assert "reads numbers" in error.message
    assert error.node == "module layers.1"
    assert "test_escapes.py" in error.where
    assert f'"{name}": lambda' in error.where
    assert "fallback=True" in error.fix
    with pytest.raises(qg.TraceError, match=f'"{name}": lambda'):
        qg.optimize(READS[name])(X)


def test_a_primitive_without_an_exporter_is_found_in_its_module():
    with pytest.raises(qg.TraceError) as caught:
        qg.optimize(Holder(lambda x: mx.checkpoint(mx.exp)(x)))(X)
    assert "CustomTransforms" in caught.value.message
    assert caught.value.node == "module layers.1"
    assert "x = layer(x)" in caught.value.where


def test_a_primitive_without_a_meaning_is_found_in_its_module(monkeypatch):
    from qgraph.capture.primitives import MEANINGS

    monkeypatch.delitem(MEANINGS, "Exp")
    with pytest.raises(qg.TraceError, match="primitive Exp") as caught:
        qg.optimize(Holder(mx.exp))(X)
    assert caught.value.node == "module layers.1"
    assert "x = layer(x)" in caught.value.where


def test_a_node_of_another_type_than_mlx_says_is_an_error(monkeypatch):
    """A changed MLX gives a clear error, not a wrong graph."""
    from qgraph.capture.primitives import MEANINGS
    from qgraph.ops.shape import Reshape

    monkeypatch.setitem(MEANINGS, "Exp", lambda p: p.add(Reshape((8, 3)), *p.inputs))
    with pytest.raises(qg.QGraphError, match=r"Exp gives f32\[3,8\], the graph's nodes f32\[8,3\]"):
        qg.optimize(mx.exp)(X)


@pytest.mark.parametrize("target", [Holder(READS["item"]), READS["item"]], ids=["module", "function"])
def test_the_fallback_runs_the_original_and_says_so_once(target):
    fast = qg.optimize(target, fallback=True)
    with pytest.warns(UserWarning, match="runs without qgraph: the function reads numbers") as caught:
        found = fast(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fast(X)
    assert mx.array_equal(found, target(X)).item()
    assert mx.array_equal(again, target(X)).item()


def test_the_fallback_cannot_run_dense_code_on_packed_weights():
    model = Holder(READS["item"])
    model.first.weight = qg.quantize(normal(8, 32), group_size=32)
    with pytest.raises(qg.TraceError, match="reads numbers"):
        qg.optimize(model, fallback=True)(normal(3, 32))


def test_an_error_of_the_users_own_keeps_its_type_and_is_told_the_module():
    with pytest.raises(ValueError, match="matmul") as caught:
        qg.optimize(Holder(lambda x: x @ x))(X)
    assert caught.value.__notes__ == ["in module layers.1, which qgraph was capturing"]


def test_a_failed_capture_leaves_the_model_as_it_was():
    model = Holder(READS["item"])
    before = {path: id(x) for path, x in _flat(model)}
    with pytest.raises(qg.TraceError):
        qg.optimize(model)(X)
    assert {path: id(x) for path, x in _flat(model)} == before
    mx.eval(model.parameters())


def _flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_a_quantized_tensor_given_to_mlx_in_an_odd_place_is_the_users_own_error():
    with pytest.raises(ValueError, match="Invalid type str"):
        qg.optimize(lambda x: mx.exp("text"))(X)
    with pytest.raises(ValueError, match="matmul"):
        qg.optimize(lambda x: x @ x)(X)

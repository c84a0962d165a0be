"""`qg.optimize` of functions written for MLX: the same numbers, QuantizedTensors where arrays were meant."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import qgraph as qg
from qgraph.execute.reference import to_numpy
from tests.agree import assert_as_mlx, assert_close, normal


def equal(found, wanted):
    """In every leaf what MLX gives, bit for bit where its ops are all that runs."""
    found, wanted = dict(tree_flatten(found)), dict(tree_flatten(wanted))
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        assert_as_mlx(x, wanted[name], about=name, path="graph")


W = normal(5, 64)
X = normal(2, 7, 64)


def rotated(x):
    return mx.fast.rope(x, 32, traditional=False, base=1e4, scale=1.0, offset=3)


def unreported(a):
    bits = (a.astype(mx.int16), a.astype(mx.uint8), a > 0)
    return mx.contiguous(a.T) * 2, *map(mx.bitwise_invert, bits)


def draws(key):
    return mx.random.normal((3, 4), key=key), mx.random.randint(0, 9, (5,), key=key)


FUNCTIONS = {
    "a product": (lambda x, w: x @ w.T, X, W),
    "trees": (lambda d: {"a": d["x"] * 2, "b": [d["y"][0] + 1, d["y"][1]]}, {"x": X, "y": (X, W)}),
    "einsum": (lambda a, b: mx.einsum("bij,kj->bik", a, b), X, W),
    "a gradient": (mx.grad(lambda w, x: (mx.tanh(x @ w.T) ** 2).sum()), W, X),
    "a value and its gradient": (mx.value_and_grad(lambda w, x: (x @ w.T).max()), W, X),
    "vmap": (mx.vmap(lambda a, b: a @ b.T), X, normal(2, 3, 64)),
    "a directional derivative": (lambda a: mx.jvp(mx.sin, [a], [a * 2])[1], W),
    "a compiled function": (mx.compile(lambda a: mx.sigmoid(a) * a), W),
    "sorting": (lambda a: (mx.sort(a), mx.argsort(a), mx.topk(a, 3), mx.cumsum(a, 0)), W),
    "indices": (
        lambda a, i: (a[i], a[:, i], a[i, i], a.at[i].add(1.0), a.at[i].maximum(0.3)),
        W,
        mx.array([0, 2, 4, 1, 1]),
    ),
    "fast ops": (
        lambda x, w: mx.fast.rms_norm(
            mx.fast.rope(x, 32, traditional=False, base=1e4, scale=1.0, offset=3), w, 1e-5
        ),
        X,
        normal(64),
    ),
    "random numbers of a key": (draws, mx.random.key(3)),
    "integers and booleans": (lambda a: ((a > 0).astype(mx.int32) << 3, ~(a > 0), mx.where(a > 0, a, -a)), W),
    "what MLX does not report": (unreported, W),
    "rows of zero length": (lambda x, w: (x[:, :0] @ w.T, mx.sum(x[:0], axis=0)), X, W),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_the_very_numbers_of_mlx(name):
    function, *args = FUNCTIONS[name]
    fast = qg.optimize(function)
    equal(fast(*args), function(*args))
    equal(fast(*args), function(*args))
    assert fast.cache_info().misses == 1


LAYERS = {
    "Linear": (nn.Linear(64, 32), X),
    "Embedding": (nn.Embedding(10, 64), mx.array([[1, 9, 0]])),
    "Conv1d": (nn.Conv1d(64, 8, 3), X),
    "Conv2d": (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), normal(2, 9, 8, 4)),
    "Conv3d": (nn.Conv3d(3, 4, 2), normal(1, 5, 4, 5, 3)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 8, 3, stride=2), normal(2, 5, 4, 3)),
    "LayerNorm": (nn.LayerNorm(64), X),
    "RMSNorm": (nn.RMSNorm(64), X),
    "GroupNorm": (nn.GroupNorm(4, 64), X),
    "InstanceNorm": (nn.InstanceNorm(64), X),
    "MultiHeadAttention": (nn.MultiHeadAttention(64, 4), X, X, X),
    "RNN": (nn.RNN(64, 16), X),
    "GRU": (nn.GRU(64, 16), X),
    "LSTM": (nn.LSTM(64, 16), X),
    "TransformerEncoder": (nn.TransformerEncoder(2, 64, 4), X, None),
    "MaxPool2d": (nn.MaxPool2d(2), normal(2, 8, 8, 3)),
    "AvgPool1d": (nn.AvgPool1d(2), X),
    "Upsample": (nn.Upsample(2, mode="linear"), normal(1, 4, 4, 3)),
    "Sequential": (nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.5).eval(), nn.Linear(32, 8)), X),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_of_mlx_run_as_they_are(name):
    layer, *args = LAYERS[name]
    equal(qg.optimize(layer)(*args), layer(*args))


def test_a_quantized_tensor_stands_where_an_array_was_meant():
    w = qg.quantize(normal(32, 64))
    fast = qg.optimize(lambda x, w: x @ w.T)
    assert fast.report(X, w).counts() == {"quantized_matmul": 1}
    exact = to_numpy(X) @ to_numpy(w).T
    assert_close(fast(X, w), exact, k=64, path="P2", magnitude=np.abs(to_numpy(X)) @ np.abs(to_numpy(w).T))


def test_gradients_flow_through_an_optimized_function():
    w = qg.quantize(normal(32, 64))
    fast = qg.optimize(lambda x, w: mx.tanh(x @ w.T).sum())
    plain = qg.dequantize(w)
    found = mx.grad(lambda x: fast(x, w))(X)
    assert_close(found, mx.grad(lambda x: mx.tanh(x @ plain.T).sum())(X), k=64, path="graph")


def test_arrays_from_outside_are_read_at_every_call():
    held = {"w": W}
    fast = qg.optimize(lambda x: x @ held["w"].T)
    equal(fast(X), X @ W.T)
    held["w"] = W * 3
    equal(fast(X), X @ (W * 3).T)
    assert fast.cache_info().misses == 1


def test_a_lazy_array_from_outside_is_not_traced_itself():
    lazy = mx.exp(W) + 1
    fast = qg.optimize(lambda x: x @ lazy.T)
    assert fast.graph(X).histogram() == {"transpose": 1, "dot": 1}


def test_a_module_that_the_function_updates_keeps_what_it_held():
    layer = nn.Linear(64, 8)
    before = layer.weight

    def loss(params, x):
        layer.update(params)
        layer.scale = x.sum()
        return (layer(x) ** 2).sum()

    params = {"weight": normal(8, 64), "bias": normal(8)}
    for step in (qg.optimize(loss), qg.optimize(mx.value_and_grad(loss))):
        step(params, X)
        assert layer.weight is before
        assert "scale" not in layer
        mx.eval(layer.parameters())
    assert_close(
        qg.optimize(loss)(params, X), ((X @ params["weight"].T + params["bias"]) ** 2).sum(), k=64 * 112
    )


def test_a_whole_training_step_on_a_quantized_base_is_captured():
    """QLoRA: the gradient of the adapter through packed weights, which come back as products with them."""
    base = qg.quantize(normal(32, 64))
    a, b = normal(64, 4), normal(4, 32)

    def loss(a, b, x, w):
        return mx.tanh(x @ w.T + 2.0 * ((x @ a) @ b)).square().mean()

    step = mx.value_and_grad(loss, argnums=(0, 1))
    fast = qg.optimize(step)
    value, gradients = fast(a, b, X, base)
    x, w, an, bn = map(to_numpy, (X.reshape(-1, 64), base, a, b))
    y = np.tanh(x @ w.T + 2 * (x @ an) @ bn)
    back = 2 * y * (1 - y**2) / y.size
    assert_close(value, np.mean(y**2), path="graph")
    terms = 2 * np.abs(y) * (1 + y**2) / y.size  # where y is nearly 1, 1 - y**2 has the error of 1
    exact = (2 * x.T @ back @ bn.T, 2 * (x @ an).T @ back)
    sizes = (2 * np.abs(x).T @ terms @ np.abs(bn).T, 2 * np.abs(x @ an).T @ terms)
    for found, wanted, magnitude in zip(gradients, exact, sizes, strict=True):
        assert_close(found, wanted, k=64, path="P2", magnitude=magnitude)
    assert "dequantize" not in fast.optimized(a, b, X, base).histogram()


def test_an_mlxfn_file_is_imported(tmp_path):
    file = tmp_path / "gram.mlxfn"
    mx.export_function(str(file), lambda x: mx.tanh(x @ x.T), W)
    fast = qg.optimize(str(file))
    equal(fast(W)[0], mx.tanh(W @ W.T))
    assert fast.graph(W).histogram() == {"transpose": 1, "dot": 1, "tanh": 1}


@pytest.mark.parametrize("content", [b"", b"not a function", None])
def test_a_bad_mlxfn_file_is_one_clear_error(tmp_path, content):
    file = tmp_path / "bad.mlxfn"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(qg.QGraphError, match=r"bad\.mlxfn"):
        qg.optimize(file)


def test_what_is_no_function_is_refused():
    with pytest.raises(qg.QGraphError, match="cannot optimize a int"):
        qg.optimize(3)


def test_mlx_compiles_as_before_after_a_capture():
    runs = []

    @mx.compile
    def counted(x):
        runs.append(1)
        return x * 2

    qg.optimize(lambda x: x + 1)(W)
    for _ in range(3):
        counted(W)
    assert len(runs) == 1
    mx.disable_compile()
    try:
        qg.optimize(lambda x: x + 2)(W)
        for _ in range(3):
            counted(X)
        assert len(runs) == 4  # still off
    finally:
        mx.enable_compile()

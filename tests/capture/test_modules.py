"""`qg.optimize` of modules: a drop-in object whose weights are read at every call."""

import threading

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from tests.agree import assert_as_mlx, assert_close, normal

X = normal(2, 7, 64)


class Block(nn.Module):
    """A norm, an attention without projections of its own, and a feed-forward network."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.layers = [nn.Linear(64, 64), nn.Linear(64, 64, bias=False)]
        self.rope = nn.RoPE(64)
        self.scale = 0.5

    def __call__(self, x):
        h = self.norm(x)
        q, k = (self.rope(layer(h)[:, None]) for layer in self.layers)
        h = mx.fast.scaled_dot_product_attention(q, k, h[:, None], scale=self.scale, mask="causal")
        return x + h[:, 0]


def quantized(model, **scheme):
    """The dense model with QuantizedTensors as the weights of its linear layers and embeddings."""
    for _, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.weight = qg.quantize(layer.weight, **scheme)
    return model


def equal(a, b):
    assert_as_mlx(a, b, path="graph")


def test_the_result_is_an_object_of_the_same_class_with_the_same_parts():
    model = Block()
    fast = qg.optimize(model)
    assert isinstance(fast, Block)
    assert fast.norm is model.norm
    assert fast.layers is model.layers
    assert fast.scale == model.scale
    assert [p for p, _ in fast.named_modules()] == [p for p, _ in model.named_modules()]
    equal(fast(X), model(X))


def test_new_weights_of_the_same_types_need_no_capture():
    model = Block()
    fast = qg.optimize(model)
    fast(X)
    model.layers[0].weight = normal(64, 64)
    equal(fast(X), model(X))
    model.update({"norm": {"weight": normal(64)}})
    equal(fast(X), model(X))
    assert fast.qgraph.cache_info().misses == 1


def test_another_structure_is_another_program():
    model = Block()
    fast = qg.optimize(model)
    fast(X)
    nn.quantize(model, 64, 4)
    equal(fast(X), model(X))
    model.layers.append(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="unpack"):
        fast(X)
    model.layers.pop()
    model.layers[1] = nn.Linear(64, 64)
    equal(fast(X), model(X))

    class Twice(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    other = Twice(64, 64)
    other.update(model.layers[1].parameters())
    model.layers[1] = other  # the same arrays, other code
    equal(fast(X), model(X))


@pytest.mark.parametrize("scheme", [{}, {"bits": 8, "group_size": 32}, {"mode": "mxfp4"}, {"mode": "nvfp4"}])
def test_one_form_whichever_way_the_quantized_weights_came(scheme):
    def layers():
        return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 128), nn.Linear(128, 64, bias=False))

    dense, packed = layers(), layers()
    packed.update(dense.parameters())
    nn.quantize(packed, **scheme)
    quantized(dense, **scheme)
    ids = mx.array([[3, 49, 0]])
    one, two = qg.optimize(dense), qg.optimize(packed)
    found = [f.qgraph.report(ids).counts() for f in (one, two)]
    assert found[0] == found[1] == {"quantized_take": 1, "quantized_matmul": 2}
    # MLX unpacks an embedding of the fp modes to bfloat16; a dense float32 one means float32.
    fp = "mode" in scheme
    types = [[v.type for v in f.qgraph.graph(ids).inputs if v.type.packing] for f in (one, two)]
    assert types[0][1:] == types[1][1:] or fp
    assert [t.packing.quantization for t in types[0]] == [t.packing.quantization for t in types[1]]
    x = normal(1, 3, 64) if fp else packed.layers[0](ids)
    after = [nn.Sequential(*model.layers[1:]) if fp else model for model in (dense, packed)]
    given = x if fp else ids
    for model in after:
        assert_close(qg.optimize(model)(given), after[1](given), k=128, path="model")


def test_words_that_are_used_by_themselves_stay_arrays():
    class Odd(nn.QuantizedLinear):
        def __call__(self, x):
            return super().__call__(x) + self.scales.sum()

    layer = Odd(64, 32)
    fast = qg.optimize(layer)
    assert_close(fast(X), layer(X), k=64, path="graph")
    assert fast.qgraph.graph(X).find("pack")


def test_state_that_a_module_keeps_is_written_back():
    one, two = nn.BatchNorm(64), nn.BatchNorm(64)
    fast = qg.optimize(one)
    for _ in range(3):
        equal(fast(X), two(X))
    equal(fast.running_mean, two.running_mean)
    equal(fast.running_var, two.running_var)
    fast.eval(), two.eval()
    equal(fast(X), two(X))
    assert fast.qgraph.cache_info().misses == 2


def test_gradients_flow_to_the_weights():
    model = Block()
    fast = qg.optimize(model)
    loss = lambda m: (m(X) ** 2).sum()  # noqa: E731
    value, found = nn.value_and_grad(fast, lambda: loss(fast))()
    expected, wanted = nn.value_and_grad(model, lambda: loss(model))()
    assert_close(value, expected, k=64, path="graph")
    for i in range(2):
        assert_close(found["layers"][i]["weight"], wanted["layers"][i]["weight"], k=64, path="model")


def test_a_gradient_inside_a_module_is_not_cut():
    """A stand-in would have no gradient: the fused op must be seen through there."""

    class Score(nn.Module):
        def __call__(self, x):
            return mx.grad(lambda y: mx.fast.rms_norm(y, None, 1e-5).square().sum(axis=-1)[0, 0])(x) + (
                mx.fast.rms_norm(x, None, 1e-5)
            )

    model = Score()
    assert_close(qg.optimize(model)(X), model(X), k=64, path="graph")
    assert qg.optimize(model).qgraph.graph(X).find("rms_norm")


def test_another_thread_runs_the_model_while_it_is_captured():
    model = Block()
    expected = model(X)
    mx.eval(expected)
    stop, found = threading.Event(), []

    def run():
        while not stop.is_set():
            y = model(X)
            mx.eval(y)
            found.append(mx.array_equal(y, expected).item())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(20):
            fast = qg.optimize(model)
            equal(fast(X), expected)
    finally:
        stop.set()
        thread.join()
    assert found
    assert all(found)


def test_threads_share_the_programs():
    fast = qg.optimize(Block())
    expected = fast(X)
    mx.eval(expected, fast.parameters())
    wrong = []

    def run():
        for _ in range(20):
            y = fast(X)
            mx.eval(y)
            if not mx.array_equal(y, expected).item():
                wrong.append(y)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert fast.qgraph.cache_info().misses == 1


def test_nodes_know_their_module_and_the_line_that_calls_it():
    fast = qg.optimize(quantized(Block()))
    graph = fast.qgraph.graph(X)
    by_scope = {n.origin.scope: n for n in graph.nodes if n.op.name in ("dot", "addmm", "rms_norm")}
    assert {"layers.0", "layers.1", "norm"} <= by_scope.keys()
    assert by_scope["norm"].origin.source.text == "h = self.norm(x)"
    assert graph.find("scaled_dot_product_attention")[0].origin.source.text.startswith(
        "h = mx.fast.scaled_dot"
    )
    labels = {v.op.label for v in graph.inputs}
    assert {"layers.0.weight", "layers.0.bias", "layers.1.weight", "norm.weight", "x"} == labels
    said = str(fast.qgraph.report(X))
    assert "in layers.1 → quantized_matmul" in said
    assert "layers.0" in str(qg.inspect(fast, X).why(scope="layers.0"))


class Shared(nn.Module):
    """One activation and one block in several places."""

    def __init__(self):
        super().__init__()
        act, block = nn.SiLU(), nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        self.layers = [nn.Sequential(nn.Linear(64, 64), act) for _ in range(2)]
        self.first, self.second = nn.Sequential(block), nn.Sequential(block)
        self.second.outer = [self]  # names do not go round in circles

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.second(self.first(x))


def test_a_module_in_several_places_is_named_by_the_one_that_calls_it():
    fast = qg.optimize(Shared())
    equal(fast(X), Shared.__call__(fast, X))
    graph = fast.qgraph.graph(X)
    assert [n.origin.scope for n in graph.find("sigmoid")] == ["layers.0.layers.1", "layers.1.layers.1"]
    assert [n.origin.scope for n in graph.find("tanh")] == [
        "first.layers.0.layers.1",
        "second.layers.0.layers.1",
    ]


def test_fused_ops_arrive_whole():
    names = qg.optimize(Block()).qgraph.graph(X).histogram()
    assert {n: names[n] for n in ("rms_norm", "rope", "scaled_dot_product_attention")} == {
        "rms_norm": 1,
        "rope": 2,
        "scaled_dot_product_attention": 1,
    }


def test_mlx_is_as_before_after_a_capture_that_failed():
    class Fails(nn.Module):
        def __call__(self, x):
            raise RuntimeError("the model's own")

    before = (mx.fast.rms_norm, mx.fast.rope, mx.dequantize, mx.grad, mx.contiguous)
    with pytest.raises(RuntimeError, match="the model's own"):
        qg.optimize(Fails())(X)
    assert (mx.fast.rms_norm, mx.fast.rope, mx.dequantize, mx.grad, mx.contiguous) == before


def test_strict_refuses_to_unpack_and_names_the_module():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 64, bias=False)

        def __call__(self, x):
            return x @ mx.exp(self.inner.weight)

    model = quantized(Odd())
    with pytest.raises(qg.StrictError, match="exp"):
        qg.optimize(model, strict=True)(X)
    assert qg.optimize(model)(X).shape == X.shape


class Scaled(nn.Module):
    def __call__(self, x, scale=1.0):
        return x * scale


def test_numbers_that_make_every_call_another_program_are_warned_of():
    fast = qg.optimize(Scaled())
    with pytest.warns(qg.RecompileWarning, match="argument 'scale': 0.0, 1.0") as caught:
        [fast(X, scale=float(n)) for n in range(12)]
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_lengths_are_not_warned_of():
    fast = qg.optimize(Scaled())
    for n in range(1, 14):
        assert fast(normal(2, n, 4)).shape == (2, n, 4)

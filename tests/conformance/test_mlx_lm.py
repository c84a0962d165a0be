"""research/mlx.md §5, cases 27, 28, 40 and 44: beside mlx-lm's checkpoints and its LoRA layers."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

import qgraph as qg
from qgraph.execute.reference import to_numpy
from qgraph_examples import qwen3
from tests.agree import assert_as_mlx, assert_close, magnitude_of, normal, ops
from tests.conformance import decoder
from tests.conformance.oracle import MODES, kernel, largest_terms
from tests.lm.peer import TINY, Peer, mixed, write

PROMPT = [3, 41, 17, 88, 5]


def flat(params):
    """Leaves by path; a QuantizedTensor is one leaf."""
    return dict(tree_flatten(params, is_leaf=qg.is_quantized))


def assert_same_logits(folder):
    config = qwen3.Config.from_dict(qg.load_config(folder))
    cache = qwen3.make_cache(config, 1, 8, mx.float32)
    logits, _ = qg.jit(qwen3.forward)(qg.load(folder), mx.array([PROMPT]), cache, mx.array(0), config)
    assert_close(logits[0], Peer(folder).logits(PROMPT), path="model")


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8, "group_size": 32}, {"mode": "mxfp4"}], ids=str)
def test_m27_a_quantized_model_has_mlx_lms_bits_per_weight(options, tmp_path):
    folder = write(tmp_path / "model", quantization=options)
    leaves = flat(qg.load(folder)).values()
    bits = 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)
    assert bits == mlx_lm.utils.compute_bits_per_weight(Peer(folder).model)
    assert_same_logits(folder)


def test_m27_the_schemes_of_a_mixed_model_survive_a_round_trip(tmp_path):
    """Layers that the map of config.json does not name have its default scheme."""
    folder = write(tmp_path / "model", tied=False, quantization={"bits": 4, "quant_predicate": mixed})
    block = json.loads((folder / "config.json").read_text())["quantization"]
    params = qg.load(folder)
    schemes = {path: str(w.quantization) for path, w in flat(params).items() if qg.is_quantized(w)}
    assert set(schemes.values()) == {"affine4g64", "affine8g32", "affine6g64"}
    named = [path for path in schemes if path.removesuffix(".weight") in block]
    assert 0 < len(named) < len(schemes)
    assert schemes["lm_head.weight"] == "affine4g64"
    assert "lm_head" not in block
    assert "model.layers.1.self_attn.o_proj.weight" not in schemes
    for leaf in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / leaf).write_bytes((folder / leaf).read_bytes())
    qg.save(tmp_path / "again", params)
    again = qg.load(tmp_path / "again")
    for path, w in flat(again).items():
        before = flat(params)[path]
        parts = [x.components() if qg.is_quantized(x) else (x,) for x in (w, before)]
        assert all(map(mx.array_equal, *parts))
        assert not qg.is_quantized(w) or w.quantization == before.quantization
    assert_close(Peer(tmp_path / "again").logits(PROMPT), Peer(folder).logits(PROMPT), path="model")
    assert_same_logits(tmp_path / "again")


def test_m27_a_layer_that_does_not_divide_into_groups_stays_dense(tmp_path):
    folder = write(tmp_path / "model", {**TINY, "intermediate_size": 96}, quantization={"bits": 4})
    layer = qg.load(folder)["model"]["layers"][0]["mlp"]
    assert qg.is_quantized(layer["up_proj"]["weight"])
    assert not qg.is_quantized(layer["down_proj"]["weight"])
    assert_same_logits(folder)


def lora_linear(scheme, dtype=mx.float32, bias=True):
    """mlx-lm's layer on a packed base, with an adapter of order 1, and our weight of the same words."""
    mode, bits, group = scheme
    dense = nn.Linear(128, 64, bias=bias)
    dense.update(
        {"weight": normal(64, 128, dtype=dtype), **({"bias": normal(64, dtype=dtype)} if bias else {})}
    )
    base = nn.QuantizedLinear.from_linear(dense, group, bits, mode)
    layer = LoRALinear.from_base(base, r=4, scale=2.0)
    layer.lora_b = normal(4, 64)
    return layer, packed(base, scheme, dtype)


def packed(module, scheme, dtype):
    mode, bits, group = scheme
    biases = module.get("biases")
    return qg.from_quantized(
        module.weight, module.scales, biases, bits=bits, group_size=group, mode=mode, dtype=dtype
    )


def lora(x, w, bias, a, b, scale):
    """What LoRALinear computes, on any weight."""
    y = qg.dot(x, w.T) + bias
    return y + (scale * qg.dot(qg.dot(x, a), b)).astype(x.dtype)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m28_lora_linear_on_a_quantized_base(scheme):
    layer, w = lora_linear(scheme)
    x = normal(3, 128)
    f = qg.jit(strict=True)(lora)
    found = f(x, w, layer.linear.bias, layer.lora_a, layer.lora_b, 2.0)
    assert_close(found, layer(x), k=128, path="graph")
    base = qg.dot(x, w.T) + layer.linear.bias
    assert mx.array_equal(f(x, w, layer.linear.bias, layer.lora_a, mx.zeros((4, 64)), 2.0), base)
    layer.lora_b = mx.zeros((4, 64))
    assert_as_mlx(base, layer(x), k=128, path="P2", magnitude=magnitude_of(x, w) + 9.0)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_m28_lora_linear_in_16_bit_keeps_the_dtype(dtype):
    """Against the same layer in float32: MLX's own sums here are in 16 bit."""
    layer, w = lora_linear(("affine", 4, 64), dtype)
    x = normal(3, 128, dtype=dtype)
    arguments = (layer.linear.bias, layer.lora_a, layer.lora_b)
    found = qg.jit(strict=True)(lora)(x, w, *arguments, 2.0)
    assert found.dtype == layer(x).dtype == dtype
    bias, a, b = (v.astype(mx.float32) for v in arguments)
    dense = qg.dequantize(w).astype(mx.float32)
    exact = x.astype(mx.float32) @ dense.T + bias + 2.0 * (x.astype(mx.float32) @ a) @ b
    assert_close(found, exact, k=128, path="graph")


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m28_lora_embedding_and_its_tied_head(scheme):
    mode, bits, group = scheme
    dense = nn.Embedding(40, 128)
    dense.weight = normal(40, 128)
    layer = LoRAEmbedding.from_base(
        nn.QuantizedEmbedding.from_embedding(dense, group, bits, mode), 4, scale=2.0
    )
    layer.lora_b = normal(4, 128)
    w = packed(layer.embedding, scheme, layer.embedding(mx.array([0])).dtype)
    ids, x = mx.array([[3, 39], [0, 3]]), normal(3, 128)

    @qg.jit(strict=True)
    def embed(w, a, b, ids):
        y = qg.take(w, ids, axis=0)
        return y + (2.0 * qg.dot(qg.take(a, ids, axis=0), b)).astype(y.dtype)

    @qg.jit(strict=True)
    def head(w, a, b, x):
        return qg.dot(x, w.T) + (2.0 * qg.dot(qg.dot(x, b.T), a.T)).astype(x.dtype)

    arguments = (w, layer.lora_a, layer.lora_b)
    assert_close(embed(*arguments, ids), layer(ids), k=4, path="graph")
    assert_close(head(*arguments, x), layer.as_linear(x), k=128, path="graph")
    none = (w, layer.lora_a, mx.zeros((4, 128)))
    assert mx.array_equal(embed(*none, ids), qg.dequantize(w)[ids])
    assert mx.array_equal(head(*none, x), qg.dot(x, w.T))


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m28_fusing_into_a_dequantized_weight_is_exact(scheme):
    layer, w = lora_linear(scheme)
    fused = layer.fuse(dequantize=True)
    wide = packed(layer.linear, scheme, fused.weight.dtype)

    @qg.jit
    def fuse(w, a, b, scale):
        dense = qg.dequantize(w)
        return dense + qg.dot(scale * b.T, a.T).astype(dense.dtype)

    magnitude = largest_terms(wide) + abs(2.0 * to_numpy(layer.lora_b).T) @ abs(to_numpy(layer.lora_a)).T
    found = fuse(wide, layer.lora_a, layer.lora_b, 2.0)
    assert_as_mlx(found, fused.weight, k=4, path="P2", magnitude=magnitude)
    x = normal(3, 128)
    found = qg.jit(lambda x, w, b: x @ w.T + b)(x, fused.weight, fused.bias)
    assert_close(found, fused(x), k=128, path="graph")


@pytest.mark.parametrize("scheme", [("affine", 4, 32), ("mxfp4", 4, 32)], ids=str)
def test_m40_32_steps_with_the_offset_in_an_array_equal_one_pass(scheme):
    p = decoder.parameters(scheme)
    x = normal(1, 32, decoder.HIDDEN)
    f = qg.jit(strict=True)(decoder.layer)
    whole, filled = f(p, x, decoder.empty_cache(40), mx.array(0))
    cache, rows = decoder.empty_cache(40), []
    f.clear_cache()
    for i in range(32):
        y, cache = f(p, x[:, i : i + 1], cache, mx.array(i))
        rows.append(y)
    assert f.cache_info().misses == 1
    assert_close(mx.concatenate(rows, axis=1), whole, k=decoder.HIDDEN, path="graph")
    for found, expected in zip(cache, filled, strict=True):
        assert_close(found, expected, k=decoder.HIDDEN, path="graph")


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m44_a_lora_branch_stays_beside_the_base_and_is_swapped_without_a_compile(scheme):
    layer, w = lora_linear(scheme)
    x, words = normal(3, 128), w.packed.tolist()
    f = qg.jit(strict=True)(lora)
    for seed in range(3):
        layer.lora_a, layer.lora_b = normal(128, 4, seed=seed), normal(4, 64, seed=10 + seed)
        found = f(x, w, layer.linear.bias, layer.lora_a, layer.lora_b, mx.array(layer.scale))
        assert_close(found, layer(x), k=128, path="graph")
        branch = layer.scale * (x @ layer.lora_a) @ layer.lora_b
        assert_close(found, kernel(x, w) + layer.linear.bias + branch, k=128, path="graph")
    assert f.cache_info().misses == 1
    assert w.packed.tolist() == words
    arguments = (x, w, layer.linear.bias, layer.lora_a, layer.lora_b, mx.array(layer.scale))
    inputs = [v.type.shape for v in f.optimized(*arguments).inputs]
    assert {(128, 4), (4, 64)} <= set(inputs)
    assert not set(ops(f.optimized(*arguments))) & {"dequantize", "quantize"}


def test_m44_a_lora_branch_without_a_bias_is_one_fused_op():
    layer, w = lora_linear(("affine", 4, 64), bias=False)
    x = normal(3, 128)
    f = qg.jit(strict=True)(lambda x, w, a, b: qg.dot(x, w.T) + 2.0 * qg.dot(qg.dot(x, a), b))
    assert ops(f.optimized(x, w, layer.lora_a, layer.lora_b)) == {"quantized_lora_matmul": 1}
    assert_close(f(x, w, layer.lora_a, layer.lora_b), layer(x), k=128, path="graph")

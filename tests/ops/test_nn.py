"""The fused ops of networks: their meaning spelled out, their operands checked, their compositions."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph import DTypeError, ShapeError
from qgraph.ir.dtypes import BF16, F32
from qgraph.numeric import tolerance
from tests.agree import assert_close
from tests.ops.cases import data


def near(found, exact, magnitude=1.0, k=1):
    exact = np.asarray(exact)
    assert tuple(found.shape) == exact.shape
    assert np.all(tolerance(F32, k, "P2").allows(np.array(found), exact, magnitude))


def attend(q, k, v, scale, seen):
    """Attention row by row, each query over the keys that it sees."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    heads = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(q.shape[:3]):
        rows = [j for j in range(k.shape[2]) if seen(b, h, i, j)]
        scores = np.array([scale * q[b, h, i] @ k[b, h // heads, j] for j in rows])
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights / weights.sum() @ v[b, h // heads, rows]
    return out


@pytest.mark.parametrize("mask", [None, "causal", "bool", "add"])
def test_attention_is_what_a_loop_over_its_rows_gives(mask):
    q, k, v = (data(i, s, F32) for i, s in enumerate(((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6))))
    table = np.random.default_rng(0).random((2, 1, 3, 5)) < 0.6
    table[..., 2] = True  # no row without keys
    given = {"bool": mx.array(table), "add": mx.array(np.where(table, 0, -np.inf).astype(np.float32))}.get(
        mask, mask
    )
    seen = {None: lambda *_: True, "causal": lambda b, h, i, j: j <= i + 2}.get(
        mask, lambda b, h, i, j: table[b, 0, i, j]
    )
    found = qg.scaled_dot_product_attention(q, k, v, scale=0.3, mask=given)
    near(found, attend(*(np.array(x, np.float64) for x in (q, k, v)), 0.3, seen), 16.0, 13)


def test_attention_refuses_what_does_not_fit():
    q = mx.zeros((1, 4, 3, 8))
    kv = mx.zeros((1, 2, 5, 8))
    attention = qg.scaled_dot_product_attention
    for bad, text in (
        ((q[0], kv, kv), "give (batch, heads, length, features)"),
        ((q, kv[..., :4], kv), "do not fit"),
        ((q[:, :3], kv, kv), "no multiple of 2 key heads"),
        ((q, kv[:, :, :0], kv[:, :, :0]), "no keys"),
    ):
        with pytest.raises(ShapeError) as caught:
            attention(*bad, scale=1.0)
        assert text in str(caught.value)
    with pytest.raises(ShapeError, match='use None, "causal" or an array'):
        attention(q, kv, kv, scale=1.0, mask="left")
    with pytest.raises(ShapeError, match="mask"):
        attention(q, kv, kv, scale=1.0, mask=mx.zeros((2, 5)))
    half = [x.astype(mx.bfloat16) for x in (q, kv, kv)]
    with pytest.raises(DTypeError, match="cast to bf16"):
        attention(*half, scale=1.0, mask=mx.zeros((3, 5)))
    with pytest.raises(ShapeError, match="4 heads"):
        attention(q, kv, kv, scale=1.0, sinks=mx.zeros(2))


@pytest.mark.parametrize("traditional", [True, False])
def test_rope_turns_pairs_by_their_positions(traditional):
    x = data(0, (2, 3, 5, 8), F32)
    exact = np.array(x, np.float64)
    for t in range(5):
        for i in range(3):
            a, b = (2 * i, 2 * i + 1) if traditional else (i, i + 3)
            angle = 0.5 * (t + 7) * 100.0 ** (-2 * i / 6)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            exact[:, :, t, [a, b]] = exact[:, :, t, [a, b]] @ turn.T
    arguments = {"traditional": traditional, "base": 100.0, "scale": 0.5}
    for offset in (7, mx.array(7), mx.array([7, 7])):
        near(qg.rope(x, 6, offset=offset, **arguments), exact, 16.0)
    freqs = mx.array([100.0 ** (2 * i / 6) for i in range(3)])
    near(qg.rope(x, 6, traditional=traditional, base=None, scale=0.5, offset=7, freqs=freqs), exact, 16.0)


def test_an_array_of_positions_serves_every_step_with_one_program():
    step = qg.jit(lambda x, at: qg.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=at))
    x = data(0, (1, 2, 1, 8), F32)
    for at in range(3):
        expected = mx.fast.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=at)
        near(step(x, mx.array(at)), np.array(expected), 16.0)
    assert step.cache_info().misses == 1


def test_rope_refuses_what_does_not_fit():
    x = mx.zeros((1, 2, 8))
    usual = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 0}
    for dims, changed, text in (
        (5, {}, "dims=5"),
        (10, {}, "dims=10"),
        (8, {"base": None}, "exactly one of base and freqs"),
        (8, {"freqs": mx.ones(4)}, "exactly one of base and freqs"),
        (8, {"base": None, "freqs": mx.ones(3)}, "dims / 2 = 4"),
        (8, {"offset": mx.array([1, 2])}, "an offset"),
        (8, {"offset": mx.array(1.0)}, "an offset"),
    ):
        with pytest.raises(ShapeError) as caught:
            qg.rope(x, dims, **{**usual, **changed})
        assert text in str(caught.value)


def test_norms_of_any_parameters():
    x = data(0, (3, 8), F32)
    w, b = data(1, (8,), F32), data(2, (8,), F32)
    exact = np.array(x, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    near(qg.layer_norm(x, w, b, 1e-5), unit * np.array(w) + np.array(b), 16.0, 8)
    near(qg.layer_norm(x, None, None, 1e-5), unit, 16.0, 8)
    near(qg.layer_norm(x, None, b, 1e-5), unit + np.array(b), 16.0, 8)
    near(qg.rms_norm(x, None, 1e-5), exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5), 16.0, 8)
    with pytest.raises(ShapeError, match="rows of 8"):
        qg.rms_norm(x, w[:1], 1e-5)
    with pytest.raises(DTypeError, match="float"):
        qg.rms_norm(x.astype(mx.int32), None, 1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("softplus", ()),
        ("leaky_relu", (0.2,)),
        ("mish", ()),
        ("gelu_approx", ()),
        ("gelu_fast_approx", ()),
        ("relu_squared", ()),
    ],
)
def test_activations_are_those_of_mlx(name, arguments):
    x = data(0, (64,), F32)
    peer = {"relu_squared": nn.relu2}.get(name) or getattr(nn, name)
    found = getattr(qg, name)(x, *arguments)
    assert found.dtype == x.dtype
    near(found, np.array(peer(x, *arguments)), 4.0)
    half = x.astype(mx.bfloat16)
    assert getattr(qg, name)(half, *arguments).dtype == half.dtype


def test_softmax_of_16_bits_is_precise():
    x = data(0, (1, 4096), BF16)
    p = qg.softmax(x, axis=-1)
    assert p.dtype == mx.bfloat16
    assert abs(p.astype(mx.float32).sum().item() - 1) <= 2 * BF16.unit_roundoff
    f = qg.jit(lambda x: qg.softmax(x, -1))
    assert f.optimized(x).find("softmax")[0].op.precise
    assert "precise" not in f.source(x.astype(mx.float32))
    exact = mx.softmax(x.astype(mx.float32), -1)
    assert_close(f(x), exact, k=4096, path="P2", magnitude=exact)
    with pytest.raises(DTypeError, match="i32"):
        qg.softmax(mx.zeros(3, mx.int32))


def test_experts_are_chosen_by_index():
    w = qg.quantize(data(0, (4, 8, 64), F32), bits=4, group_size=32)
    x = data(1, (3, 1, 64), F32)
    chosen = mx.array([2, 0, 3])
    expected = np.array(x, np.float64) @ np.swapaxes(
        np.array(qg.dequantize(w), np.float64)[np.array(chosen)], -1, -2
    )
    near(qg.gather_qmm(x, w, rhs_indices=chosen), expected, 1000.0, 64)
    near(qg.gather_mm(x, qg.swapaxes(qg.dequantize(w), -1, -2), None, chosen), expected, 1000.0, 64)
    half = qg.gather_mm(
        x.astype(mx.bfloat16), qg.swapaxes(qg.dequantize(w), -1, -2).astype(mx.bfloat16), None, chosen
    )
    assert half.dtype == mx.bfloat16
    mx.eval(half)  # MLX's CPU kernel takes float32 only
    with pytest.raises(ShapeError, match="index 4 is out of range"):
        qg.gather_qmm(x, w, rhs_indices=[2, 0, 4])
    with pytest.raises(DTypeError, match="not quantized"):
        qg.gather_qmm(x, mx.zeros((4, 8, 64)), rhs_indices=chosen)
    assert qg.gather_qmm(x[:, :0], w, rhs_indices=chosen).shape == (3, 0, 8)

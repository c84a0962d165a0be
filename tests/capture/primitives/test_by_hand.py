"""Primitives that this machine's MLX does not report: those of a GPU, of `shapeless`, and rare arguments."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.capture.primitives import MEANINGS, Primitive
from qgraph.execute.program import Program
from qgraph.ir import Builder, Graph, verify
from qgraph.ir.dtypes import F32, I32, dtype_of
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import type_of
from qgraph.ops.indexing import Take
from tests.agree import assert_close, normal
from tests.capture.primitives.replay import same


def run(name, arrays, arguments, *outputs):
    """What the meaning of a primitive gives on arrays; `outputs` are arrays of the result's types."""
    builder = Builder()
    inputs = [builder.input(f"x{i}", type_of(x)) for i, x in enumerate(arrays)]
    types = tuple(x if isinstance(x, TensorType) else type_of(x) for x in outputs)
    made = MEANINGS[name](Primitive(name, tuple(inputs), types, tuple(arguments), builder))
    values = list(made) if isinstance(made, list | tuple) else [made]
    assert [v.type.dense() for v in values] == list(types)
    graph = Graph(inputs, values, builder)
    verify(graph)
    return Program(graph).run(*arrays)


@pytest.mark.parametrize("name", ["Contiguous", "Copy", "StopGradient"])
def test_what_changes_no_number_is_its_operand(name):
    x = normal(2, 3)
    assert same(run(name, [x], (), x)[0], x)


def test_a_broadcast_of_axes_has_the_shape_that_mlx_says():
    x, out = normal(2, 1), normal(2, 3)
    assert same(run("BroadcastAxes", [x], ([-1],), out)[0], mx.broadcast_to(x, (2, 3)))


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dtype", [mx.int32, mx.float32, mx.bfloat16])
def test_the_number_of_elements_is_known(inverted, dtype):
    x = normal(2, 3, 4)
    [found] = run("NumberOfElements", [x], ([0, 2], inverted, dtype), TensorType((), dtype_of(dtype)))
    assert same(found, mx.array(1 / 8 if inverted else 8, dtype))


def test_rms_norm():
    x, w, one = normal(2, 3, 8), normal(8), mx.array(1.0)
    assert same(run("RMSNorm", [x, w], (1e-2,), x)[0], mx.fast.rms_norm(x, w, 1e-2))
    assert same(run("RMSNorm", [x, one], (1e-2,), x)[0], mx.fast.rms_norm(x, None, 1e-2))


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
def test_layer_norm(given):
    x, w, b, one = normal(2, 3, 8), normal(8), normal(8, seed=1), mx.array(1.0)
    arrays = [x, w if given[0] else one, b if given[1] else one]
    expected = mx.fast.layer_norm(x, *(p if g else None for p, g in zip((w, b), given, strict=True)), 1e-2)
    assert same(run("LayerNorm", arrays, (1e-2,), x)[0], expected)


@pytest.mark.parametrize("traditional", [False, True])
def test_rope(traditional):
    x, offset, freqs = normal(2, 4, 3, 8), mx.array(5), mx.abs(normal(3)) + 1
    how = {"traditional": traditional, "scale": 0.5, "offset": offset}
    [found] = run("RoPE", [x, offset], (6, traditional, 100.0, 0.5, True), x)
    assert same(found, mx.fast.rope(x, 6, base=100.0, **how))
    [found] = run("RoPE", [x, offset, freqs], (6, traditional, 1.0, 0.5, True), x)
    assert same(found, mx.fast.rope(x, 6, base=None, freqs=freqs, **how))


@pytest.mark.parametrize("traditional", [False, True])
def test_the_derivative_of_rope_turns_back(traditional):
    x, offset = normal(1, 2, 3, 8), mx.array(4)
    [turned] = run("RoPE", [x, offset], (8, traditional, 100.0, 0.5, True), x)
    [back] = run("RoPE", [turned, offset], (8, traditional, 100.0, 0.5, False), x)
    assert_close(back, np.array(x))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", [None, "causal", "array"])
def test_attention(mask, sinks):
    q, k, v = normal(1, 4, 3, 8), normal(1, 2, 5, 8), normal(1, 2, 5, 8, seed=1)
    given = normal(3, 5) > 0
    extra = [*([given] if mask == "array" else []), *([normal(4)] if sinks else [])]
    [found] = run(
        "ScaledDotProductAttention", [q, k, v, *extra], (0.3, mask == "causal", sinks, False, False), q
    )
    expected = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=0.3, mask=given if mask == "array" else mask, sinks=normal(4) if sinks else None
    )
    assert same(found, expected)


def test_a_gather_of_windows():
    """What vmap makes of slices: more than one element of an indexed axis, less than all of another."""
    x = normal(5, 6, 4)
    i, j = mx.array([[0, 1, 3]]), mx.array([[2], [0]])
    [found] = run("Gather", [x, i], ([0], (2, 6, 3)), TensorType((1, 3, 2, 6, 3), F32))
    expected = np.stack([np.array(x)[n : n + 2, :, :3] for n in (0, 1, 3)])[None]
    np.testing.assert_array_equal(np.array(found), expected)
    [found] = run("Gather", [x, i, j], ([0, 2], (1, 5, 2)), TensorType((2, 3, 1, 5, 2), F32))
    at = [[np.array(x)[a : a + 1, :5, b : b + 2] for a in (0, 1, 3)] for b in (2, 0)]
    np.testing.assert_array_equal(np.array(found), np.array(at))


@pytest.mark.parametrize("axes", [[0, 2], [2, 0]])
def test_a_scatter_of_windows(axes):
    x, i, j = normal(5, 6, 4), mx.array([0, 3]), mx.array([1, 2])
    update = normal(2, 2, 5, 1, seed=3)
    [found] = run("Scatter", [x, *((i, j) if axes[0] == 0 else (j, i)), update], (2, axes), x)
    expected = np.array(x)
    for n, (a, b) in enumerate([(0, 1), (3, 2)]):
        expected[a : a + 2, :5, b : b + 1] += np.array(update)[n]
    assert_close(found, expected)


def test_a_scatter_of_windows_behind_the_other_axes():
    x, i = normal(3, 2, 6), mx.array([0, 4])
    update = normal(2, 3, 2, 2, seed=3)
    [found] = run("Scatter", [x, i, update], (2, [2]), x)
    expected = np.array(x)
    for n, a in enumerate([0, 4]):
        expected[:, :, a : a + 2] += np.array(update)[n]
    assert_close(found, expected)


def test_a_masked_scatter_of_several_rows_counts_each_row():
    x, mask = normal(2, 5), mx.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]]) > 0
    values = normal(2, 4, seed=2)
    [found] = run("MaskedScatter", [x, mask, values], (), x)
    expected = np.array(x)
    for row in range(2):
        expected[row, np.array(mask)[row]] = np.array(values)[row, : int(mask[row].sum())]
    np.testing.assert_array_equal(np.array(found), expected)


@pytest.mark.parametrize(("mode", "dtype"), [("affine", None), ("affine", mx.bfloat16), ("mxfp4", None)])
def test_dequantize_as_a_gpu_reports_it(mode, dtype):
    parts = mx.quantize(normal(8, 64), mode=mode)
    expected = mx.dequantize(*parts, mode=mode, dtype=dtype)
    group, bits, code = {"affine": (64, 4, 0), "mxfp4": (32, 4, 1)}[mode]
    [found] = run("Quantize", list(parts), (group, bits, code, True), expected)
    assert same(found, expected)


@pytest.mark.parametrize("which", ["one", "two"])
def test_rows_by_other_indices_are_no_rows_of_one_embedding(which):
    words, scales, biases = mx.quantize(normal(8, 64))
    i, j = mx.array([3, 1]), mx.array([3, 2])
    builder = Builder()
    arrays = [words, scales, biases, i, j]
    w, s, b, x, y = [builder.input(f"x{n}", type_of(a)) for n, a in enumerate(arrays)]
    other = x if which == "one" else y
    rows = [builder.add(Take(0), (part, at)).outputs[0] for part, at in ((w, x), (s, other), (b, x))]
    out = mx.dequantize(words[i], scales[i if which == "one" else j], biases[i])
    primitive = Primitive("Quantize", tuple(rows), (type_of(out),), (64, 4, 0, True), builder)
    graph = Graph([w, s, b, x, y], [MEANINGS["Quantize"](primitive)], builder)
    assert ("quantized_take" in graph.histogram()) == (which == "one")
    assert same(Program(graph).run(*arrays)[0], out)


def test_words_of_another_width_are_refused():
    with pytest.raises(qg.DTypeError, match="RandomBits of 2 bytes"):
        run("RandomBits", [mx.random.key(0)], ((4,), 2), TensorType((4,), I32))

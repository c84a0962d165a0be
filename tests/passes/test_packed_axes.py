"""Packed values of three axes in every order: where transposes go, what stays packed, what says why not.

Square shapes and permutations that are not their own inverse, since with others a wrong axis still fits.
"""

from __future__ import annotations

from itertools import permutations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir import parse_graph
from qgraph.numeric import compare
from qgraph.rewrite import Context
from tests.agree import agree, normal, ops

ORDERS = list(permutations(range(3)))
VIEWS = {
    "slice of one axis": lambda w: w[:1],
    "slice of another axis": lambda w: w[:, :32],
    "slice of the last axis": lambda w: w[..., :32],
    "slices of one size from other places": lambda w: w[:32, 32:, :32],
    "strided slice": lambda w: w[::2, ::2],
    "cast": lambda w: w.astype(mx.bfloat16),
    "concatenated on one axis": lambda w: qg.concatenate([w, w], axis=0),
    "concatenated on another axis": lambda w: qg.concatenate([w, w], axis=1),
    "concatenated on the last axis": lambda w: qg.concatenate([w, w], axis=2),
    "an axis more in front": lambda w: w[None],
    "an axis more inside": lambda w: w[:, None],
    "an axis more behind": lambda w: w[..., None],
}


def cube():
    return qg.quantize(normal(64, 64, 64), group_size=32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_transposed_weight_has_its_numbers(name, order):
    f = qg.jit(lambda w: VIEWS[name](qg.transpose(w, order)) + 1.0)
    agree(f, cube())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("device", ["cpu", "metal", "cuda"])
def test_the_passes_keep_what_a_view_of_a_transposed_weight_means(name, order, device):
    f = qg.jit(lambda w: VIEWS[name](qg.transpose(w, order)))
    before = f.graph(cube())
    after = qg.Pipeline.parse(qg.rewrite.DEFAULT).run(before, Context(device=device)).graph
    assert compare(before, after) is None


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_concatenation_comes_before_the_transposes_of_its_parts(order, axis):
    f = qg.jit(lambda w: qg.concatenate([qg.transpose(w, order)] * 2, axis=axis))
    graph = f.result(cube()).after("fold-transpose")
    assert graph.outputs[0].op.name == "transpose"
    assert ops(graph) == {"concatenate": 1, "transpose": 1}


def test_sizes_of_one_come_and_go_beneath_a_transpose():
    w = qg.quantize(normal(2, 1, 3, 64), group_size=32)
    for order in permutations(range(4)):
        f = qg.jit(lambda w: qg.squeeze(qg.transpose(w, order)) * 1.0)  # noqa: B023  (used at once)
        agree(f, w)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_rows_are_taken_along_every_axis_of_every_order(axis, order, shape):
    w = qg.quantize(normal(3, 4, 64), group_size=32)
    ids = mx.array([0, 2, 1, 2, 0, 1])[: qg.zeros(shape).size].reshape(shape)
    f = qg.jit(lambda w, ids: qg.take(qg.transpose(w, order), ids, axis=axis))
    packed = order.index(2)
    assert ("quantized_take" in ops(agree(f, w, ids))) == (axis != packed)


def test_groups_along_a_batch_axis_are_dequantized_with_the_reason():
    f = qg.jit(lambda x, w: x @ qg.moveaxis(w, -1, 0))
    x, w = normal(64, 2, 3), qg.quantize(normal(3, 5, 64), group_size=32)
    assert "dequantize" in ops(agree(f, x, w))
    assert "groups run along axis -3, a batch axis of the product" in str(f.report(x, w))


@pytest.mark.parametrize("stored", ["(out, in)", "(in, out)"])
def test_a_square_base_keeps_its_orientation_beside_an_adapter(stored):
    def f(x, w, a, b, s):
        return x @ (w.T if stored == "(out, in)" else w) + s * ((x @ a) @ b)

    w = qg.quantize(normal(64, 64))
    counts = ops(agree(qg.jit(f), normal(3, 64), w, normal(64, 4), normal(4, 64), mx.array(0.7)))
    assert counts == {"quantized_lora_matmul": 1}


@pytest.mark.parametrize(
    ("device", "transpose", "width"), [("metal", False, 96), ("cuda", True, 96), ("cuda", True, 32)]
)
def test_the_fallback_of_a_square_product_keeps_its_orientation(device, transpose, width):
    text = f"""graph(%x: f32[2,{width}], %w: f32[{width},{width}]:affine4g32) {{
        %y = quantized_matmul{{transpose={transpose}}}(%x, %w) : f32[2,{width}]
        return %y
    }}"""
    before = parse_graph(text)
    after = qg.Pipeline.parse("legalize").run(before, Context(device=device)).graph
    assert "quantized_matmul" not in ops(after)
    assert compare(before, after) is None


def test_permuted_storage_is_made_contiguous_for_a_gpu_and_a_plain_transpose_is_not():
    f = qg.jit(lambda x, w: x @ qg.transpose(w, (1, 2, 0)))
    before = f.graph(normal(3, 2, 64), qg.quantize(normal(5, 3, 64)))
    pipeline = qg.Pipeline.parse(qg.rewrite.DEFAULT)
    assert ops(pipeline.run(before, Context(device="metal")).graph)["contiguous"] == 1
    before = qg.jit(lambda x, w: x @ qg.swapaxes(w, 1, 2)).graph(
        normal(3, 2, 64), qg.quantize(normal(3, 5, 64))
    )
    assert "contiguous" not in ops(pipeline.run(before, Context(device="metal")).graph)

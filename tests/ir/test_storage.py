"""The storage of a type: one rule, and what breaks it is refused before MLX sees an array."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import pytest
from hypothesis import given

import qgraph as qg
from qgraph import DTypeError, QGraphError, ShapeError, VerifyError
from qgraph.execute.program import Program
from qgraph.ir import Builder, Graph, Op, parse_graph, verify
from qgraph.ir.dtypes import BF16, F32, F64, I32, U8, dtype_of
from qgraph.ir.types import Packing, TensorType, parse_type
from qgraph.ops.dispatch import type_of
from qgraph.quant import Quantization
from tests.agree import assert_close, normal
from tests.ops.cases import packed, turned

Q4 = Quantization(bits=4, group_size=64)


@given(packed())
def test_it_is_what_a_quantized_tensor_holds(w):
    for value in (w, turned(w)):
        parts = type_of(value).storage
        assert [p.name for p in parts] == list(type_of(value).packing.components)
        arrays = value.components()
        assert [(p.shape, p.dtype) for p in parts] == [(a.shape, dtype_of(a.dtype)) for a in arrays]
        assert sum(p.dtype.size * mx.zeros(p.shape).size for p in parts) == type_of(value).nbytes


IMPOSSIBLE = {
    "one axis": (TensorType((64,), F32, Packing(Q4, F32)), "rank 1"),
    "an axis that is not there": (
        TensorType((64, 64), F32, Packing(Q4, F32, axis=-3)),
        "groups along axis -3",
    ),
    "an axis from the front": (TensorType((64, 64), F32, Packing(Q4, F32, axis=1)), "groups along axis 1"),
    "half a group": (TensorType((4, 96), F32, Packing(Q4, F32)), "96 numbers, no whole groups of 64"),
    "half a group in the other axis": (TensorType((96, 64), F32, Packing(Q4, F32, -2)), "axis -2 has 96"),
    "integer scales": (TensorType((4, 64), F32, Packing(Q4, I32)), "scales of f32 or f16 or bf16"),
    "byte scales of affine": (TensorType((4, 64), F32, Packing(Q4, U8)), "only affine has float scales"),
    "float scales of mxfp4": (
        TensorType((4, 64), F32, Packing(Quantization.of_mode("mxfp4"), F32)),
        "scales of u8",
    ),
    "double numbers": (TensorType((4, 64), F64, Packing(Q4, F32)), "numbers of f32, f16 or bf16"),
    "integers": (TensorType((4, 64), I32, Packing(Q4, F32)), "numbers of f32, f16 or bf16"),
    "a global scale of affine": (TensorType((4, 64), F32, Packing(Q4, F32, -1, True)), "only nvfp4"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_type_that_no_arrays_can_have_is_refused_everywhere(case):
    t, message = IMPOSSIBLE[case]
    for use in (t.check, lambda: t.storage):
        with pytest.raises((ShapeError, DTypeError)) as info:
            use()
        assert message in str(info.value)
        assert info.value.fix
    builder = Builder()
    x = builder.input("w", t)
    with pytest.raises(VerifyError, match="input 'w': "):
        verify(Graph([x], [x], builder))
    if t.packing.axis < 0:
        for read in (parse_type, lambda s: parse_graph(f"graph(%w: {s}) {{\n return %w\n}}")):
            with pytest.raises(QGraphError):
                read(str(t))


def test_a_node_with_such_a_type_is_refused():
    class Careless(Op):
        name = "careless_view"

        def infer(self, w: TensorType) -> TensorType:
            return TensorType((w.shape[0], 32), w.dtype, w.packing)

    try:
        builder = Builder()
        w = builder.input("w", TensorType((4, 64), F32, Packing(Q4, F32)))
        made = builder.add(Careless(), [w])
        with pytest.raises(
            VerifyError, match=r"careless_view gives .* 32 numbers, no whole groups of 64"
        ) as info:
            verify(Graph([w], made.outputs, builder))
        assert "careless_view(%w)" in str(info.value)
    finally:
        Op.registry.pop("careless_view")


def test_an_input_whose_value_has_another_type_is_refused():
    builder = Builder()
    x = builder.input("x", TensorType((2,), F32))
    object.__setattr__(x, "type", TensorType((3,), F32))
    with pytest.raises(VerifyError, match=r"declared f32\[2\], its value is f32\[3\]"):
        verify(Graph([x], [x], builder))


def test_empty_weights_have_a_storage():
    assert TensorType((0, 64), BF16, Packing(Q4, BF16)).storage[0].shape == (0, 8)
    assert [p.shape for p in TensorType((4, 0), BF16, Packing(Q4, BF16)).storage] == [(4, 0)] * 3


TEXT = """graph(%x: f32[2,64], %w: f32[{n},64]:affine4g64) {{
  %y = quantized_matmul{{transpose=True}}(%x, %w) : f32[2,{n}]
  return %y
}}"""


def flat(n=8):
    w = qg.quantize(normal(n, 64), group_size=64)
    return [normal(2, 64, seed=1), *w.components()], w


def test_a_graph_read_from_text_runs_on_the_arrays_of_its_types():
    arrays, w = flat()
    (found,) = Program(parse_graph(TEXT.format(n=8))).run(*arrays)
    x, dense = arrays[0], qg.dequantize(w)
    assert_close(found, qg.dot(x, dense.T), k=64, path="P2", magnitude=abs(x) @ abs(dense.T))


def changed(i, change):
    arrays, _ = flat()
    arrays[i] = change(arrays[i])
    return arrays


WRONG = {
    "one row of scales": (
        changed(2, lambda s: s[:1]),
        ShapeError,
        r"'w', scales of .*: f32\[1,1\], expected f32\[8,1\]",
    ),
    "one row too few": (changed(2, lambda s: s[:-1]), ShapeError, r"'w', scales .*f32\[7,1\]"),
    "one row of biases too few": (changed(3, lambda s: s[:-1]), ShapeError, r"'w', biases .*f32\[7,1\]"),
    "another rank": (changed(3, lambda s: s[None]), ShapeError, "'w', biases"),
    "words too few": (changed(1, lambda s: s[:, :-1]), ShapeError, r"'w', packed of .*u32\[8,7\]"),
    "half scales": (changed(2, lambda s: s.astype(mx.float16)), DTypeError, r"'w', scales .*f16\[8,1\]"),
    "signed words": (changed(1, lambda s: s.astype(mx.int32)), DTypeError, r"'w', packed .*i32\[8,8\]"),
    "x too narrow": (
        changed(0, lambda s: s[:, :32]),
        ShapeError,
        r"input 'x': f32\[2,32\], expected f32\[2,64\]",
    ),
    "no biases": (flat()[0][:-1], ShapeError, "a program of 4 arrays got 3"),
    "one array more": ([*flat()[0], mx.zeros(1)], ShapeError, "a program of 4 arrays got 5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_the_types_do_not_have_never_reach_mlx(case):
    arrays, error, message = WRONG[case]
    program = Program(parse_graph(TEXT.format(n=8)))
    with pytest.raises(error, match=message) as info:
        program.run(*arrays)
    assert info.value.fix


@pytest.mark.parametrize("rows", [1, 63])
def test_a_triplet_with_rows_missing_is_refused_wherever_it_is_made(rows):
    packed_, scales, biases = mx.quantize(normal(64, 64), group_size=64, bits=4)
    for s, b in ((scales[:rows], biases[:rows]), (scales[:rows], biases), (scales, biases[:rows])):
        with pytest.raises(ShapeError):
            qg.from_quantized(packed_, s, b, bits=4, group_size=64)
        with pytest.raises(ShapeError):
            qg.QuantizedTensor(packed_, s, b, Q4)


def test_arrays_changed_in_place_cannot_make_a_program_read_past_their_end():
    """In its own process: MLX ends it where the check fails."""
    script = """
import mlx.core as mx, numpy as np, qgraph as qg
p, s, b = mx.quantize(mx.ones((4096, 64)), group_size=64, bits=4)
w = qg.from_quantized(p, s, b, bits=4, group_size=64)
f = qg.jit(lambda x, w: x @ w.T)
before = np.array(f(mx.ones((1, 64)), w))
for array in (p, s, b, w.packed, w.scales, w.biases, *w.components()):
    array += mx.zeros((2, 1, 1), array.dtype)  # another shape, under every name that the array has
s[:] = 0
np.testing.assert_array_equal(np.array(f(mx.ones((1, 64)), w)), before)
print(f.cache_info().misses)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr[-2000:]

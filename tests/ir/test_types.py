"""Types and the text form of types."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import DTypeError, QGraphError, Quantization, ShapeError
from qgraph.ir import DType, Packing, TensorType, parse_type
from qgraph.ir.dtypes import BF16, F16, F32, U8, dtype_of, promote
from qgraph.ir.types import broadcast_shapes, normalize_axis

SCHEMES = [Quantization(bits=4, group_size=64), Quantization(bits=3, group_size=32)]
SCHEMES += [Quantization.of_mode("mxfp4"), Quantization.of_mode("nvfp4")]


@st.composite
def types(draw: Any) -> TensorType:
    """A dense or a quantized type."""
    dtype = draw(st.sampled_from([F32, F16, BF16]))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(), (1,), (2, 64), (3, 2, 64), (1, 0)]))
        return TensorType(shape, draw(st.sampled_from(list(DType.all.values()))))
    scheme = draw(st.sampled_from(SCHEMES))
    scales = draw(st.sampled_from([dtype, F32])) if scheme.has_biases else U8
    axis = draw(st.sampled_from([-1, -2]))
    extra = scheme.mode == "nvfp4" and draw(st.booleans())
    shape = draw(st.sampled_from([(64, 64), (2, 64, 64)]))
    return TensorType(shape, dtype, Packing(scheme, scales, axis, extra))


@given(types())
@settings(max_examples=200, deadline=None)
def test_a_type_parses_back(t: TensorType) -> None:
    assert parse_type(str(t)) == t
    assert hash(parse_type(str(t))) == hash(t)


@pytest.mark.parametrize(
    ("text", "shape"), [("f32[]", ()), ("bool[3]", (3,)), ("c64[1,0]", (1, 0)), (" u8[2] ", (2,))]
)
def test_every_dense_form_is_read(text: str, shape: tuple[int, ...]) -> None:
    assert parse_type(text).shape == shape


@pytest.mark.parametrize(
    "text",
    ["", "f32", "f32[2", "f32[-1]", "f32[2]:", "f32[2]x", "f99[2]", "f32[2,64]:affine7g64", "f32[2,64]:x@1"],
)
def test_what_is_no_type_is_refused(text: str) -> None:
    with pytest.raises(QGraphError):
        parse_type(text)


def test_the_scales_dtype_is_printed_only_when_it_is_not_the_usual_one() -> None:
    q, fp = Quantization(bits=4, group_size=64), Quantization.of_mode("mxfp4")
    assert str(TensorType((2, 64), BF16, Packing(q, BF16))) == "bf16[2,64]:affine4g64"
    assert str(TensorType((2, 64), F32, Packing(q, BF16))) == "f32[2,64]:affine4g64/bf16"
    assert str(TensorType((64, 2), F16, Packing(fp, U8, -2))) == "f16[64,2]:mxfp4@-2"


@pytest.mark.parametrize(
    "other",
    [
        TensorType((64, 2), F32, Packing(Quantization(bits=4, group_size=64), F32)),
        TensorType((2, 64), F16, Packing(Quantization(bits=4, group_size=64), F32)),
        TensorType((2, 64), F32, Packing(Quantization(bits=8, group_size=64), F32)),
        TensorType((2, 64), F32, Packing(Quantization(bits=4, group_size=32), F32)),
        TensorType((2, 64), F32, Packing(Quantization(bits=4, group_size=64), BF16)),
        TensorType((2, 64), F32, Packing(Quantization(bits=4, group_size=64), F32, -2)),
        TensorType((2, 64), F32),
    ],
)
def test_types_that_differ_anywhere_are_not_equal(other: TensorType) -> None:
    one = TensorType((2, 64), F32, Packing(Quantization(bits=4, group_size=64), F32))
    assert one != other
    assert str(one) != str(other)


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        (Quantization(bits=4, group_size=64), 8 * 64 // 2 + 8 * 2 * 4),
        (Quantization.of_mode("mxfp8"), 8 * 64 + 8 * 2),
    ],
)
def test_nbytes_is_what_mlx_stores(scheme: Quantization, size: int) -> None:
    from qgraph.ops.dispatch import type_of
    from qgraph.quant import pack

    w = pack(mx.ones((8, 64)), scheme)
    assert type_of(w).nbytes == w.nbytes == size


def test_axes_out_of_range_and_shapes_that_do_not_broadcast() -> None:
    with pytest.raises(ShapeError, match="axis 2 is out of range"):
        normalize_axis(2, 2)
    with pytest.raises(ShapeError, match="do not broadcast"):
        broadcast_shapes((2, 3), (4,))


@given(st.lists(st.sampled_from([0, 1, 3]), max_size=3), st.lists(st.sampled_from([0, 1, 3]), max_size=3))
def test_broadcast_is_numpys(a: list[int], b: list[int]) -> None:
    try:
        expected = np.broadcast_shapes(tuple(a), tuple(b))
    except ValueError:
        with pytest.raises(ShapeError):
            broadcast_shapes(tuple(a), tuple(b))
    else:
        assert broadcast_shapes(tuple(a), tuple(b)) == expected


@pytest.mark.parametrize("a", list(DType.all.values()), ids=str)
@pytest.mark.parametrize("b", list(DType.all.values()), ids=str)
def test_promotion_is_mlxs(a: DType, b: DType) -> None:
    assert promote(a, b).mlx == mx.result_type(a.mlx, b.mlx)


def test_a_dtype_is_one_object_and_others_are_refused() -> None:
    import copy

    assert copy.deepcopy(F32) is F32 is dtype_of(mx.float32)
    with pytest.raises(DTypeError, match="expected an MLX dtype"):
        dtype_of("float32")  # pyright: ignore[reportArgumentType]

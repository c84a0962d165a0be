import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph._errors import DTypeError, QGraphError, ShapeError
from qgraph.quant import (
    Quantization,
    QuantizedTensor,
    from_quantized,
    is_quantized,
    pack,
    unpack,
)
from tests.agree import assert_close

SCHEMES = [
    *(Quantization(bits=b, group_size=g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)),
    *(Quantization.of_mode(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")),
]
Q4 = Quantization(bits=4, group_size=64)
NUMPY: Any = np.ones((2, 64))
FLOATS = [mx.float32, mx.float16, mx.bfloat16]


def parts(q: Quantization, lead: tuple[int, ...] = (8,), groups: int = 2) -> list[mx.array | None]:
    """Packed, scales and biases of the right shapes and dtypes, without quantizing."""
    packed = mx.zeros((*lead, q.words(groups * q.group_size)), mx.uint32)
    scales = mx.zeros((*lead, groups), mx.bfloat16 if q.has_biases else mx.uint8)
    return [packed, scales, scales if q.has_biases else None]


def build(*args: object, **kwargs: object) -> QuantizedTensor:
    return QuantizedTensor(*args, **kwargs)  # pyright: ignore[reportArgumentType]


@settings(max_examples=60, deadline=None)
@given(
    q=st.sampled_from(SCHEMES),
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    groups=st.integers(0, 3),
    dtype=st.sampled_from(FLOATS),
)
def test_pack_and_unpack_do_what_mlx_does(
    q: Quantization, lead: list[int], groups: int, dtype: mx.Dtype
) -> None:
    w = mx.random.normal((*lead, groups * q.group_size)).astype(dtype)
    packed = pack(w, q)
    assert (packed.shape, packed.dtype) == (w.shape, dtype)
    dense = unpack(packed)
    assert (dense.shape, dense.dtype) == (w.shape, dtype)
    # MLX refuses an odd number of nvfp4 groups on CPU; pack does not.
    if w.size and w.size % 32 == 0:
        stored = mx.quantize(w, q.group_size, q.bits, q.mode)
        assert mx.array_equal(packed.packed, stored[0])
        expected = mx.dequantize(*stored, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=dtype)
        assert mx.array_equal(expected, dense)


@settings(max_examples=150, deadline=None)
@given(
    q=st.sampled_from(SCHEMES),
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    part=st.integers(0, 2),
    axis=st.integers(-4, -1),
    delta=st.sampled_from([-1, 1]),
)
def test_any_axis_that_is_off_by_one_is_refused(
    q: Quantization, lead: list[int], groups: int, part: int, axis: int, delta: int
) -> None:
    triplet = parts(q, tuple(lead), groups)
    array = triplet[part]
    if array is None or -axis > array.ndim:
        return
    shape = list(array.shape)
    shape[axis] += delta
    triplet[part] = mx.zeros(shape, array.dtype)
    with pytest.raises(ShapeError):
        build(*triplet, q)


@pytest.mark.parametrize("q", SCHEMES, ids=str)
def test_a_right_triplet_is_taken_as_it_is(q: Quantization) -> None:
    triplet = parts(q, (3, 8))
    t = build(*triplet, q)
    given = [a for a in triplet if a is not None]
    assert all(map(mx.array_equal, t.components(), given))
    assert len(t.components()) == len(given)
    assert t.shape == (3, 8, 2 * q.group_size)
    assert t.dtype == mx.bfloat16
    assert t.nbytes == sum(a.nbytes for a in t.components())
    assert (t.ndim, t.size) == (3, 3 * 8 * 2 * q.group_size)


def test_shapes_that_fit_another_scheme_too_are_read_as_declared() -> None:
    packed, scales, biases = parts(Quantization(bits=4, group_size=64))
    assert build(packed, scales, biases, Q4).shape == (8, 128)
    assert build(packed, scales, biases, Quantization(bits=8, group_size=32)).shape == (8, 64)


def words(n: int, dtype: mx.Dtype = mx.uint32) -> mx.array:
    return mx.zeros((8, n), dtype)


S, U8 = mx.zeros((8, 2)), mx.zeros((8, 4), mx.uint8)
MX4, NV4 = Quantization.of_mode("mxfp4"), Quantization.of_mode("nvfp4")
WRONG: dict[str, tuple[list[object], type[QGraphError], str]] = {
    "vector": ([mx.zeros(16, mx.uint32), S[0], S[0], Q4], ShapeError, "rank 2"),
    "int32 words": ([words(16, mx.int32), S, S, Q4], DTypeError, "expected uint32"),
    "float words": ([words(16, mx.float32), S, S, Q4], DTypeError, "expected uint32"),
    "one row of scales": ([words(16), S[:1], S, Q4], ShapeError, r"expected \(8, 2\)"),
    "transposed scales": ([words(16), S.T, S, Q4], ShapeError, r"expected \(8, 2\)"),
    "flat scales": ([words(16), S[:, 0], S, Q4], ShapeError, "expected"),
    "batched scales": ([words(16), S[None], S, Q4], ShapeError, "expected"),
    "other biases": ([words(16), S, S[:, :1], Q4], ShapeError, "biases"),
    "partial group": ([words(15), S, S, Q4], ShapeError, "multiple of 8 words"),
    "no biases": ([words(16), S, None, Q4], DTypeError, "needs biases"),
    "biases of mxfp4": ([words(16), U8, U8, MX4], DTypeError, "takes no biases"),
    "integer scales": ([words(16), S.astype(mx.int32), S, Q4], DTypeError, "int32"),
    "float64 scales": ([words(16), S.astype(mx.float64, stream=mx.cpu), S, Q4], DTypeError, "f"),
    "mixed dtypes": ([words(16), S, S.astype(mx.float16), Q4], DTypeError, "float16"),
    "float scales of mxfp4": ([words(16), mx.zeros((8, 4)), None, MX4], DTypeError, "uint8"),
    "global scale of mxfp4": ([words(16), U8, None, MX4, mx.array(1.0)], DTypeError, "nvfp4"),
    "global scale vector": (
        [words(8), U8, None, NV4, mx.zeros(8)],
        DTypeError,
        "float32 scalar",
    ),
    "global scale f16": (
        [words(8), U8, None, NV4, mx.array(1, mx.float16)],
        DTypeError,
        "float32 scalar",
    ),
    "numpy": ([np.zeros((8, 16), np.uint32), S, S, Q4], DTypeError, "ndarray"),
    "no scales": ([words(16), None, S, Q4], DTypeError, "scales is a NoneType"),
    "logical int": ([words(16), S, S, Q4, None, mx.int32], DTypeError, "int32"),
    "positive axis": ([words(16), S, S, Q4, None, None, 0], ShapeError, "axis 0"),
    "axis out of range": ([words(16), S, S, Q4, None, None, -3], ShapeError, "axis -3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_triplet_that_does_not_belong_together_is_refused(case: str) -> None:
    args, error, text = WRONG[case]
    with pytest.raises(error, match=text) as caught:
        build(*args)
    assert caught.value.fix


@pytest.mark.parametrize(("axis", "shape"), [(-1, (3, 8, 128)), (-2, (3, 128, 8)), (-3, (128, 3, 8))])
def test_the_axis_moves_the_weights_in_the_logical_shape(axis: int, shape: tuple[int, ...]) -> None:
    w = pack(mx.random.normal((3, 8, 128)), Q4)
    t = QuantizedTensor(w.packed, w.scales, w.biases, Q4, axis=axis)
    assert t.shape == shape
    assert mx.array_equal(unpack(t), mx.moveaxis(unpack(w), -1, axis))


def test_the_logical_dtype_may_differ_from_the_scales() -> None:
    w = pack(mx.random.normal((8, 64)), Q4)
    t = from_quantized(*w.components(), bits=4, group_size=64, dtype=mx.bfloat16)
    assert (t.dtype, t.scales.dtype, unpack(t).dtype) == (mx.bfloat16, mx.float32, mx.bfloat16)
    assert unpack(t, mx.float32).dtype == mx.float32


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (1, 3, 16)])
def test_an_odd_number_of_nvfp4_groups_is_packed_like_an_even_one(shape: tuple[int, ...]) -> None:
    w = mx.random.normal(shape)
    even = pack(mx.concatenate([w, w]), NV4)
    odd = pack(w, NV4)
    assert mx.array_equal(odd.packed, even.packed[: shape[0]])
    assert odd.shape == shape
    assert mx.array_equal(unpack(odd), unpack(even)[: shape[0]])


def test_a_global_scale_multiplies_by_its_share_of_2688() -> None:
    w = pack(mx.random.normal((8, 64)), NV4, mx.array(5.0))
    assert len(w.components()) == 3
    bare = QuantizedTensor(w.packed, w.scales, None, NV4, dtype=mx.float32)
    assert_close(unpack(w), unpack(bare) * (5.0 / 2688), path="elementwise")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: pack(mx.ones(64), Q4), ShapeError, "rank 2"),
        (lambda: pack(mx.ones((2, 100)), Q4), ShapeError, "multiple of group_size 64"),
        (lambda: pack(mx.ones((2, 64), mx.int32), Q4), DTypeError, "int32"),
        (lambda: pack(mx.ones((2, 64), mx.float64, stream=mx.cpu), Q4), DTypeError, "float64"),
        (lambda: pack(NUMPY, Q4), DTypeError, "ndarray"),
        (lambda: pack(mx.ones((2, 64)), Q4, mx.array(1.0)), DTypeError, "only nvfp4|no global"),
        (lambda: unpack(NUMPY), DTypeError, "expected a QuantizedTensor"),
        (lambda: unpack(pack(mx.ones((2, 64)), Q4), mx.int32), DTypeError, "int32"),
    ],
)
def test_pack_and_unpack_refuse_what_mlx_would_stumble_over(
    make: Callable[[], object], error: type[QGraphError], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


def test_the_repr_shows_the_type_and_the_storage_but_no_packed_number() -> None:
    t = pack(mx.ones((8, 128), mx.bfloat16), Q4)
    assert repr(t) == "QuantizedTensor(bf16[8,128], affine4g64, packed uint32[8,16], 576 B)"
    turned = QuantizedTensor(t.packed, t.scales, t.biases, Q4, axis=-2)
    expected = "QuantizedTensor(bf16[128,8], affine4g64, axis=-2, packed uint32[8,16], 576 B)"
    assert repr(turned) == expected
    large = build(*parts(Q4, (1024,), 32), Q4)
    assert repr(large).endswith("1.2 MB)")


@pytest.mark.parametrize("use", [len, list, bool, np.array, np.asarray, iter])
def test_a_packed_tensor_is_not_taken_for_numbers(use: Callable[[object], object]) -> None:
    with pytest.raises(DTypeError, match="packed") as caught:
        use(build(*parts(Q4), Q4))
    assert "qg.dequantize" in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_a_tensor_cannot_be_changed() -> None:
    t = build(*parts(Q4), Q4)
    with pytest.raises(AttributeError, match="immutable"):
        t.scales = t.scales
    with pytest.raises(AttributeError, match="immutable"):
        del t.scales
    with pytest.raises(AttributeError):
        t.extra = 1  # pyright: ignore[reportAttributeAccessIssue]


def grow(array: mx.array) -> None:
    """What ``a += b`` does to an mx.array: it may get another shape, under every name it has."""
    array += mx.ones((3, *array.shape), array.dtype)


@pytest.mark.parametrize("q", SCHEMES, ids=str)
def test_no_handle_reaches_the_arrays_inside(q: Quantization) -> None:
    triplet = [a for a in parts(q) if a is not None]
    t = build(*triplet, *[None] * (3 - len(triplet)), q)
    before = [np.array(a.astype(mx.float32)) for a in t.components()]
    for array in (*triplet, *t.components(), t.packed, t.scales, t.biases):
        if array is not None:
            grow(array)
            array[:] = 1
    assert triplet[1].shape != before[1].shape  # it did change, outside
    for component, array in zip(t.components(), before, strict=True):
        np.testing.assert_array_equal(np.array(component.astype(mx.float32)), array)
    assert t.scales.shape == before[1].shape


def test_tensors_compare_by_identity_and_can_be_weakly_referenced() -> None:
    t = build(*parts(Q4), Q4)
    same = build(*t.components(), Q4)
    assert t == t
    assert t != same
    assert {t: 1, same: 2}[t] == 1
    assert copy.copy(t) is t
    assert copy.deepcopy({"w": t})["w"] is t
    ref = weakref.ref(t)
    del t
    gc.collect()
    assert ref() is None


def test_is_quantized_answers_for_any_object() -> None:
    class Odd:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError(name)

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        __hash__ = None  # type: ignore[assignment]

    others: list[object] = [None, "w", {}, [], 1, mx.zeros(2), np.zeros(2), QuantizedTensor, Odd()]
    assert not any(is_quantized(other) for other in others)
    assert is_quantized(build(*parts(Q4), Q4))

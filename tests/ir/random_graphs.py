"""Random graphs, valid by construction: any op on any values that its own type rule takes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from qgraph._errors import QGraphError
from qgraph.ir import Builder, Graph, Op, Packing, TensorType, Value
from qgraph.ir.dtypes import BF16, F16, F32, I32, U8, DType
from qgraph.ir.op import Constant
from qgraph.ir.origin import Origin
from qgraph.quant import Quantization

SCHEMES = [
    Quantization(bits=4, group_size=64),
    Quantization(bits=3, group_size=32),
    Quantization.of_mode("mxfp4"),
    Quantization.of_mode("nvfp4"),
]
SCOPES = ["", "layers.0", "layers.1.attn.q_proj", "head", "dot", "a.1"]
SHAPES = [(), (1,), (2, 64), (64, 64), (64, 2), (3, 2, 64), (1, 1)]
FLOATS = [0.0, -0.0, 1.0, -1.5, 1e-30, float("inf"), float("-inf"), float("nan")]

dtypes = st.sampled_from([F32, F16, BF16, I32])


@st.composite
def types(draw: Any) -> TensorType:
    """A dense or a quantized type."""
    dtype = draw(st.sampled_from([F32, F16, BF16]))
    if draw(st.booleans()):
        return TensorType(draw(st.sampled_from(SHAPES)), draw(dtypes))
    scheme = draw(st.sampled_from(SCHEMES))
    scales = draw(st.sampled_from([dtype, F32])) if scheme.has_biases else U8
    axis = draw(st.sampled_from([-1, -2]))
    extra = scheme.mode == "nvfp4" and draw(st.booleans())
    return TensorType(
        draw(st.sampled_from([(64, 64), (2, 64, 64)])), dtype, Packing(scheme, scales, axis, extra)
    )


def _permutation(draw: Any, v: Value) -> Op:
    return Op.registry["transpose"](draw(st.permutations(range(v.type.ndim)).map(tuple)))


def _reshape(draw: Any, v: Value) -> Op:
    shapes = [(v.type.size,), (1, *v.type.shape), (-(-v.type.size // 2), 2), (1, v.type.size)]
    return Op.registry["reshape"](draw(st.sampled_from(shapes)))


def _slice(draw: Any, v: Value) -> Op:
    starts = tuple(draw(st.sampled_from([0, s // 2])) for s in v.type.shape)
    return Op.registry["slice"](starts, v.type.shape, (1,) * v.type.ndim)


def _axes(name: str) -> Any:
    def make(draw: Any, v: Value) -> Op:
        axes = draw(st.sets(st.integers(0, max(v.type.ndim - 1, 0))).map(sorted).map(tuple))
        return Op.registry[name](axes, *([] if name == "softmax" else [draw(st.booleans())]))

    return make


def _plain(name: str) -> Any:
    return lambda draw, v: Op.registry[name]()


def _cast(draw: Any, v: Value) -> Op:
    return Op.registry["cast"](draw(dtypes))


def _norm(draw: Any, v: Value) -> Op:
    return Op.registry["rms_norm"](draw(st.sampled_from([1e-5, 1e-06, 0.0])))


MAKERS = [
    *map(_plain, ("exp", "negative", "silu", "abs", "add", "multiply", "subtract", "dot", "where", "divide")),
    *map(
        _plain,
        ("dequantize", "quantize", "quantized_matmul", "quantized_take", "take", "equal", "contiguous"),
    ),
    *map(_axes, ("sum", "max", "mean", "softmax")),
    _permutation,
    _permutation,
    _reshape,
    _slice,
    _cast,
    _norm,
]


def constant(draw: Any) -> Op:
    dtype: DType = draw(dtypes)
    number = draw(st.sampled_from([0, 1, -3]) if dtype is I32 else st.sampled_from(FLOATS))
    shape = draw(st.sampled_from([(), (2,)]))
    return Constant((number,) * (shape[0] if shape else 1), shape, dtype)


@st.composite
def graphs(draw: Any, size: int = 12) -> Graph:
    """A graph of up to `size` nodes; values have any number of users, and some are outputs twice."""
    builder = Builder()
    count = draw(st.integers(1, 4))
    inputs = [builder.input(f"x{i}", draw(types())) for i in range(count)]
    values = list(inputs)
    for _ in range(draw(st.integers(size // 2, size))):
        origin = Origin(scope=draw(st.sampled_from(SCOPES)))
        if draw(st.integers(0, 6)) == 0:
            values += builder.add(constant(draw), (), origin).outputs
            continue
        first = draw(st.sampled_from(draw(st.sampled_from([values, values[-3:]]))))
        alike = [v for v in values if v.type.shape == first.type.shape]
        second, third = (draw(st.sampled_from(draw(st.sampled_from([alike, values])))) for _ in range(2))
        op = draw(st.sampled_from(MAKERS))(draw, first)
        for operands in ([first], [first, second], [first, second, third]):
            try:
                values += builder.add(op, operands, origin).outputs
                break
            except (QGraphError, TypeError):
                continue
    outputs = [values[-1], *draw(st.lists(st.sampled_from(values), max_size=3))]
    return Graph(inputs, outputs, builder)

"""Operations kept whole during a capture, which MLX on a CPU would expand into primitives at once.

While a model is captured, `mx.fast.rms_norm` and its like are replaced: the call notes the op and its
operands, and returns a stand-in of the right type. The stand-in is a broadcast of a constant that nobody else
has, so that it can be told in what the tracer reports; the operands become further outputs of the function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import mlx.core as mx

from qgraph import ops
from qgraph._errors import QGraphError
from qgraph.capture.importer import Step
from qgraph.capture.primitives import MEANINGS
from qgraph.capture.primitives.table import Meaning
from qgraph.capture.records import CAPTURING, Record, Recording, address
from qgraph.capture.scopes import calling_line
from qgraph.ir.op import Constant, Op
from qgraph.ir.origin import Source
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import apply, run_under, type_of
from qgraph.ops.shape import Contiguous
from qgraph.quant import Quantization

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")  # as MLX counts them in the arguments of primitives


@dataclass(frozen=True)
class Cut:
    """One call: what it means, its operands, and the constants behind its stand-ins."""

    name: str
    meaning: Meaning
    operands: list[mx.array]
    arguments: tuple[Any, ...]
    types: tuple[TensorType, ...]
    seeds: list[mx.array]
    source: Source


@dataclass
class Cutter:
    """The calls of one capture; as an interpreter of qgraph's ops it notes an op as one call."""

    cuts: list[Cut] = field(default_factory=list[Cut])
    thread: int = field(default_factory=threading.get_ident)
    transforming: int = 0  # inside mx.grad and its like a stand-in would have no gradient

    def apply(self, op: Op, operands: tuple[Any, ...]) -> Any:
        """Note an op, and return stand-ins of its results."""
        if isinstance(op, Constant):
            return eval_(mx.array(op.data, op.dtype.mlx).reshape(op.shape))
        inferred = op.infer(*map(type_of, operands))
        types = inferred if isinstance(inferred, tuple) else (inferred,)
        out = self.cut(op.name, lambda p: p.node(op, *p.inputs), list(operands), (), types)
        return out[0] if len(out) == 1 else tuple(out)

    def cut(
        self,
        name: str,
        meaning: Meaning,
        operands: list[mx.array],
        arguments: tuple[Any, ...],
        types: tuple[TensorType, ...],
    ) -> list[mx.array]:
        """Note a call, and return stand-ins of its results."""
        seeds = [eval_(mx.zeros((1,) * max(len(t.shape), 1), t.dtype.mlx)) for t in types]
        self.cuts.append(Cut(name, meaning, operands, arguments, types, seeds, calling_line()))
        return [
            mx.broadcast_to(seed, t.shape) if t.shape else mx.squeeze(seed)
            for seed, t in zip(seeds, types, strict=True)
        ]

    @property
    def active(self) -> bool:
        """Whether this thread is the one that captures, and a stand-in may be used here."""
        return not self.transforming and threading.get_ident() == self.thread

    def steps(self, recording: Recording, operand_names: Sequence[str]) -> list[Step]:
        """The calls by names; `operand_names` are those of all operands in order."""
        seeds = {address(x): name for name, x in recording.constants.items() if x.size == 1}
        made_of = {r.inputs[0]: r.outputs[0] for r in recording.records if r.name in ("Broadcast", "Squeeze")}
        names = iter(operand_names)
        steps: list[Step] = []
        for cut in self.cuts:
            inputs = tuple(next(names) for _ in cut.operands)
            places = [seeds.get(address(seed)) for seed in cut.seeds]
            if all(p is None for p in places):
                continue  # nothing reads it
            # A shape of ones only is the constant itself: MLX makes no broadcast that changes nothing.
            outputs = tuple(
                f"unread {id(cut)}.{i}" if p is None else made_of.get(p, p) for i, p in enumerate(places)
            )
            record = Record(cut.name, inputs, outputs, cut.types, cut.arguments)
            steps.append(Step(record, cut.meaning, cut.source))
        return steps


def eval_(x: mx.array) -> mx.array:
    """An array with its numbers made: what is lazy would be part of the traced graph."""
    mx.eval(x)
    return x


def _dequantize(
    cutter: Cutter,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """`mx.dequantize` as the primitive that a GPU reports."""
    defaults = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[mode]
    q = Quantization(
        bits=defaults[0] if bits is None else bits,
        group_size=defaults[1] if group_size is None else group_size,
        mode=mode,  # pyright: ignore[reportArgumentType]  (Quantization checks it)
    )
    found = dtype or (scales.dtype if q.has_biases else mx.bfloat16)
    shape = (*w.shape[:-1], w.shape[-1] * 32 // q.bits)
    types = (type_of(mx.zeros(shape, found)),)
    operands = [x for x in (w, scales, biases, global_scale) if x is not None]
    arguments = (q.group_size, q.bits, MODES.index(q.mode), True)
    return cutter.cut("Quantize", lambda p: MEANINGS["Quantize"](p), operands, arguments, types)[0]


def _contiguous(x: mx.array, allow_col_major: bool = False) -> Any:
    del allow_col_major
    return apply(Contiguous(), x)


def _by_qgraph(function: Callable[..., Any]) -> Callable[..., Any]:
    """A cut by qgraph's function of the same name and signature."""

    def call(cutter: Cutter, *args: Any, **kwargs: Any) -> Any:
        return run_under(cutter, lambda: function(*args, **kwargs))

    return call


def _itself(x: mx.array, allow_col_major: bool = False) -> mx.array:
    del allow_col_major
    return x


def _inverted(x: mx.array) -> mx.array:
    if x.dtype == mx.bool_:
        return mx.logical_not(x)
    unsigned = mx.issubdtype(x.dtype, mx.unsignedinteger)
    return mx.bitwise_xor(x, mx.array(mx.iinfo(x.dtype).max if unsigned else -1, x.dtype))


# Where MLX's function is found, its name, and how a call of it is cut out.
CUTS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (mx.fast, "rms_norm", _by_qgraph(ops.rms_norm)),
    (mx.fast, "layer_norm", _by_qgraph(ops.layer_norm)),
    (mx.fast, "rope", _by_qgraph(ops.rope)),
    (mx.fast, "scaled_dot_product_attention", _by_qgraph(ops.scaled_dot_product_attention)),
    (mx, "contiguous", _by_qgraph(_contiguous)),
    (mx, "dequantize", _dequantize),
    # MLX has no exporter for these.
    (mx, "bitwise_invert", _by_qgraph(ops.bitwise_invert)),
    (mx, "logcumsumexp", _by_qgraph(ops.logcumsumexp)),
    (mx, "to_fp8", _by_qgraph(ops.to_fp8)),
    (mx, "from_fp8", _by_qgraph(ops.from_fp8)),
)
# For a function that is captured as it is: the same values in operations that MLX does report.
SPELT_OUT: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("contiguous", _itself),
    ("bitwise_invert", _inverted),
)
TRANSFORMS = ("grad", "value_and_grad", "vjp", "jvp", "vmap")


@contextmanager
def cutting(cutter: Cutter) -> Generator[None]:
    """Replace MLX's functions for this thread; other threads reach the real ones through the replacements."""
    with CAPTURING:
        real = [(place, name, getattr(place, name)) for place, name, _ in CUTS]
        real += [(mx, name, getattr(mx, name)) for name in TRANSFORMS]
        try:
            for place, name, cut in CUTS:
                setattr(place, name, _replaced(cutter, getattr(place, name), cut))
            for name in TRANSFORMS:
                setattr(mx, name, _suspending(cutter, getattr(mx, name)))
            yield
        finally:
            for place, name, function in real:
                setattr(place, name, function)


@contextmanager
def spelling_out() -> Generator[None]:
    """Replace, for this thread, functions that MLX's tracer cannot report by others of the same meaning."""
    thread = threading.get_ident()

    def replaced(real: Any, meaning: Callable[..., Any]) -> Any:
        @wraps(real)
        def call(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                return meaning(*args, **kwargs)
            return real(*args, stream=stream, **kwargs)

        return call

    with CAPTURING:
        real = {name: getattr(mx, name) for name, _ in SPELT_OUT}
        try:
            for name, meaning in SPELT_OUT:
                setattr(mx, name, replaced(real[name], meaning))
            yield
        finally:
            for name, function in real.items():
                setattr(mx, name, function)


def _replaced(cutter: Cutter, real: Any, cut: Callable[..., Any]) -> Any:
    @wraps(real)
    def call(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
        if cutter.active:
            try:
                return cut(cutter, *args, **kwargs)
            except (QGraphError, TypeError, KeyError):
                pass  # a call that qgraph's op does not take is MLX's to judge, and expanded if right
        return real(*args, **kwargs) if stream is None else real(*args, stream=stream, **kwargs)

    return call


def _suspending(cutter: Cutter, real: Any) -> Any:
    """A transformation, or what it makes, during which nothing is cut."""

    def suspended(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != cutter.thread:
                return function(*args, **kwargs)
            cutter.transforming += 1
            try:
                out = function(*args, **kwargs)
            finally:
                cutter.transforming -= 1
            return suspended(out) if callable(out) and not isinstance(out, mx.array) else out

        return call

    return suspended(real)

"""Random numbers from explicit keys: the same key gives the same numbers, eagerly, traced or compiled.

    k1, k2 = qg.random.split(qg.random.key(0))
    x = qg.random.normal((4, 64), key=k1)

MLX can also draw from a hidden state; a compiled function would freeze it, so every function here needs
its key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from qgraph._errors import DTypeError, QGraphError, ShapeError
from qgraph.ir.dtypes import BOOL, F32, I32, U32, DType, dtype_of
from qgraph.ir.op import Op, Operand, Types, literal
from qgraph.ir.types import Shape, TensorType, broadcast_shapes, normalize_axis
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend_of, operand, shape_of
from qgraph.ops.elementwise import astype
from qgraph.ops.indexing import take
from qgraph.ops.nn import check_float

__all__ = ["bernoulli", "categorical", "gumbel", "key", "normal", "permutation"]
__all__ += ["randint", "split", "truncated_normal", "uniform"]


class Draw(Op):
    """An op whose first operand is a key."""

    flops_per_element = 20  # some rounds of a hash function
    drawn: ClassVar[Callable[..., TensorType]]  # the type of the numbers
    call: ClassVar[Callable[..., str]]  # the MLX call as source, for the names of key and parameters

    def infer(self, key: TensorType, *parameters: TensorType) -> TensorType:
        """Check the key; `drawn` gives the type."""
        if key.shape != (2,) or key.dtype is not U32:
            raise DTypeError(f"{self.name}: the key is {key}, not u32[2]", fix="pass qg.random.key(seed)")
        return self.drawn(*parameters)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The call."""
        return self.call(*operands)

    def reference(self, key: Any, *parameters: Any) -> Any:
        """The same MLX call: which bits a key stands for is MLX's definition, so NumPy cannot be asked."""
        arrays = [_narrow(np.asarray(key, np.uint32)), *(_narrow(p) for p in parameters)]
        names = [f"x{i}" for i in range(len(arrays))]
        out = eval(self.call(*names), {"mx": mx, **dict(zip(names, arrays, strict=True))})
        return (
            np.array(out.astype(mx.float32), np.float64)
            if mx.issubdtype(out.dtype, mx.floating)
            else np.array(out)
        )


def _narrow(x: Any) -> mx.array:
    x = np.array(x, order="C")  # MLX takes no view that runs backwards
    return mx.array(x.astype(np.float32) if x.dtype.kind == "f" else x)


def _need(key: ArrayLike | None, name: str) -> Any:
    if key is None:
        raise QGraphError(
            f"random.{name}: no key",
            fix="pass key=..., e.g. qg.random.key(0): a jitted function must not freeze hidden state",
        )
    return operand(key)


def _fits(name: str, shape: Shape, *parameters: TensorType) -> None:
    if broadcast_shapes(shape, *(p.shape for p in parameters)) != shape:
        found = ", ".join(str(p.shape) for p in parameters)
        raise ShapeError(
            f"{name}: parameters of shape {found} do not broadcast to {shape}", fix="pass shape="
        )


def _check_drawable(name: str, dtype: DType) -> None:
    if not dtype.is_float or dtype.size == 8:
        raise DTypeError(f"{name}: cannot draw {dtype}", fix="draw float32, float16 or bfloat16, then cast")


@dataclass(frozen=True)
class Key(Op):
    """The key of a seed."""

    name = "random_key"
    mlx = "mx.random.key({seed})"
    seed: int = 0

    def infer(self) -> TensorType:
        """Two words."""
        return TensorType((2,), U32)

    def reference(self) -> Any:
        """The seed's two halves."""
        return np.array([self.seed >> 32 & 0xFFFFFFFF, self.seed & 0xFFFFFFFF], np.uint32)


def key(seed: int) -> Array:
    """The key of an int.  Shape: (2,), u32.  Source: mlx.core.random.key."""
    if not isinstance(seed, int) or not 0 <= seed < 2**64:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DTypeError(f"random.key: the seed is {seed!r}", fix="pass an int from 0 to 2**64 - 1")
    return apply(Key(seed))


@dataclass(frozen=True)
class Split(Draw):
    """`num` independent keys."""

    name = "random_split"
    num: int = 2

    def drawn(self, *parameters: TensorType) -> TensorType:
        """One row for each key."""
        return TensorType((self.num, 2), U32)

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.split`."""
        return f"mx.random.split({key}, {self.num})"


@frontend_of("random_split")
def split(key: ArrayLike, num: int = 2) -> Array:
    """`num` independent keys from one.  Shape: (num, 2), u32.  Source: mlx.core.random.split."""
    return apply(Split(num), _need(key, "split"))


@dataclass(frozen=True)
class Uniform(Draw):
    """Uniform numbers from low (included) to high (excluded)."""

    name = "random_uniform"
    shape: tuple[int, ...] = ()
    dtype: DType = F32

    def drawn(self, *parameters: TensorType) -> TensorType:
        """`shape`, to which low and high broadcast."""
        _check_drawable(self.name, self.dtype)
        _fits(self.name, self.shape, *parameters)
        return TensorType(self.shape, self.dtype)

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.uniform`."""
        low, high = parameters
        return f"mx.random.uniform({low}, {high}, {self.shape}, {literal(self.dtype)}, key={key})"


@frontend_of("random_uniform")
def uniform(
    low: ArrayLike = 0,
    high: ArrayLike = 1,
    shape: Sequence[int] = (),
    dtype: mx.Dtype = mx.float32,
    key: ArrayLike | None = None,
) -> Array:
    """Uniform numbers in [low, high).  Shape: `shape`.  Source: mlx.core.random.uniform."""
    kind = dtype_of(dtype)
    k = _need(key, "uniform")
    return apply(Uniform(tuple(shape), kind), k, operand(low, kind), operand(high, kind))


@dataclass(frozen=True)
class Normal(Draw):
    """Normal numbers; operands behind the key: the mean and the deviation, where given."""

    name = "random_normal"
    shape: tuple[int, ...] = ()
    dtype: DType = F32
    loc: bool = False
    scale: bool = False

    def drawn(self, *parameters: TensorType) -> TensorType:
        """`shape`, to which mean and deviation broadcast."""
        _check_drawable(self.name, self.dtype)
        if len(parameters) != self.loc + self.scale:
            raise ShapeError(f"{self.name}: {len(parameters)} parameters")
        _fits(self.name, self.shape, *parameters)
        return TensorType(self.shape, self.dtype)

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.normal`."""
        loc, scale = parameters[0] if self.loc else None, parameters[-1] if self.scale else None
        return f"mx.random.normal({self.shape}, {literal(self.dtype)}, {loc}, {scale}, key={key})"


@frontend_of("random_normal")
def normal(
    shape: Sequence[int] = (),
    dtype: mx.Dtype = mx.float32,
    loc: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    key: ArrayLike | None = None,
) -> Array:
    """Normal numbers with mean `loc` (None: 0) and deviation `scale` (None: 1).

    Shape: `shape`.  Source: mlx.core.random.normal.
    """
    kind = dtype_of(dtype)
    op = Normal(tuple(shape), kind, loc is not None, scale is not None)
    given = [astype(operand(p, kind), kind) for p in (loc, scale) if p is not None]
    return apply(op, _need(key, "normal"), *given)


@dataclass(frozen=True)
class Bernoulli(Draw):
    """True with probability p."""

    name = "random_bernoulli"
    shape: tuple[int, ...] = ()

    def drawn(self, *parameters: TensorType) -> TensorType:
        """`shape`, to which p broadcasts."""
        check_float(self.name, parameters[0])
        _fits(self.name, self.shape, *parameters)
        return TensorType(self.shape, BOOL)

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.bernoulli`."""
        return f"mx.random.bernoulli({parameters[0]}, {self.shape}, key={key})"


@frontend_of("random_bernoulli")
def bernoulli(p: ArrayLike = 0.5, shape: Sequence[int] | None = None, key: ArrayLike | None = None) -> Array:
    """True with probability `p`.  Shape: `shape`, or p's.  Source: mlx.core.random.bernoulli."""
    k, p = _need(key, "bernoulli"), operand(p, F32)
    return apply(Bernoulli(shape_of(p) if shape is None else tuple(shape)), k, p)


@dataclass(frozen=True)
class Randint(Draw):
    """Integers from low (included) to high (excluded)."""

    name = "random_randint"
    shape: tuple[int, ...] = ()
    dtype: DType = I32

    def drawn(self, *parameters: TensorType) -> TensorType:
        """`shape`, to which low and high broadcast."""
        if not self.dtype.is_int and self.dtype is not BOOL:
            raise DTypeError(f"{self.name}: cannot draw {self.dtype}", fix="draw an integer dtype")
        _fits(self.name, self.shape, *parameters)
        return TensorType(self.shape, self.dtype)

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.randint`."""
        low, high = parameters
        return f"mx.random.randint({low}, {high}, {self.shape}, {literal(self.dtype)}, key={key})"


@frontend_of("random_randint")
def randint(
    low: ArrayLike,
    high: ArrayLike,
    shape: Sequence[int] = (),
    dtype: mx.Dtype = mx.int32,
    key: ArrayLike | None = None,
) -> Array:
    """Integers in [low, high).  Shape: `shape`.  Source: mlx.core.random.randint.

    MLX draws them from float32: not every integer of a range wider than 2**24 can come.
    """
    k = _need(key, "randint")
    return apply(Randint(tuple(shape), dtype_of(dtype)), k, operand(low), operand(high))


@dataclass(frozen=True)
class Categorical(Draw):
    """Positions along `axis`, drawn with the probabilities softmax(logits)."""

    name = "random_categorical"
    axis: int = -1
    shape: tuple[int, ...] | None = None
    num_samples: int | None = None

    def drawn(self, *parameters: TensorType) -> TensorType:
        """The logits' shape without the axis; samples last."""
        (logits,) = parameters
        axis = normalize_axis(self.axis, logits.ndim)
        rest = tuple(s for i, s in enumerate(logits.shape) if i != axis)
        if logits.size == 0:
            raise ShapeError(f"{self.name}: there is nothing to draw from, {logits.shape}")
        if self.shape is not None:
            _fits(self.name, self.shape, TensorType(rest, logits.dtype))
            return TensorType(self.shape, U32)
        return TensorType(rest if self.num_samples is None else (*rest, self.num_samples), U32)

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.categorical`."""
        how = f"{self.axis}, shape={self.shape}, num_samples={self.num_samples}"
        return f"mx.random.categorical({parameters[0]}, {how}, key={key})"


@frontend_of("random_categorical")
def categorical(
    logits: ArrayLike,
    axis: int = -1,
    shape: Sequence[int] | None = None,
    num_samples: int | None = None,
    key: ArrayLike | None = None,
) -> Array:
    """Positions (u32) along `axis`, drawn with the probabilities softmax(logits).

    Shape: the logits' without the axis; with `num_samples` that many, last; or `shape`, to which it
    broadcasts.  Source: mlx.core.random.categorical.
    """
    if shape is not None and num_samples is not None:
        raise ShapeError("random.categorical: give shape or num_samples, not both")
    op = Categorical(axis, None if shape is None else tuple(shape), num_samples)
    return apply(op, _need(key, "categorical"), operand(logits))


@dataclass(frozen=True)
class Gumbel(Uniform):
    """Numbers with the distribution function exp(-exp(-x))."""

    name = "random_gumbel"

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.gumbel`."""
        return f"mx.random.gumbel({self.shape}, {literal(self.dtype)}, key={key})"


@frontend_of("random_gumbel")
def gumbel(shape: Sequence[int] = (), dtype: mx.Dtype = mx.float32, key: ArrayLike | None = None) -> Array:
    """Standard Gumbel numbers.  Shape: `shape`.  Source: mlx.core.random.gumbel."""
    return apply(Gumbel(tuple(shape), dtype_of(dtype)), _need(key, "gumbel"))


@dataclass(frozen=True)
class TruncatedNormal(Uniform):
    """Normal numbers between two bounds."""

    name = "random_truncated_normal"

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.truncated_normal`."""
        low, high = parameters
        return f"mx.random.truncated_normal({low}, {high}, {self.shape}, {literal(self.dtype)}, key={key})"


@frontend_of("random_truncated_normal")
def truncated_normal(
    lower: ArrayLike,
    upper: ArrayLike,
    shape: Sequence[int] | None = None,
    dtype: mx.Dtype = mx.float32,
    key: ArrayLike | None = None,
) -> Array:
    """Normal numbers in (lower, upper).  Shape: `shape`, or the bounds'.

    Source: mlx.core.random.truncated_normal.
    """
    kind = dtype_of(dtype)
    low, high = operand(lower, kind), operand(upper, kind)
    full = broadcast_shapes(shape_of(low), shape_of(high)) if shape is None else tuple(shape)
    return apply(TruncatedNormal(full, kind), _need(key, "truncated_normal"), low, high)


@dataclass(frozen=True)
class Permutation(Draw):
    """The numbers 0 … n - 1 in random order."""

    name = "random_permutation"
    n: int = 0

    def drawn(self, *parameters: TensorType) -> TensorType:
        """One u32 for each."""
        return TensorType((self.n,), U32)

    def call(self, key: str, *parameters: str) -> str:
        """`mx.random.permutation`."""
        return f"mx.random.permutation({self.n}, key={key})"


@frontend_of("random_permutation")
def permutation(x: int | ArrayLike, axis: int = 0, key: ArrayLike | None = None) -> Array:
    """0 … x - 1 in random order, or the slices of an array along `axis`.

    Source: mlx.core.random.permutation.
    """
    k = _need(key, "permutation")
    if isinstance(x, int):
        return apply(Permutation(x), k)
    x = operand(x)
    i = normalize_axis(axis, len(shape_of(x)))
    return take(x, apply(Permutation(shape_of(x)[i]), k), axis=i)

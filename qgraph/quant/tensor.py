"""A packed weight as one value: words, scales and biases that were checked against each other."""

from __future__ import annotations

from copy import copy
from math import prod
from typing import Never, TypeGuard

import mlx.core as mx

from qgraph._errors import DTypeError, ShapeError
from qgraph.quant.scheme import Mode, Quantization

_SCHEME = "pass the bits, group_size and mode that the weight was packed with"
_FLOATS: dict[mx.Dtype, str] = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}


class QuantizedTensor:
    """A weight in packed form, with the shape and dtype of the dense weight it stands for.

    MLX does not check the rows of scales and biases and reads past their end, so the constructor
    checks the whole triplet. The object cannot be changed; it compares and hashes by identity.
    (``a += b`` gives an mx.array another shape, wherever it is held: the arrays in here are handles
    of their own to the same data, and those that are read from it are others: no memory is copied.)

    Shape: `packed` is uint32[..., words], `scales` and `biases` are [..., groups], with equal
    leading axes and words * 32 == groups * group_size * bits. The logical shape is the leading
    axes and the number of weights, which `axis` may move: the transpose of an (N, K) weight is the
    same storage with axis -2 and shape (K, N).
    Dtype: affine scales and biases are both float32, float16 or bfloat16; the scales of the other
    modes are uint8; `global_scale` (nvfp4 only) is a float32 scalar.
    Errors: ShapeError, DTypeError. Source: mlx.core.quantize.

    >>> w = pack(mx.ones((8, 128), mx.bfloat16), Quantization(bits=4, group_size=64))
    >>> w
    QuantizedTensor(bf16[8,128], affine4g64, packed uint32[8,16], 576 B)
    >>> w.shape, w.packed.shape, w.scales.shape
    ((8, 128), (8, 16), (8, 2))
    """

    __slots__ = (
        "__weakref__",
        "_components",
        "_type",
        "axis",
        "dtype",
        "quantization",
        "shape",
    )

    quantization: Quantization
    dtype: mx.Dtype
    axis: int
    shape: tuple[int, ...]
    _components: tuple[mx.array, ...]  # in the order of `components`; not to be handed out
    _type: object  # a cache for the layers above; None until they fill it

    def __init__(
        self,
        packed: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        quantization: Quantization,
        global_scale: mx.array | None = None,
        dtype: mx.Dtype | None = None,
        axis: int = -1,
    ) -> None:
        """Check the components against each other and keep them, unchanged."""
        _check_arrays(packed, scales, biases, global_scale)
        _check_dtypes(packed, scales, biases, quantization)
        _check_global_scale(global_scale, quantization)
        _check_shapes(packed, scales, biases, quantization)
        if dtype is None:
            dtype = scales.dtype if quantization.has_biases else mx.bfloat16
        if dtype not in _FLOATS:
            raise DTypeError(
                f"QuantizedTensor: the logical dtype is {_name(dtype)}",
                fix="use float32, float16 or bfloat16",
            )
        if not -packed.ndim <= axis <= -1:
            raise ShapeError(
                f"QuantizedTensor: axis {axis} of a value of rank {packed.ndim}",
                fix=f"count the axis from the end: -{packed.ndim} to -1",
            )
        for name, value in (("quantization", quantization), ("dtype", dtype), ("axis", axis)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "shape", _logical_shape(scales, quantization, axis))
        object.__setattr__(self, "_type", None)
        stored = (packed, scales, biases, global_scale)
        handles = tuple(copy(array) for array in stored if array is not None)
        object.__setattr__(self, "_components", handles)

    @property
    def packed(self) -> mx.array:
        """The words, uint32."""
        return copy(self._components[0])

    @property
    def scales(self) -> mx.array:
        """One for each group."""
        return copy(self._components[1])

    @property
    def biases(self) -> mx.array | None:
        """One for each group of an affine weight."""
        return copy(self._components[2]) if self.quantization.has_biases else None

    @property
    def global_scale(self) -> mx.array | None:
        """One number that multiplies all scales (nvfp4), if there is one."""
        given = len(self._components) > 2 + self.quantization.has_biases
        return copy(self._components[-1]) if given else None

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage: words, scales, biases and global scale."""
        return sum(array.nbytes for array in self._components)

    def components(self) -> tuple[mx.array, ...]:
        """The stored arrays: packed, scales, biases if affine, global_scale if there is one."""
        return tuple(map(copy, self._components))

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: programs are keyed by the type of a weight."""
        raise AttributeError(f"QuantizedTensor is immutable: make a new one to change {name}")

    def __delattr__(self, name: str) -> None:
        """Refuse, as `__setattr__`."""
        raise AttributeError(f"QuantizedTensor is immutable: cannot delete {name}")

    def __copy__(self) -> QuantizedTensor:
        """The object itself: it never changes."""
        return self

    def __deepcopy__(self, memo: object) -> QuantizedTensor:
        """The object itself: it never changes, and a copy would double the memory."""
        return self

    def __repr__(self) -> str:
        """Type and storage, never the packed numbers: they mean nothing by themselves."""
        logical = f"{_FLOATS[self.dtype]}[{','.join(map(str, self.shape))}]"
        words = f"packed uint32[{','.join(map(str, self.packed.shape))}]"
        parts = [logical, str(self.quantization)]
        parts += [f"axis={self.axis}"] if self.axis != -1 else []
        parts += [words, _human(self.nbytes)]
        return f"QuantizedTensor({', '.join(parts)})"

    def _refuse(self, what: str) -> Never:
        raise DTypeError(
            f"{what} of a QuantizedTensor: its words are packed and have no value of their own",
            fix="call qg.dequantize(w) first",
        )

    def __array__(self, *args: object, **kwargs: object) -> Never:
        """Refuse: NumPy would see packed words."""
        self._refuse("array")

    def __len__(self) -> int:
        """Refuse; read ``shape[0]`` instead."""
        self._refuse("len")

    def __iter__(self) -> Never:
        """Refuse, or indexing would be used to iterate."""
        self._refuse("iteration")

    def __bool__(self) -> bool:
        """Refuse, as an array of more than one element does."""
        self._refuse("truth value")


def from_quantized(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    bits: int,
    group_size: int,
    mode: Mode = "affine",
    global_scale: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> QuantizedTensor:
    """Wrap what `mlx.core.quantize` returns, or what a checkpoint stores, without copying.

    Shape: weight uint32[..., K * bits / 32], scales and biases [..., K / group_size] -> [..., K].
    Dtype: `dtype` is the logical one; by default that of the scales (affine) or bfloat16.
    Errors: ShapeError or DTypeError if the parts do not belong together.
    Source: mlx.core.quantize, mlx.nn.QuantizedLinear.

    >>> parts = mx.quantize(mx.ones((8, 128)), group_size=64, bits=4)
    >>> from_quantized(*parts, bits=4, group_size=64).shape
    (8, 128)
    """
    scheme = Quantization(bits=bits, group_size=group_size, mode=mode)
    return QuantizedTensor(weight, scales, biases, scheme, global_scale, dtype)


def is_quantized(obj: object) -> TypeGuard[QuantizedTensor]:
    """True for a QuantizedTensor, False for any other object; never raises.

    >>> is_quantized(mx.ones((2, 2))), is_quantized(None)
    (False, False)
    """
    return isinstance(obj, QuantizedTensor)


def pack(w: mx.array, quantization: Quantization, global_scale: mx.array | None = None) -> QuantizedTensor:
    """Quantize a dense weight along its last axis.

    Shape: [..., K] with K a multiple of the group size; any leading axis may be empty.
    Dtype: float32, float16 or bfloat16, kept as the logical dtype.
    Errors: ShapeError for rank < 2 or a partial group, DTypeError for other dtypes.
    Source: mlx.core.quantize.

    >>> pack(mx.ones((8, 64)), Quantization.of_mode("mxfp8"))
    QuantizedTensor(f32[8,64], mxfp8, packed uint32[8,16], 528 B)
    """
    _check_packable(w, quantization)
    _check_global_scale(global_scale, quantization)
    q = quantization
    if w.size == 0:  # MLX divides by zero on empty input, which kills the process
        return QuantizedTensor(*_empty(w, q), q, global_scale, w.dtype)
    if _odd_groups(w.size, q):
        rows, both = w.shape[0], pack(mx.concatenate([w, w]), q, global_scale)
        return QuantizedTensor(both.packed[:rows], both.scales[:rows], None, q, global_scale, w.dtype)
    parts = mx.quantize(w, q.group_size, q.bits, q.mode, global_scale=global_scale)
    biases = parts[2] if q.has_biases else None
    return QuantizedTensor(parts[0], parts[1], biases, q, global_scale, w.dtype)


def unpack(t: QuantizedTensor, dtype: mx.Dtype | None = None) -> mx.array:
    """The dense weight, in its logical orientation.

    Shape: `t.shape`.  Dtype: `dtype`, by default `t.dtype`.
    Errors: DTypeError if `t` is not a QuantizedTensor or `dtype` is not a 16- or 32-bit float.
    Source: mlx.core.dequantize. With nvfp4, a global scale g multiplies by g / 2688 (= 448 * 6).

    >>> w = pack(mx.ones((8, 64)), Quantization(bits=8))
    >>> bool(mx.all(unpack(w) == 1))
    True
    """
    if not is_quantized(t):
        raise DTypeError(
            f"unpack: expected a QuantizedTensor, got a {type(t).__name__}",
            fix="wrap the triplet with qg.from_quantized",
        )
    dtype = dtype or t.dtype
    if dtype not in _FLOATS:
        raise DTypeError(
            f"unpack: cannot dequantize to {_name(dtype)}",
            fix="use float32, float16 or bfloat16, then cast",
        )
    if t.size == 0:  # as in pack
        return mx.zeros(t.shape, dtype)
    q, packed, scales = t.quantization, t.packed, t.scales
    if _odd_groups(t.size, q):
        packed, scales = mx.concatenate([packed, packed]), mx.concatenate([scales, scales])
    dense = mx.dequantize(packed, scales, t.biases, q.group_size, q.bits, q.mode, t.global_scale, dtype)
    dense = dense[: t.packed.shape[0]] if packed is not t.packed else dense
    return dense if t.axis == -1 else mx.moveaxis(dense, -1, t.axis)


def _check_arrays(*arrays: object) -> None:
    """Packed and scales must be MLX arrays; biases and global scale may be None."""
    for name, array in zip(("packed", "scales", "biases", "global_scale"), arrays, strict=True):
        if isinstance(array, mx.array) or (array is None and name in ("biases", "global_scale")):
            continue
        raise DTypeError(
            f"QuantizedTensor: {name} is a {type(array).__name__}, not an mlx.core.array",
            fix="convert it with mx.array(...)",
        )


def _check_dtypes(packed: mx.array, scales: mx.array, biases: mx.array | None, q: Quantization) -> None:
    if packed.dtype != mx.uint32:
        raise DTypeError(
            f"QuantizedTensor: packed is {_name(packed.dtype)}, expected uint32",
            fix="pass the first result of mx.quantize",
        )
    if not q.has_biases:
        if biases is not None:
            raise DTypeError(f"QuantizedTensor: {q} takes no biases", fix="pass biases=None")
        if scales.dtype != mx.uint8:
            raise DTypeError(
                f"QuantizedTensor: {q} scales are {_name(scales.dtype)}, expected uint8",
                fix="check the mode: only affine has float scales",
            )
        return
    if scales.dtype not in _FLOATS:
        raise DTypeError(
            f"QuantizedTensor: {q} scales are {_name(scales.dtype)}",
            fix="use float32, float16 or bfloat16, or the mode that the scales were made with",
        )
    if biases is None:
        raise DTypeError(f"QuantizedTensor: {q} needs biases", fix="pass the third result of mx.quantize")
    if biases.dtype != scales.dtype:
        raise DTypeError(
            f"QuantizedTensor: scales are {_name(scales.dtype)}, biases {_name(biases.dtype)}",
            fix="cast one: MLX would promote the product to float32 silently",
        )


def _check_global_scale(scale: mx.array | None, q: Quantization) -> None:
    if scale is None:
        return
    if q.mode != "nvfp4":
        raise DTypeError(f"{q} takes no global_scale", fix="pass global_scale=None: only nvfp4 has one")
    if scale.shape != () or scale.dtype != mx.float32:
        raise DTypeError(
            f"global_scale is {_name(scale.dtype)}{list(scale.shape)}, expected a float32 scalar",
            fix="pass mx.array(value, mx.float32)",
        )


def _check_shapes(packed: mx.array, scales: mx.array, biases: mx.array | None, q: Quantization) -> None:
    if packed.ndim < 2:
        raise ShapeError(
            f"QuantizedTensor: packed has shape {packed.shape}, expected rank 2 or more",
            fix="keep the row axis: (1, words) for a single row",
        )
    k = packed.shape[-1] * 32 // q.bits
    if packed.shape[-1] * 32 != k * q.bits or k % q.group_size:
        raise ShapeError(
            f"QuantizedTensor: {q} packed {packed.shape} with scales {scales.shape}, expected "
            f"a multiple of {q.words(q.group_size)} words",
            fix=_SCHEME,
        )
    expected = q.storage_shapes((*packed.shape[:-1], k))["scales"]
    if scales.shape != expected:
        raise ShapeError(
            f"QuantizedTensor: {q} packed {packed.shape} with scales {scales.shape}, expected {expected}",
            fix=_SCHEME,
        )
    if biases is not None and biases.shape != scales.shape:
        raise ShapeError(
            f"QuantizedTensor: scales have shape {scales.shape}, biases {biases.shape}",
            fix="pass the scales and biases of the same weight",
        )


def _check_packable(w: object, q: Quantization) -> None:
    if not isinstance(w, mx.array):
        raise DTypeError(
            f"pack: expected an mlx.core.array, got a {type(w).__name__}",
            fix="convert it with mx.array(...)",
        )
    if w.dtype not in _FLOATS:
        raise DTypeError(f"pack: cannot quantize {_name(w.dtype)}", fix="cast with w.astype(mx.float32)")
    if w.ndim < 2:
        raise ShapeError(
            f"pack: the weight has shape {w.shape}, expected rank 2 or more",
            fix="give a vector a row axis: w[None]",
        )
    k, group = w.shape[-1], q.group_size
    if k % group:
        raise ShapeError(
            f"pack: the last axis has {k} elements, not a multiple of group_size {group}",
            fix=f"pad the last axis to {-(-k // group) * group}, or pick a group_size that divides {k}",
        )


def _odd_groups(size: int, q: Quantization) -> bool:
    """True where MLX 0.32 fails on CPU: it takes 32 weights at a time, nvfp4 has groups of 16."""
    return size % 32 != 0 and q.group_size < 32


def _empty(w: mx.array, q: Quantization) -> tuple[mx.array, mx.array, mx.array | None]:
    shapes = q.storage_shapes(w.shape)
    packed = mx.zeros(shapes["packed"], mx.uint32)
    scales = mx.zeros(shapes["scales"], w.dtype if q.has_biases else mx.uint8)
    return packed, scales, mx.zeros_like(scales) if q.has_biases else None


def _logical_shape(scales: mx.array, q: Quantization, axis: int) -> tuple[int, ...]:
    shape = list(scales.shape[:-1])
    k = scales.shape[-1] * q.group_size
    shape.insert(len(shape) + 1 + axis, k)
    return tuple(shape)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _human(nbytes: int) -> str:
    size, unit = float(nbytes), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"

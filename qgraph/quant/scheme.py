"""How the numbers of a weight are packed: mode, bits and group size. Imports no array library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from qgraph._errors import DTypeError

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

MODES: tuple[Mode, ...] = get_args(Mode)
# The first value is MLX's default of the mode.
_BITS: dict[Mode, tuple[int, ...]] = {
    "affine": (4, 1, 2, 3, 5, 6, 8),
    "mxfp4": (4,),
    "mxfp8": (8,),
    "nvfp4": (4,),
}
_GROUP_SIZES: dict[Mode, tuple[int, ...]] = {
    "affine": (64, 32, 128),
    "mxfp4": (32,),
    "mxfp8": (32,),
    "nvfp4": (16,),
}
_TAG = re.compile(r"affine([1-9])g([1-9][0-9]{1,2})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A quantization scheme, as MLX defines it.

    Source: mlx.core.quantize. Errors: DTypeError for a combination MLX has no kernels for.

    Attributes:
        bits: Bits of one packed weight: 1, 2, 3, 4, 5, 6 or 8 (affine); 4 (mxfp4, nvfp4);
            8 (mxfp8).
        group_size: Weights that share a scale: 32, 64 or 128 (affine); 32 (mxfp4, mxfp8);
            16 (nvfp4).
        mode: ``affine`` has a float scale and bias for each group, the others a one-byte scale.

    >>> q = Quantization(bits=4, group_size=64)
    >>> print(q, q.bits_per_weight, q.words(4096))
    affine4g64 4.5 512
    """

    bits: int = 4
    group_size: int = 64
    mode: Mode = "affine"

    def __post_init__(self) -> None:
        """Refuse what MLX would: some of it kills the process instead of raising."""
        if type(self.mode) is not str or self.mode not in MODES:
            raise DTypeError(
                f"mode is {_clip(self.mode)}, supported: {', '.join(MODES)}",
                fix="pick one of the supported values",
            )
        self._check("bits", self.bits, _BITS[self.mode])
        self._check("group_size", self.group_size, _GROUP_SIZES[self.mode])

    def _check(self, field: str, value: object, allowed: tuple[int, ...]) -> None:
        # type() and not isinstance: True is an int, and bits=True is a mistake.
        if type(value) is int and value in allowed:
            return
        values = ", ".join(map(str, sorted(allowed)))
        fix = "pick one of the supported values"
        if len(allowed) == 1:
            fix = f"write Quantization.of_mode({self.mode!r})"
        raise DTypeError(f"{self.mode}: {field} is {_clip(value)}, supported: {values}", fix=fix)

    @property
    def has_biases(self) -> bool:
        """True if a group has a bias beside its scale (affine)."""
        return self.mode == "affine"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage for one weight, scales and biases included.

        4 + 2 * 16 / 64 = 4.5 for affine 4 bit in groups of 64 with 16-bit scales and biases; the
        other modes have one 8-bit scale for each group.

        >>> Quantization.of_mode("mxfp4").bits_per_weight
        4.25
        """
        return self.bits + (32 if self.has_biases else 8) / self.group_size

    def words(self, k: int) -> int:
        """The number of uint32 words that hold a row of `k` weights (whole groups).

        Errors: DTypeError if `k` is not a multiple of the group size.

        >>> Quantization(bits=3).words(128)
        12
        """
        if k < 0 or k % self.group_size:
            raise DTypeError(
                f"{self}: a row of {k} weights is not a whole number of groups",
                fix=f"make the row a multiple of {self.group_size}",
            )
        return k * self.bits // 32

    def storage_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays that store weights of `shape`, which has the packed axis last.

        The one rule: types, tensors and the verifier ask here. Errors: DTypeError as `words`.

        >>> Quantization(bits=4, group_size=64).storage_shapes((8, 128))
        {'packed': (8, 16), 'scales': (8, 2), 'biases': (8, 2)}
        """
        *lead, k = shape
        groups = (*lead, k // self.group_size)
        biases = {"biases": groups} if self.has_biases else {}
        return {"packed": (*lead, self.words(k)), "scales": groups, **biases}

    def lookalikes(self) -> tuple[Quantization, ...]:
        """Other schemes whose arrays have the same shapes, each for another number of weights.

        >>> print(*Quantization(bits=4, group_size=64).lookalikes())
        affine2g128 affine8g32
        """
        if not self.has_biases:
            return ()
        same = self.bits * self.group_size
        pairs = ((b, g) for b in sorted(_BITS["affine"]) for g in _GROUP_SIZES["affine"] if b * g == same)
        return tuple(Quantization(bits=b, group_size=g) for b, g in pairs if b != self.bits)

    @classmethod
    def of_mode(cls, mode: Mode) -> Quantization:
        """The scheme MLX uses when only the mode is given.

        >>> print(Quantization.of_mode("affine"), Quantization.of_mode("nvfp4").group_size)
        affine4g64 16
        """
        return cls.from_config({"mode": mode})

    @classmethod
    def from_config(cls, entry: Mapping[str, object]) -> Quantization:
        """Read an entry of the ``quantization`` block of a config.json.

        The mode defaults to affine, and bits and group_size to MLX's defaults for the mode; other
        keys are ignored. Errors: DTypeError for a value of another type or outside the supported
        set (null, true, 4.0 and "4" included).

        >>> print(Quantization.from_config({"group_size": 32, "bits": 8}))
        affine8g32
        """
        mode = entry.get("mode", "affine")
        known = mode if type(mode) is str and mode in MODES else "affine"
        return cls(
            bits=cast("int", entry.get("bits", _BITS[known][0])),
            group_size=cast("int", entry.get("group_size", _GROUP_SIZES[known][0])),
            mode=cast("Mode", mode),
        )

    def to_config(self) -> dict[str, int | str]:
        """The entry of a config.json that `from_config` reads back.

        >>> Quantization(bits=8).to_config()
        {'group_size': 64, 'bits': 8, 'mode': 'affine'}
        """
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        """The tag of the text form, which `parse` reads back."""
        return f"affine{self.bits}g{self.group_size}" if self.mode == "affine" else self.mode

    @classmethod
    def parse(cls, tag: str) -> Quantization:
        """Read the tag that ``str(quantization)`` prints.

        Errors: DTypeError if it is no such tag.

        >>> Quantization.parse("affine4g64")
        Quantization(bits=4, group_size=64, mode='affine')
        """
        if tag in MODES and tag != "affine":
            return cls.of_mode(tag)
        match = _TAG.fullmatch(tag)
        if match is None:
            raise DTypeError(
                f"{_clip(tag)} is not a quantization",
                fix="write affine<bits>g<group_size>, mxfp4, mxfp8 or nvfp4",
            )
        return cls(bits=int(match[1]), group_size=int(match[2]))


def _clip(value: object) -> str:
    """A short, printable form of a value that may come from a hostile file."""
    if isinstance(value, int) and value.bit_length() > 128:  # str() of a huge int is slow or refused
        return "a huge number"
    text = ascii(value) if value is None or isinstance(value, bool | int | float | str) else ""
    text = text or f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."

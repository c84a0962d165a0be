"""Finds the packed layers of a checkpoint and checks them on the headers, before any data is read.

MLX reads past the end of scales with too few rows, and shapes alone do not tell the scheme: 4 bit
in groups of 64 and 8 bit in groups of 32 look alike. So the config decides, and must fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from qgraph._errors import CheckpointError
from qgraph.quant.config import QuantizationConfig
from qgraph.quant.safetensors_file import Entry
from qgraph.quant.scheme import Quantization
from qgraph.quant.strict_file import refuse

_FLOATS = ("F16", "BF16", "F32")
_INCOMPLETE = "download the checkpoint again, or convert the model again"
_DECLARE = "correct quantization in config.json: bits, group_size, mode, or this layer's entry"
# The scheme of a module that the config does not name, from its weight and scales; None where none fits.
Infer = Callable[[str, Entry, Entry], Quantization | None]
# For the hint which schemes would fit the shapes.
_SCHEMES = tuple(Quantization(bits=b, group_size=g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128))


@dataclass(frozen=True, slots=True)
class Triplet:
    """A packed layer: the entries that belong together and the scheme declared for them."""

    module: str
    quantization: Quantization
    weight: Entry
    scales: Entry
    biases: Entry | None
    global_scale: Entry | None


def find_triplets(
    entries: Mapping[str, Entry], declared: QuantizationConfig, infer: Infer | None = None
) -> dict[str, Triplet]:
    """The packed layers by module path, checked against the config and against each other.

    Whoever knows the size of the dense weights can `infer` the schemes that the config does not list by
    path, as mlx-lm does; its scheme for all others is taken where that gives none.

    Errors: CheckpointError, naming the tensor at fault and what was expected of it.
    """
    triplets: dict[str, Triplet] = {}
    for name, entry in entries.items():
        module, leaf = _split(name)
        if leaf == "scales":
            triplets[module] = _triplet(module, entry, entries, declared, infer)
        elif leaf in ("biases", "global_scale") and _sibling(module, "scales") not in entries:
            raise _no(entry, "has no scales beside it", _INCOMPLETE)
        elif leaf == "weight" and entry.dtype == "U32" and _sibling(module, "scales") not in entries:
            raise _no(entry, "is packed (U32) but has no scales beside it", _INCOMPLETE)
    _check_declared(entries, declared, triplets)
    return triplets


def _triplet(
    module: str,
    scales: Entry,
    entries: Mapping[str, Entry],
    declared: QuantizationConfig,
    infer: Infer | None,
) -> Triplet:
    weight = entries.get(_sibling(module, "weight"))
    if weight is None:
        raise _no(scales, "has no packed weight beside it", _INCOMPLETE)
    inferred = infer(module, weight, scales) if infer and module not in declared.overrides else None
    if declared.default is None and inferred is None:
        raise _no(weight, "is packed, but no quantization block declares bits and group_size", _DECLARE)
    scheme = inferred or declared.at(module)
    if scheme is None:
        raise _no(weight, "is packed, but declared false (dense) in config.json", _DECLARE)
    biases = entries.get(_sibling(module, "biases"))
    triplet = Triplet(module, scheme, weight, scales, biases, entries.get(_sibling(module, "global_scale")))
    for problem in (*_dtype_problems(triplet), *_shape_problems(triplet)):
        raise problem
    return triplet


def _dtype_problems(t: Triplet) -> Iterator[CheckpointError]:
    q = t.quantization
    if t.weight.dtype != "U32":
        yield _no(t.weight, f"is {t.weight.dtype}, a packed weight is U32", _INCOMPLETE)
    allowed = _FLOATS if q.has_biases else ("U8",)
    if t.scales.dtype not in allowed:
        cause = f"is {t.scales.dtype}, declared {q} needs {' or '.join(allowed)}"
        yield _no(t.scales, cause, _DECLARE)
    if q.has_biases and t.biases is None:
        yield _no(t.scales, f"has no biases beside it, declared {q} needs them", _INCOMPLETE)
    if t.biases is not None and not q.has_biases:
        yield _no(t.biases, f"is not expected, declared {q} has no biases", _DECLARE)
    if t.biases is not None and t.biases.dtype != t.scales.dtype:
        cause = f"is {t.biases.dtype}, but the scales are {t.scales.dtype}"
        yield _no(t.biases, cause, "cast one of them: MLX would compute in float32 silently")
    scale = t.global_scale
    if scale is not None and q.mode != "nvfp4":
        yield _no(scale, f"is not expected, declared {q} has no global scale", _DECLARE)
    if scale is not None and (scale.dtype, scale.shape) != ("F32", ()):
        cause = f"is {scale.dtype}{list(scale.shape)}, expected an F32 scalar"
        yield _no(scale, cause, "one global scale for each expert is not supported: use affine or mxfp4")


def _shape_problems(t: Triplet) -> Iterator[CheckpointError]:
    q, weight, scales = t.quantization, t.weight.shape, t.scales.shape
    if len(weight) < 2:
        yield _no(t.weight, f"has shape {list(weight)}, expected rank 2 or more", _INCOMPLETE)
        return
    if scales[:-1] != weight[:-1] or len(scales) != len(weight):
        expected = [*weight[:-1], "groups"]
        cause = f"has shape {list(scales)}, the weight {list(weight)} needs {expected}"
        yield _no(t.scales, cause.replace("'", ""), _INCOMPLETE)
        return
    if weight[-1] * 32 != scales[-1] * q.group_size * q.bits:
        fits = [str(s) for s in _SCHEMES if weight[-1] * 32 == scales[-1] * s.group_size * s.bits]
        hint = f"; shapes fit {', '.join(fits[:3])}" if fits and q.has_biases else ""
        cause = f"{list(weight)} with scales {list(scales)} is not the declared {q}{hint}"
        yield _no(t.weight, cause, _DECLARE)
    if t.biases is not None and t.biases.shape != scales:
        cause = f"has shape {list(t.biases.shape)}, the scales have {list(scales)}"
        yield _no(t.biases, cause, _INCOMPLETE)


def _check_declared(
    entries: Mapping[str, Entry], declared: QuantizationConfig, triplets: Mapping[str, Triplet]
) -> None:
    for module, scheme in declared.overrides.items():
        weight = entries.get(_sibling(module, "weight"))
        # A path without tensors is fine: a tied head, or a part that was dropped.
        if scheme is not None and module not in triplets and weight is not None:
            raise _no(weight, f"is dense, but config.json declares it {scheme}", _DECLARE)
    if declared.default is not None and not triplets:
        path = next((e.path for e in entries.values()), "checkpoint")
        cause = f"config.json declares {declared.default}, but no tensor has scales"
        raise refuse(path, cause, fix="remove the quantization block, or use the packed weights")


def _no(entry: Entry, cause: str, fix: str) -> CheckpointError:
    return refuse(entry.path, cause, tensor=entry.name, fix=fix)


def _split(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _sibling(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf

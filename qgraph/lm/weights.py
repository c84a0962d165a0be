"""The tensors of a checkpoint folder as the parameters of a dense model: packed ones as QuantizedTensors.

They pass through the model's own `sanitize` while they are lazy, by name, as in mlx-lm; so everything is
known and checked before any data is read, and nothing is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from qgraph._errors import CheckpointError, DTypeError, QGraphError
from qgraph.lm.architecture import Module, Slot, slots
from qgraph.lm.foreign import Foreign, foreign_of
from qgraph.quant.checkpoint import (
    Progress,
    check_finite,
    check_unchanged,
    closed_after,
    drop,
    open_arrays,
    reading,
    tensor_of,
)
from qgraph.quant.config import QuantizationConfig
from qgraph.quant.layout import Layout, read_layout
from qgraph.quant.memory import check_memory
from qgraph.quant.safetensors_file import DTYPE_NAMES, DTYPES, WITH_BYTES, Entry
from qgraph.quant.scheme import Quantization
from qgraph.quant.strict_file import clip, refuse, sealed
from qgraph.quant.tensor import QuantizedTensor
from qgraph.quant.triplet import Infer, find_triplets

Weights = dict[str, mx.array | QuantizedTensor]
_BATCH_BYTES = 64_000_000  # read between two progress calls
_PARTS = ("scales", "biases", "global_scale")


@sealed
def read_weights(
    folder: Path, config: Mapping[str, Any], model: Module, progress: Progress | None = None
) -> Weights:
    """The value of every parameter of `model`, by path; all are read when this returns.

    Errors: CheckpointError for files that are malformed, and for tensors that are not exactly those of the
    model; then nothing is loaded.
    """
    foreign = foreign_of(config, folder)
    if foreign is None:
        layout = read_layout(folder, dtypes=DTYPES)
    else:  # its schemes are inferred: its words say how they are packed
        layout = read_layout(folder, _nothing_declared, WITH_BYTES)
    check_memory(folder, sum(entry.nbytes for entry in layout.entries.values()))
    with closed_after(*layout.headers):
        arrays = _sanitized(folder, layout, model, foreign)
        try:
            return _read(folder, layout, arrays, slots(model), progress)
        except BaseException:
            drop(arrays)
            raise


def _nothing_declared(config: Mapping[str, object], path: Path) -> QuantizationConfig:
    return QuantizationConfig()


def _sanitized(folder: Path, layout: Layout, model: Module, foreign: Foreign | None) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for header in layout.headers:
        found |= open_arrays(header)
    try:
        if hasattr(model, "sanitize"):
            found = model.sanitize(found)
        if foreign is not None:
            found = foreign.convert(found, model)
    except QGraphError:
        raise
    except Exception as error:  # any code of mlx-lm's, on tensors of any name and shape
        raise _not_those(folder, f"{type(error).__name__}: {error}") from None
    return found


def _read(
    folder: Path,
    layout: Layout,
    arrays: dict[str, mx.array],
    places: Mapping[str, Slot],
    progress: Progress | None,
) -> Weights:
    entries = _entries(layout, arrays, places)
    triplets = find_triplets(entries, layout.declared, _inference(places))
    packed = {t.weight.name: t for t in triplets.values()}
    parts = {
        entry.name
        for triplet in triplets.values()
        for entry in (triplet.scales, triplet.biases, triplet.global_scale)
        if entry is not None
    }
    shapes = {
        name: _logical(array.shape, packed[name].quantization) if name in packed else array.shape
        for name, array in arrays.items()
        if name not in parts
    }
    _check_places(folder, shapes, places)
    order = {name: i for i, name in enumerate(layout.entries)}  # that of the files
    _evaluate(folder, {n: arrays[n] for n in sorted(arrays, key=lambda n: order.get(n, -1))}, progress)
    for header in layout.headers:
        check_unchanged(header)
    check_finite(triplets, arrays)
    return {name: tensor_of(packed[name], arrays) if name in packed else arrays[name] for name in shapes}


def _entries(layout: Layout, arrays: Mapping[str, mx.array], places: Mapping[str, Slot]) -> dict[str, Entry]:
    """What could be part of a packed layer, as if a file had it so; not what a module has as its own."""
    somewhere = next(iter(layout.headers)).path
    found: dict[str, Entry] = {}
    for name, array in arrays.items():
        leaf = name.rpartition(".")[2]
        if name in places and (leaf in _PARTS or places[name].value.dtype == mx.uint32):
            continue
        origin = layout.entries.get(name)
        path = somewhere if origin is None else origin.path
        dtype = DTYPE_NAMES.get(array.dtype, str(array.dtype))
        found[name] = Entry(path, name, dtype, array.shape, 0, array.nbytes)
    return found


def _inference(places: Mapping[str, Slot]) -> Infer:
    """As mlx-lm does: the dense weight tells how many numbers a row has."""

    def infer(module: str, weight: Entry, scales: Entry) -> Quantization | None:
        place = places.get(f"{module}.weight")
        if place is None or not weight.shape or not scales.shape or not scales.shape[-1]:
            return None
        k = place.value.shape[-1]
        bits, group = weight.shape[-1] * 32 // max(k, 1), k // scales.shape[-1]
        modes = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
        mode = modes.get((bits, group), "") if scales.dtype == "U8" else "affine"
        try:
            return Quantization.from_config({"bits": bits, "group_size": group, "mode": mode})
        except DTypeError:
            return None

    return infer


def _logical(packed: tuple[int, ...], scheme: Quantization) -> tuple[int, ...]:
    return (*packed[:-1], packed[-1] * 32 // scheme.bits)


def _check_places(folder: Path, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Slot]) -> None:
    for what, names in (
        ("the model has no", sorted(name for name in shapes if name not in places)),
        ("there is no", [name for name in places if name not in shapes]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise _not_those(folder, f"{what} {clip(names[0], 80)}{more}")
    for name, place in places.items():
        shape, wanted = shapes[name], place.value.shape
        if shape != wanted:
            raise _not_those(folder, f"{clip(name, 60)} is {clip(shape, 40)}, not {clip(wanted, 40)}")


def _evaluate(folder: Path, arrays: Mapping[str, mx.array], progress: Progress | None) -> None:
    total = sum(array.nbytes for array in arrays.values())
    done, size, batch = 0, 0, list[mx.array]()
    for i, array in enumerate(arrays.values()):
        batch.append(array)
        size += array.nbytes
        if size < _BATCH_BYTES and i + 1 < len(arrays):
            continue
        with reading(folder):
            mx.eval(batch)
        done, size, batch = done + size, 0, []
        if progress is not None:
            progress(done, total)
    for name, array in arrays.items():
        if array.dtype == mx.bool_ and array.size and mx.any(array.view(mx.uint8) > 1).item():
            raise refuse(folder, "is BOOL with bytes other than 0 and 1", tensor=name, fix="write it again")


def _not_those(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{clip(folder.name, 60)}: the tensors are not those that config.json describes ({clip(why, 160)})",
        fix="check num_hidden_layers, tie_word_embeddings and model_type, or download it again",
    )

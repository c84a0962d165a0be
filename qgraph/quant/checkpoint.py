"""Loads a checkpoint: the strict checks first, then the data, then everything or nothing.

Why the data goes through `mlx.core.load` and not through the safetensors library: without
ml_dtypes, `safetensors.safe_open` (0.8) cannot read bfloat16 into MLX or NumPy at all, and its peak
memory is too high. Measured on a 419 MB float16 and uint32 checkpoint whose last tensor, the
embedding, is 25 % of it, as growth of VmHWM over the process before the load (each in a fresh
process, MLX 0.32.4, Linux):

    mx.load, evaluated                      0.98 x the file
    safe_open, pread, get_tensor            1.25 x
    safe_open, pread, slices of 8 MB        1.25 x (a slice reads its whole tensor)
    safe_open, mmap                         2.22 x (mapped pages count)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any, cast

import mlx.core as mx

from qgraph._errors import QGraphError
from qgraph.quant.layout import Layout, read_layout
from qgraph.quant.memory import check_memory
from qgraph.quant.safetensors_file import WITH_BYTES, Entry, Header
from qgraph.quant.strict_file import Stamp, refuse, sealed
from qgraph.quant.tensor import QuantizedTensor
from qgraph.quant.tree import nest
from qgraph.quant.triplet import Triplet, find_triplets

Progress = Callable[[int, int], None]

_BATCH_BYTES = 64_000_000  # read between two progress calls
_PIECE = 1 << 18  # elements that are looked at together
_AGAIN = "download the file again"


@sealed
def load(
    path: str | os.PathLike[str],
    *,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Load a checkpoint as a tree of parameters.

    `path` is a .safetensors file, or a folder with config.json and model.safetensors or an index
    and its shards. The tree has a dict for each module and a list for numbered ones, as
    `mlx.utils.tree_unflatten` makes it. A packed layer (weight, scales, and biases if affine)
    becomes one QuantizedTensor under "weight", with the words of the file, bit for bit. All arrays
    are read when this returns. `progress(bytes_done, bytes_total)` is called as the data arrives.

    Shape, dtype: those of the file. Memory: the size of the tensors, plus less than 10 %.
    Errors: CheckpointError for anything malformed; then nothing is loaded. NaN and infinity in
    scales, biases and global scales are an error unless `allow_nonfinite`.
    Source: mlx.core.load, and mlx-lm's layout of a model folder.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "a.safetensors")
    ...     mx.save_safetensors(str(file), {"layers.0.weight": mx.ones((2, 3))})
    ...     params = load(file)
    >>> params["layers"][0]["weight"].shape
    (2, 3)
    """
    flat = load_flat(path, allow_nonfinite=allow_nonfinite, progress=progress)
    return nest(flat, lambda name, cause: _unnamed(path, name, cause))


@sealed
def load_flat(
    path: str | os.PathLike[str],
    *,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> dict[str, mx.array | QuantizedTensor]:
    """Load a checkpoint as `load` does, but by full name: ``{"layers.0.weight": ...}``."""
    layout = read_layout(path)
    triplets = find_triplets(layout.entries, layout.declared)
    total = sum(entry.nbytes for entry in layout.entries.values())
    check_memory(path, total)
    arrays: dict[str, mx.array] = {}
    try:
        for header in layout.headers:
            done = sum(array.nbytes for array in arrays.values())
            arrays |= read_arrays(header, done, total, progress)
        _check_bools(layout, arrays)
        if not allow_nonfinite:
            check_finite(triplets, arrays)
        return _assemble(layout, triplets, arrays)
    except BaseException:
        drop(arrays)
        raise


def read_arrays(
    header: Header, done: int = 0, total: int = 0, progress: Progress | None = None
) -> dict[str, mx.array]:
    """Read all tensors of a file whose header was checked; they are evaluated on return.

    Errors: CheckpointError if a read fails, or the file changed since its header was read.
    """
    with closed_after(header):
        return _read_evaluated(header, done, total, progress)


@contextmanager
def closed_after(*headers: Header) -> Generator[None, None, None]:
    """When this ends, the files are closed: MLX's reading threads do it a moment after the last read."""
    opened = [_descriptors(header.stamp) for header in headers]
    try:
        yield
    finally:
        for header, before in zip(headers, opened, strict=True):
            for _ in range(100):
                if _descriptors(header.stamp) <= before:
                    break
                sleep(0.001)


def open_arrays(header: Header) -> dict[str, mx.array]:
    """The tensors of a file whose header was checked, not read yet; they belong to this thread.

    Errors: CheckpointError if the file changed since its header was read.
    """
    check_unchanged(header)
    _check_path(header.path)
    # Explicit format: the name of a blob in a download cache has no suffix.
    with reading(header.path):
        arrays = cast("dict[str, mx.array]", mx.load(str(header.path), format="safetensors"))
    try:
        _check_same(header, arrays)
    except BaseException:
        drop(arrays)
        raise
    return arrays


def _descriptors(stamp: Stamp) -> int:
    """How many descriptors of this process are on a file; 0 where that cannot be known."""
    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]
    except (OSError, ValueError):
        return 0
    count = 0
    for number in numbers:
        with suppress(OSError):  # that of the listing itself
            status = os.fstat(number)
            count += (status.st_dev, status.st_ino) == (stamp.device, stamp.inode)
    return count


def _read_evaluated(header: Header, done: int, total: int, progress: Progress | None) -> dict[str, mx.array]:
    arrays = open_arrays(header)
    try:
        # An unevaluated array belongs to this thread, and a read that failed once gives garbage
        # the second time: so all is read here, or the whole load fails.
        for batch in _batches(header):
            with reading(header.path):
                mx.eval([arrays[e.name] for e in batch])
            done += sum(entry.nbytes for entry in batch)
            if progress is not None:
                progress(done, total)
        check_unchanged(header)
    except BaseException:
        drop(arrays)
        raise
    return arrays


def _check_path(path: Path) -> None:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        cause = "stands under a path that is not UTF-8, which MLX cannot open"
        raise refuse(path, cause, fix="rename the file, or the folder that it is in") from None


@contextmanager
def reading(path: Path) -> Generator[None, None, None]:
    """What MLX raises in here means that a file cannot be read: CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        raise refuse(path, f"cannot be read: {error}", fix=_AGAIN) from None


def drop(arrays: dict[str, mx.array]) -> None:
    """Free a failed load: the traceback would keep its memory in use and its file open."""
    arrays.clear()
    mx.clear_cache()


def _batches(header: Header) -> list[list[Entry]]:
    batches: list[list[Entry]] = []
    size = _BATCH_BYTES
    for entry in header.entries.values():
        if size >= _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(entry)
        size += entry.nbytes
    return batches


def check_unchanged(header: Header) -> None:
    """Errors: CheckpointError if the file is not the one whose header was read."""
    try:
        same = Stamp.of(os.stat(header.path)) == header.stamp
    except OSError:
        same = False
    if not same:
        raise refuse(header.path, "changed while it was read", fix="load it when it is complete")


def _check_same(header: Header, arrays: Mapping[str, mx.array]) -> None:
    """MLX must have understood the header as the strict check did."""
    for name, entry in header.entries.items():
        array = arrays.get(name)
        if array is None or array.shape != entry.shape or array.dtype != WITH_BYTES[entry.dtype]:
            raise refuse(header.path, "MLX reads it differently", tensor=name, fix=_AGAIN)
    if len(arrays) != len(header.entries):
        raise refuse(header.path, "MLX finds more tensors in it", fix=_AGAIN)


def _check_bools(layout: Layout, arrays: Mapping[str, mx.array]) -> None:
    for entry in layout.entries.values():
        if entry.dtype != "BOOL" or not entry.nbytes:
            continue
        if mx.any(arrays[entry.name].view(mx.uint8) > 1).item():
            cause = "is BOOL with bytes other than 0 and 1"
            raise refuse(entry.path, cause, tensor=entry.name, fix="write the file again")


def check_finite(triplets: Mapping[str, Triplet], arrays: Mapping[str, mx.array]) -> None:
    """Errors: CheckpointError for a scale, a bias or a global scale that is NaN or infinite."""
    for triplet in triplets.values():
        for entry in (triplet.scales, triplet.biases, triplet.global_scale):
            if entry is not None and not _all_finite(arrays[entry.name], triplet.quantization.mode):
                fix = "download it again, or pass allow_nonfinite=True"
                raise refuse(entry.path, "has NaN or infinity", tensor=entry.name, fix=fix)


def _all_finite(values: mx.array, mode: str) -> bool:
    """Piece by piece: MLX makes several arrays on the way, and those of a whole embedding are large."""
    flat = values.reshape(-1)
    pieces = (flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE))
    return all(bool(mx.all(_are_finite(piece, mode)).item()) for piece in pieces)


def _are_finite(values: mx.array, mode: str) -> mx.array:
    if values.dtype != mx.uint8:
        return mx.isfinite(values)
    if mode == "nvfp4":  # e4m3: NaN is 0x7f, with either sign
        return (values & 0x7F) != 0x7F
    return values != 0xFF  # e8m0


def _assemble(
    layout: Layout, triplets: Mapping[str, Triplet], arrays: Mapping[str, mx.array]
) -> dict[str, mx.array | QuantizedTensor]:
    parts = {
        entry.name: triplet
        for triplet in triplets.values()
        for entry in (triplet.weight, triplet.scales, triplet.biases, triplet.global_scale)
        if entry is not None
    }
    flat: dict[str, mx.array | QuantizedTensor] = {}
    for name in layout.entries:
        triplet = parts.get(name)
        if triplet is None:
            flat[name] = arrays[name]
        elif name == triplet.weight.name:
            flat[name] = tensor_of(triplet, arrays)
    return flat


def tensor_of(t: Triplet, arrays: Mapping[str, mx.array]) -> QuantizedTensor:
    """The packed weight of a triplet whose headers were checked."""
    biases = None if t.biases is None else arrays[t.biases.name]
    scale = None if t.global_scale is None else arrays[t.global_scale.name]
    try:
        return QuantizedTensor(arrays[t.weight.name], arrays[t.scales.name], biases, t.quantization, scale)
    except QGraphError as error:  # not expected: the headers were checked
        fix = error.fix or _AGAIN
        raise refuse(t.weight.path, error.message, tensor=t.weight.name, fix=fix) from error


def _unnamed(path: str | os.PathLike[str], name: str, cause: str) -> Exception:
    return refuse(path, cause, tensor=name, fix="rename the tensor, or use load_flat")

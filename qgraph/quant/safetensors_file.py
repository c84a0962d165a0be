"""The strict check of a safetensors header, in front of every read.

MLX's own reader takes overlapping spans, sizes that wrap, duplicate names and trailing data, and
some of these crash or read other memory. This check uses Python integers and accepts a subset of
what the reference implementation accepts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import mlx.core as mx

from qgraph.quant.strict_file import (
    Stamp,
    as_object,
    clip,
    json_name,
    open_regular,
    parse_json,
    read_at_most,
    refuse,
)

MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_MAX_TENSORS = 100_000  # in one file; the largest public models have 2,000
_MAX_NAME = 1000
_MAX_RANK = 32
_MAX_DIM = 2**31 - 1  # MLX counts axes in 32 bits and wraps silently beyond
_AGAIN = "download the file again"

# What both safetensors and MLX hold, by the name in the header.
DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "C64": mx.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# MLX has no 8-bit floats and reads their bytes; only code that knows that they are floats may ask for it.
WITH_BYTES: dict[str, mx.Dtype] = {**DTYPES, "F8_E4M3": mx.uint8}
_ELSEWHERE = {"F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"}

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer", "fetch the file with `git lfs pull`"),
    (b"PK\x03\x04", "is a zip or a PyTorch pickle", "convert it to safetensors"),
    (b"\x80\x02", "is a pickle, which can run code", "convert it to safetensors"),
    (b"\x80\x03", "is a pickle, which can run code", "convert it to safetensors"),
    (b"\x80\x04", "is a pickle, which can run code", "convert it to safetensors"),
    (b"\x80\x05", "is a pickle, which can run code", "convert it to safetensors"),
    (b"GGUF", "is a GGUF file", "convert it to safetensors"),
    (b"\x93NUMPY", "is a NumPy file", "convert it to safetensors"),
    (b"\x1f\x8b", "is a gzip file", "unpack it first"),
    (b"<", "is an HTML or XML page", "download the file itself, not the page about it"),
    (b"{", "is a JSON text", "pass the .safetensors file"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header: `dtype` as the header spells it, `start` and `stop` in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the entries are in file order and cover the data without gap or overlap."""

    path: Path
    stamp: Stamp
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: str | os.PathLike[str], dtypes: Mapping[str, mx.Dtype] = DTYPES) -> Header:
    """Read and check the header of a safetensors file; the tensors are not read.

    `dtypes` are those that are taken, by the name in the header, and what MLX makes of them.

    Errors: CheckpointError, naming the file, the tensor and the cause.
    Source: the safetensors format; its rules are all checked, with MLX's limits added.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "a.safetensors")
    ...     mx.save_safetensors(str(file), {"x": mx.ones((2, 3))})
    ...     entry = read_header(file).entries["x"]
    >>> entry.dtype, entry.shape, entry.nbytes
    ('F32', (2, 3), 24)
    """
    path = Path(path)
    with open_regular(path) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        start = read_at_most(file, 32, path)
        length = _header_length(path, start, stamp.size)
        text = (start + read_at_most(file, max(0, length - 24), path))[8 : 8 + length]
    if len(text) != length:
        raise refuse(path, "was cut while it was read", fix=_AGAIN)
    raw = parse_json(text, path, what="header")
    metadata = _metadata(path, raw.pop("__metadata__", {}))
    if len(raw) > _MAX_TENSORS:
        cause = f"has {len(raw)} tensors, at most {_MAX_TENSORS} are read from one file"
        raise refuse(path, cause, fix="split it into shards")
    entries = [_entry(path, name, value, 8 + length, dtypes) for name, value in raw.items()]
    # An empty tensor sits at the start of the next one, so the stop decides between equal starts.
    entries.sort(key=lambda e: (e.start, e.stop))
    _check_layout(path, entries, 8 + length, stamp.size)
    return Header(path, stamp, {e.name: e for e in entries}, metadata)


def _header_length(path: Path, start: bytes, size: int) -> int:
    length = int.from_bytes(start[:8], "little")
    if size >= 8 and 2 <= length <= MAX_HEADER_BYTES and 8 + length <= size:
        return length
    for magic, what, fix in _MAGIC:
        if start.lstrip().startswith(magic):
            raise refuse(path, what, fix=fix)
    if size < 8:
        raise refuse(path, f"has {size} bytes, a header needs at least 8", fix=_AGAIN)
    if length < 2 or length > MAX_HEADER_BYTES:
        # Not the number itself: in a foreign file it is eight bytes of its content.
        claim = f"{length} bytes" if length < 2 else f"more than {MAX_HEADER_BYTES} bytes"
        raise refuse(path, f"claims a header of {claim}", fix="check that it is a safetensors file")
    raise refuse(path, f"has {size} bytes, the header alone needs {8 + length}", fix=_AGAIN)


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:  # mlx.core.save_safetensors writes null if there is none
        return {}
    found = as_object(value, path, "__metadata__")
    for key, text in found.items():
        if not isinstance(text, str):
            cause = f"__metadata__ '{clip(key, 40)}' is {json_name(text)}, not a text"
            raise refuse(path, cause, fix="write the file again")
    return cast("dict[str, str]", found)


def _entry(path: Path, name: str, value: object, base: int, dtypes: Mapping[str, mx.Dtype]) -> Entry:
    def no(cause: str, fix: str = "write the file again") -> Exception:
        return refuse(path, cause, tensor=name, fix=fix)

    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise no(f"the name is empty, longer than {_MAX_NAME}, or has control characters")
    entry = as_object(value, path, f"tensor '{clip(name, 70)}'")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        fields = ", ".join(clip(key, 16) for key in sorted(entry)[:4]) or "none"
        raise no(f"has the fields {fields}, expected dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        found = clip(dtype, 20) if isinstance(dtype, str) else json_name(dtype)
        fix = "cast it to F32 or BF16" if found in _ELSEWHERE else "write the file again"
        raise no(f"dtype {found} is not supported by MLX; known: {', '.join(DTYPES)}", fix)
    shape = _naturals(entry["shape"], _MAX_RANK, _MAX_DIM)
    if shape is None:
        limits = f"0 to {_MAX_DIM}, rank at most {_MAX_RANK}"
        raise no(f"the shape is not a list of whole numbers from {limits}")
    offsets = _naturals(entry["data_offsets"], 2, 2**63)
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise no("data_offsets are not two whole numbers, begin and end")
    start, stop = offsets
    needed = prod(shape) * dtypes[dtype].size
    if needed != stop - start:
        raise no(f"{dtype}{clip(list(shape), 60)} needs {needed} bytes, has {stop - start}")
    return Entry(path, name, dtype, shape, base + start, base + stop)


def _naturals(value: object, max_len: int, max_value: int) -> tuple[int, ...] | None:
    """A list of whole numbers as a tuple; None if it is anything else (True and 1.0 included)."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    if len(items) > max_len:
        return None
    numbers = [n for n in items if type(n) is int and 0 <= n <= max_value]
    return tuple(numbers) if len(numbers) == len(items) else None


def _check_layout(path: Path, entries: list[Entry], base: int, size: int) -> None:
    """The data must be covered exactly once: no overlap, no hole, nothing before or behind."""
    last = max(entries, key=lambda e: e.stop, default=None)
    if last is not None and last.stop > size:
        cause = f"is cut: the file has {size} bytes, this tensor ends at {last.stop}"
        raise refuse(path, cause, tensor=last.name, fix=_AGAIN)
    at = base
    for entry in entries:
        if entry.start != at:
            what = "overlaps the tensor before it" if entry.start < at else "follows a hole"
            cause = f"{what}, it starts at byte {entry.start}, not at {at}"
            raise refuse(path, cause, tensor=entry.name, fix="write the file again")
        at = entry.stop
    if at != size:
        cause = f"has {size - at} bytes behind the last tensor"
        raise refuse(path, cause, fix="download it again, or cut what was appended")

"""Checkpoints made byte by byte, right ones and wrong ones, without MLX and without qgraph."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRET = "SECRET-7f3a19"  # stands in files that must not be echoed
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "I64": 8}

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.norm.weight"
BLOCK = {"group_size": 64, "bits": 4, "mode": "affine"}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Stored]
Maker = Callable[[Path], Path]  # writes into an empty folder, and returns what is to be loaded


def floats(*shape: int, seed: int = 1) -> Stored:
    """Numbers of the order of 1, never 0."""
    drawn = random.Random(f"{shape}{seed}")
    values = [drawn.choice((-1, 1)) * drawn.uniform(0.5, 2) for _ in range(_count(shape))]
    return Stored("F32", shape, struct.pack(f"<{len(values)}f", *values))


def of_bytes(dtype: str, *shape: int, seed: int = 1, high: int = 255) -> Stored:
    drawn = random.Random(f"{dtype}{shape}{seed}")
    size = _count(shape) * SIZES[dtype]
    return Stored(dtype, shape, bytes(drawn.randint(1, high) for _ in range(size)))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def affine(module: str, n: int = 8, k: int = 128, bits: int = 4, group: int = 64) -> Tensors:
    return {
        f"{module}.weight": of_bytes("U32", n, k * bits // 32),
        f"{module}.scales": floats(n, k // group),
        f"{module}.biases": floats(n, k // group, seed=2),
    }


def block_float(module: str, bits: int, group: int, n: int = 8, k: int = 128) -> Tensors:
    """A layer of mxfp4, mxfp8 or nvfp4: one byte for a scale, no biases."""
    return {
        f"{module}.weight": of_bytes("U32", n, k * bits // 32),
        f"{module}.scales": of_bytes("U8", n, k // group, high=126),
    }


def model() -> Tensors:
    """Two packed layers and a dense vector."""
    return affine(UP) | affine(DOWN) | {NORM: floats(128)}


def entries(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """The header of a file that holds them in this order."""
    header: dict[str, Any] = {}
    at = 0
    for name, stored in tensors.items():
        end = at + len(stored.data)
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [at, end]}
        at = end
    return header


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header: a dict, text or bytes."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def file_of(tensors: Mapping[str, Stored]) -> bytes:
    return safetensors(entries(tensors), b"".join(t.data for t in tensors.values()))


def config_of(block: object = None, **others: object) -> dict[str, Any]:
    block = BLOCK if block is None else block
    return {"model_type": "qwen3", "quantization": block, "quantization_config": block} | others


def write_folder(folder: Path, tensors: Mapping[str, Stored], config: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config_of() if config is None else config))
    (folder / "model.safetensors").write_bytes(file_of(tensors))
    return folder


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(folder: Path, tensors: Mapping[str, Stored] | None = None) -> Path:
    """The first packed layer in one shard, the rest in another."""
    tensors = model() if tensors is None else tensors
    parts: dict[str, Tensors] = {FIRST: {}, SECOND: {}}
    for name, stored in tensors.items():
        parts[FIRST if name.startswith(UP) else SECOND][name] = stored
    for file, part in parts.items():
        (folder / file).write_bytes(file_of(part))
    weights = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    (folder / "config.json").write_text(json.dumps(config_of()))
    return folder


# --- makers of cases ------------------------------------------------------------------------------

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}
DATA = bytes(range(1, 29))


def content(data: bytes | Callable[[], bytes], name: str = "model.safetensors") -> Maker:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data() if callable(data) else data)
        return folder / name

    return make


def header(value: object | Callable[[], object], data: bytes = DATA, **options: Any) -> Maker:
    return content(lambda: safetensors(value() if callable(value) else value, data, **options))


def entry(**changes: object) -> Maker:
    """A header in which tensor a is damaged and b is right."""
    return header({"a": A | changes, "b": B})


def whole(change: Callable[[Path], object], base: Callable[[Path], Path] | None = None) -> Maker:
    """A right folder, then changed."""

    def make(folder: Path) -> Path:
        (base or (lambda f: write_folder(f, model())))(folder)
        change(folder)
        return folder

    return make


def sharded(change: Callable[[Path], object]) -> Maker:
    return whole(change, write_shards)


def text(name: str, value: str | bytes) -> Callable[[Path], object]:
    return lambda f: (f / name).write_bytes(value.encode() if isinstance(value, str) else value)


def block(changes: Mapping[str, object] | Callable[[dict[str, Any]], object]) -> Maker:
    """A folder whose quantization block, in both places, is changed."""

    def make(folder: Path) -> Path:
        value: dict[str, Any] = dict(BLOCK)
        if callable(changes):
            changes(value)
        else:
            value |= changes
        return write_folder(folder, model(), config_of(value))

    return make


def config(value: object) -> Maker:
    return lambda f: write_folder(f, model(), value)


def tensors(change: Callable[[Tensors], object]) -> Maker:
    def make(folder: Path) -> Path:
        found = model()
        change(found)
        return write_folder(folder, found)

    return make


def index(change: Callable[[dict[str, Any]], object]) -> Maker:
    """A sharded folder whose weight_map is changed."""

    def change_file(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        change(value["weight_map"])
        (folder / INDEX).write_text(json.dumps(value))

    return sharded(change_file)


ADAPTER = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
}


def pair() -> Tensors:
    return {f"{UP}.lora_a": floats(128, 4), f"{UP}.lora_b": floats(4, 8)}


def adapter(change: Callable[[Path], object] = lambda folder: None) -> Maker:
    def make(folder: Path) -> Path:
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
        (folder / "adapters.safetensors").write_bytes(file_of(pair()))
        change(folder)
        return folder

    return make


@dataclass(frozen=True)
class Case:
    """One row: how the checkpoint is made, and what must come of it.

    Attributes:
        cause: A part of the message; None for one that loads.
        file: What the message starts with.
        tensor: The tensor that the message names.
        adapter: Loaded as an adapter, not as a model.
        loaded: For one that loads: the tensors that make it up, as written.
        growth: Megabytes that it may take beside those of the file, at most.
    """

    make: Maker
    cause: str | None = None
    file: str = "model.safetensors"
    tensor: str | None = None
    adapter: bool = False
    loaded: Callable[[], Tensors] = field(default=model)
    growth: int = 40


def refused(make: Maker, cause: str, file: str = "model.safetensors", **options: Any) -> Case:
    return Case(make, cause, file, **options)

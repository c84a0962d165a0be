"""Which files make up a checkpoint: one file, or a folder as mlx-lm writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from qgraph.quant.config import QuantizationConfig, read_config, read_quantization
from qgraph.quant.pending import Pending, current, read_pending
from qgraph.quant.safetensors_file import DTYPES, Entry, Header, read_header
from qgraph.quant.strict_file import as_object, clip, json_name, parse_json, read_json, refuse

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# A single file has no config beside it; `save` keeps the block in the metadata under this key.
METADATA_KEY = "quantization"
_AGAIN = "download the checkpoint again"
Declare = Callable[[Mapping[str, object], Path], QuantizationConfig]


@dataclass(frozen=True, slots=True)
class Layout:
    """The checked headers of a checkpoint, its entries by name, and what its config declares."""

    headers: tuple[Header, ...]
    entries: Mapping[str, Entry]
    declared: QuantizationConfig


def read_layout(
    path: str | os.PathLike[str],
    declare: Declare = read_quantization,
    dtypes: Mapping[str, mx.Dtype] = DTYPES,
) -> Layout:
    """Find and check the files of a checkpoint; no tensor data is read.

    `declare` reads the quantization of a folder's config, `dtypes` are those that tensors may have.

    Errors: CheckpointError for missing, ambiguous or foreign files, and for an index that does not
    agree exactly with its shards.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path, declare, dtypes)
    if not os.path.lexists(path):
        fix = "pass a .safetensors file, or a folder with config.json and model.safetensors"
        raise refuse(path, "no such file or folder", fix=fix)
    header = read_header(current(path))
    return Layout((header,), header.entries, _declared_for_file(header))


def _declared_for_file(header: Header) -> QuantizationConfig:
    block = header.metadata.get(METADATA_KEY)
    if block is not None:
        parsed = parse_json(block.encode("utf-8"), header.path, what="quantization metadata")
        return read_quantization({"quantization": parsed}, header.path)
    config = header.path.parent / "config.json"
    if any(name.endswith(".scales") for name in header.entries) and os.path.lexists(config):
        return read_quantization(read_config(config), config)
    return QuantizationConfig()


def _read_folder(folder: Path, declare: Declare, dtypes: Mapping[str, mx.Dtype]) -> Layout:
    config, index = folder / "config.json", folder / INDEX
    pending = read_pending(folder)
    files = _weight_files(folder, pending)
    declared = declare(read_config(config), config)
    if not files.indexed:
        header = read_header(current(_only(folder, files.weights)), dtypes)
        return Layout((header,), header.entries, declared)
    weight_map = _read_index(current(index))
    shards = sorted(set(weight_map.values()))
    for extra in sorted(set(files.weights) - set(shards)):
        cause = f"is not in {INDEX}: a stale file, or another checkpoint"
        raise refuse(folder / extra, cause, fix="move it to another folder")
    for missing in sorted(set(shards) - set(files.weights)):
        if not os.path.lexists(folder / missing):
            raise refuse(folder / missing, f"is missing, {INDEX} names it", fix=_AGAIN)
    headers = {shard: read_header(current(folder / shard), dtypes) for shard in shards}
    return Layout(tuple(headers.values()), _merge(headers, weight_map, index), declared)


@dataclass(frozen=True, slots=True)
class _Files:
    weights: list[str]
    indexed: bool


def _weight_files(folder: Path, pending: Pending | None) -> _Files:
    """The names that mlx-lm would load: it merges all that match, in the order of the folder."""
    try:
        names = set(os.listdir(folder)) | set(pending.files if pending else ())
    except OSError as error:
        cause = f"cannot be listed: {error.strerror}"
        raise refuse(folder, cause, fix="check the path and its permissions") from None
    files = sorted(n for n in names if n.startswith("model") and n.endswith(".safetensors"))
    if files or INDEX in names:
        return _Files(files, INDEX in names)
    if "adapter_config.json" in names:
        raise refuse(folder, "is an adapter, not a model", fix="use load_adapter")
    foreign = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")))
    if foreign:
        cause = f"has no model.safetensors, only {clip(foreign[0], 60)}"
        raise refuse(folder, cause, fix="convert the model with mlx_lm.convert")
    raise refuse(folder, "has no model.safetensors", fix="check the path, or download the model")


def _only(folder: Path, files: list[str]) -> Path:
    if len(files) == 1:
        return folder / files[0]
    raise refuse(
        folder,
        f"has {len(files)} model*.safetensors files and no {INDEX}",
        fix="download the index too, or move the files that do not belong",
    )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = as_object(read_json(path).get("weight_map"), path, "weight_map")
    if not weight_map:
        raise refuse(path, "weight_map is empty", fix=_AGAIN)
    checked: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            cause = f"the file name is {json_name(file)}, not a text"
            raise refuse(path, cause, tensor=name, fix=_AGAIN)
        if not _is_plain(file):
            cause = f"'{clip(file, 60)}' is not the plain name of a .safetensors file"
            raise refuse(path, cause, tensor=name, fix="name files in the same folder only")
        checked[name] = file
    return checked


def _is_plain(file: str) -> bool:
    """A base name, so that an index cannot point out of its folder."""
    special = any(c in "/\\:" for c in file) or file.startswith(".")
    return file.endswith(".safetensors") and file.isprintable() and not special and len(file) <= 255


def _merge(headers: Mapping[str, Header], weight_map: Mapping[str, str], index: Path) -> dict[str, Entry]:
    merged: dict[str, Entry] = {}
    for shard, header in headers.items():
        for name, entry in header.entries.items():
            if weight_map.get(name) == shard:
                merged[name] = entry
                continue
            listed = weight_map.get(name)
            what = "does not list it" if listed is None else f"lists it in {clip(listed, 60)}"
            raise refuse(header.path, f"{INDEX} {what}", tensor=name, fix=_AGAIN)
    for name, file in weight_map.items():
        if name not in merged:
            raise refuse(index, f"is not in {clip(file, 60)}", tensor=name, fix=_AGAIN)
    return merged

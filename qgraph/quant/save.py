"""Saves a checkpoint that mlx-lm loads; a crash leaves the old files or the new ones."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten  # pyright: ignore[reportUnknownVariableType]

from qgraph._errors import CheckpointError
from qgraph.quant.commit import Writer, replace_all, replace_file, writing
from qgraph.quant.config import load_config, read_quantization
from qgraph.quant.layout import INDEX, METADATA_KEY, SINGLE
from qgraph.quant.safetensors_file import DTYPE_NAMES, read_header
from qgraph.quant.scheme import Quantization
from qgraph.quant.strict_file import refuse, sealed
from qgraph.quant.tensor import QuantizedTensor
from qgraph.quant.tree import nest

MAX_SHARD_BYTES = 5_000_000_000
_BLOCKS = ("quantization", "quantization_config")


@sealed
def save(
    path: str | os.PathLike[str],
    params: Mapping[str, object],
    *,
    config: Mapping[str, object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Save a tree of parameters as `load` and mlx-lm read it.

    `path` is a .safetensors file (it holds the quantization block in its metadata) or a folder:
    then config.json, the index and the shards of at most `max_shard_bytes` bytes are written. The
    config gets the quantization blocks that describe `params`; without `config`, one that is in
    the folder is kept. Packed words, scales and biases are written bit for bit. The logical dtype of
    a packed tensor is not stored: `load` gives the scales' dtype (affine) or bfloat16.

    Every file is written beside its target, synced and renamed, the index last. A crash or a full
    disk at any point leaves the old checkpoint or the new one for `load`; for mlx-lm, which knows
    nothing of unfinished saves, a crash during the renames may leave too few shards, never a mixture.
    The next save completes it.

    Shape, dtype: any that `load` reads.  Errors: CheckpointError for leaves that are not arrays or
    QuantizedTensors, for a QuantizedTensor with an axis other than -1, for a folder with weight
    files that would not be replaced, for another writer at the same time, and if the disk fails.
    Source: the safetensors format, mlx-lm's save_model and save_config.

    >>> import tempfile
    >>> from qgraph.quant import Quantization, load, pack
    >>> w = pack(mx.ones((8, 64)), Quantization(bits=8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, {"lm_head": {"weight": w}}, config={"model_type": "toy"})
    ...     load(folder)["lm_head"]["weight"]
    QuantizedTensor(f32[8,64], affine8g64, packed uint32[8,16], 576 B)
    """
    path = Path(path)
    leaves = _leaves(path, params)
    arrays = _stored(path, leaves)
    schemes = {
        name.removesuffix("weight").removesuffix("."): (leaf.quantization, leaf.global_scale)
        for name, leaf in leaves.items()
        if isinstance(leaf, QuantizedTensor)
    }
    mx.eval(list(arrays.values()))
    if path.suffix == ".safetensors":
        metadata = {"format": "mlx"}
        if schemes:
            metadata[METADATA_KEY] = json.dumps(_block(path, schemes, None))
        with writing(path):
            replace_file(path, lambda temp: _write_tensors(temp, arrays, metadata))
        return
    _make_folder(path)
    with writing(path):
        _save_folder(path, arrays, _new_config(path, config, schemes), max_shard_bytes)


Schemes = Mapping[str, tuple[Quantization, mx.array | None]]


def _leaves(path: Path, params: Mapping[str, object]) -> dict[str, mx.array | QuantizedTensor]:
    flat = cast("list[tuple[str, object]]", tree_flatten(params))
    leaves: dict[str, mx.array | QuantizedTensor] = {}
    for name, leaf in flat:
        if not isinstance(leaf, mx.array | QuantizedTensor):
            cause = f"is a {type(leaf).__name__}, not an mlx.core.array or a QuantizedTensor"
            raise refuse(path, cause, tensor=name, fix="convert it with mx.array(...)")
        if name in leaves:
            raise refuse(path, "the name is used twice", tensor=name, fix="rename one")
        if not name.isprintable() or name == "__metadata__":
            raise refuse(path, "the name cannot be stored", tensor=name, fix="rename it")
        leaves[name] = leaf
    if not leaves:
        raise refuse(path, "there are no parameters to save", fix="pass a tree of arrays")
    nest(leaves, lambda name, cause: refuse(path, cause, tensor=name, fix="rename it"))
    return leaves


def _stored(path: Path, leaves: Mapping[str, mx.array | QuantizedTensor]) -> dict[str, mx.array]:
    """The arrays of the file by name."""
    stored: dict[str, mx.array] = {}
    for name, leaf in leaves.items():
        for part, array in _parts(path, name, leaf):
            if array.dtype not in DTYPE_NAMES:
                cause = f"is {array.dtype}, which checkpoints do not hold"
                raise refuse(path, cause, tensor=part, fix="cast it to float32")
            if part in stored or (part != name and part in leaves):
                cause = "is also a part of a packed tensor"
                raise refuse(path, cause, tensor=part, fix="rename it")
            # Row order, and without a copy where the array has it already.
            stored[part] = mx.contiguous(array)
    return stored


def _parts(path: Path, name: str, leaf: mx.array | QuantizedTensor) -> list[tuple[str, mx.array]]:
    if isinstance(leaf, mx.array):
        return [(name, leaf)]
    module, _, last = name.rpartition(".")
    if last != "weight":
        cause = "a packed tensor is stored as <module>.weight, .scales and .biases"
        raise refuse(path, cause, tensor=name, fix='put it under the key "weight"')
    if leaf.axis != -1:
        cause = f"its groups run along axis {leaf.axis}, files store them along the last"
        raise refuse(path, cause, tensor=name, fix="save the untransposed tensor (its .T)")
    prefix = f"{module}." if module else ""
    named = (
        ("weight", leaf.packed),
        ("scales", leaf.scales),
        ("biases", leaf.biases),
        ("global_scale", leaf.global_scale),
    )
    return [(prefix + part, array) for part, array in named if array is not None]


def _new_config(folder: Path, config: Mapping[str, object] | None, schemes: Schemes) -> dict[str, object]:
    file = folder / "config.json"
    if config is None:
        config = load_config(file) if os.path.lexists(file) else {}
    result = copy.deepcopy(dict(config))
    before = {key: result.pop(key, None) for key in _BLOCKS}
    if not schemes:
        return result
    try:
        kept = read_quantization(before, file).default
    except CheckpointError:
        kept = None  # a block of another library: the tensors say what holds
    block = _block(folder, schemes, kept)
    # mlx-lm and the model hub read one each.
    return result | dict.fromkeys(_BLOCKS, block)


def _block(path: Path, schemes: Schemes, kept: Quantization | None) -> dict[str, object]:
    """The scheme of most layers at the top, the others by module path."""
    counts = Counter(scheme for scheme, _ in schemes.values())
    top = kept if kept is not None and kept in counts else counts.most_common(1)[0][0]
    block: dict[str, object] = dict(top.to_config())
    for module, (scheme, global_scale) in schemes.items():
        if module in block or module in _BLOCKS:
            raise refuse(path, "the module name is a key of the config", tensor=module, fix="rename it")
        if scheme == top:
            continue  # mlx-lm finds a global scale by itself, except for listed layers
        entry: dict[str, object] = dict(scheme.to_config())
        block[module] = entry if global_scale is None else entry | {"global_scale": True}
    return block


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        cause = f"cannot be used: {getattr(error, 'strerror', error)}"
        raise refuse(folder, cause, fix="check the path") from None


def _save_folder(
    folder: Path,
    arrays: Mapping[str, mx.array],
    config: Mapping[str, object],
    max_shard_bytes: int,
) -> None:
    shards = _shards(arrays, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file in sorted(set(os.listdir(folder)) - set(names)):
        if file.startswith("model") and file.endswith(".safetensors"):
            # mlx-lm would merge it with the new weights.
            cause = "is in the folder and would stay beside the new weights"
            raise refuse(folder / file, cause, fix="save to an empty folder, or remove it")
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in sorted(shard)
        },
    }
    files = {name: _tensor_writer(shard) for name, shard in zip(names, shards, strict=True)}
    files["config.json"] = _json_writer(dict(sorted(config.items())))
    files[INDEX] = _json_writer(index)
    replace_all(folder, files)


def _shards(arrays: Mapping[str, mx.array], limit: int) -> list[dict[str, mx.array]]:
    shards: list[dict[str, mx.array]] = []
    size = 0
    for name, array in arrays.items():
        if not shards or size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def _tensor_writer(arrays: Mapping[str, mx.array]) -> Writer:
    return lambda temp: _write_tensors(temp, arrays, {"format": "mlx"})


def _json_writer(value: Mapping[str, object]) -> Writer:
    def write(temp: Path) -> None:
        temp.write_text(json.dumps(value, indent=4) + "\n", "utf-8")

    return write


def _write_tensors(file: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str]) -> None:
    # As the safetensors library does: the widest elements first, so that all are aligned.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.size, item[0]))
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, array in ordered:
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            out.write(memoryview(array))  # pyright: ignore[reportArgumentType]  (a buffer at run time)
    read_header(file)  # what cannot be loaded must not replace what can

"""What a checkpoint must be to load, written once more: plain Python, nothing of qgraph's own check.

`read` gives the tensors of a checkpoint, or raises Bad with the reason.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
SIZES |= {"U64": 8, "I64": 8, "C64": 8}
AFFINE = {(b, g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)}
OTHERS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
SETTINGS = ("bits", "group_size", "mode", "quant_method", "linear_class", "global_scale")

Files = dict[str, bytes]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


class Bad(Exception):
    """The rule that is broken."""


def must(condition: object, rule: str) -> None:
    if not condition:
        raise Bad(rule)


def read(files: Files, kind: str) -> Tensors:
    """The tensors that `files` hold; kind is file (model.safetensors alone is loaded) or folder."""
    if kind == "file":
        tensors, metadata = read_file(files["model.safetensors"])
        packed = any(name.endswith(".scales") for name in tensors)
        if "quantization" in metadata:
            block: object = {"quantization": parse(metadata["quantization"].encode(), nan=False)}
        else:
            block = parse(files["config.json"], nan=True) if packed and "config.json" in files else {}
    else:
        must("config.json" in files, "a config")
        block = parse(files["config.json"], nan=True)
        tensors = read_shards(files)
    check_layers(tensors, read_block(block))
    check_tree(list(tensors))
    return tensors


def parse(text: bytes, *, nan: bool) -> Any:
    """Strict JSON, an object at the top."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        must(len(set(names)) == len(names), "no name twice")
        "".join(names).encode("utf-8")
        return dict(items)

    def constant(name: str) -> float:
        must(nan, "no NaN")
        return float(name.replace("Infinity", "inf"))

    def whole(digits: str) -> int:
        must(len(digits) <= 32, "no endless number")
        return int(digits)

    must(not text.startswith(b"\xef\xbb\xbf"), "no byte order mark")
    try:
        value = json.loads(
            str(text, "utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=whole
        )
    except (ValueError, RecursionError) as error:
        raise Bad("JSON") from error
    must(type(value) is dict, "an object")
    must(depth(value) <= 64, "not too deep")
    return value


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inside), default=0)


def read_file(data: bytes) -> tuple[Tensors, dict[str, str]]:
    must(len(data) >= 8, "8 bytes")
    (length,) = struct.unpack("<Q", data[:8])
    must(2 <= length <= 10**8 and 8 + length <= len(data), "the length of the header")
    header, body = parse(data[8 : 8 + length], nan=False), data[8 + length :]
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    must(type(metadata) is dict, "metadata is an object")
    must(all(type(value) is str for value in metadata.values()), "metadata are texts")
    must(len(header) <= 100_000, "not too many")
    tensors: Tensors = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        must(name and len(name) <= 1000 and name.isprintable(), "a name")
        must(type(entry) is dict and sorted(entry) == ["data_offsets", "dtype", "shape"], "three fields")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        must(type(dtype) is str and dtype in SIZES, "a dtype")
        must(type(shape) is list and len(shape) <= 32, "a shape")
        must(all(type(n) is int and 0 <= n < 2**31 for n in shape), "sizes")
        must(type(offsets) is list and len(offsets) == 2 and all(type(n) is int for n in offsets), "offsets")
        start, stop = offsets
        must(0 <= start <= stop <= len(body), "inside the file")
        must(stop - start == math.prod(shape) * SIZES[dtype], "the size")
        spans.append((start, stop))
        tensors[name] = dtype, tuple(shape), body[start:stop]
        must(dtype != "BOOL" or set(body[start:stop]) <= {0, 1}, "0 or 1")
    spans.sort()
    must(
        [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), len(body)],
        "no hole, no overlap",
    )
    return tensors, metadata


def read_shards(files: Files) -> Tensors:
    weights = sorted(n for n in files if n.startswith("model") and n.endswith(".safetensors"))
    index = files.get("model.safetensors.index.json")
    if index is None:
        must(len(weights) == 1, "one file, or an index")
        return read_file(files[weights[0]])[0]
    found = parse(index, nan=False).get("weight_map")
    must(type(found) is dict and found, "a weight_map")
    for file in found.values():
        must(type(file) is str and file.isprintable() and 0 < len(file) <= 255, "a file name")
        must(not set(file) & set("/\\:") and not file.startswith("."), "a plain name")
        must(file.endswith(".safetensors"), "a safetensors file")
    must(set(weights) <= set(found.values()), "no stale file")
    must(set(found.values()) <= set(files), "every shard")
    tensors: Tensors = {}
    for file in sorted(set(found.values())):
        inside = read_file(files[file])[0]
        must(all(found.get(name) == file for name in inside), "where the index says")
        tensors |= inside
    must(set(tensors) == set(found), "no ghost")
    return tensors


def read_block(config: Any) -> dict[str | None, Any] | None:
    """Scheme by module, under None the default; None if nothing is declared."""
    blocks = [config[key] for key in ("quantization", "quantization_config") if config.get(key) is not None]
    if not blocks:
        return None
    must(json.dumps(blocks[0]) == json.dumps(blocks[-1]), "two equal blocks")
    block = blocks[0]
    must(type(block) is dict, "the block is an object")
    must(block.get("quant_method", "mlx") in ("mlx", None), "our packing")
    must("bits" in block and "group_size" in block, "bits and group_size")
    found: dict[str | None, Any] = {None: scheme(block)}
    for module, value in block.items():
        if module not in SETTINGS:
            must(value is True or value is False or type(value) is dict, "an override")
            found[module] = scheme(value) if type(value) is dict else found[None] if value else None
    return found


def scheme(entry: dict[str, Any]) -> tuple[str, int, int]:
    mode = entry.get("mode", "affine")
    must(mode == "affine" or (type(mode) is str and mode in OTHERS), "a mode")
    bits, group = OTHERS.get(mode, (4, 64))
    bits, group = entry.get("bits", bits), entry.get("group_size", group)
    must(type(bits) is int and type(group) is int, "whole numbers")
    allowed = AFFINE if mode == "affine" else {OTHERS[mode]}
    must((bits, group) in allowed, "a known scheme")
    return mode, bits, group


def check_layers(tensors: Tensors, declared: dict[str | None, Any] | None) -> None:
    layers: set[str] = set()
    for name, (dtype, _, _) in tensors.items():
        module, dot, leaf = name.rpartition(".")
        has_scales = module + dot + "scales" in tensors
        if leaf == "scales":
            layers.add(module)
            must(declared is not None, "a declaration")
            check_layer(tensors, module + dot, declared.get(module, declared[None]))  # type: ignore[union-attr]
        must(has_scales or leaf not in ("biases", "global_scale"), "scales beside them")
        must(has_scales or leaf != "weight" or dtype != "U32", "scales beside the words")
    for module, declaration in (declared or {}).items():
        weight = f"{module}.weight" if module else "weight"
        dense = module is not None and declaration is not None and module not in layers and weight in tensors
        must(not dense, "what is declared packed is packed")
    must(declared is None or layers, "something is packed")


def check_layer(tensors: Tensors, prefix: str, declared: tuple[str, int, int] | None) -> None:
    must(declared is not None, "not declared dense")
    mode, bits, group = declared  # type: ignore[misc]
    must(prefix + "weight" in tensors, "a weight")
    words, scales = tensors[prefix + "weight"], tensors[prefix + "scales"]
    biases, factor = tensors.get(prefix + "biases"), tensors.get(prefix + "global_scale")
    must(words[0] == "U32" and len(words[1]) >= 2, "words")
    must(scales[1][:-1] == words[1][:-1] and len(scales[1]) == len(words[1]), "rows")
    must(words[1][-1] * 32 == scales[1][-1] * group * bits, "groups")
    if mode == "affine":
        must(scales[0] in ("F32", "F16", "BF16"), "float scales")
        must(biases is not None and biases[:2] == scales[:2], "biases like the scales")
        must(factor is None, "no global scale")
        must(finite(scales) and finite(biases), "finite")  # type: ignore[arg-type]
        return
    must(scales[0] == "U8" and biases is None, "scales of one byte")
    must(not any(byte & 127 == 127 if mode == "nvfp4" else byte == 255 for byte in scales[2]), "no NaN")
    if factor is not None:
        must(mode == "nvfp4" and factor[:2] == ("F32", ()) and finite(factor), "a global scale")


def finite(tensor: tuple[str, tuple[int, ...], bytes]) -> bool:
    dtype, _, data = tensor
    if dtype == "F32":
        return all(map(math.isfinite, struct.unpack(f"<{len(data) // 4}f", data)))
    if dtype == "F16":
        return all(map(math.isfinite, struct.unpack(f"<{len(data) // 2}e", data)))
    return all(n & 0x7F80 != 0x7F80 for n in struct.unpack(f"<{len(data) // 2}H", data))


def check_tree(names: list[str]) -> None:
    groups: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        must(len(parts) <= 32 and all(parts), "parts")
        for n, part in enumerate(parts):
            inside = ".".join(parts[:n])
            try:
                number = int(part)
            except ValueError:
                number = -1
            else:
                must(part == str(number) and number <= 100_000, "a plain index")
            groups[inside] = max(groups.get(inside, 0), number + 1)
    must(not set(names) & set(groups), "no tensor inside another")
    must(sum(groups.values()) <= 1_000_000, "lists")

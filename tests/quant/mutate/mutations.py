"""Right checkpoints, and changes of them: of fields of the header, the config, the index; of any byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from tests.quant.hostile import craft
from tests.quant.hostile.craft import DOWN, FIRST, INDEX, SECOND, UP
from tests.quant.mutate.headers import HEADER, MODES, NAMES, ODD, entry, number

Files = dict[str, bytes]
MODEL = "model.safetensors"


def base(drawn: Random) -> tuple[Files, str]:
    """A right checkpoint, and how it is loaded: as a file or as a folder."""
    tensors = craft.model()
    block = drawn.choice([MODES[0], MODES[0], *MODES])
    if block["mode"] != "affine":
        layers = [craft.block_float(m, block["bits"], block["group_size"]) for m in (UP, DOWN)]
        tensors = layers[0] | layers[1] | {craft.NORM: craft.floats(128)}
        if block["mode"] == "nvfp4":
            tensors[f"{UP}.global_scale"] = craft.floats()
    tensors["flags"] = craft.Stored("BOOL", (4,), b"\0\1\1\0")
    config = json.dumps(craft.config_of(block)).encode()
    layout = drawn.choice(["file", "folder", "shards", "dense"])
    if layout == "dense":
        dense = {"w": craft.floats(4, 6), "layers.0.b": craft.of_bytes("BF16", 8), "n": craft.floats(0, 3)}
        return {"config.json": b'{"model_type": "x"}', MODEL: craft.file_of(dense)}, drawn.choice(
            ["file", "folder"]
        )
    if layout != "shards":
        return {"config.json": config, MODEL: craft.file_of(tensors)}, layout
    parts: dict[str, craft.Tensors] = {FIRST: {}, SECOND: {}}
    for name, stored in tensors.items():
        parts[FIRST if name.startswith(UP) else SECOND][name] = stored
    weights = {name: file for file, part in parts.items() for name in part}
    files = {file: craft.file_of(part) for file, part in parts.items()}
    return {"config.json": config, INDEX: json.dumps({"weight_map": weights}).encode()} | files, "folder"


FILES = [
    FIRST,
    SECOND,
    MODEL,
    "../" + MODEL,
    "/etc/passwd",
    "m\0.safetensors",
    "",
    ".",
    "other.safetensors",
    "a\\b",
]


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def change_header(drawn: Random, files: Files) -> str:
    name = _weights(drawn, files)
    header, data = _split(files[name])
    changes = drawn.choices(HEADER, k=drawn.choice([1, 1, 1, 2]))
    for change in changes:
        try:
            change(drawn, header)
        except (AttributeError, TypeError, KeyError, IndexError):
            break  # an earlier change took what this one wants to change
    text = json.dumps(header, ensure_ascii=drawn.random() < 0.5).encode("utf-8", "surrogatepass")
    if drawn.random() < 0.2:
        text = drawn.choice([b" ", b"\n\t", b""]) + text + drawn.choice([b" " * 7, b"\0", b"\n", b"{}"])
    files[name] = craft.safetensors(text, data)
    return changes[0].__name__


def change_twice(drawn: Random, files: Files) -> str:
    """One name twice, in the header, the config or the index."""
    name = drawn.choice(sorted(files))
    data = files[name]
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]] if name.endswith(".safetensors") else data
    value = json.loads(header) or {"x": 1}
    key = drawn.choice(sorted(value))
    double = header.rstrip()[:-1] + b"," + json.dumps({key: value[key]}).encode()[1:]
    body = data[8 + len(header) :] if name.endswith(".safetensors") else b""
    files[name] = craft.safetensors(double, body) if name.endswith(".safetensors") else double
    return "twice"


def change_length(drawn: Random, files: Files) -> str:
    name = _weights(drawn, files)
    (length,) = struct.unpack("<Q", files[name][:8])
    new = drawn.choice(
        [length - 1, length + 1, length + 8, 0, 1, 2, 2**63, 2**64 - 1, drawn.randrange(2**16)]
    )
    files[name] = struct.pack("<Q", new % 2**64) + files[name][8:]
    return "length"


def change_data(drawn: Random, files: Files) -> str:
    """Numbers only: NaN, infinity, and bytes of a BOOL."""
    name = _weights(drawn, files)
    header, data = _split(files[name])
    entries = {key: value for key, value in header.items() if key != "__metadata__"}
    if not data:
        return "data"
    changed = bytearray(data)
    chosen = entry(drawn, entries)
    start, stop = chosen["data_offsets"]
    if stop - start >= 4:
        at = start + 4 * drawn.randrange((stop - start) // 4)
        changed[at : at + 4] = drawn.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\1\2\3\4"]
        )
    files[name] = craft.safetensors(header, bytes(changed))
    return "data"


def change_size(drawn: Random, files: Files) -> str:
    name = _weights(drawn, files)
    data = files[name]
    files[name] = drawn.choice(
        [
            data[: drawn.randrange(len(data))],
            data[:-1],
            data + b"\0",
            data + b"PK\3\4",
            data + data,
            b"",
            data[8:],
        ]
    )
    return "size"


def change_config(drawn: Random, files: Files) -> str:
    config = json.loads(files["config.json"])
    block: dict[str, Any] = config.get("quantization", {})
    what = drawn.randrange(7)
    if what == 0:
        block[drawn.choice(["bits", "group_size"])] = number(drawn, block.get("bits"))
    elif what == 1:
        block |= drawn.choice(MODES)
    elif what == 2:
        block["mode"] = drawn.choice(["affine", "mxfp4", "mxfp8", "nvfp4", "int4", *ODD])
    elif what == 3:
        module = drawn.choice([UP, DOWN, "absent", "model.norm", "linear_class", "quant_method", "w", ""])
        block[module] = drawn.choice([*ODD, *MODES, {"bits": 8, "group_size": 32}, "mlx", "awq"])
    elif what == 4:
        block.pop(drawn.choice(sorted(block) or ["bits"]), None)
    elif what == 5:
        config[drawn.choice(["quantization", "quantization_config", "model_type"])] = drawn.choice(
            [*ODD, *MODES]
        )
    else:
        config["x"] = drawn.choice([float("nan"), float("inf"), 10**40, "é", [[[]]]])
    if what < 5 and drawn.random() < 0.8:
        config |= {"quantization": block, "quantization_config": block}
    files["config.json"] = json.dumps(config, ensure_ascii=drawn.random() < 0.5).encode()
    return "config"


def change_index(drawn: Random, files: Files) -> str:
    if INDEX not in files:
        files[INDEX] = json.dumps({"weight_map": dict.fromkeys(_split(files[MODEL])[0], MODEL)}).encode()
    value = json.loads(files[INDEX])
    weights = value["weight_map"]
    name = drawn.choice(sorted(weights))
    what = drawn.randrange(6)
    if what == 0:
        weights[name] = drawn.choice([*FILES, *ODD])
    elif what == 1:
        weights.pop(name)
    elif what == 2:
        weights[drawn.choice([*NAMES, "ghost"])] = drawn.choice(FILES)
    elif what == 3:
        value["weight_map"] = drawn.choice(ODD)
    elif what == 4:
        value["metadata"] = drawn.choice(ODD)
    else:
        value["weight_map"] = {key: files_of(drawn, weights[key]) for key in weights}
    files[INDEX] = json.dumps(value).encode()
    return "index"


def files_of(drawn: Random, old: str) -> str:
    return drawn.choice(FILES) if drawn.random() < 0.1 else old


def change_files(drawn: Random, files: Files) -> str:
    name = drawn.choice(sorted(files))
    what = drawn.randrange(4)
    if what == 0:
        del files[name]
    elif what == 1:
        files[drawn.choice(["model-x.safetensors", "model.safetensors", "notes.txt", INDEX])] = files[name]
    elif what == 2:
        files[name] = files[drawn.choice(sorted(files))]
    else:
        files[drawn.choice(["Model.safetensors", "x.safetensors", ".model.safetensors.tmp"])] = b"x"
    return "files"


def change_bytes(drawn: Random, files: Files) -> str:
    """Any byte of any file, mostly of what is parsed."""
    name = drawn.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(drawn.choice([1, 1, 2, 4])):
        if not data:
            break
        limit = len(data) if drawn.random() < 0.2 else min(len(data), 700)
        at = drawn.randrange(limit)
        byte = drawn.choice(
            [drawn.randrange(256), drawn.choice(b'0123456789{}[]",:.-+eENaInf\\u \t\n\0\xff')]
        )
        what = drawn.randrange(3)
        if what == 0:
            data[at] = byte
        elif what == 1:
            data.insert(at, byte)
        else:
            del data[at]
    files[name] = bytes(data)
    return "bytes"


def _weights(drawn: Random, files: Files) -> str:
    return drawn.choice(sorted(name for name in files if name.endswith(".safetensors")))


CHANGES: list[Callable[[Random, Files], str]] = [
    *[change_header] * 8,
    *[change_bytes] * 4,
    *[change_config] * 3,
    *[change_index] * 2,
    change_twice,
    change_length,
    change_data,
    change_size,
    change_files,
]


def mutated(seed: int) -> tuple[Files, str, str]:
    """A changed checkpoint, how it is loaded, and what was changed; always the same for a seed."""
    drawn = Random(seed)
    files, kind = base(drawn)
    if kind == "file" and drawn.random() < 0.3:  # the block of a lone file stands in its metadata
        header, data = _split(files[MODEL])
        block = json.loads(files.pop("config.json")).get("quantization")
        header |= {"__metadata__": {} if block is None else {"quantization": json.dumps(block)}}
        files[MODEL] = craft.safetensors(header, data)
        files.setdefault("config.json", b"{}")
    what = drawn.choice(CHANGES)(drawn, files)
    if kind == "file":
        files.setdefault(MODEL, b"")
    return files, kind, what

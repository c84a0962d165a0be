"""Loads mutated checkpoints one after the other: ``python worker.py FIRST STOP``, one JSON line for each."""

import json
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from qgraph._errors import CheckpointError
from qgraph.quant import QuantizedTensor, load, load_flat
from tests.quant.mutate.mutations import Files, mutated
from tests.quant.mutate.strict import Bad, Tensors, read


def place(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def stored(path: Path) -> dict[str, mx.array]:
    load(path)
    arrays: dict[str, mx.array] = {}
    for name, leaf in load_flat(path).items():
        if isinstance(leaf, QuantizedTensor):
            parts = ("weight", "scales", "biases", "global_scale")
            values = (leaf.packed, leaf.scales, leaf.biases, leaf.global_scale)
            prefix = name.removesuffix("weight")
            arrays |= {prefix + p: v for p, v in zip(parts, values, strict=True) if v is not None}
        else:
            arrays[name] = leaf
    return arrays


def differs(found: dict[str, mx.array], expected: Tensors) -> str:
    if found.keys() != expected.keys():
        return f"other names: {sorted(found.keys() ^ expected.keys())}"
    for name, array in found.items():
        _, shape, data = expected[name]
        if array.shape != shape or memoryview(array).tobytes() != data:
            return f"other numbers in {name}"
    return ""


def judge(path: Path, files: Files, kind: str) -> dict[str, Any]:
    """What the load did, what the rules say, and what is wrong with it, if anything."""
    expected: Tensors | None = None
    rule = ""
    try:
        expected = read(files, kind)
    except Bad as error:
        rule = str(error)
    try:
        found = stored(path)
    except CheckpointError as error:
        text = str(error)
        fault = "refused, but right" if expected is not None else ""
        plain = len(text) <= 400 and text.replace("\n", "").isprintable() and "\n  fix: " in text
        return {"outcome": "refused", "text": text, "rule": rule, "fault": fault if plain else "bad message"}
    except Exception as error:
        return {"outcome": type(error).__name__, "text": ascii(str(error))[:300], "fault": "other exception"}
    fault = "accepted, but wrong" if expected is None else differs(found, expected) and "other numbers"
    return {"outcome": "accepted", "rule": rule, "fault": fault}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        for seed in range(int(sys.argv[1]), int(sys.argv[2])):
            files, kind, what = mutated(seed)
            place(folder, files)
            print(json.dumps({"seed": seed, "begin": what}), flush=True)
            path = folder / "model.safetensors" if kind == "file" else folder
            print(json.dumps({"seed": seed} | judge(path, files, kind)), flush=True)
    os._exit(0)  # nothing is left to clean up


if __name__ == "__main__":
    main()

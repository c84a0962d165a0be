"""Saves checkpoint after checkpoint until it is killed: ``python saver.py PATH FIRST MODE [NUMBER]``.

MODE is run (save FIRST, FIRST + 1, ... and print each when it is saved), crash (die at the NUMBERth call
that touches the folder while FIRST is saved), full (no file may be larger than NUMBER bytes) or hold
(take the lock, and wait).
"""

import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from qgraph._errors import CheckpointError
from qgraph.quant import Quantization, QuantizedTensor, load, load_config, load_flat, pack, save, unpack
from qgraph.quant.commit import writing

ROWS = 256


def parameters(step: int) -> dict[str, Any]:
    """Every number is `step`, and the scheme tells odd steps from even ones."""
    dense = [{"weight": mx.full((ROWS, 128), step, mx.float32)} for _ in range(2)]
    packed = pack(mx.full((ROWS, 128), step, mx.float32), Quantization(bits=4 if step % 2 else 8))
    return {"layers": dense, "head": {"weight": packed}}


def store(path: Path, step: int) -> None:
    """A single file, or a folder with one shard for each tensor."""
    save(path, parameters(step), max_shard_bytes=1)


def stored(path: Path) -> int:
    """The step of the checkpoint, all of it."""
    leaves = load_flat(path)
    assert set(leaves) == {"layers.0.weight", "layers.1.weight", "head.weight"}
    steps: set[int] = set()
    for leaf in leaves.values():
        values = unpack(leaf) if isinstance(leaf, QuantizedTensor) else leaf
        step = round(values[0, 0].item())
        assert mx.all(mx.round(values) == step)
        if isinstance(leaf, QuantizedTensor):
            assert leaf.quantization.bits == (4 if step % 2 else 8)
        steps.add(step)
    assert len(steps) == 1, f"a mixture of {steps}"
    assert len(load(path)["layers"]) == 2
    if path.is_dir():
        block: Any = load_config(path)["quantization"]
        assert block["bits"] == (4 if steps == {step} and step % 2 else 8)
    return steps.pop()


def visible(folder: Path) -> set[float]:
    """The steps of the shards as a reader finds them that knows nothing of unfinished saves."""
    found: set[float] = set()
    for file in folder.glob("model*.safetensors"):
        arrays: Any = mx.load(str(file))
        for name, array in arrays.items():
            if name.startswith("layers"):
                found |= {array.min().item(), array.max().item()}
    return found


def die_at(folder: str, number: int) -> None:
    """End this process, as kill -9 would, at a call that touches the folder."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.truncate") and folder in str(arguments[0]):
            count += 1
            if count == number:
                os._exit(9)

    sys.addaudithook(hook)
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        hook("open", (folder,))
        fsync(descriptor)

    os.fsync = sync


def main() -> None:
    path, first, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if mode == "hold":
        with writing(path):
            print("held", flush=True)
            sys.stdin.read()
        return
    if mode == "run":
        mx.eval(mx.zeros(4))
        print(first - 1, flush=True)
        while True:
            store(path, first)
            print(first, flush=True)
            first += 1
    if mode == "crash":
        die_at(str(path.parent), int(sys.argv[4]))
        store(path, first)
        print("done")
        return
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
    try:
        store(path, first)
    except CheckpointError as error:
        print(error)


if __name__ == "__main__":
    main()

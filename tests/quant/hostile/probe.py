"""Loads one checkpoint in its own process, prints one JSON line: ``python probe.py PATH KIND``."""

import hashlib
import json
import os
import resource
import sys


def peak_kib() -> int:
    """Of this process alone: ru_maxrss starts with that of the parent on Linux."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def open_files() -> int:
    folder = next(f for f in ("/proc/self/fd", "/dev/fd") if os.path.isdir(f))
    return len(os.listdir(folder))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (15, 15))  # an endless loop ends
    import mlx.core as mx

    from qgraph._errors import CheckpointError
    from qgraph.quant import QuantizedTensor, load, load_adapter, load_flat

    mx.eval(mx.zeros(4))
    path, kind = sys.argv[1:]
    found: dict[str, object] = {"loaded": None}
    modules, files, before = set(sys.modules), open_files(), peak_kib()
    arrays: dict[str, mx.array] = {}
    try:
        if kind == "adapter":
            arrays = dict(load_adapter(path).tensors)
        else:
            load(path)
            for name, leaf in load_flat(path).items():
                parts = {name: leaf}
                if isinstance(leaf, QuantizedTensor):
                    named = ("weight", "scales", "biases", "global_scale")
                    stored = (leaf.packed, leaf.scales, leaf.biases, leaf.global_scale)
                    prefix = name.removesuffix("weight")
                    parts = {prefix + n: a for n, a in zip(named, stored, strict=True) if a is not None}
                arrays |= parts
        found["loaded"] = {
            name: [list(array.shape), hashlib.sha256(memoryview(array).tobytes()).hexdigest()]
            for name, array in arrays.items()
        }
    except CheckpointError as error:
        found |= {
            "error": type(error).__name__,
            "text": str(error),
            "alone": error.__cause__ is None and error.__context__ is None,
        }
    except Exception as error:
        found |= {"error": type(error).__name__, "text": str(error)}
    found |= {
        "growth": peak_kib() - before,
        "open": open_files() - files,
        "imported": sorted(set(sys.modules) - modules),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

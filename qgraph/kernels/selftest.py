"""Run as a program in a process of its own: does a built module load, and compute what NumPy does?

A module that was built for another MLX or another CPU may end the process instead of raising; that is why
it is not the user's process that finds out.
"""

from __future__ import annotations

import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

NAME = "qgraph.kernels._native"


def load(path: str) -> ModuleType:
    """The module at `path`. Errors: ImportError, where it does not fit this Python or this MLX."""
    mlx = mlx_version()  # which loads the library that the module needs
    spec = spec_from_file_location(NAME, path, loader=ExtensionFileLoader(NAME, path))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    built_for = getattr(module, "mlx_version", "none")
    if not mlx.startswith(built_for):
        raise ImportError(f"{path} is built for MLX {built_for}, this is {mlx}")
    return module


def mlx_version() -> str:
    """As MLX says it, e.g. 0.32.4."""
    import mlx.core as mx

    return str(vars(mx)["__version__"])


def check(native: Any) -> None:
    """Compare packed products of every instruction set with NumPy's. Errors: AssertionError."""
    import mlx.core as mx
    import numpy as np

    mx.set_default_device(mx.cpu)
    random = np.random.default_rng(0)
    for name in native.instruction_sets():
        native.use(name)
        for rows, bits, dtype in ((1, 4, mx.float32), (3, 8, mx.bfloat16), (9, 4, mx.float16)):
            x = mx.array(random.standard_normal((rows, 128)), mx.float32).astype(dtype)
            weight = mx.array(random.standard_normal((48, 128)), mx.float32)
            packed = [a.astype(dtype) if i else a for i, a in enumerate(mx.quantize(weight, 64, bits))]
            result = native.quantized_matmul(
                x, *packed, None, transpose=True, group_size=64, bits=bits, mode="affine"
            )
            exact = _float64(x) @ _numbers(packed, bits).T
            error = np.abs(_float64(result) - exact).max() / np.abs(exact).max()
            bound = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
            assert error < bound, f"{name}, {bits} bits, {dtype}: {rows} rows are off by {error:.1e}"


def _float64(a: Any) -> Any:
    import mlx.core as mx
    import numpy as np

    return np.array(a.astype(mx.float32)).astype(np.float64)


def _numbers(packed: list[Any], bits: int) -> Any:
    """The numbers of an affine matrix of groups of 64, without a kernel of MLX."""
    import numpy as np

    words, scales, biases = np.array(packed[0]), _float64(packed[1]), _float64(packed[2])
    shifted = words[..., None] >> (bits * np.arange(32 // bits, dtype=np.uint32))
    levels = (shifted & ((1 << bits) - 1)).reshape(*scales.shape, 64)
    return (levels * scales[..., None] + biases[..., None]).reshape(len(words), -1)


if __name__ == "__main__":
    check(load(sys.argv[1]))

"""Faults on the way to the native kernels: they are planted with the kernels in use, the others without."""

from __future__ import annotations

from tests.faults.fault import Fault

WRONG_KERNELS = [
    Fault(
        "native-product-turned-around",
        "qgraph.ops.linear",
        'native.call("matmul", *operands) if self.kernel',
        'native.call("matmul", *operands[::-1]) if self.kernel',
        ("tests/jit/test_transforms.py",),
        kernels="auto",
    ),
    Fault(
        "native-addmm-without-its-bias",
        "qgraph.ops.linear",
        "return f\"mx.add({native.call('matmul', *operands[1:])}, {operands[0]})\"",
        "return f\"mx.add({native.call('matmul', *operands[1:])}, 0)\"",
        ("tests/capture/test_functions.py",),
        kernels="auto",
    ),
    Fault(
        "subtract-of-a-chain-turned-around",
        "qgraph.ops.chain",
        "writer.write(op.name, writer.places(numbers), made.dtype)",
        'writer.write(op.name, writer.places(numbers[:: -1 if op.name == "subtract" else 1]), made.dtype)',
        ("tests/passes/test_fuse_elementwise.py",),
        kernels="auto",
    ),
    Fault(
        "eight-bit-activations-unasked",
        "qgraph.ops.quantized",
        'KERNELS_OF_PRODUCTS = {NATIVE: "",',
        'KERNELS_OF_PRODUCTS = {NATIVE: "int8",',
        ("tests/ops/test_accumulation.py",),
        kernels="auto",
    ),
]

"""Faults of the table of primitives: an argument of MLX's read wrongly, a form of captured code lost."""

from __future__ import annotations

from tests.faults.fault import Fault

PRIMITIVES = "qgraph.capture.primitives."
REPLAY = "tests/capture/primitives/test_primitives.py"
FORMS = "tests/capture/primitives/test_forms.py"

WRONG_PRIMITIVES = [
    Fault(
        "minimum-for-maximum",
        PRIMITIVES + "reductions",
        '"all", "any", "sum", "prod", "min", "max"',
        '"all", "any", "sum", "prod", "max", "min"',
        (f"{REPLAY}::test_the_replay_is_what_mlx_computes[Reduce]",),
    ),
    Fault(
        "alpha-for-beta",
        PRIMITIVES + "products",
        "AddMm(float(alpha), float(beta))",
        "AddMm(float(beta), float(alpha))",
        (f"{REPLAY}::test_the_replay_is_what_mlx_computes[AddMM]",),
    ),
    Fault(
        "fp4-for-fp8",
        PRIMITIVES + "products",
        '("affine", "mxfp4", "mxfp8", "nvfp4")',
        '("affine", "mxfp8", "mxfp4", "nvfp4")',
        (f"{REPLAY}::test_the_replay_is_what_mlx_computes[QuantizedMatmul]",),
    ),
    Fault(
        "any-rows-are-an-embedding",
        PRIMITIVES + "products",
        "len({index for _, index in taken}) > 1 or ",
        "",
        ("tests/capture/primitives/test_by_hand.py",),
    ),
    Fault(
        "indices-by-steps-are-all-in-order",
        PRIMITIVES + "products",
        "isinstance(index.op, Arange) and (index.op.start, index.op.step) == (0, 1)",
        "isinstance(index.op, Arange)",
        (FORMS,),
    ),
    Fault(
        "slice-backwards-misses-the-first",
        PRIMITIVES + "shapes",
        "max(stop, -1) if by < 0",
        "max(stop, 0) if by < 0",
        (f"{REPLAY}::test_the_replay_is_what_mlx_computes[Slice]",),
    ),
    Fault(
        "broadcast-dropped-that-was-needed",
        PRIMITIVES + "elementwise",
        "if broadcast_shapes(*(x.type.shape for x in tried)) == shape:",
        "if tried:",
        (REPLAY,),
    ),
    Fault(
        "scatter-leaves-the-axes-permuted",
        PRIMITIVES + "indexing",
        "return _permuted(p, out, tuple(order.index(i) for i in range(len(order))))",
        "return out",
        ("tests/capture/primitives/test_by_hand.py",),
    ),
    Fault(
        "addmm-without-its-alpha",
        "qgraph_passes.quantize_dot",
        "product if op.alpha == 1 else qg.multiply(product, op.alpha)",
        "product",
        (FORMS,),
    ),
    Fault(
        "an-encoding-is-not-checked",
        "qgraph.capture.selftest",
        "if (name, plain(arguments)) not in found:",
        "if name not in {other for other, _ in found}:",
        ("tests/capture/test_selftest.py",),
    ),
]

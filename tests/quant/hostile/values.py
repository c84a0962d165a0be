"""Damaged triplets, and quantization blocks that do not fit: C of the reliability report."""

from __future__ import annotations

import struct
from typing import Any

from tests.quant.hostile.craft import (
    BLOCK,
    NORM,
    SECRET,
    UP,
    Case,
    Stored,
    affine,
    block,
    block_float,
    config,
    config_of,
    floats,
    model,
    of_bytes,
    refused,
    tensors,
    write_folder,
)

W, S, B = (f"{UP}.{part}" for part in ("weight", "scales", "biases"))


def like(stored: Stored, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Stored:
    """The same bytes under another type; fewer of them for a smaller shape."""
    shape = stored.shape if shape is None else shape
    count = 1
    for dim in shape:
        count *= dim
    return Stored(dtype or stored.dtype, shape, stored.data[: count * 4])


def put(name: str, value: Stored) -> Any:
    return tensors(lambda t: t.update({name: value}))


def drop(*names: str) -> Any:
    return tensors(lambda t: [t.pop(name) for name in names])


def with_number(number: float, at: int) -> Stored:
    scales = floats(8, 2)
    data = bytearray(scales.data)
    data[4 * at : 4 * at + 4] = struct.pack("<f", number)
    return Stored("F32", (8, 2), bytes(data))


def bad(maker: Any, cause: str, tensor: str, **options: Any) -> Case:
    return refused(maker, cause, tensor=tensor, **options)


TRIPLETS: dict[str, Case] = {
    "C01 no scales": bad(drop(S), "is packed (U32) but has no scales beside it", W),
    "C01b the words alone": bad(drop(S, B), "is packed (U32) but has no scales beside it", W),
    "C02 no biases": bad(drop(B), "has no biases beside it, declared affine4g64", S),
    "C03 no weight": bad(drop(W), "has no packed weight beside it", S),
    "C20 biases alone": bad(drop(W, S), "has no scales beside it", B),
    "C04 one row of scales": bad(
        put(S, floats(1, 2)), "has shape [1, 2], the weight [8, 16] needs [8, groups]", S
    ),
    "C04b one row too few": bad(put(S, floats(7, 2)), "has shape [7, 2]", S),
    "C05 one group too few": bad(
        tensors(lambda t: t.update({S: floats(8, 1), B: floats(8, 1)})), "is not the declared affine4g64", W
    ),
    "C05b one group too many": bad(put(S, floats(8, 3)), "is not the declared affine4g64", W),
    "C06 scales of another rank": bad(put(S, floats(8)), "has shape [8]", S),
    "C07 transposed scales": bad(put(S, floats(2, 8)), "has shape [2, 8]", S),
    "C08 integer scales": bad(put(S, of_bytes("I32", 8, 2)), "is I32, declared affine4g64 needs F16", S),
    "C09 scales F32 and biases F16": bad(put(B, of_bytes("F16", 8, 2)), "is F16, but the scales are F32", B),
    "C10 words I32": bad(put(W, like(affine(UP)[W], "I32")), "is I32, a packed weight is U32", W),
    "C11 words F32": bad(put(W, floats(8, 16)), "is F32, a packed weight is U32", W),
    "C18 words F16": bad(put(W, of_bytes("F16", 8, 16)), "is F16, a packed weight is U32", W),
    "C12 one row of biases too few": bad(put(B, floats(7, 2)), "has shape [7, 2], the scales have [8, 2]", B),
    "C13 biases of another rank": bad(put(B, floats(16)), "has shape [16], the scales have [8, 2]", B),
    "C14 NaN in the scales": bad(put(S, with_number(float("nan"), 5)), "has NaN or infinity", S),
    "C15 infinity in the scales": bad(put(S, with_number(float("inf"), 0)), "has NaN or infinity", S),
    "C16 minus infinity in the biases": bad(put(B, with_number(float("-inf"), 15)), "has NaN or infinity", B),
    "C17 a vector of words": bad(
        tensors(lambda t: t.update({W: of_bytes("U32", 16), S: floats(2), B: floats(2)})),
        "expected rank 2",
        W,
    ),
    "C17b a scalar weight": bad(
        tensors(lambda t: t.update({W: of_bytes("U32"), S: floats(), B: floats()})), "expected rank 2", W
    ),
    "C19 K=80 in groups of 32": bad(
        lambda f: write_folder(
            f,
            {W: of_bytes("U32", 8, 10), S: floats(8, 2), B: floats(8, 2)},
            config_of(BLOCK | {"group_size": 32}),
        ),
        "is not the declared affine4g32",
        W,
    ),
    "C21 no rows of scales": bad(put(S, floats(0, 2)), "has shape [0, 2]", S),
    "C22 no groups": bad(put(S, floats(8, 0)), "is not the declared affine4g64", W),
    "C23 a global scale of an affine layer": bad(
        put(f"{UP}.global_scale", floats()), "has no global scale", f"{UP}.global_scale"
    ),
    "C24 a global scale without a layer": bad(
        put("x.global_scale", floats()), "has no scales beside it", "x.global_scale"
    ),
    "C25 NaN in the scales of mxfp4": bad(
        lambda f: write_folder(
            f,
            block_float(UP, 4, 32) | {S: Stored("U8", (8, 4), b"\xff" * 32)},
            config_of({"mode": "mxfp4", "bits": 4, "group_size": 32}),
        ),
        "has NaN or infinity",
        S,
    ),
    "C26 minus NaN in the scales of nvfp4": bad(
        lambda f: write_folder(
            f,
            block_float(UP, 4, 16) | {S: Stored("U8", (8, 8), b"\xff" * 64)},
            config_of({"mode": "nvfp4", "bits": 4, "group_size": 16}),
        ),
        "has NaN or infinity",
        S,
    ),
    "C27 biases of mxfp4": bad(
        lambda f: write_folder(
            f,
            block_float(UP, 4, 32) | {B: of_bytes("U8", 8, 4)},
            config_of({"mode": "mxfp4", "bits": 4, "group_size": 32}),
        ),
        "declared mxfp4 has no biases",
        B,
    ),
    "C28 a vector of global scales": bad(
        lambda f: write_folder(
            f,
            block_float(UP, 4, 16) | {f"{UP}.global_scale": floats(4)},
            config_of({"mode": "nvfp4", "bits": 4, "group_size": 16}),
        ),
        "is F32[4], expected an F32 scalar",
        f"{UP}.global_scale",
    ),
    "C29 a global scale of NaN": bad(
        lambda f: write_folder(
            f,
            block_float(UP, 4, 16) | {f"{UP}.global_scale": Stored("F32", (), b"\0\0\xc0\x7f")},
            config_of({"mode": "nvfp4", "bits": 4, "group_size": 16}),
        ),
        "has NaN or infinity",
        f"{UP}.global_scale",
    ),
}


def named(changes: Any, cause: str) -> Case:
    return refused(block(changes), cause, "config.json")


def unfit(changes: Any, cause: str, tensor: str = W) -> Case:
    return refused(block(changes), cause, tensor=tensor)


BLOCKS: dict[str, Case] = {
    "C30 bits contradict": unfit(
        {"bits": 8}, "is not the declared affine8g64; shapes fit affine2g128, affine4g64"
    ),
    "C31 group contradicts": unfit({"group_size": 32}, "is not the declared affine4g32"),
    "C32 group 128 contradicts": unfit({"group_size": 128}, "is not the declared affine4g128"),
    "C33 bits 2 contradict": unfit({"bits": 2}, "is not the declared affine2g64"),
    "C34 bits 0": named({"bits": 0}, "bits is 0, supported: 1, 2, 3, 4, 5, 6, 8"),
    "C35 bits 7": named({"bits": 7}, "bits is 7"),
    "C36 bits -4": named({"bits": -4}, "bits is -4"),
    "C37 bits as text": named({"bits": "4"}, "bits is '4'"),
    "C38 bits 4.5": named({"bits": 4.5}, "bits is 4.5"),
    "C38b bits 4.0": named({"bits": 4.0}, "bits is 4.0"),
    "C39 bits true": named({"bits": True}, "bits is True"),
    "C40 bits null": named({"bits": None}, "bits is None"),
    "C41 no bits": named(lambda b: b.pop("bits"), "the quantization block has no bits"),
    "C41b no group": named(lambda b: b.pop("group_size"), "the quantization block has no group_size"),
    "C42 group 0": named({"group_size": 0}, "group_size is 0, supported: 32, 64, 128"),
    "C43 group 48": named({"group_size": 48}, "group_size is 48"),
    "C44 group -32": named({"group_size": -32}, "group_size is -32"),
    "C45 group 2^62": named({"group_size": 2**62}, "group_size is 4611686018427387904"),
    "C45b bits infinite": named({"bits": float("inf")}, "bits is inf"),
    "C46 mode contradicts": unfit({"mode": "mxfp4", "group_size": 32}, "declared mxfp4 needs U8", S),
    "C47 an unknown mode": named({"mode": "int4"}, "mode is 'int4'"),
    "C47b mode is a list": named({"mode": []}, "mode is a list"),
    "C47c mode with escapes": named({"mode": "\x1b[2J" + "x" * 500}, r"mode is '\x1b[2J"),
    "C47d bits of another mode": named({"mode": "nvfp4", "bits": 8, "group_size": 16}, "bits is 8"),
    "C48 no block": refused(config({"model_type": "qwen3"}), "no quantization block declares", tensor=W),
    "C48b an empty block": refused(config({"quantization": {}}), "has no bits", "config.json"),
    "C49 the block is a list": refused(
        config({"quantization": []}), "the quantization block is a list", "config.json"
    ),
    "C49b the block is a number": refused(config({"quantization": 4}), "block is a number", "config.json"),
    "C49c the block is null": refused(config({"quantization": None}), "no quantization block", tensor=W),
    "C50 two blocks disagree": refused(
        config({"quantization": BLOCK, "quantization_config": BLOCK | {"bits": 8}}), "differ", "config.json"
    ),
    "C50b two blocks, 4 and 4.0": refused(
        config({"quantization": BLOCK, "quantization_config": BLOCK | {"bits": 4.0}}), "differ", "config.json"
    ),
    "C51 the packing of another library": named({"quant_method": "awq"}, "quant_method awq is the packing"),
    "C51b quant_method is a list": named({"quant_method": [SECRET]}, "quant_method a list"),
    "C52 an override contradicts": unfit(
        {UP: {"bits": 8, "group_size": 64}}, "is not the declared affine8g64"
    ),
    "C53 an override is a list": named({UP: [4, 64]}, f"quantization of '{UP}' is a list"),
    "C53b an override is a number": named({UP: 4}, "is a number, expected an object or false"),
    "C53c an override is null": named({UP: None}, "is null, expected an object or false"),
    "C54 false over a packed layer": unfit({UP: False}, "declared false (dense)"),
    "C55 nothing is packed": refused(
        lambda f: write_folder(f, {NORM: floats(128)}), "declares affine4g64, but no tensor has scales"
    ),
    "C56 an override of a dense layer": refused(
        lambda f: write_folder(
            f, model() | {"x.weight": floats(8, 64)}, config_of(BLOCK | {"x": {"bits": 8, "group_size": 64}})
        ),
        "is dense, but config.json declares it affine8g64",
        tensor="x.weight",
    ),
    "C57 group 0 in an override": named({UP: {"bits": 4, "group_size": 0}}, "group_size is 0"),
    "C58 bits 0 in an override": named({UP: {"bits": 0, "group_size": 64}}, "bits is 0"),
    "C59 bits true in an override": named({UP: {"bits": True, "group_size": 64}}, "bits is True"),
    "C60 an override with an escape": named({"\x1b[2J\u202e": 7}, r"'\x1b[2J\u202e' is a number"),
    "C61 an override with a name of a million letters": named({"x" * 10**6: 7}, "xxx...' is a number"),
}

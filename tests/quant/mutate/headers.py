"""Changes of the header of a safetensors file, one function each."""

from __future__ import annotations

import json
from random import Random
from typing import Any

MODES: list[dict[str, Any]] = [
    {"mode": "affine", "bits": 4, "group_size": 64},
    {"mode": "mxfp4", "bits": 4, "group_size": 32},
    {"mode": "mxfp8", "bits": 8, "group_size": 32},
    {"mode": "nvfp4", "bits": 4, "group_size": 16},
]
NUMBERS: list[Any] = [
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    16,
    31,
    32,
    64,
    127,
    128,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    2**64,
    -1,
    -4,
]
ODD: list[Any] = [True, False, None, 4.0, 0.5, 1e300, "4", "", [], [4], {}, {"bits": 4, "group_size": 64}]
DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "I64",
    "C64",
    "F64",
    "F8_E4M3",
    "f32",
    "",
    "Q4",
]
NAMES = [
    "",
    "a",
    "a.b",
    "layers.0",
    "layers.01.w",
    "x\x1b",
    "\u202e",
    "weight",
    "scales",
    "n.99999999",
    "é",
    "a" * 1001,
]


def number(drawn: Random, old: object) -> Any:
    """Near `old`, or anything that stands for a number."""
    if isinstance(old, int) and drawn.random() < 0.5:
        return drawn.choice([old + 1, old - 1, old * 2, old // 2, -old, old + 2**32, old + 2**64, float(old)])
    return drawn.choice(NUMBERS if drawn.random() < 0.6 else ODD)


def entry(drawn: Random, header: dict[str, Any]) -> Any:
    return header[drawn.choice(sorted(header))]


def header_dtype(drawn: Random, header: dict[str, Any]) -> None:
    entry(drawn, header)["dtype"] = drawn.choice([*DTYPES, *ODD])


def header_shape(drawn: Random, header: dict[str, Any]) -> None:
    shape = entry(drawn, header)["shape"]
    what = drawn.randrange(6)
    if what == 0 or not shape:
        shape.insert(drawn.randint(0, len(shape)), drawn.choice([1, 1, 0, 2, True]))
    elif what == 1:
        shape.pop(drawn.randrange(len(shape)))
    elif what == 2:
        drawn.shuffle(shape)
    elif what == 3:
        shape[0] = shape[0] * 2
        shape[-1] = shape[-1] // 2
    else:
        at = drawn.randrange(len(shape))
        shape[at] = number(drawn, shape[at])


def header_offsets(drawn: Random, header: dict[str, Any]) -> None:
    offsets = entry(drawn, header)["data_offsets"]
    what = drawn.randrange(5)
    if what == 0:
        shift = drawn.choice([1, -1, 4, 8, 2**32, 2**64, -(2**64)])
        offsets[:] = [offsets[0] + shift, offsets[1] + shift]
    elif what == 1:
        offsets.reverse()
    elif what == 2:
        offsets[:] = list(entry(drawn, header)["data_offsets"])
    elif what == 3:
        offsets[:] = drawn.choice([[], [0], [0, 0, 0], [0, 0]])
    else:
        at = drawn.randrange(2)
        offsets[at] = number(drawn, offsets[at])


def header_names(drawn: Random, header: dict[str, Any]) -> None:
    name = drawn.choice(sorted(header))
    other = drawn.choice(
        [*NAMES, name + "x", name.replace("scales", "biases"), name.replace("weight", "scales")]
    )
    items = [(other if key == name else key, value) for key, value in header.items()]
    header.clear()
    header.update(items)


def header_entries(drawn: Random, header: dict[str, Any]) -> None:
    name = drawn.choice(sorted(header))
    what = drawn.randrange(5)
    if what == 0:
        header.pop(name)
    elif what == 1:
        header[drawn.choice(NAMES)] = dict(header[name])
    elif what == 2:
        header[name].pop(drawn.choice(sorted(header[name])))
    elif what == 3:
        header[name][drawn.choice(["extra", "offset"])] = 1
    else:
        header[name] = drawn.choice(ODD)


def header_metadata(drawn: Random, header: dict[str, Any]) -> None:
    block = json.dumps(drawn.choice(MODES) | {"x": False})
    header["__metadata__"] = drawn.choice([{"format": "mlx"}, {}, {"quantization": block}, {"v": 1}, *ODD])


def header_order(drawn: Random, header: dict[str, Any]) -> None:
    """The names in another order: that changes nothing."""
    items = list(header.items())
    drawn.shuffle(items)
    header.clear()
    header.update(items)


HEADER = (
    header_dtype,
    header_shape,
    header_offsets,
    header_names,
    header_entries,
    header_metadata,
    header_order,
)

"""Damaged safetensors files, by the row of the reliability report: A the frame, B the entries, E sizes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from tests.quant.hostile.craft import (
    DATA,
    SECRET,
    A,
    B,
    Case,
    Maker,
    Stored,
    content,
    entry,
    file_of,
    floats,
    header,
    refused,
    safetensors,
)


def file(data: bytes, cause: str) -> Case:
    return refused(content(data), cause)


def at_a(maker: Maker, cause: str) -> Case:
    return refused(maker, cause, tensor="a")


def without(name: str) -> Maker:
    return header({"a": {k: v for k, v in A.items() if k != name}, "b": B})


def spaced(size: int) -> bytes:
    """A right header filled up with spaces."""
    text = json.dumps({"a": A, "b": B}).encode()
    return text + b" " * (size - len(text))


def sparse(claim: int) -> Maker:
    """One tensor of `claim` bytes, of which none is on the disk."""

    def make(folder: Path) -> Path:
        entries = {"a": {"dtype": "U8", "shape": [claim >> 20, 2**20], "data_offsets": [0, claim]}}
        path = folder / "model.safetensors"
        path.write_bytes(safetensors(entries))
        os.truncate(path, path.stat().st_size + claim)
        return path

    return make


def machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def many(count: int) -> str:
    one = '"t{0}":{{"dtype":"U8","shape":[1],"data_offsets":[{0},{1}]}}'
    return "{" + ",".join(one.format(n, n + 1) for n in range(count)) + "}"


def many_over_one_span() -> object:
    one = {"dtype": "U8", "shape": [4 << 20], "data_offsets": [0, 4 << 20]}
    return {f"t{n}": one for n in range(1024)}


WHOLE = safetensors({"a": A, "b": B}, DATA)
ONE_NAME = '{"a":' + json.dumps(A) + ',"a":' + json.dumps(A) + ',"b":' + json.dumps(B) + "}"
OTHER = json.dumps({"dtype": "U8", "shape": [4], "data_offsets": [24, 28]})

FRAME: dict[str, Case] = {
    "A01 empty": file(b"", "has 0 bytes, a header needs at least 8"),
    "A02 3 bytes": file(b"\1\0\0", "has 3 bytes"),
    "A03 header length 0": file(bytes(8), "claims a header of 0 bytes"),
    "A04 header length 2^63": file(
        struct.pack("<Q", 2**63) + b"{}", "claims a header of more than 100000000 bytes"
    ),
    "A05 header length 2^64 - 1": file(b"\xff" * 8 + b"{}", "claims a header of more than 100000000 bytes"),
    "A06 header length past the end": file(WHOLE[:60], "the header alone needs"),
    "A07 header of 99 MB that is not there": file(struct.pack("<Q", 99_000_000) + b"{}", "needs 99000008"),
    "A08 header one byte over the limit": refused(
        content(lambda: struct.pack("<Q", 100_000_001) + bytes(100_000_001)),
        "claims a header of more than 100000000 bytes",
    ),
    "A09 header of 100 MB of spaces": refused(header(lambda: " " * 100_000_000), "is not JSON", growth=420),
    "A10 cut in the header": file(struct.pack("<Q", 100) + b'{"a": {', "has 15 bytes"),
    "A11 cut in the data": refused(content(WHOLE[:-1]), "is cut: the file has", tensor="b"),
    "A12 cut before the data": refused(content(WHOLE[: -len(DATA)]), "is cut", tensor="b"),
    "A13 a zip behind it": file(WHOLE + b"PK\3\4" + bytes(96), "has 100 bytes behind the last tensor"),
    "A14 a NUL behind it": file(WHOLE + b"\0", "has 1 bytes behind the last tensor"),
    "A15 not JSON": refused(header("{hello}"), "is not JSON"),
    "A16 an array": refused(header("[]"), "is a list, not an object"),
    "A17 null": refused(header("null"), "is null, not an object"),
    "A18 unterminated": refused(header('{"a": '), "is not JSON"),
    "A19 a trailing comma": refused(header('{"a": 1,}'), "is not JSON"),
    "A20 a second object": refused(header("{}{}", b""), "is not JSON: Extra data"),
    "A21 NUL padding": refused(header(b'{"a": 1}\0\0\0'), "is not JSON"),
    "A22 bad UTF-8": refused(header(b'{"\xff": 1}'), "is not valid UTF-8"),
    "A23 overlong UTF-8": refused(header(b'{"\xc0\xaf": 1}'), "is not valid UTF-8"),
    "A24 a lone surrogate": refused(header(b'{"\\ud800": 1}'), "is not valid UTF-8"),
    "A25 a byte order mark": refused(header(b"\xef\xbb\xbf{}"), "byte order mark"),
    "A26 UTF-16": refused(header('{"a": 1}'.encode("utf-16")), "is not"),
    "A27 a million lists": refused(header(lambda: "[" * 1_000_000 + "]" * 1_000_000), "nests deeper than 64"),
    "A28 a million objects": refused(
        header(lambda: '{"a":' * 1_000_000 + "1" + "}" * 1_000_000), "nests deeper than 64", growth=300
    ),
    "A29 a raw control character": refused(header(b'{"a\n": 1}'), "is not JSON: Invalid control"),
    "A30 metadata is a number": refused(
        header({"__metadata__": 7, "a": A, "b": B}), "__metadata__ is a number"
    ),
    "A31 metadata is a list": refused(header({"__metadata__": [], "a": A, "b": B}), "__metadata__ is a list"),
    "A31b metadata holds a number": refused(
        header({"__metadata__": {"v": 1}, "a": A, "b": B}), "'v' is a number"
    ),
    "A31c metadata holds no JSON": refused(
        header({"__metadata__": {"quantization": "{"}, "a": A, "b": B}), "quantization metadata is not JSON"
    ),
    "A32 one name twice, same span": refused(header(ONE_NAME), "the key 'a' twice"),
    "A33 one name twice, another span": refused(
        header('{"a":' + json.dumps(A) + ',"a":' + OTHER + "}"), "the key 'a' twice"
    ),
    "A34 one field twice": refused(
        header('{"a":{"dtype":"F32","dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'),
        "the key 'dtype' twice",
    ),
    "A35 a git-lfs pointer": file(b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
    "A36 an HTML page": file(b"<!DOCTYPE html><html>", "is an HTML or XML page"),
    "A37 a pickle": file(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00", "is a pickle"),
    "A38 GGUF": file(b"GGUF\3\0\0\0\0\0\0\0", "is a GGUF file"),
    "A38b a PyTorch zip": file(b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "PyTorch pickle"),
    "A38c gzip": file(b"\x1f\x8b\x08\0\0\0\0\0\0\0", "is a gzip file"),
    "A38d JSON": file(b'{"model_type": "qwen3"}', "is a JSON text"),
    "A38e NumPy": file(b"\x93NUMPY\1\0v\0{'descr': '<f4'}", "is a NumPy file"),
    "A40 NaN": refused(header('{"a": NaN}'), "contains NaN"),
    "A41 quotes to backtrack on": refused(
        header(lambda: '"' + '\\"' * 10_000_000 + "\\"), "is not JSON", growth=100
    ),
    "A42 a secret that is no JSON": refused(header(SECRET), "is not JSON"),
    "A43 ten million items": refused(
        header(lambda: "[" + "1," * 10_000_000 + "1]"), "more than 2000000 items", growth=100
    ),
}

ENTRIES: dict[str, Case] = {
    "B01 no dtype": at_a(without("dtype"), "has the fields data_offsets, shape"),
    "B02 no shape": at_a(without("shape"), "has the fields data_offsets, dtype"),
    "B03 no offsets": at_a(without("data_offsets"), "has the fields dtype, shape"),
    "B04 unknown dtype": at_a(entry(dtype="Q4"), "dtype Q4 is not supported"),
    "B05 lower-case dtype": at_a(entry(dtype="f32"), "dtype f32 is not supported"),
    "B06 numeric dtype": at_a(entry(dtype=7), "dtype a number is not supported"),
    "B06b dtype is a list": at_a(entry(dtype=["F32"]), "dtype a list is not supported"),
    "B06c dtype is an object": at_a(entry(dtype={}), "dtype an object is not supported"),
    "B07 dtype null": at_a(entry(dtype=None), "dtype null is not supported"),
    "B08 unknown field": at_a(entry(extra=1), "has the fields"),
    "B09 one negative dim": at_a(entry(shape=[-2, 3]), "the shape is not a list of whole numbers"),
    "B10 two negative dims": at_a(entry(shape=[-2, -3]), "the shape is not a list of whole numbers"),
    "B11 the product wraps to 0": at_a(entry(shape=[2**31 - 1, 2**31 - 1, 4]), "needs 7378697"),
    "B12 2^32 x 2^32": at_a(entry(shape=[2**32, 2**32]), "the shape"),
    "B13 dim 2^32": at_a(entry(shape=[2**32, 0]), "the shape"),
    "B14 dim 2^32 + 2": at_a(entry(shape=[2**32 + 2, 3]), "the shape"),
    "B15 dim 2^63": at_a(entry(shape=[2**63, 3]), "the shape"),
    "B16 dim of 400 digits": refused(
        header(f'{{"a":{{"dtype":"F32","shape":[{"9" * 400}],"data_offsets":[0,24]}}}}'),
        "number of 400 digits",
    ),
    "B16b dim of a million digits": refused(
        header(lambda: f'{{"a":{{"dtype":"F32","shape":[{"9" * 10**6}],"data_offsets":[0,24]}}}}'),
        "number of 1000000 digits",
    ),
    "B17 float dim": at_a(entry(shape=[2.5, 3]), "the shape"),
    "B18 integral float dim": at_a(entry(shape=[2.0, 3]), "the shape"),
    "B18b huge float dim": at_a(entry(shape=[1e300, 3]), "the shape"),
    "B19 bool dim": at_a(entry(shape=[True, 6]), "the shape"),
    "B20 text dim": at_a(entry(shape=["2", 3]), "the shape"),
    "B21 null dim": at_a(entry(shape=[None, 3]), "the shape"),
    "B22 nested shape": at_a(entry(shape=[[2, 3]]), "the shape"),
    "B23 the shape is a number": at_a(entry(shape=6), "the shape"),
    "B24 rank 20,000": at_a(entry(shape=[1] * 20_000), "rank at most 32"),
    "B25 shape too small": at_a(entry(shape=[2, 2]), "F32[2, 2] needs 16 bytes, has 24"),
    "B26 shape too large": at_a(entry(shape=[2, 4]), "F32[2, 4] needs 32 bytes, has 24"),
    "B27 dtype of another size": at_a(entry(dtype="F16"), "F16[2, 3] needs 12 bytes, has 24"),
    "B28 reversed offsets": at_a(entry(data_offsets=[24, 0]), "data_offsets are not two whole numbers"),
    "B29 one offset": at_a(entry(data_offsets=[24]), "data_offsets"),
    "B30 three offsets": at_a(entry(data_offsets=[0, 24, 24]), "data_offsets"),
    "B31 past the end": at_a(entry(data_offsets=[100, 124]), "is cut: the file has"),
    "B32 negative offset": at_a(entry(data_offsets=[-24, 0]), "data_offsets"),
    "B33 float offsets": at_a(entry(data_offsets=[0.0, 24.0]), "data_offsets"),
    "B34 text offsets": at_a(entry(data_offsets="0,24"), "data_offsets"),
    "B35 offsets null": at_a(entry(data_offsets=None), "data_offsets"),
    "B36 the offset wraps 2^64": at_a(entry(data_offsets=[2**64 - 24, 2**64]), "data_offsets"),
    "B36b the offset wraps 2^63": at_a(entry(data_offsets=[2**63 - 24, 2**63]), "is cut"),
    "B36c the header is read as data": at_a(entry(data_offsets=[2**64 - 100, 2**64 - 76]), "data_offsets"),
    "B37 exact overlap": refused(
        header({"a": A, "c": A}, DATA[:24]), "overlaps the tensor before it", tensor="c"
    ),
    "B38 partial overlap": refused(
        header({"a": A, "b": {"dtype": "U8", "shape": [8], "data_offsets": [20, 28]}}), "overlaps", tensor="b"
    ),
    "B39 a hole": refused(
        header({"a": A, "b": {"dtype": "U8", "shape": [2], "data_offsets": [26, 28]}}),
        "follows a hole",
        tensor="b",
    ),
    "B39b a hole in front": refused(header({"b": B}), "follows a hole", tensor="b"),
    "B39c no tensor, but data": refused(header({}), "has 28 bytes behind"),
    "B40 1,024 names over 4 MiB": refused(
        header(many_over_one_span, bytes(4 << 20)), "overlaps", tensor="t1"
    ),
    "B42 F64": at_a(entry(dtype="F64", shape=[3]), "cast it to F32"),
    "B42b F8": at_a(entry(dtype="F8_E4M3", shape=[24]), "dtype F8_E4M3 is not supported"),
    "B42c F4": at_a(entry(dtype="F4", shape=[48]), "dtype F4 is not supported"),
    "B42d F6": at_a(entry(dtype="F6_E2M3", shape=[32]), "dtype F6_E2M3 is not supported"),
    "B43 BOOL of other bytes": refused(
        header({"a": {"dtype": "BOOL", "shape": [28], "data_offsets": [0, 28]}}),
        "is BOOL with bytes",
        tensor="a",
    ),
    "B44 ESC in a name": refused(header({"a\x1b[2J": A, "b": B}), r"a\x1b[2J"),
    "B44b NUL in a name": refused(header({"a\0": A, "b": B}), "has control characters"),
    "B44c right-to-left override in a name": refused(header({"a\u202egpj.b": A, "b": B}), r"a\u202egpj.b"),
    "B44d zero-width space in a name": refused(header({"a\u200b": A, "b": B}), r"a\u200b"),
    "B44e line break in a name": refused(header({"a\nfix: run me": A, "b": B}), r"a\nfix: run me"),
    "B45 an empty name": refused(header({"": A, "b": B}), "the name is empty"),
    "B46 a name of a million letters": refused(header(lambda: {"x" * 10**6: A, "b": B}), "longer than 1000"),
    "B47 an entry is a list": refused(header({"a": [], "b": B}), "tensor 'a' is a list"),
    "B48 an entry is null": refused(header({"a": None, "b": B}), "tensor 'a' is null"),
    "B49 a long name of odd characters": refused(
        header({"\u202e" * 900: A | {"dtype": "Q"}, "b": B}), "characters"
    ),
    "B50 200,000 tensors": refused(
        header(lambda: many(200_000), bytes(200_000)), "has 200000 tensors, at most 100000", growth=250
    ),
    "B51 a million tensors": refused(
        header(lambda: many(1_000_000), bytes(1_000_000)), "more than 2000000 items", growth=160
    ),
    "B52 two names that look alike are two names, a damaged one is named": refused(
        header({"a": A, "\u0430": B | {"dtype": "Q"}}), "dtype Q", tensor="\u0430"
    ),
}

TREES: dict[str, Case] = {
    f"T0{n} {what}": refused(content(file_of(dict.fromkeys(names, floats(2)))), cause)
    for n, (what, names, cause) in enumerate(
        [
            ("a tensor inside another", ["a", "a.b"], "tensor 'a': is a tensor and has tensors inside it"),
            ("a huge list", ["layers.999999999.w"], "a list index above 100000"),
            ("leading zeros", ["layers.01.w"], "not a plain list index"),
            ("an underscore", ["layers.1_0.w"], "not a plain list index"),
            ("a space before a huge number", ["layers. 99999999999.w"], "not a plain list index"),
            ("a sign", ["layers.+99999999999.w"], "not a plain list index"),
            ("a foreign digit", ["layers.\u0669.w"], "not a plain list index"),
            ("an empty part", ["a..b"], "an empty part"),
            ("2,000 parts", [".".join("a" * 400)], "more than 32 parts"),
            ("many long lists", [f"x{n}.100000" for n in range(20)], "more than 1000000 items"),
        ]
    )
}

SIZES: dict[str, Case] = {
    "E01 the claim is above the memory": refused(
        sparse((machine() // 2**20 + 1024) * 2**20), "GB, this machine has", growth=10
    ),
    "E02 8 TB, sparse": refused(sparse(2**43), "needs 8796.1 GB, this machine has", growth=10),
}

AB = {"a": Stored("F32", (2, 3), DATA[:24]), "b": Stored("U8", (4,), DATA[24:])}

LOAD: dict[str, Case] = {
    "A39 leading white space": Case(header(" \n\t" + json.dumps({"a": A, "b": B})), loaded=lambda: AB),
    "A44 a header of 2 MB of trailing spaces": Case(header(lambda: spaced(2_000_000)), loaded=lambda: AB),
    "B13b sizes of 0": Case(
        content(lambda: file_of({"z": floats(0, 3), "a": floats(2), "k": floats(3, 0), "s": floats()})),
        loaded=lambda: {"z": floats(0, 3), "a": floats(2), "k": floats(3, 0), "s": floats()},
    ),
    "B53 names that look alike": Case(
        content(lambda: file_of({"a": floats(2), "\u0430": floats(3)})),
        loaded=lambda: {"a": floats(2), "\u0430": floats(3)},
    ),
    "B54 no tensors": Case(header("{}", b""), loaded=dict),
    "B55 a file beside no config": Case(
        content(lambda: file_of({"w": floats(4)})), loaded=lambda: {"w": floats(4)}
    ),
    "B56 10,000 tensors": Case(
        header(lambda: many(10_000), bytes(10_000)),
        loaded=lambda: {f"t{n}": Stored("U8", (1,), b"\0") for n in range(10_000)},
        growth=80,
    ),
}


FILES = FRAME | ENTRIES | TREES | SIZES | LOAD

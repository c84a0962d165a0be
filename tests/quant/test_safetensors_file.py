# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (safetensors.safe_open has no types)

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from qgraph._errors import CheckpointError
from qgraph.quant import load_flat
from qgraph.quant.safetensors_file import DTYPES, read_header

Raw = Callable[..., bytes]
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}
DATA = bytes(28)


def entry(**changes: object) -> dict[str, object]:
    """A header in which tensor `a` is damaged and `b` is right."""
    return {"a": A | changes, "b": B}


def without(field: str) -> dict[str, object]:
    return {"a": {k: v for k, v in A.items() if k != field}, "b": B}


# name: (header, data, expected text)
HEADERS: dict[str, tuple[object, bytes, str]] = {
    "missing dtype": (without("dtype"), DATA, "'a': has the fields data_offsets, shape"),
    "missing shape": (without("shape"), DATA, "'a': has the fields"),
    "missing offsets": (without("data_offsets"), DATA, "'a': has the fields"),
    "unknown field": (entry(extra=1), DATA, "'a': has the fields"),
    "unknown dtype": (entry(dtype="Q4"), DATA, "'a': dtype Q4 is not supported"),
    "lower-case dtype": (entry(dtype="f32"), DATA, "dtype f32 is not supported"),
    "numeric dtype": (entry(dtype=7), DATA, "dtype a number is not supported"),
    "dtype null": (entry(dtype=None), DATA, "dtype null is not supported"),
    "dtype F64": (entry(dtype="F64", shape=[3]), DATA, "cast it to F32"),
    "dtype F8": (entry(dtype="F8_E4M3", shape=[24]), DATA, "dtype F8_E4M3"),
    "one negative dim": (entry(shape=[-2, 3]), DATA, "'a': the shape"),
    "two negative dims": (entry(shape=[-2, -3]), DATA, "'a': the shape"),
    "product wraps to 0": (entry(shape=[2**31 - 1, 2**31 - 1, 4]), DATA, "'a': F32"),
    "dim 2^32 + 2": (entry(shape=[2**32 + 2, 3]), DATA, "'a': the shape"),
    "dim 2^63": (entry(shape=[2**63, 3]), DATA, "'a': the shape"),
    "dim of 400 digits": (
        f'{{"a":{{"dtype":"F32","shape":[{"9" * 400}],"data_offsets":[0,24]}}}}',
        DATA,
        "a number of 400 digits",
    ),
    "float dim": (entry(shape=[2.5, 3]), DATA, "'a': the shape"),
    "integral float dim": (entry(shape=[2.0, 3]), DATA, "'a': the shape"),
    "huge float dim": (entry(shape=[1e300, 3]), DATA, "'a': the shape"),
    "bool dim": (entry(shape=[True, 6]), DATA, "'a': the shape"),
    "text dim": (entry(shape=["2", 3]), DATA, "'a': the shape"),
    "shape is a number": (entry(shape=6), DATA, "'a': the shape"),
    "rank 20000": (entry(shape=[1] * 20_000), DATA, "rank at most 32"),
    "shape too small": (entry(shape=[2, 2]), DATA, "'a': F32[2, 2] needs 16 bytes, has 24"),
    "shape too large": (entry(shape=[2, 4]), DATA, "'a': F32[2, 4] needs 32 bytes, has 24"),
    "reversed offsets": (entry(data_offsets=[24, 0]), DATA, "'a': data_offsets"),
    "one offset": (entry(data_offsets=[24]), DATA, "'a': data_offsets"),
    "three offsets": (entry(data_offsets=[0, 24, 24]), DATA, "'a': data_offsets"),
    "float offsets": (entry(data_offsets=[0.0, 24.0]), DATA, "'a': data_offsets"),
    "negative offset": (entry(data_offsets=[-24, 0]), DATA, "'a': data_offsets"),
    "offset wraps 2^64": (entry(data_offsets=[2**64 - 24, 2**64]), DATA, "'a': data_offsets"),
    "offset wraps 2^63": (entry(data_offsets=[2**63 - 24, 2**63]), DATA, "'a': is cut"),
    "past the end": (entry(data_offsets=[100, 124]), DATA, "'a': is cut: the file has"),
    "exact overlap": ({"a": A, "c": A}, DATA[:24], "overlaps"),
    "partial overlap": (
        {"a": A, "b": {"dtype": "U8", "shape": [8], "data_offsets": [20, 28]}},
        DATA,
        "'b': overlaps",
    ),
    "hole": (
        {"a": A, "b": {"dtype": "U8", "shape": [2], "data_offsets": [26, 28]}},
        DATA,
        "'b': follows a hole",
    ),
    "hole in front": ({"b": B}, DATA, "'b': follows a hole"),
    "cut data": ({"a": A, "b": B}, DATA[:-1], "'b': is cut"),
    "no data": ({"a": A, "b": B}, b"", "is cut"),
    "trailing byte": ({"a": A, "b": B}, DATA + b"\0", "1 bytes behind"),
    "trailing zip": ({"a": A, "b": B}, DATA + b"PK\3\4" + bytes(96), "100 bytes behind"),
    "metadata number": ({"__metadata__": {"v": 1}, "a": A, "b": B}, DATA, "__metadata__ 'v'"),
    "metadata list": ({"__metadata__": [], "a": A, "b": B}, DATA, "__metadata__ is a list"),
    "escape in a name": ({"a\x1b[2J": A, "b": B}, DATA, r"a\x1b[2J"),
    "NUL in a name": ({"a\0": A, "b": B}, DATA, "control characters"),
    "empty name": ({"": A, "b": B}, DATA, "the name is empty"),
    "entry is a list": ({"a": [], "b": B}, DATA, "tensor 'a' is a list"),
    "not JSON": ("{hello}", b"", "is not JSON"),
    "array": ("[]", b"", "is a list"),
    "null": ("null", b"", "is null"),
    "unterminated": ('{"a": ', b"", "is not JSON"),
    "unterminated text": ('{"a', b"", "is not JSON"),
    "trailing comma": ('{"a": 1,}', b"", "is not JSON"),
    "second object": ("{}{}", b"", "is not JSON"),
    "NaN": ('{"a": NaN}', b"", "contains NaN"),
    "NUL padding": (b"{}\0\0", b"", "is not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "byte order mark"),
    "bad UTF-8": (b'{"\xff": 1}', b"", "not valid UTF-8"),
    "overlong UTF-8": (b'{"\xc0\xaf": 1}', b"", "not valid UTF-8"),
    "lone surrogate": (b'{"\\ud800": 1}', b"", "not valid UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), b"", "is not"),
    "deep lists": ("[" * 1_000_000 + "]" * 1_000_000, b"", "deeper than 64"),
    "deep objects": ('{"a":' * 1_000_000 + "1" + "}" * 1_000_000, b"", "deeper than 64"),
    "quotes to backtrack on": ('"' + '\\"' * 1_000_000 + "\\", b"", "is not JSON"),
    "duplicate name": (
        f'{{"a":{json.dumps(A)},"a":{json.dumps(A)},"b":{json.dumps(B)}}}',
        DATA,
        "the key 'a' twice",
    ),
    "duplicate field": (
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
        DATA[:24],
        "the key 'dtype' twice",
    ),
}

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "3 bytes": (b"\1\0\0", "has 3 bytes"),
    "header length 0": (bytes(8), "claims a header of 0 bytes"),
    "header length 2^63": (struct.pack("<Q", 2**63) + b"{}", "claims a header"),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", "claims a header"),
    "header of 99 MB, not there": (struct.pack("<Q", 99_000_000) + b"{}", "the header alone"),
    "cut in the header": (struct.pack("<Q", 100) + b'{"a": {', "has 15 bytes"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
    "HTML": (b"<!DOCTYPE html><html>", "HTML"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00", "pickle"),
    "PyTorch zip": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "PyTorch pickle"),
    "GGUF": (b"GGUF\3\0\0\0\0\0\0\0", "GGUF"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\0", "gzip"),
    "JSON": (b'{"model_type": "qwen3"}', "JSON text"),
}


def refusal(path: Path, within: float = 2.0) -> str:
    """The text of the one error; it must be short, printable, quick, and name the file."""
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert time.perf_counter() - start < within
    text = str(caught.value)
    assert caught.value.fix
    assert text.startswith(path.name)
    assert len(text) <= 400
    assert text.replace("\n", "").isprintable()
    return text


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_header_is_refused(case: str, raw: Raw, tmp_path: Path) -> None:
    header, data, expected = HEADERS[case]
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw(header, data))
    assert expected in refusal(file)


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_safetensors_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, expected = FILES[case]
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    assert expected in refusal(file)


def test_many_names_over_one_span_are_refused_before_allocating(raw: Raw, tmp_path: Path) -> None:
    one = {"dtype": "U8", "shape": [4096], "data_offsets": [0, 4096]}
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw({f"t{n}": one for n in range(1024)}, bytes(4096)))
    assert "overlaps" in refusal(file)


def test_a_sparse_file_that_claims_terabytes_is_refused(raw: Raw, tmp_path: Path) -> None:
    size = 2**43
    file = tmp_path / "m.safetensors"
    head = raw({"a": {"dtype": "F32", "shape": [2**21, 2**20], "data_offsets": [0, size]}})
    file.write_bytes(head)
    try:
        os.truncate(file, len(head) + size)
    except OSError:
        pytest.skip("no sparse files of this size here")
    with pytest.raises(CheckpointError, match=r"needs 8796\.1 GB, this machine has"):
        load_flat(file)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe.safetensors", tmp_path / "folder.safetensors"
    os.mkfifo(pipe)
    folder.mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "passwd.safetensors").symlink_to("/etc/passwd")
    assert "is a pipe" in refusal(pipe)
    assert "is a folder" in refusal(folder)
    assert "cannot be opened" in refusal(tmp_path / "loop.safetensors")
    assert "no such file" in refusal(tmp_path / "dangling.safetensors")
    assert "root" not in refusal(tmp_path / "passwd.safetensors")
    assert "is a device" in refusal(Path("/dev/null"))
    assert "no such file" in refusal(tmp_path / "absent.safetensors")


def test_links_of_a_download_cache_are_followed(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "0a1b2c").write_bytes(raw({"a": A, "b": B}, DATA))
    (tmp_path / "model.safetensors").symlink_to("0a1b2c")
    assert set(load_flat(tmp_path / "model.safetensors")) == {"a", "b"}


@pytest.mark.parametrize("name", ["x" * 5000, "\u202e" * 3000, "\n" * 3000, "é" * 3000])
def test_a_long_or_odd_name_is_clipped_and_escaped(name: str, raw: Raw, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw({name: A | {"dtype": "Q"}, "b": B}, DATA))
    refusal(file)


def test_a_header_is_read_in_file_order_with_exact_positions(raw: Raw, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw({"__metadata__": {"format": "mlx"}, "b": B, "a": A}, DATA))
    header = read_header(file)
    base = len(raw({"__metadata__": {"format": "mlx"}, "b": B, "a": A}))
    spans = [(e.name, e.start - base, e.stop - base) for e in header.entries.values()]
    assert spans == [("a", 0, 24), ("b", 24, 28)]
    assert header.metadata == {"format": "mlx"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_listed_dtype_loads_with_the_bytes_of_the_file(dtype: str, raw: Raw, tmp_path: Path) -> None:
    size = DTYPES[dtype].size
    data = bytes([1] * 6 * size) if dtype == "BOOL" else bytes(range(6 * size))
    entry = {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * size]}
    empty = {"dtype": dtype, "shape": [0, 3], "data_offsets": [6 * size, 6 * size]}
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw({"x": entry, "e": empty}, data))
    loaded = load_flat(file)
    x = loaded["x"]
    assert isinstance(x, mx.array)
    assert (x.dtype, x.shape) == (DTYPES[dtype], (2, 3))
    assert np.array(x.view(mx.uint8)).tobytes() == data
    assert loaded["e"].shape == (0, 3)


def test_a_bool_must_be_0_or_1(raw: Raw, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    header = {"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    file.write_bytes(raw(header, b"\0\1\2"))
    with pytest.raises(CheckpointError, match="'x': is BOOL with bytes other"):
        load_flat(file)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_accepted_the_reference_reader_accepts_too(
    data: st.DataObject, raw: Raw, tmp_path: Path
) -> None:
    content = bytearray(raw({"a": A, "b": B, "__metadata__": {"format": "mlx"}}, DATA))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert"]))
        byte = data.draw(st.sampled_from(b'0123456789{}[]",:.-eF\0\xff ') | st.integers(0, 255))
        if action == "set":
            content[at] = byte
        elif action == "insert":
            content.insert(at, byte)
        elif len(content) > 9:
            del content[at]
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    try:
        header = read_header(file)
    except CheckpointError:
        return
    try:
        with safe_open(file, framework="numpy") as reference:
            assert set(reference.keys()) == set(header.entries)
    except SafetensorError as error:
        pytest.fail(f"accepted what the reference refuses: {error}")

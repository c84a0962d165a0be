# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (safetensors.safe_open has no types)

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

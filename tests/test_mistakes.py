"""Ordinary mistakes: each gives an error of ours that names the user's line and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import CheckpointError, DTypeError, QGraphError, RuleError, ShapeError, StrictError, TraceError

X = mx.ones((2, 64))
W = qg.quantize(mx.ones((32, 64)))
KEPT: list[Any] = []


def keep(x):
    KEPT[:] = [x]
    return x


qg.jit(keep)(X)
OLD = list(KEPT)


def loop(x):
    while x.sum() > 0:
        x = x - 1
    return x


def branch(x):
    if x.sum() > 0:
        return x
    return -x


def assign(x):
    x[0] = 1
    return x


def add_in_place(x):
    x[0] += 1
    return x


def use_in_another_trace(x):
    return x + OLD[0]


@dataclass
class Mistake:
    """`body` is traced on X; the error is of type `kind`, and its first line matches `says`."""

    says: str
    body: Callable[..., Any]
    kind: type[QGraphError] = TraceError
    fix: str = ""  # what the fix must mention


IN_A_TRACE = {
    "if on a traced value": Mistake("if/while/and/or on a traced value", branch, fix="qg.where"),
    "while on a traced value": Mistake("if/while/and/or on a traced value", loop, fix="qg.where"),
    "and between conditions": Mistake("if/while/and/or", lambda x: (x > 0) and x, fix="qg.where"),
    "assert on a traced value": Mistake("if/while/and/or", lambda x: max(x[0, 0], 1), fix="qg.where"),
    "float()": Mistake("a Python number from a traced value", lambda x: float(x.sum())),
    "int()": Mistake("a Python number from a traced value", lambda x: int(x[0, 0])),
    "range of a traced value": Mistake("a Python number", lambda x: list(range(x[0, 0]))),
    "a list index": Mistake("a Python number", lambda x: [1, 2][qg.argmax(x)]),
    "item": Mistake(r"\.item\(\) of a traced value", lambda x: x.sum().item()),
    "tolist": Mistake(r"\.tolist\(\) of a traced value", lambda x: x.tolist()),
    "a NumPy function": Mistake("numpy.exp of a traced value", lambda x: np.exp(x), fix="qg.exp"),
    "a NumPy reduction": Mistake("numpy.sum of a traced value", lambda x: np.sum(x), fix="qg.sum"),
    "a NumPy function that qg lacks": Mistake(
        "numpy.kron of a traced value", lambda x: np.kron(x, x), fix="there is no qg.kron"
    ),
    "numpy.array": Mistake("NumPy function on a traced value", lambda x: np.array(x)),
    "an mx function": Mistake(r"mx\.exp was called on a traced value", lambda x: mx.exp(x), fix="qg.exp"),
    "an mx function of lists": Mistake(
        "mx.concatenate was called on a traced value", lambda x: mx.concatenate([x, x]), fix="qg.concatenate"
    ),
    "an mx.fast function": Mistake(
        r"mx\.fast\.rms_norm was called", lambda x: mx.fast.rms_norm(x, None, 1e-5), fix="use qg.rms_norm"
    ),
    "an mx.array of a traced value": Mistake(
        r"mx\.array was called on a traced value", lambda x: mx.array([x])
    ),
    "an mx array on the left": Mistake(
        "an mx.array on the left of multiplication", lambda x: mx.ones(64) * x, fix="left"
    ),
    "an mx array on the left of @": Mistake(
        "an mx.array on the left of matmul", lambda x: mx.ones((1, 2)) @ x
    ),
    "item assignment": Mistake(r"x\[...\] = v on a traced value", assign, fix=r".at[index].set"),
    "in-place item update": Mistake(r"x\[...\] = v on a traced value", add_in_place, fix=r".at[index].set"),
    "a tracer of another trace": Mistake(
        "leaked tracer from keep", use_in_another_trace, fix="return the value"
    ),
    "the wrong inner size": Mistake(
        r"dot: inner sizes differ, 64 \(lhs axis -1\) and 32",
        lambda x: x @ qg.dequantize(W),
        ShapeError,
        "its .T",
    ),
    "shapes that do not broadcast": Mistake(
        r"shapes \(2, 64\) and \(3,\) do not broadcast", lambda x: x + mx.ones(3), ShapeError
    ),
    "int @ int": Mistake(
        "dot: i32 by i32 has no float operand",
        lambda x: x.astype(mx.int32) @ mx.ones((64, 2), mx.int32),
        DTypeError,
    ),
    "an axis out of range": Mistake("axis 5 is out of range", lambda x: qg.sum(x, axis=5), ShapeError),
    "a reshape to another size": Mistake("reshape", lambda x: x.reshape(3, 5), ShapeError),
    "a float index": Mistake("indices are f32", lambda x: qg.take(x, x), DTypeError, "astype"),
    "an einsum with a number for an index": Mistake(
        "einsum: cannot read 'i1'", lambda x: qg.einsum("i1->i", x), ShapeError
    ),
    "an einsum of another rank": Mistake(
        "einsum: 'ijk' names 3", lambda x: qg.einsum("ijk->i", x), ShapeError
    ),
    "an einsum of more operands": Mistake(
        "does not fit 1 operands", lambda x: qg.einsum("ij,jk->ik", x), ShapeError
    ),
    "a string for an array": Mistake("expected an array", lambda x: qg.exp("x"), DTypeError),
}


@pytest.mark.parametrize("name", IN_A_TRACE)
def test_a_mistake_in_a_jitted_function(name: str) -> None:
    mistake = IN_A_TRACE[name]
    with pytest.raises(mistake.kind) as info:
        qg.jit(mistake.body)(X)
    check(info.value, mistake.says, mistake.fix)
    line = re.search(r"from test_mistakes\.py:(\d+) in ", str(info.value))
    assert line, f"the user's line is missing:\n{info.value}"
    code = mistake.body.__code__
    lines = {number for _, _, number in code.co_lines() if number}
    assert int(line[1]) in lines, f"another line than the user's:\n{info.value}"


def check(error: QGraphError, says: str, fix: str = "") -> None:
    text = str(error)
    assert re.search(says, text.splitlines()[0]), text
    found = re.search(r"^  fix: (.+)", text, re.MULTILINE)
    assert found, f"no fix:\n{text}"
    assert fix in found[1], text
    assert "Tracer object at" not in text


def test_a_tracer_that_is_used_after_its_trace() -> None:
    qg.jit(keep)(X)
    for use in (lambda: KEPT[0] + 1, lambda: qg.exp(KEPT[0]), lambda: qg.jit(keep)(KEPT[0])):
        with pytest.raises(TraceError) as info:
            use()
        check(info.value, "leaked tracer from keep.*after the trace ended", "return the value")
        assert "from test_mistakes.py:" in str(info.value)


def test_an_argument_that_is_neither_array_nor_hashable() -> None:
    with pytest.raises(TraceError) as info:
        qg.jit(lambda x, s: x)(X, {1, 2})
    check(info.value, "an argument of type set is neither an array nor hashable")


def test_a_missing_folder(tmp_path: Any) -> None:
    for load in (qg.load, __import__("qgraph.lm").lm.load):
        with pytest.raises(CheckpointError) as info:
            load(tmp_path / "absent")
        check(info.value, "no such")


def test_the_wrong_bits() -> None:
    parts = mx.quantize(mx.ones((32, 64)), bits=4, group_size=64)
    with pytest.raises(ShapeError) as info:
        qg.from_quantized(*parts, bits=8, group_size=64)
    check(info.value, "affine8g64", "bits, group_size and mode")
    with pytest.raises(DTypeError) as other:
        qg.from_quantized(*parts, bits=7, group_size=64)
    check(other.value, "bits is 7, supported: 1, 2, 3, 4, 5, 6, 8")


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        ("canonicalize,quantise-dot", "no pass is named 'quantise-dot'"),
        ("legalize{strikt=true}", "legalize has no option 'strikt=true'"),
        ("legalize{strict=yes}", "strict=yes"),
        ("legalize,canonicalize", "legalize stands before canonicalize"),
        ("canonicalize;legalize", "cannot read the pipeline"),
    ],
)
def test_a_wrong_pipeline(pipeline: str, says: str) -> None:
    with pytest.raises(RuleError) as info:
        qg.jit(pipeline=pipeline)(lambda x: x)
    check(info.value, says)


def test_strict_with_a_weight_that_has_no_kernel() -> None:
    @qg.jit(strict=True)
    def f(x, w):
        return x[:, :32] @ w[:, :32].T

    with pytest.raises(StrictError) as info:
        f(X, W)
    assert "cuts groups of 64" in str(info.value)
    assert re.search(r"test_mistakes\.py:\d+", str(info.value))
    assert "fix:" in str(info.value)


def test_eager_mistakes_have_a_fix_too() -> None:
    with pytest.raises(ShapeError) as info:
        qg.dot(X, W)
    check(info.value, "inner sizes differ", "its .T")


def test_numbers_of_a_quantized_tensor() -> None:
    for use in (lambda: float(W), lambda: len(W), lambda: np.array(W), lambda: list(W), lambda: bool(W)):
        with pytest.raises((DTypeError, TypeError)):
            use()


def test_errors_of_the_users_own_are_left_alone() -> None:
    def f(x):
        return x.no_such_method()

    with pytest.raises(AttributeError, match="no_such_method"):
        qg.jit(f)(X)

    def g(x):
        raise ValueError("my own")

    with pytest.raises(ValueError, match="my own"):
        qg.jit(g)(X)

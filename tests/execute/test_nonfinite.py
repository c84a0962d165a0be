"""QGRAPH_DEBUG_NAN=1: the node that made NaN or infinities is named, and no other."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import NonFiniteError, QGraphError
from qgraph.execute.nonfinite import watched
from qgraph.execute.program import Program, load
from qgraph.ir import parse_graph
from tests.agree import normal

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _debugging(monkeypatch):
    monkeypatch.setenv("QGRAPH_DEBUG_NAN", "1")


def blame(f, *args) -> str:
    with pytest.raises(NonFiniteError) as info:
        qg.jit(f)(*args)
    assert info.value.fix
    return str(info.value)


W = qg.quantize(normal(64, 64), group_size=64)
X = normal(2, 64)


def test_the_first_module_that_made_it_is_named_with_its_line_and_operands():
    def model(x, w):
        for i in range(3):
            with qg.scope(f"layers.{i}"):
                with qg.scope("attn"):
                    x = x + 0.1 * qg.tanh(x @ w.T)
                with qg.scope("mlp"):
                    x = qg.exp(x * 100.0) @ w.T if i == 1 else x
        return x

    text = blame(model, mx.ones((2, 64)) * 2, W)
    assert text.startswith("exp in layers.1.mlp: ")
    assert "of 128 numbers are infinite; its operands: %layers.1.mlp.multiply up to " in text
    assert "at %layers.1.mlp.exp = exp(%layers.1.mlp.multiply) : f32[2,64]" in text
    assert "test_nonfinite.py" in text
    assert "qg.exp(x * 100.0)" in text


BLAMED = {
    "0 under a logarithm": (lambda x: qg.log(x), [mx.array([1.0, 0.0])], "log: 1 of 2 numbers are infinite"),
    "a negative root": (
        lambda x: qg.exp(qg.sqrt(x)),
        [mx.array([1.0, -1.0])],
        "sqrt: 1 of 2 numbers are NaN",
    ),
    "a division": (lambda x: 1.0 / x * 0.0, [mx.array([1.0, 0.0])], "divide: 1 of 2"),
    "infinity less infinity": (
        lambda x: qg.exp(x) - qg.exp(2.0 * x) + 1.0,
        [mx.array([1.0, 100.0])],
        "exp: 1 of 2 numbers are infinite; its operands: %x up to 100",
    ),
    "half precision": (lambda x: (x * x).sum(), [mx.array([1, 1000.0], mx.float16)], "float16 ends at 65504"),
    "a cast to half": (lambda x: (x * 2.0).astype(mx.float16), [mx.array([1, 1e6])], "cast: 1 of 2"),
    "an index": (
        lambda x: qg.exp(qg.take(x, qg.arange(2) * 5 + mx.array([0, 2]), axis=0)),
        [normal(4, 3)],
        "take: 3 of 6 numbers are NaN",
    ),
    "an index of a packed table": (
        lambda w, i: qg.take(w, i, axis=0) * 2,
        [W, mx.array([3, 64])],
        "an index is out of range",
    ),
    "a row that is masked everywhere": (
        lambda x, keep: qg.softmax(x + qg.where(keep, 0.0, -INF), axis=-1),
        [normal(2, 3), mx.array([[True, False, True], [False] * 3])],
        "softmax: 3 of 6 numbers are NaN",
    ),
    "an input": (
        lambda x: qg.exp(x) + 1.0,
        [mx.array([1.0, NAN])],
        "input 'x': 1 of 2 numbers are NaN when it comes in",
    ),
    "a mask behind which something else breaks": (
        lambda x: qg.where(qg.array([True, False]), qg.log(x), -INF),
        [mx.array([0.0, 1.0])],
        "log: 1 of 2 numbers are infinite",
    ),
    "not what went before and did no harm": (
        lambda x, y: qg.exp(-qg.exp(x)) + qg.log(y),
        [mx.array([1000.0]), mx.array([0.0])],
        "log: 1 of 1",
    ),
    "numbers of two outputs": (lambda x: (x, qg.log(x - 1.0)), [mx.array([1.0])], "log: 1 of 1"),
    "complex numbers": (lambda x: x / (x - x), [mx.array([1 + 2j])], "divide: 1 of 1 numbers are NaN"),
}


@pytest.mark.parametrize("case", BLAMED)
def test_who_is_blamed(case):
    f, args, message = BLAMED[case]
    assert message in blame(f, *args)


def keep(x):
    return qg.where(qg.tri(3, 3) > 0, 0.0, -INF) + x


INNOCENT = {
    "finite numbers": (lambda x: qg.exp(x), [normal(3, 3)]),
    "a mask of -inf": (lambda x: qg.softmax(keep(x), axis=-1), [normal(3, 3)]),
    "a mask that is returned": (keep, [normal(3, 3)]),
    "a mask cast to half": (
        lambda x: x + qg.full((3,), -3e38).astype(mx.float16),
        [normal(3, dtype=mx.float16)],
    ),
    "infinities that come in": (lambda x: x * 2.0, [mx.array([INF, 1.0])]),
    "an infinity that does not come out": (lambda x: qg.exp(-qg.exp(x)), [mx.array([1000.0, 1.0])]),
    "NaN that does not come out": (lambda x: qg.where(x > 0, qg.log(x), 0.0), [mx.array([-1.0, 1.0])]),
    "integers": (lambda x: x // 2, [mx.array([1, 2])]),
    "nothing at all": (lambda x: x * 2.0, [mx.zeros((0, 3))]),
    "packed weights that are returned": (lambda w: w.T, [W]),
    "constants alone": (lambda x: (x, qg.log(qg.zeros((2,)))), [normal(2)]),
}


@pytest.mark.parametrize("case", INNOCENT)
def test_who_is_not(case, monkeypatch):
    f, args = INNOCENT[case]
    found = qg.jit(f)(*args)
    monkeypatch.delenv("QGRAPH_DEBUG_NAN")
    plain = qg.jit(f)(*args)
    for a, b in zip(
        *(
            [v] if isinstance(v, mx.array) else list(v) if isinstance(v, tuple) else v.components()
            for v in (found, plain)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(np.array(a), np.array(b))


def test_all_programs_of_a_jitted_function_are_watched_and_the_good_ones_still_run():
    f = qg.jit(lambda x: qg.log(x))
    for shape in ((2,), (3,)):
        with pytest.raises(NonFiniteError):
            f(mx.zeros(shape))
        assert f(mx.ones(shape)).tolist() == [0.0] * shape[0]


def test_unset_nothing_is_checked_and_nothing_stands_between(monkeypatch):
    graph = parse_graph("graph(%x: f32[2]) {\n %y = log(%x) : f32[2]\n return %y\n}")
    monkeypatch.setenv("QGRAPH_COMPILE", "0")
    for unset in ("", "0"):
        monkeypatch.setenv("QGRAPH_DEBUG_NAN", unset)
        program = Program(graph)
        assert program.trusted.__name__ == "program"  # the emitted function itself
        assert program.run(mx.zeros(2))[0].tolist() == [-INF, -INF]
    monkeypatch.setenv("QGRAPH_DEBUG_NAN", "yes")
    with pytest.raises(QGraphError, match="QGRAPH_DEBUG_NAN='yes'"):
        Program(graph)


def test_where_mlx_traces_there_is_nothing_to_look_at():
    f = qg.jit(lambda x: qg.log(x))
    x = mx.array([0.0, 1.0])
    assert mx.compile(f)(x).tolist() == [-INF, 0.0]
    assert mx.vmap(f)(x).tolist() == [-INF, 0.0]
    with pytest.raises(NonFiniteError):
        mx.grad(lambda x: f(x).sum())(x)
    assert mx.grad(lambda x: f(x).sum())(x + 1.0).tolist() == [1.0, 0.5]


def test_a_difference_between_the_program_and_its_nodes_is_said():
    graph = parse_graph("graph(%x: f32[1]) {\n %y = exp(%x) : f32[1]\n return %y\n}")
    wrong = watched(lambda x: (mx.log(x - x),), graph, load)
    with pytest.raises(NonFiniteError, match=r"its nodes one by one do not"):
        wrong(mx.ones(1))


def test_arrays_are_dropped_behind_their_last_use():
    """A replay holds what is still needed, as the program does."""

    def chain(x):
        for _ in range(40):
            x = qg.sin(x)
        return qg.log(x - x)

    x = mx.ones((256, 1024))
    f = qg.jit(chain)
    f.source(x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(NonFiniteError):
        f(x)
    assert mx.get_peak_memory() - before < 12 * x.nbytes

"""The self-test of argument encodings: it passes on this MLX, and sees every change of an encoding."""

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.capture import selftest
from qgraph.capture.primitives import MEANINGS
from qgraph.capture.records import record


def test_this_mlx_reports_what_the_table_reads():
    assert selftest.difference() == ""
    selftest.check_encodings()


def test_every_expected_primitive_has_a_meaning():
    assert {name for name, _ in selftest.EXPECTED} <= set(MEANINGS)


@pytest.mark.parametrize("at", range(len(selftest.EXPECTED)), ids=lambda i: selftest.EXPECTED[i][0])
def test_another_encoding_of_any_of_them_is_seen(at, monkeypatch):
    name, arguments = selftest.EXPECTED[at]
    changed = [*selftest.EXPECTED]
    changed[at] = (name, (*arguments[:-1], "other"))
    monkeypatch.setattr(selftest, "EXPECTED", tuple(changed))
    found = selftest.difference()
    assert found.startswith(name)
    assert "other" in found


def test_true_and_one_are_two_encodings():
    assert selftest.plain([True, [1]]) != selftest.plain([1, [1]]) != selftest.plain([1, [1.0]])
    assert selftest.plain([1, [2]]) == selftest.plain((1, (2,)))


def test_the_error_names_the_version_and_what_changed(monkeypatch):
    monkeypatch.setattr(selftest, "EXPECTED", (("Softmax", (7,)),))
    selftest.check_encodings.cache_clear()
    with pytest.raises(qg.QGraphError, match="another form") as caught:
        selftest.check_encodings()
    assert mx.__version__ in str(caught.value)
    assert "Softmax(7,) is now (True,)" in caught.value.message
    assert selftest.TESTED in (caught.value.fix or "")
    monkeypatch.undo()
    selftest.check_encodings.cache_clear()
    selftest.check_encodings()


def test_an_interface_that_is_gone_is_the_same_error(monkeypatch):
    def gone(*_):
        raise TypeError("export_function(): incompatible function arguments")

    monkeypatch.setattr(selftest, "record", gone)
    assert "incompatible" in selftest.difference()


def test_nothing_of_the_sample_is_evaluated(monkeypatch):
    def refuse(*_):
        raise AssertionError("evaluated")

    monkeypatch.setattr(mx, "eval", refuse)
    assert record(selftest.sample, selftest._operands()).records

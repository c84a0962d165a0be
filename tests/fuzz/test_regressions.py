"""Every graph that once failed, and those of bugs from before the fuzzer, through the whole check."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgraph.ir import parse_graph
from tests.fuzz.check import MANY, check

GRAPHS = sorted((Path(__file__).parent / "regressions").glob("*.qg"))


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_that_failed_once_passes(path):
    check(parse_graph(path.read_text()), sets=MANY)


def test_there_are_graphs_to_replay():
    assert GRAPHS

"""300 random graphs through every pipeline; and the checker finds wrong rewrites, and makes them small."""

from __future__ import annotations

import pytest

from qgraph.ir import parse_graph
from tests.fuzz import report
from tests.fuzz.batch import run
from tests.fuzz.planted import PLANTED
from tests.fuzz.shrink import size


@pytest.mark.slow
def test_300_random_graphs_keep_their_meaning_with_native_kernels():
    batch = run(first=2020, count=300)
    assert not batch.failures, report.text(batch)
    assert batch.counts["run through MLX"]


@pytest.mark.slow
@pytest.mark.usefixtures("mlx_alone")  # every rule is to fire, and some are for MLX's kernels
def test_every_pass_keeps_the_meaning_of_300_random_graphs():
    batch = run(first=20, count=300)
    assert not batch.failures, report.text(batch)
    counts = batch.counts
    assert counts["graphs"] == 300
    assert 3 * counts["graphs with packed operands"] >= counts["graphs"]
    assert counts["run through MLX"]
    unused = [rule for rule in report.RULES if not report.fired(counts, rule)]
    assert not unused, report.text(batch)


@pytest.mark.slow
@pytest.mark.usefixtures("mlx_alone")
@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_a_planted_bug_is_caught_and_shrinks_to_a_few_nodes(plant, monkeypatch):
    plant(monkeypatch)
    batch = run(first=620, count=600, stop=True)  # stops at the first failure
    assert batch.failures, "not caught"
    kind, detail, text = batch.failures[0]
    assert "differs" in kind, (kind, detail)
    assert size(parse_graph(text)) <= 5, (kind, detail, text)

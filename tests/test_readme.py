"""What the README shows is true: its Python runs, its text parses."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

import qgraph as qg
from qgraph.ir import digest, parse_graph
from tests.agree import agree, normal

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_first_example_runs_and_reports_three_quantized_matmuls():
    namespace = {}
    exec(blocks("python")[0], namespace)
    report = namespace["mlp"].report(mx.ones((1, 64)), namespace["w4"])
    assert report.counts() == {"quantized_matmul": 3}


def test_the_pass_of_the_readme_fires_and_computes_the_same():
    namespace = {}
    exec(blocks("python")[1], namespace)
    assert "multiply" not in agree(namespace["f"], normal(3, 4)).histogram()


def test_the_graphs_of_the_readme_are_what_the_default_pipeline_does():
    before, after = re.findall(r"graph\(.*?\n\}", blocks("text")[0], re.S)
    result = qg.Pipeline.parse(qg.rewrite.DEFAULT).run(parse_graph(before))
    assert digest(result.graph) == digest(parse_graph(after))
    assert qg.rewrite.DEFAULT in README

"""What the README shows is true: its Python runs, its text parses."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph import kernels
from qgraph.ir import digest, parse_graph
from tests.agree import agree, assert_as_mlx, normal
from tests.lm.peer import write, write_adapter

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder that mlx-lm wrote, and one of an adapter."""
    folder = write(tmp_path_factory.mktemp("readme") / "model", quantization={"bits": 4, "group_size": 32})
    return folder, write_adapter(folder.parent / "adapter", folder, 2)


def test_the_first_examples_run_on_a_checkpoint(checkpoint, capsys):
    model, adapter = map(str, checkpoint)
    namespace = {}
    for block in blocks("python")[:2]:
        exec(block.replace("ADAPTER_DIR", adapter).replace('"DIR"', repr(model)), namespace)
    assert "quantized_lora_matmul" in capsys.readouterr().out
    prompt = mx.array([[1, 2, 3]])
    assert_as_mlx(namespace["fast"](prompt), namespace["model"](prompt), path="model")


def test_the_array_example_runs_and_reports_three_quantized_matmuls():
    namespace = {}
    exec(blocks("python")[2], namespace)
    report = namespace["mlp"].report(mx.ones((1, 64)), namespace["w4"])
    assert report.counts() == {"quantized_matmul": 3}


def test_the_pass_of_the_readme_fires_and_computes_the_same():
    namespace = {}
    exec(blocks("python")[3], namespace)
    assert "multiply" not in agree(namespace["f"], normal(3, 4)).histogram()


def test_the_graphs_of_the_readme_are_what_the_default_pipeline_does():
    before, after = re.findall(r"graph\(.*?\n\}", blocks("text")[0], re.S)
    if kernels.library() is None:
        after = after.replace(", kernel='native'", "")
    result = qg.Pipeline.parse(qg.rewrite.DEFAULT).run(parse_graph(before))
    assert digest(result.graph) == digest(parse_graph(after))
    assert qg.rewrite.DEFAULT in README

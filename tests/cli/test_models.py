"""The commands on checkpoint folders of several architectures: dump, why, generate and bench."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
from click.testing import CliRunner, Result

import qgraph as qg
from qgraph import kernels
from qgraph.cli import main
from qgraph.cli.versus import Report, Side, compare, random_ids
from qgraph.ir import parse_graph
from tests.lm.peer import tokenizer, write_adapter
from tests.zoo.build import build
from tests.zoo.configs import config

SCHEME: dict[str, Any] = {"group_size": 32, "bits": 4, "mode": "affine"}
NAMES = ("llama", "gemma3_text", "mixtral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        model, found = mlx_lm.utils.quantize_model(build(name), config(name), **SCHEME)
        mlx_lm.utils.save(root / name, root, model, tokenizer(), found)
    return {name: root / name for name in NAMES}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def output(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: object) -> str:
    """The message of a command that fails: no traceback, nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    return result.stderr


def test_dump_shows_a_module_by_its_path(folders: dict[str, Path]) -> None:
    part = parse_graph(output("dump", folders["llama"], "--at", "layers.1.mlp"))
    assert len(part.find("quantized_matmul")) == 3
    labels = [str(v.op.label) for v in part.inputs]  # pyright: ignore[reportAttributeAccessIssue]
    assert "model.layers.1.mlp.down_proj.weight" in labels
    assert not [x for x in labels if "captured" in x or x.startswith("state")]
    before = parse_graph(output("dump", folders["llama"], "--at", "layers.1.mlp", "--after", "trace"))
    assert (len(before.find("dot", "addmm")), len(before.find("quantized_matmul"))) == (3, 0)


def test_dump_names_lines_of_the_model_and_arrays_of_its_caches(folders: dict[str, Path]) -> None:
    text = output("dump", folders["llama"])
    assert "// llama.py:" in text
    assert "in model.layers.1.self_attn.q_proj" in text
    assert "slice_update{axes=(2,)}(%cache.1.keys," in text
    assert "captured" not in text


def test_a_module_that_the_model_does_not_have(folders: dict[str, Path]) -> None:
    message = refusal("dump", folders["llama"], "--at", "layers.99")
    assert "no node is in a module 'layers.99'" in message
    assert "model.layers.*.mlp.down_proj" in message or "more" in message
    assert run("dump", folders["llama"], "--at", "layers.1", "--summary").exit_code == 2


@pytest.mark.parametrize("name", NAMES)
def test_every_packed_weight_of_the_folder_is_used_packed(name: str, folders: dict[str, Path]) -> None:
    summary = json.loads(output("dump", folders[name], "--summary", "--format", "json", "--length", 3))
    assert summary["missed"] == []
    layers = [m for m in summary["modules"] if m["where"].startswith("model.layers.")]
    assert sum(m["count"] for m in layers) >= 2
    assert all("gather_qmm" in dict(m["ops"]) for m in layers) == (name == "mixtral")
    why = output("why", folders[name], "--at", "layers.*.self_attn")
    assert "model.layers.*.self_attn.q_proj → quantized_matmul" in why
    assert "dequantize" not in why


def test_the_experts_activation_is_that_of_its_own_layer(folders: dict[str, Path]) -> None:
    text = output("dump", folders["mixtral"], "--at", "layers.1")
    assert "in model.layers.1.block_sparse_moe.switch_mlp.activation" in text
    assert "in model.layers.0." not in text


def test_generate_gives_its_figures_as_json(folders: dict[str, Path]) -> None:
    options = ("generate", "--model", folders["gemma3_text"], "--prompt", "abc", "--max-tokens", 6)
    found = json.loads(output(*options, "--json"))
    assert found["text"] + "\n" == output(*options)
    assert (found["prompt_tokens"], found["generated_tokens"], len(found["tokens"])) == (3, 6, 6)
    assert found["finish"] in ("stop", "length")
    assert min(found["prompt_rate"], found["generation_rate"], found["peak_bytes"]) > 0
    plain = run(*options)
    assert "peak memory" in plain.stderr
    assert plain.stderr.count("tokens/s") == 2


def test_generate_rounds_activations_where_there_are_kernels_for_it(folders: dict[str, Path]) -> None:
    options = ("--model", folders["llama"], "--prompt", "abc", "--max-tokens", 4, "--activations", "int8")
    if kernels.library() is None:
        assert "needs the native CPU kernels" in refusal("generate", *options)
    else:
        assert len(output("generate", *options)) > 1


@pytest.mark.parametrize("name", NAMES)
def test_bench_compares_with_plain_mlx_lm(name: str, folders: dict[str, Path]) -> None:
    options = ("--prompt-tokens", 5, "--tokens", 4, "--rounds", 2)
    found = json.loads(output("bench", "--model", folders[name], *options, "--json"))
    assert found["identical"] is True
    assert found["first_difference"] is None
    assert (found["model"], found["dtype"]) == (name, "float32")
    assert (found["prompt_tokens"], found["tokens"], found["rounds"]) == (5, 4, 2)
    for figure in ("prefill", "decode"):
        row = found[figure]
        assert row["ratio"] == row["qgraph"] / row["mlx-lm"]
    for side in ("qgraph", "mlx-lm"):
        stored = sum(f.stat().st_size for f in folders[name].glob("*.safetensors"))
        assert 0 < found["weight_bytes"][side] <= stored
        assert found["peak_bytes"][side] > found["weight_bytes"][side]


def test_bench_prints_a_table(folders: dict[str, Path]) -> None:
    text = output("bench", "--model", folders["llama"], "--prompt-tokens", 4, "--tokens", 3, "--rounds", 1)
    assert "llama, float32, cpu" in text or "llama, float32, gpu" in text
    for row in ("prefill tokens/s", "decode tokens/s", "peak memory, MB", "first run, s", "texts: identical"):
        assert f"\n{row}" in text


def test_bench_runs_an_adapter_on_both(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folders["llama"], layers=2)
    options = ("--model", folders["llama"], "--prompt-tokens", 6, "--tokens", 12, "--rounds", 1, "--json")
    assert json.loads(output("bench", *options, "--adapter", adapter))["identical"] is True


@pytest.mark.slow
def test_bench_never_asks_the_network(folders: dict[str, Path]) -> None:
    program = (
        "import socket, sys; from qgraph.cli import main\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "main(sys.argv[1:])"
    )
    options = ["--prompt-tokens", "3", "--tokens", "2", "--rounds", "1"]
    unset = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", "--model", str(folders["llama"]), *options],
        capture_output=True,
        text=True,
        env=unset,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "texts: identical" in done.stdout


def test_bench_refuses_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "nowhere: no such folder" in refusal("bench", "--model", tmp_path / "nowhere")
    assert "adapter_config.json" in refusal(
        "bench", "--model", folders["llama"], "--adapter", folders["gemma3_text"]
    )
    broken = tmp_path / "broken"
    shutil.copytree(folders["llama"], broken)
    (broken / "config.json").write_text("{")
    assert "config.json" in refusal("bench", "--model", broken)
    assert run("bench", "--model", folders["llama"], "--tokens", "1").exit_code == 2


def test_what_plain_mlx_lm_cannot_load_is_said_to_be_its_own_limit(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(mlx_lm.utils, "load_model", fails)
    message = refusal("bench", "--model", folders["llama"])
    assert "plain mlx-lm cannot load this model: ValueError: no such thing\n" in message
    assert "qgraph generate" in message


class Steps:
    """A model that gives the tokens of a list, whatever it reads."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.calls, self.layers = tokens, 0, []

    def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
        self.calls += x.shape[1] == 1
        at = self.tokens[(self.calls - 1) % len(self.tokens)]
        return mx.broadcast_to((mx.arange(8) == at).astype(mx.float32), (1, x.shape[1], 8))


def test_texts_that_differ_are_found_where_they_differ() -> None:
    # generate_step asks for one token more than it gives, so a list of n + 1 is one run of n tokens.
    ours, theirs = Side("qgraph", Steps([1, 2, 3, 4, 0])), Side("mlx-lm", Steps([1, 2, 5, 4, 0]))
    report = Report({"model": "fake"}, *compare(ours, theirs, random_ids(8, 3), 4, 2))
    assert (report.ours.tokens, report.theirs.tokens) == ([1, 2, 3, 4], [1, 2, 5, 4])
    assert report.first_difference == 2
    assert "texts: differ from token 3 of 4 on" in str(report)
    assert report.plain()["identical"] is False


def test_a_model_whose_greedy_tokens_do_not_repeat_is_an_error() -> None:
    side = Side("qgraph", Steps([1, 2, 3, 4, 5, 6, 7]))
    with pytest.raises(qg.QGraphError, match="qgraph gave other tokens for the same prompt than before"):
        compare(side, Side("mlx-lm", Steps([1])), random_ids(8, 3), 3, 2)

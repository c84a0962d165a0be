"""`qgraph dump`, `why`, `passes`, `doctor`: what a shell user sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qgraph.cli import COMMANDS, main
from qgraph.ir import parse_graph

MODEL = """
from dataclasses import dataclass

import mlx.core as mx
import qgraph as qg
from beside import WIDTH


@dataclass
class Settings:
    scale: "float" = 2.0


@qg.jit
def mlp(x, w):
    with qg.scope("layers.0"):
        return qg.silu(x @ w.T) * Settings().scale + (x[:, :32] @ w[:, :32].T)


def mlp_example():
    return mx.ones((1, WIDTH)), qg.quantize(mx.ones((32, WIDTH)))


def plain(x):
    return qg.exp(x)


def plain_example():
    return (mx.ones(3),)


def constant():
    return qg.arange(3) + 1


def lonely(x):
    return x


def bad_example():
    return mx.ones(3)


bad = lonely


def branch(x):
    if x.sum() > 0:
        return x
    return -x


branch_example = plain_example
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("user")
    (folder / "beside.py").write_text("WIDTH = 64\n")
    (folder / "model.py").write_text(MODEL)
    (folder / "broken.py").write_text("import mlx\n\nraise ValueError('half written')\n")
    return str(folder / "model.py")


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def output(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert result.exception is None
    return result.output


def refusal(*args: str) -> str:
    """The message of a command that fails with exit code 1: no traceback, nothing on stdout."""
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ")
    return result.stderr


def test_dump_prints_the_last_graph_as_text_that_parses(file: str) -> None:
    text = output("dump", f"{file}:mlp")
    assert parse_graph(text).find("quantized_matmul")
    assert "// model.py:17 in layers.0" in text


def test_dump_after_a_pass(file: str) -> None:
    traced = parse_graph(output("dump", f"{file}:mlp", "--after", "trace"))
    assert (len(traced.find("dot")), len(traced.find("quantized_matmul"))) == (2, 0)
    after = parse_graph(output("dump", f"{file}:mlp", "--after", "quantize-dot"))
    assert (len(after.find("dot")), len(after.find("quantized_matmul"))) == (1, 1)
    assert "no pass 'nosuch' ran" in refusal("dump", f"{file}:mlp", "--after", "nosuch")


def test_dump_as_json_and_as_graphviz(file: str) -> None:
    nodes = json.loads(output("dump", f"{file}:mlp", "--format", "json"))["nodes"]
    assert any(n["op"] == "quantized_matmul" and n["sources"][0]["file"] == file for n in nodes)
    assert output("dump", f"{file}:mlp", "--format", "dot").startswith("digraph qgraph {")
    assert run("dump", f"{file}:mlp", "--format", "svg").exit_code == 2


def test_dump_summary(file: str) -> None:
    text = output("dump", f"{file}:mlp", "--summary")
    assert "quantized_matmul        0        1       +1" in text
    assert "left unquantized   1" in text
    assert "cuts groups of 64" in text
    assert json.loads(output("dump", f"{file}:mlp", "--summary", "--format", "json"))["casts"] == [0, 0]
    assert run("dump", f"{file}:mlp", "--summary", "--after", "trace").exit_code == 2


def test_why(file: str) -> None:
    text = output("why", f"{file}:mlp")
    assert "dot at model.py:17 in layers.0 → dequantize" in text
    assert "dot at model.py:17 in layers.0 → quantized_matmul" in text
    assert "lora-branch-unscaled did not fire at" in output("why", f"{file}:mlp", "fuse-lora")
    assert output("why", f"{file}:mlp", "--at", "head") == "no operation in head reads a quantized value\n"
    assert "no rule or pass is named 'nope'" in refusal("why", f"{file}:mlp", "nope")


def test_plain_functions_and_functions_without_parameters_are_targets(file: str) -> None:
    assert parse_graph(output("dump", f"{file}:plain")).find("exp")
    assert parse_graph(output("dump", f"{file}:constant", "--after", "trace")).find("add")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("{file}:nosuch", "has no function 'nosuch'"),
        ("{file}:lonely", "add to the file a function lonely_example()"),
        ("{file}:bad", "bad_example() returned a array"),
        ("{file}:branch", "if/while/and/or on a traced value"),
        ("{file}", "which function?"),
        ("absent.py:f", "absent.py: no such file"),
        ("absent", "absent: no such folder"),
        ("{folder}", "config.json"),
        ("{folder}/broken.py:f", "cannot be imported: ValueError: half written"),
    ],
)
def test_a_bad_target_is_one_clean_message(file: str, target: str, says: str) -> None:
    message = refusal("dump", target.format(file=file, folder=Path(file).parent))
    assert says in message
    assert "fix:" in message


def test_a_function_that_is_not_there_lists_those_that_are(file: str) -> None:
    message = refusal("dump", f"{file}:nosuch")
    assert "mlp, plain, constant, lonely, bad, branch" in message


def test_an_import_error_names_the_line(file: str) -> None:
    assert "from broken.py:3:  raise ValueError('half written')" in refusal(
        "dump", f"{Path(file).parent}/broken.py:f"
    )


def test_the_path_is_left_as_it_was(file: str) -> None:
    before = list(sys.path)
    output("dump", f"{file}:mlp")
    refusal("dump", f"{Path(file).parent}/broken.py:f")
    assert sys.path == before


def test_a_model_folder_is_a_target() -> None:
    import qgraph_examples

    folder = str(Path(qgraph_examples.__file__).parent / "demo" / "model")
    text = output("dump", folder, "--summary", "--length", "3")
    assert "left unquantized   none" in text
    graph = parse_graph(output("dump", folder))
    assert graph.find("quantized_matmul")
    assert not graph.find("dequantize", "dot")
    assert "dot at qwen3.py:" in output("why", folder, "--at", "layers.0.self_attn")
    assert "no operation in layers.99 reads" in output("why", folder, "--at", "layers.99")


def test_passes_lists_names_meanings_options_and_the_default(file: str) -> None:
    text = output("passes")
    lines = text.splitlines()
    assert lines[0].split(maxsplit=1) == ["canonicalize", "Fold constants and drop what changes nothing."]
    assert any("legalize{strict=false}" in line for line in lines)
    assert any("fuse-lora{reassociate=false}" in line for line in lines)
    assert lines[-1].startswith("default pipeline: canonicalize,")


def test_doctor_tells_versions_device_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGRAPH_FUEL", "7")
    text = output("doctor")
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert rows["QGRAPH_FUEL"] == "7"
    assert {"python", "qgraph", "mlx", "mlx-lm", "device", "passes"} <= set(rows)
    assert "mx.compile" in rows


def test_help_lists_every_command_and_a_wrong_one_is_a_usage_error() -> None:
    text = output("--help")
    assert all(f"  {name}  " in text for name in COMMANDS)
    assert run("nosuch").exit_code == 2
    assert run("dump").exit_code == 2
    assert output("--version").startswith("qgraph, version ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_has_help(name: str) -> None:
    assert output(name, "--help").startswith(f"Usage: main {name}")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from qgraph.cli import main; "
        "r = CliRunner().invoke(main, ['--help']); assert r.exit_code == 0; "
        "print([m for m in ('mlx_lm', 'networkx', 'rich', 'transformers', 'qgraph.cli.dump') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

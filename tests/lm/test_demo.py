"""`qgraph demo`: on the shipped model, and on one whose answers are wrong."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qgraph.cli.demo import demo
from tests.lm.peer import write, write_adapter


def run(*arguments: object) -> Result:
    return CliRunner().invoke(demo, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the demo, with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    write(folder / "model", quantization={"bits": 4})
    write_adapter(folder / "adapter", folder / "model", layers=2)
    return folder


def record(folder: Path, accuracy: float) -> Path:
    names = ("float", "4bit", "4bit on task 2", "4bit+lora on task 2")
    tasks = {"task 1": {"1+2=": "3", "10+4=": "14"}, "task 2": {"3-2=": "1"}}
    text = json.dumps({"accuracy": dict.fromkeys(names, accuracy), **tasks})
    (folder / "problems.json").write_text(text)
    return folder


def test_the_shipped_model_answers_as_recorded() -> None:
    result = run("--problems", 50)
    assert result.exit_code == 0, result.output
    assert "The answers are right." in result.stdout
    for shown in ("29 × quantized_matmul", "28 × quantized_lora_matmul", "4 bit + LoRA, subtracting"):
        assert shown in result.stdout
    assert "  right" in result.stdout
    assert "WRONG" not in result.stdout


def test_wrong_answers_are_a_failure(untrained: Path) -> None:
    result = run("--folder", record(untrained, 1.0))
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "the answers are worse" in result.stderr
    assert "Traceback" not in result.output


def test_an_accuracy_of_nothing_cannot_fall(untrained: Path) -> None:
    assert run("--folder", record(untrained, 0.0)).exit_code == 0


@pytest.mark.parametrize("text", ["{", "{}", '{"accuracy": {"float": 1}, "task 1": {}}'])
def test_broken_problems_are_explained(untrained: Path, text: str) -> None:
    (untrained / "problems.json").write_text(text)
    result = run("--folder", untrained)
    assert result.exit_code == 1
    assert "problems.json" in result.stderr

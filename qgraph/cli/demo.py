"""`qgraph demo`: the whole path on the small trained model that comes with qgraph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from qgraph._errors import QGraphError
from qgraph.cli.errors import friendly_errors
from qgraph.cli.loading import loading

if TYPE_CHECKING:
    from qgraph.lm import LanguageModel

SHOWN = 4  # problems that are generated one by one, on screen
MARGIN = 0.02  # of accuracy: mlx-lm rounds otherwise


@dataclass(frozen=True)
class _Run:
    """One line of the accuracy table."""

    name: str
    recorded: float  # by mlx-lm, on all problems
    found: float | None = None  # on `count` of them; None: not run here
    count: int = 1

    @property
    def wrong(self) -> bool:
        """Worse than recorded, by more than drawing `count` of the problems explains."""
        deviation = sqrt(self.recorded * (1 - self.recorded) / self.count)
        return self.found is not None and self.found < self.recorded - 2 * deviation - MARGIN

    def __str__(self) -> str:
        found = "not shipped" if self.found is None else f"{self.found:.1%}"
        return f"  {self.name:<34} {found:>12} {self.recorded:>12.1%}" + ("   WRONG" if self.wrong else "")


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), hidden=True, help="Another model in the same layout."
)
@click.option(
    "--problems", "count", default=100, show_default=True, type=click.IntRange(1), help="Of each task."
)
@friendly_errors()
def demo(folder: Path | None, count: int) -> None:
    """Load a 4-bit model, show what became of its graph, and check its answers.

    The model is a Qwen3 of 0.8 million parameters, trained to add; a LoRA adapter teaches it to subtract.
    """
    from qgraph import lm

    folder = folder or _shipped()
    problems = _problems(folder / "problems.json", count)
    with loading("loading the demo model") as progress:
        model = lm.load(folder / "model", progress=progress)
    adapted = model.with_adapter(folder / "adapter")
    _show_graph(model, adapted)
    click.secho("\nGenerated, token by token", bold=True)
    _show_answers("4 bit", model, problems["task 1"])
    _show_answers("4 bit + LoRA", adapted, problems["task 2"])
    start = perf_counter()
    runs = _measure(model, adapted, problems)
    seconds = perf_counter() - start
    click.secho(f"\nAccuracy on {count} held-out problems of each task (in {seconds:.1f} s)", bold=True)
    click.echo(f"  {'':<34} {'qgraph':>12} {'mlx-lm, all':>12}")
    for run in runs:
        click.echo(run)
    if any(run.wrong for run in runs):
        raise QGraphError(
            "the answers are worse than those that mlx-lm gave when the model was made",
            fix="run `qgraph doctor` and report what it prints: this should not happen",
        )
    click.secho("The answers are right.", fg="green")


def _shipped() -> Path:
    import qgraph_examples

    return Path(qgraph_examples.__path__[0]) / "demo"


def _problems(path: Path, count: int) -> dict[str, Any]:
    """The recorded accuracies and the first `count` problems of each task, prompt to answer."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise QGraphError(
            f"the demo's {path.name} cannot be read: {error}", fix="install qgraph again"
        ) from error
    missing = [key for key in ("accuracy", "task 1", "task 2") if not found.get(key)]
    if missing:
        raise QGraphError(f"the demo's {path.name} has no {missing[0]}", fix="install qgraph again")
    return found | {task: dict(list(found[task].items())[:count]) for task in ("task 1", "task 2")}


def _show_graph(model: LanguageModel, adapted: LanguageModel) -> None:
    from qgraph.inspector.summary import summarize

    click.secho("One decode step of the dense model code, given 4-bit weights", bold=True)
    click.echo(summarize(model.result()))
    counts = ", ".join(f"{n} × {op}" for op, n in adapted.report().counts().items())
    click.echo(f"With the LoRA adapter: {counts}")


def _show_answers(title: str, model: LanguageModel, task: dict[str, str]) -> None:
    for prompt, answer in list(task.items())[:SHOWN]:
        click.echo(f"  {title:<14} {prompt}", nl=False)
        found = ""
        for piece in model.generate(prompt, max_tokens=16):
            click.echo(piece.text, nl=False)
            found += piece.text
        click.echo("  right" if found == answer else f"  wrong, it is {answer}")


def _measure(model: LanguageModel, adapted: LanguageModel, problems: dict[str, Any]) -> list[_Run]:
    def run(name: str, key: str, which: LanguageModel, task: str) -> _Run:
        answers: dict[str, str] = problems[task]
        return _Run(name, problems["accuracy"][key], _accuracy(which, answers), len(answers))

    return [
        _Run("float, adding", problems["accuracy"]["float"]),
        run("4 bit, adding", "4bit", model, "task 1"),
        run("4 bit, subtracting", "4bit on task 2", model, "task 2"),
        run("4 bit + LoRA, subtracting", "4bit+lora on task 2", adapted, "task 2"),
    ]


def _accuracy(model: LanguageModel, task: dict[str, str]) -> float:
    """The share of problems answered exactly, and then ended."""
    found = model.complete(list(task), max_tokens=12)
    return sum(a == b for a, b in zip(found, task.values(), strict=True)) / len(task)

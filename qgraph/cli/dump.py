"""`qgraph dump`: the graph of a function or a model, after any pass."""

from __future__ import annotations

import click

from qgraph.cli.errors import friendly_errors
from qgraph.cli.target import inspected


@click.command()
@click.argument("target")
@click.option(
    "--after", default="", metavar="PASS", help="After which pass; trace: before all. [default: the last]"
)
@click.option(
    "--format", "form", default="text", show_default=True, type=click.Choice(["text", "json", "dot"])
)
@click.option(
    "--at", "scope", default="", metavar="SCOPE", help="One module: its name, or e.g. 'layers.*.self_attn'."
)
@click.option("--summary", is_flag=True, help="What the passes changed, instead of the graph.")
@click.option(
    "--length", default=1, show_default=True, type=click.IntRange(1), help="Tokens in a model's step."
)
@friendly_errors()
def dump(target: str, after: str, form: str, scope: str, summary: bool, length: int) -> None:
    """Print the graph of TARGET: FILE.py:FUNCTION, or the folder of a model.

    FUNCTION's arguments are what FUNCTION_example() in the same file returns, a tuple. Nothing is
    computed: arguments are traced by their types.
    """
    if summary and (after or scope or form == "dot"):
        raise click.UsageError("--summary compares the first graph with the last, whole, as text or json")
    found = inspected(target, length)
    if summary:
        click.echo(found.summary().to_json() if form == "json" else str(found.summary()))
    else:
        click.echo(found.dump(form, after, scope))

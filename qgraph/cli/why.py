"""`qgraph why`: what quantized values became, and why a rule did not fire."""

from __future__ import annotations

import click

from qgraph.cli.errors import friendly_errors
from qgraph.cli.target import inspected


@click.command()
@click.argument("target")
@click.argument("rule", default="")
@click.option(
    "--at", "scope", default="", metavar="SCOPE", help="One module: its name, or e.g. 'layers.*.attn'."
)
@click.option(
    "--length", default=1, show_default=True, type=click.IntRange(1), help="Tokens in a model's step."
)
@friendly_errors()
def why(target: str, rule: str, scope: str, length: int) -> None:
    """Tell what every use of a quantized value in TARGET became, or why it is unpacked.

    TARGET is FILE.py:FUNCTION (its arguments from FUNCTION_example(), a tuple) or the folder of a
    model. With RULE, the name of a rule or of a pass, tell where that one nearly fired.
    """
    click.echo(inspected(target, length).why(rule, scope))

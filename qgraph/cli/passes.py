"""`qgraph passes`: what a pipeline can be made of."""

from __future__ import annotations

from dataclasses import MISSING, fields
from inspect import getdoc

import click

from qgraph.cli.errors import friendly_errors


@click.command()
@friendly_errors()
def passes() -> None:
    """List the registered passes with their options, and the default pipeline."""
    from qgraph.rewrite import DEFAULT, Pass
    from qgraph.rewrite import passes as registered

    def line(kind: type[Pass]) -> str:
        return (getdoc(kind) or "").partition("\n")[0] if kind.__dict__.get("__doc__") else ""

    found = registered()
    width = max(map(len, found), default=0)
    default = [item.partition("{")[0] for item in DEFAULT.split(",")]
    ordered = sorted(found, key=lambda n: (default.index(n) if n in default else len(default), n))
    for name in ordered:
        click.echo(f"{name:<{width}}  {line(found[name])}".rstrip())
        for f in fields(found[name]):
            value = "" if f.default is MISSING else f"={str(f.default).lower()}"
            click.echo(f"{'':<{width}}    {name}{{{f.name}{value}}}")
    click.echo(f"\ndefault pipeline: {DEFAULT}")

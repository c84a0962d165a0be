"""`qgraph generate`: text from a checkpoint folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qgraph.cli.errors import friendly_errors
from qgraph.cli.loading import loading


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path), help="A model folder.")
@click.option("--prompt", required=True, help="The text to continue; - reads it from stdin.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA folder, as mlx-lm writes it.")
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Stop after as many."
)
@click.option("--temp", default=0.0, show_default=True, type=click.FloatRange(0), help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0), help="Draw the same tokens again.")
@click.option("--raw", is_flag=True, help="Leave out the model's chat template.")
@friendly_errors()
def generate(
    folder: Path,
    prompt: str,
    adapter: Path | None,
    max_tokens: int,
    temp: float,
    seed: int | None,
    raw: bool,
) -> None:
    """Continue a text with a quantized or dense model; the text streams to stdout.

    The speed and the peak memory follow on stderr.
    """
    from qgraph import lm

    text = sys.stdin.read() if prompt == "-" else prompt
    with loading(f"loading {folder.name}") as progress:
        model = lm.load(folder, adapter, progress=progress)
    pieces = model.generate(text, max_tokens=max_tokens, temp=temp, seed=seed, chat=not raw)
    piece = None
    for piece in pieces:
        click.echo(piece.text, nl=False)
    click.echo()
    if piece is not None:
        click.echo(piece.stats, err=True)

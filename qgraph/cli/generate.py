"""`qgraph generate`: text from a checkpoint folder."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qgraph.cli.errors import friendly_errors
from qgraph.cli.loading import loading

if TYPE_CHECKING:
    from qgraph.lm import Piece


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path), help="A model folder.")
@click.option("--prompt", required=True, help="The text to continue; - reads it from stdin.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA folder, as mlx-lm writes it.")
@click.option("--activations", type=click.Choice(["int8"]), help="On a CPU: round them, faster, less exact.")
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Stop after as many."
)
@click.option("--temp", default=0.0, show_default=True, type=click.FloatRange(0), help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0), help="Draw the same tokens again.")
@click.option("--raw", is_flag=True, help="Leave out the model's chat template.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end, instead of the text.")
@friendly_errors()
def generate(
    folder: Path,
    prompt: str,
    adapter: Path | None,
    activations: str | None,
    max_tokens: int,
    temp: float,
    seed: int | None,
    raw: bool,
    as_json: bool,
) -> None:
    """Continue a text with a quantized or dense model; the text streams to stdout.

    Tokens per second of the prompt and of the text, and the peak memory, follow on stderr.
    """
    from qgraph import lm

    text = sys.stdin.read() if prompt == "-" else prompt
    with loading(f"loading {folder.name}") as progress:
        model = lm.load(folder, adapter, activations=activations or "", progress=progress)
    pieces = model.generate(text, max_tokens=max_tokens, temp=temp, seed=seed, chat=not raw)
    found: list[Piece] = []
    for piece in pieces:
        found.append(piece)
        if not as_json:
            click.echo(piece.text, nl=False)
    if as_json:
        click.echo(json.dumps(_plain(found), indent=2))
        return
    click.echo()
    click.echo(found[-1].stats, err=True)


def _plain(pieces: list[Piece]) -> dict[str, Any]:
    """The text and the figures of `Stats` as JSON has them."""
    last = pieces[-1]
    rates = {"prompt_rate": last.stats.prompt_rate, "generation_rate": last.stats.generation_rate}
    return {
        "text": "".join(p.text for p in pieces),
        "tokens": [p.token for p in pieces],
        "finish": last.finish,
        **asdict(last.stats),
        **rates,
    }

"""`qgraph bench`: a checkpoint with qgraph and with plain mlx-lm, in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qgraph.cli.errors import friendly_errors
from qgraph.cli.loading import loading


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path), help="A model folder.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA folder, for both.")
@click.option(
    "--prompt-tokens", default=64, show_default=True, type=click.IntRange(1), help="Random ids, the same."
)
@click.option(
    "--tokens", default=32, show_default=True, type=click.IntRange(2), help="Generated after the prompt."
)
@click.option(
    "--rounds", default=5, show_default=True, type=click.IntRange(1), help="Of each, alternating; medians."
)
@click.option("--json", "as_json", is_flag=True, help="The same figures for a program.")
@friendly_errors()
def bench(
    folder: Path, adapter: Path | None, prompt_tokens: int, tokens: int, rounds: int, as_json: bool
) -> None:
    """Compare qgraph with plain mlx-lm: one checkpoint, one prompt, greedy tokens, in one process.

    Prints tokens per second of prefill and decode, the ratio (above 1: qgraph is faster), the peak memory
    of each, and whether the texts are identical. Both sets of weights are in memory at once.
    """
    import mlx.core as mx

    from qgraph.cli.versus import Report, Side, compare, plain_mlx_lm, random_ids
    from qgraph.execute.program import compiling

    ours = Side.load("qgraph", lambda: _ours(folder, adapter))
    theirs = Side.load("mlx-lm", lambda: _theirs(folder, adapter))
    with plain_mlx_lm("run"):
        logits = theirs.model(mx.array([[0]]))
    prompt = random_ids(logits.shape[-1], prompt_tokens)
    facts = {
        "model": folder.resolve().name,
        "dtype": str(logits.dtype).removeprefix("mlx.core."),
        "device": f"{mx.default_device().type.name}, {mx.device_info().get('device_name', 'unnamed')}",
        "mx.compile": compiling(),
    }
    report = Report(facts, *compare(ours, theirs, prompt, tokens, rounds))
    click.echo(json.dumps(report.plain(), indent=2) if as_json else str(report))


def _ours(folder: Path, adapter: Path | None) -> Any:
    from qgraph import lm

    with loading(f"loading {folder.name}") as progress:
        return lm.load(folder, adapter, progress=progress).model


def _theirs(folder: Path, adapter: Path | None) -> Any:
    """mlx-lm's own model of a folder that qgraph has loaded, so what mlx-lm cannot do is its own limit."""
    import mlx_lm.utils

    from qgraph.cli.versus import plain_mlx_lm

    peer: Any = mlx_lm.utils
    with plain_mlx_lm("load"):
        model, _ = peer.load_model(folder)
        if adapter is not None:
            model = peer.load_adapters(model, str(adapter))
            model.eval()
        return model

"""The command `qgraph`. Each subcommand is a module of its name, imported when it is called."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version

import click

# What --help says of each command, so that it need not import them.
COMMANDS = {
    "generate": "Continue a text with a model.",
    "bench": "Compare the speed, the memory and the text of a model with plain mlx-lm's.",
    "demo": "Show what qgraph does, on the small model that comes with it.",
    "dump": "Print the graph of a function or a model, or a summary of what the passes did.",
    "why": "Tell what quantized values became, and why a rule did not fire.",
    "passes": "List the passes, with their options.",
    "doctor": "Check the installation, and print what a bug report needs.",
}


class _Lazy(click.Group):
    """A group that knows its commands by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(f"qgraph.cli.{cmd_name}"), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("qgraph"), prog_name="qgraph")
def main() -> None:
    """A graph compiler for MLX in which quantization is a rewrite."""
    for library in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # a model is a folder: nothing is fetched
        os.environ.setdefault(library, "1")

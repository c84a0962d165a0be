"""How the commands show errors: one clean message, no traceback, exit code 1."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import click

from qgraph._errors import QGraphError


@contextmanager
def friendly_errors() -> Generator[None]:
    """Turn what qgraph raises on purpose into a message of the command; a decorator, too.

    Anything else is a bug and keeps its traceback. Warnings become one line on stderr.

    >>> with friendly_errors():
    ...     raise QGraphError("the prompt is empty", fix="pass at least one character")
    Traceback (most recent call last):
        ...
    click.exceptions.ClickException: the prompt is empty
      fix: pass at least one character
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except QGraphError as error:
            notes: list[str] = getattr(error, "__notes__", [])
            raise click.ClickException("\n  ".join([str(error), *notes])) from None


def _show_warning(message: Warning | str, *_: object) -> None:
    click.echo(f"Warning: {message}", err=True)

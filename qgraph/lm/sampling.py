"""Choosing the next token, and what a generation reports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import mlx.core as mx

from qgraph import ops
from qgraph._errors import NonFiniteError, QGraphError
from qgraph._jit import jit


@dataclass
class Stats:
    """Counts and times of one generation; filled in as it runs."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0  # after the first token
    peak_bytes: int = 0  # of MLX's arrays in this process

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, up to the first generated token."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_rate(self) -> float:
        """Tokens per second after the first one."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0

    def __str__(self) -> str:
        """One line for a person."""
        return (
            f"prompt {self.prompt_tokens} tokens, {self.prompt_rate:.1f} tokens/s; "
            f"generation {self.generated_tokens} tokens, {self.generation_rate:.1f} tokens/s; "
            f"peak memory {self.peak_bytes / 1e9:.3f} GB"
        )


@dataclass(frozen=True)
class Piece:
    """What one generated token adds to the text.

    Attributes:
        text: The new text; empty while a character is incomplete, and for the end token.
        token: The token's id.
        finish: "stop" at an end token, "length" at the last token that was allowed, else None.
        stats: Of the generation so far; complete at the last piece.
    """

    text: str
    token: int
    finish: Literal["stop", "length"] | None
    stats: Stats


class Sampler:
    """Greedy at temperature 0; otherwise a draw from softmax(logits / temp), reproducible by its seed.

    Errors: QGraphError for a temperature that is negative or not finite.

    >>> Sampler(0.0, seed=None)(mx.array([[1.0, 3.0, 2.0]])).tolist()
    [1]
    """

    def __init__(self, temp: float, seed: int | None) -> None:
        if not isfinite(temp) or temp < 0:
            raise QGraphError(f"the temperature is {temp}", fix="use 0 (greedy) or a positive number")
        self._temp = temp
        self._key = mx.random.key(int.from_bytes(os.urandom(4), "little") if seed is None else seed)

    def __call__(self, logits: mx.array) -> mx.array:
        """Token ids (batch,) for logits (batch, vocab), `NO_TOKEN` where there is none; lazy."""
        if self._temp == 0:
            return greedy(logits)
        self._key, key = mx.random.split(self._key)
        drawn = mx.random.categorical(logits.astype(mx.float32) / self._temp, key=key)
        return checked(drawn, logits)


NO_TOKEN = 2**32 - 1  # no vocabulary is that large


@jit
def greedy(logits: Any) -> Any:
    """The `checked` place of the largest of every row; lazy."""
    return ops.where(
        ops.isfinite(ops.max(logits, -1)), ops.argmax(logits, -1), ops.array(NO_TOKEN, mx.uint32)
    )


@jit
def checked(tokens: Any, logits: Any) -> Any:
    """`tokens`, but `NO_TOKEN` for rows of `logits` that give none: with NaN or +inf, or all -inf.

    The largest of a row tells, so this costs one more reduction, and no wait: the token is read anyway.
    A model may give -inf to tokens that it never wants.
    """
    return ops.where(ops.isfinite(ops.max(logits, -1)), tokens, ops.array(NO_TOKEN, mx.uint32))


def refuse_no_token(token: int, step: int, prompt: int | None = None) -> None:
    """Errors: NonFiniteError for `NO_TOKEN`, with the step (and the prompt) at which it came."""
    if token == NO_TOKEN:
        of = "" if prompt is None else f" of prompt {prompt}"
        raise NonFiniteError(
            f"the logits{of} are not finite at step {step}: there is no token to choose",
            fix="run it with QGRAPH_DEBUG_NAN=1, which names the module that made them so",
        )

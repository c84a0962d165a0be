"""Two models that should compute the same, run in turns: the figures of `qgraph bench`."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random
from time import perf_counter
from typing import Any

import mlx.core as mx

from qgraph._errors import QGraphError
from qgraph.quant.strict_file import clip


@dataclass
class Side:
    """One of the two: a model that mlx-lm's generate_step runs, and what it took so far."""

    name: str
    model: Any
    weights: int = 0  # bytes that stayed when it was loaded
    peak: int = 0  # bytes, the other one's weights not counted
    first: float = 0.0  # seconds of the first run, compilation included
    prefill: list[float] = field(default_factory=list[float])  # seconds, one for each round
    decode: list[float] = field(default_factory=list[float])  # seconds per token
    tokens: list[int] = field(default_factory=list[int])

    @classmethod
    def load(cls, name: str, make: Callable[[], Any]) -> Side:
        """The side that `make` builds, with the memory that this took."""
        before = _start_measuring()
        model = make()
        return cls(name, model, mx.get_active_memory() - before, mx.get_peak_memory() - before)

    def run(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Generate `count` greedy tokens; the seconds of the prompt, and of each token after the first.

        Errors: QGraphError for tokens other than those of the run before.
        """
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        before = _start_measuring()
        streams: Any = [generation_stream]
        with wired_limit(self.model, streams):
            start = perf_counter()
            steps: Any = generate_step(mx.array(prompt, mx.uint32), self.model, max_tokens=count)
            found = [int(next(steps)[0])]
            middle = perf_counter()
            found += [int(token) for token, _ in steps]
            end = perf_counter()
        self.peak = max(self.peak, self.weights + mx.get_peak_memory() - before)
        if self.tokens and found != self.tokens:
            raise QGraphError(
                f"{self.name} gave other tokens for the same prompt than before",
                fix="report it with the output of `qgraph doctor`: greedy tokens must repeat",
            )
        self.tokens = found
        return middle - start, (end - middle) / max(1, count - 1)


def _start_measuring() -> int:
    """Forget the peak, and whatever is garbage; the bytes in use now."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def random_ids(vocab: int, count: int) -> list[int]:
    """Ids within the vocabulary; the same at every call."""
    draw = Random(count)
    return [draw.randrange(vocab) for _ in range(count)]


@contextmanager
def plain_mlx_lm(what: str) -> Generator[None]:
    """Where mlx-lm alone fails, on a model that qgraph runs: one line, and no traceback of its code.

    >>> with plain_mlx_lm("run"):
    ...     raise ValueError("shapes")
    Traceback (most recent call last):
        ...
    qgraph._errors.QGraphError: plain mlx-lm cannot run this model: ValueError: shapes
      fix: run it with `qgraph generate`, which prints its own speed and memory
    """
    try:
        yield
    except QGraphError:
        raise
    except Exception as error:
        first = clip(str(error).partition("\n")[0], 200)
        raise QGraphError(
            f"plain mlx-lm cannot {what} this model: {type(error).__name__}: {first}",
            fix="run it with `qgraph generate`, which prints its own speed and memory",
        ) from error


def compare(
    ours: Side, theirs: Side, prompt: list[int], count: int, rounds: int
) -> tuple[Side, Side, list[int]]:
    """Run both in turns, once more at the beginning to compile, and keep the times.

    Errors: QGraphError where plain mlx-lm fails; whatever qgraph raises.
    """
    for side in (ours, theirs):
        start = perf_counter()
        with plain_mlx_lm("run") if side is theirs else nullcontext():
            side.run(prompt, count)
        side.first = perf_counter() - start
    for n in range(rounds):
        for side in (ours, theirs) if n % 2 else (theirs, ours):
            prefill, decode = side.run(prompt, count)
            side.prefill.append(prefill)
            side.decode.append(decode)
    return ours, theirs, prompt


@dataclass(frozen=True)
class Report:
    """The figures; ``str()`` is for a person, `plain` for a program."""

    facts: dict[str, Any]
    ours: Side
    theirs: Side
    prompt: list[int]

    @property
    def first_difference(self) -> int | None:
        """The position of the first generated token that is not the same."""
        pairs = zip(self.ours.tokens, self.theirs.tokens, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), None)

    def rates(self) -> dict[str, tuple[float, float]]:
        """Tokens per second of qgraph and of mlx-lm, from the medians."""

        def pair(times: Callable[[Side], list[float]], tokens: int) -> tuple[float, float]:
            ours, theirs = (tokens / statistics.median(times(side)) for side in (self.ours, self.theirs))
            return ours, theirs

        return {
            "prefill": pair(lambda s: s.prefill, len(self.prompt)),
            "decode": pair(lambda s: s.decode, 1),
        }

    def plain(self) -> dict[str, Any]:
        """All of it in numbers, strings and lists."""
        rows = {
            name: {"qgraph": a, "mlx-lm": b, "ratio": a / b, "unit": "tokens/s"}
            for name, (a, b) in self.rates().items()
        }
        return {
            **self.facts,
            "prompt_tokens": len(self.prompt),
            "tokens": len(self.ours.tokens),
            "rounds": len(self.ours.prefill),
            **rows,
            "peak_bytes": {"qgraph": self.ours.peak, "mlx-lm": self.theirs.peak},
            "weight_bytes": {"qgraph": self.ours.weights, "mlx-lm": self.theirs.weights},
            "first_run_seconds": {"qgraph": self.ours.first, "mlx-lm": self.theirs.first},
            "identical": self.first_difference is None,
            "first_difference": self.first_difference,
        }

    def __str__(self) -> str:
        """A small table."""
        facts = ", ".join(str(v) for k, v in self.facts.items() if k != "mx.compile")
        counts = f"{len(self.prompt)} prompt tokens, {len(self.ours.tokens)} generated, greedy"
        lines = [f"{facts}; {counts}; medians of {len(self.ours.prefill)} rounds in turns", ""]
        lines += [f"{'':<18}{'qgraph':>12}{'mlx-lm':>12}{'ratio':>9}"]
        for name, (a, b) in self.rates().items():
            lines += [f"{name + ' tokens/s':<18}{a:>12.1f}{b:>12.1f}{a / b:>8.2f}×"]
        a, b = self.ours.peak, self.theirs.peak
        lines += [f"{'peak memory, MB':<18}{a / 1e6:>12.1f}{b / 1e6:>12.1f}{a / b:>8.2f}×"]
        a, b = self.ours.first, self.theirs.first
        lines += [f"{'first run, s':<18}{a:>12.2f}{b:>12.2f}"]
        at, count = self.first_difference, len(self.ours.tokens)
        texts = "identical" if at is None else f"differ from token {at + 1} of {count} on"
        return "\n".join([*lines, "", f"texts: {texts}"])

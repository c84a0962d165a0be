"""Traced values in the hands of MLX: what it says about them, in words that help."""

from __future__ import annotations

import re
from types import TracebackType

import mlx.core as mx

from qgraph import ops
from qgraph._errors import TraceError
from qgraph.ir.origin import Source, is_library

_REFUSED = re.compile(r"(\w+)\(\): incompatible function arguments")
_OPERATOR = re.compile(r"Cannot perform (.+) on an mlx\.core\.array and")
_CALL = re.compile(r"\bmx\.([\w.]+)\(")
_MODULES = {"fast": mx.fast, "random": mx.random, "linalg": mx.linalg, "fft": mx.fft}
_ON_THE_LEFT = "put the traced value on the left, or call the qg function, e.g. qg.multiply(a, b)"


def foreign_call(error: Exception) -> TraceError | None:
    """The error that says that a function of MLX was given a traced value; None for any other error."""
    text = str(error)
    source = user_source_of(error.__traceback__)
    refused = _REFUSED.match(text)
    name = refused[1] if refused else ""
    if not (_refuses_ours(text, name) if name else "Tracer" in text):
        return None
    operator = _OPERATOR.match(text)
    if operator or name.startswith("__"):
        what = operator[1] if operator else name.strip("_")
        message = f"an mx.array on the left of {what} with a traced value on its right: MLX refuses it"
        return TraceError(message, where=_sentence(source), fix=_ON_THE_LEFT)
    called = _full_name(name, source)
    message = f"{f'mx.{called}' if called else 'a function of mlx.core'} was called on a traced value"
    return TraceError(message, where=_sentence(source), fix=instead(called.removeprefix("fast.")))


def instead(called: str) -> str:
    """What to write in place of the function of MLX."""
    if not called:
        return "use the qg function of its name"
    known = hasattr(ops.random, called[7:]) if called.startswith("random.") else hasattr(ops, called)
    return f"use qg.{called}" if known else f"compose it of qg functions: there is no qg.{called}"


def _refuses_ours(text: str, name: str) -> bool:
    """Whether it is MLX that refuses, and was given a traced value, or a list that may hold one."""
    given = text.rpartition("Invoked with types:")[2]
    known = name.startswith("__") or any(hasattr(m, name) for m in (mx, *_MODULES.values()))
    return known and ("Tracer" in given or bool(re.search(r"\b(list|tuple|dict)\b", given)))


def _full_name(name: str, source: Source | None) -> str:
    """``fast.rms_norm`` for ``rms_norm``; for no name, the one call of mx in the user's line."""
    if name:
        inside = next((m for m, module in _MODULES.items() if hasattr(module, name)), "")
        return name if hasattr(mx, name) or not inside else f"{inside}.{name}"
    calls = set(_CALL.findall(source.text)) if source else set[str]()
    return calls.pop() if len(calls) == 1 else ""


def user_source_of(traceback: TracebackType | None) -> Source | None:
    """The innermost line of the user's in a traceback."""
    found: Source | None = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not is_library(code):
            found = Source(code, traceback.tb_lasti)
        traceback = traceback.tb_next
    return found


def _sentence(source: Source | None) -> str | None:
    return source.sentence() if source else None

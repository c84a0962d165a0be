"""Repetition: texts that differ only in the number of the layer they speak of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

# A part of a scope or name that is a number, e.g. the 3 of layers.3.attn; not the 88 of model.py:88.
_NUMBER = re.compile(r"(?<=[A-Za-z_]\.)\d+(?=[.\s,()]|$)")


def collapsed(text: str) -> str:
    """`text` with the numbers of layers as stars.

    >>> collapsed("layers.3.attn.dot (model.py:88)")
    'layers.*.attn.dot (model.py:88)'
    """
    return _NUMBER.sub("*", text)


def layer_of(scope: str) -> str:
    """The layer that a scope lies in: up to its first number; the whole scope where there is none.

    >>> layer_of("model.layers.3.mlp.experts.0"), layer_of("model.norm")
    ('model.layers.3', 'model.norm')
    """
    found = _NUMBER.search(scope)
    return scope[: found.end()] if found else scope


def ranges(scopes: Sequence[str]) -> str:
    """Scopes that differ in one number, as one text.

    >>> ranges(["layers.0", "layers.1", "layers.2", "layers.5"]), ranges(["norm"])
    ('layers.0–2,5', 'norm')
    """
    numbers = [int(m[0]) for m in map(_NUMBER.search, scopes) if m]
    if len(numbers) < 2 or len(numbers) != len(scopes):
        return ", ".join(scopes)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return _NUMBER.sub(text, scopes[0], count=1)


def inside(scope: str, pattern: str) -> bool:
    """Whether `scope` is, or lies inside, a scope that `pattern` names; stars match within.

    The outermost parts may be left out.

    >>> inside("model.layers.3.attn.q_proj", "layers.*.attn"), inside("layers.31", "layers.3")
    (True, False)
    """
    forms = (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*")
    return not pattern or any(fnmatchcase(scope, form) for form in forms)

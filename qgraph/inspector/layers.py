"""Repetition: texts that differ only in the number of the layer they speak of."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

# A part of a scope or name that is a number, e.g. the 3 of layers.3.attn; not the 88 of model.py:88.
_NUMBER = re.compile(r"(?<=[A-Za-z_]\.)\d+(?=[.\s,()]|$)")


def collapsed(text: str) -> str:
    """`text` with the numbers of layers as stars.

    >>> collapsed("layers.3.attn.dot (model.py:88)")
    'layers.*.attn.dot (model.py:88)'
    """
    return _NUMBER.sub("*", text)


def inside(scope: str, pattern: str) -> bool:
    """Whether `scope` is, or lies inside, a scope that `pattern` names; stars match within.

    The outermost parts may be left out.

    >>> inside("model.layers.3.attn.q_proj", "layers.*.attn"), inside("layers.31", "layers.3")
    (True, False)
    """
    forms = (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*")
    return not pattern or any(fnmatchcase(scope, form) for form in forms)

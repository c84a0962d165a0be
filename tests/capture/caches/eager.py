"""A model's code run on stand-ins with real arrays: what a capture would do, without one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qgraph.capture.caches import register
from qgraph.capture.state import Step, around, commit_all, holder

register()


def step(model: Any, tokens: mx.array, caches: list[Any], *, dynamic: bool = True) -> mx.array:
    """The logits; the caches are updated by way of stand-ins."""
    return step_and_keys(model, tokens, caches, dynamic=dynamic)[0]


def step_and_keys(
    model: Any, tokens: mx.array, caches: list[Any], *, dynamic: bool = True
) -> tuple[mx.array, Any]:
    """The same, and what the key of the program would say of the caches."""
    now = Step(tokens.shape[1], dynamic=dynamic)
    held = [holder(type(c))(c, now) for c in caches]
    made = [h.stand_in(list(h.arrays)) for h in held]
    with around():
        logits = model(tokens, cache=[stand_in for stand_in, _ in made])
    found = [read() for _, read in made]
    commit_all(held, [x for arrays, _ in found for x in arrays], [(len(a), after) for a, after in found])
    mx.eval(logits, [c.state for c in caches if hasattr(c, "state")])
    return logits, tuple((h.key, tuple((x.shape, x.dtype) for x in h.arrays)) for h in held)

"""Attention over a buffer whose end is empty: every mask leaves it out, also those that models do not ask for.

mlx-lm's caches return the filled positions only, so a model may pass no mask for a single token, or "causal".
A stand-in returns a window of the buffer; where attention is given that very array, its mask is made complete.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from qgraph.capture.state import NotDynamic
from qgraph.lm.caches.positions import Position, arange

LOCAL = threading.local()
PATCHING = threading.RLock()  # one capture at a time: patches nest, and are undone in order


class Buffer(Protocol):
    """What a stand-in can say about the window that it returned; no mask: every position is filled."""

    @property
    def place(self) -> Hashable:
        """What its masks depend on: equal for windows that the same masks fit."""
        ...

    def filled(self) -> mx.array | None:
        """Which positions hold something, bool, broadcastable to (B, 1, L, window)."""
        ...

    def causal(self, length: int) -> mx.array | None:
        """Which positions each of the last `length` may see, bool, broadcastable to (B, 1, L, window)."""
        ...


@dataclass(frozen=True)
class Mask:
    """A mask that a stand-in made; `plain` where mlx-lm's cache would have made none, or "causal"."""

    array: mx.array
    place: Hashable
    plain: bool


class Session:
    """The windows and masks of one run of the model's code."""

    def __init__(self) -> None:
        self.windows: dict[int, tuple[mx.array, Buffer]] = {}
        self.masks: dict[int, Mask] = {}  # by the id of their array, which they keep alive
        self.attended: set[int] = set()

    def fetched(self, keys: mx.array, buffer: Buffer) -> None:
        """Note that the model was given this window."""
        self.windows[id(keys)] = keys, buffer

    def masked(self, mask: mx.array, place: Hashable, *, plain: bool) -> mx.array:
        """Note a mask that a stand-in made, and return it."""
        self.masks[id(mask)] = Mask(mask, place, plain)
        return mask

    def mask_for(self, queries: mx.array, keys: Any, mask: Any) -> Any:
        """The mask that attention needs, given the one that the model passes."""
        made, known = self.masks.get(id(mask)), self.windows.get(id(keys))
        if known is None:
            if made is None or not made.plain or keys.shape[-2] == made.array.shape[-1]:
                return mask
            return "causal" if queries.shape[-2] > 1 else None  # as for a cache that is no window
        buffer = known[1]
        self.attended.add(id(keys))
        if isinstance(mask, str):
            return buffer.causal(queries.shape[-2])
        if mask is None:
            return buffer.filled()
        if made is not None and made.place == buffer.place:
            return mask
        if made is not None and made.plain:
            return buffer.causal(queries.shape[-2])
        return _without_end(mask, buffer.filled())

    def check(self) -> None:
        """Errors: NotDynamic where the model took windows and neither asked for masks nor attended."""
        if not self.masks and self.windows.keys() - self.attended:
            raise NotDynamic(
                "the model reads its cache by code of its own, and does not ask the cache for a mask",
                fix="call mlx_lm.models.base.create_attention_mask, or mx.fast.scaled_dot_product_attention",
            )


def _without_end(mask: mx.array, filled: mx.array | None) -> mx.array:
    if filled is None:
        return mask
    if mask.dtype == mx.bool_:
        return mask & filled
    return mx.where(filled, mask, mx.array(mx.finfo(mask.dtype).min, mask.dtype))


def session() -> Session:
    """The one of this thread; outside of `attending` one that nothing looks at."""
    found = getattr(LOCAL, "session", None)
    return Session() if found is None else found


@contextmanager
def attending() -> Iterator[Session]:
    """Around a model's code that is given stand-ins.

    Errors: NotDynamic, at the end, where the model was not seen to leave out the empty end of a buffer.
    """
    fast: Any = mx.fast
    module: Any = mx
    with PATCHING:
        attend, plain_arange, numpy_arange = fast.scaled_dot_product_attention, module.arange, np.arange

        def attention(q: mx.array, k: mx.array, v: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            mask = session().mask_for(q, k, kwargs.pop("mask", None))
            return attend(q, k, v, *args, mask=mask, **kwargs)

        def from_numpy(*args: Any, **kwargs: Any) -> Any:
            inside = any(isinstance(a, Position) for a in args)
            return arange(*args, **kwargs) if inside else numpy_arange(*args, **kwargs)

        outer, current = getattr(LOCAL, "session", None), Session()
        fast.scaled_dot_product_attention, module.arange, np.arange = attention, arange, from_numpy
        LOCAL.session = current
        try:
            yield current
            current.check()
        finally:
            fast.scaled_dot_product_attention, module.arange = attend, plain_arange
            np.arange, LOCAL.session = numpy_arange, outer

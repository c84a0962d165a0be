"""Attention over a buffer whose end is empty: every mask leaves it out, also where models pass none.

mlx-lm's caches return the filled positions only, so a model may pass no mask for a single token, or "causal".
A stand-in returns a window of the buffer; where attention is given that very array, its mask is completed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from qgraph.capture.caches.positions import Position, Span, arange
from qgraph.capture.state import DOUBTS, NotDynamic

SHAPE: Any = mx.array.shape.fget
SIZE: Any = mx.array.size.fget
TRUSTED = ("qgraph.", "mlx_lm.models.base")  # these read the other sizes only
LOCAL = threading.local()
PATCHING = threading.RLock()  # one capture at a time: patches nest, and are undone in order


class Buffer(Protocol):
    """What a stand-in can say about the window that it returned; no mask: every position is filled."""

    @property
    def place(self) -> Hashable:
        """What its masks depend on: equal for windows that the same masks fit."""
        ...

    @property
    def end(self) -> Position:
        """Where the filled positions of the window end."""
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


class Windowed(mx.array):
    """A window, as the model is given it: an array whose length is a `Span`."""

    __slots__ = ()

    @property
    def shape(self) -> Any:
        plain, current = SHAPE(self), session()
        known = current.windows.get(id(self))
        if known is None or sys._getframe(1).f_globals["__name__"].startswith(TRUSTED):
            return plain
        current.doubt("the model reads the length of its cache")
        return (*plain[:2], Span.of(plain[2], known[1].end), *plain[3:])

    @property
    def size(self) -> Any:
        session().doubt("the model reads the size of its cache")
        return SIZE(self)


class Session:
    """The windows and masks of one run of the model's code."""

    def __init__(self) -> None:
        self.windows: dict[int, tuple[mx.array, Buffer]] = {}  # the keys and the values
        self.masks: dict[int, Mask] = {}  # by the id of their array, which they keep alive
        self.unattended: set[int] = set()
        self.doubts: dict[str, None] = {}

    def fetched(self, keys: mx.array, values: mx.array, buffer: Buffer) -> None:
        """Note that the model is given this window."""
        for x in (keys, values):
            x.__class__ = Windowed  # the same array; a copy would be a node of the graph
            self.windows[id(x)] = x, buffer
        self.unattended.add(id(keys))

    def whole(self, keys: mx.array, buffer: Buffer) -> None:
        """Note that the model is given a buffer that is full."""
        self.windows[id(keys)] = keys, buffer

    def doubt(self, why: str) -> None:
        """Note why the program is to be checked."""
        self.doubts[why] = None

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
        self.unattended.discard(id(keys))
        if isinstance(mask, str):
            return buffer.causal(queries.shape[-2])
        if mask is None:
            return buffer.filled()
        if made is not None and made.place == buffer.place:
            return mask
        if made is not None and made.plain:
            return buffer.causal(queries.shape[-2])
        return _without_end(mask, buffer.filled())

    def attends(self, given: Any, mask: Any, buffer: Buffer) -> None:
        """Note attention by mlx-lm's code for quantized caches, which applies `mask` to what it was given."""
        made = self.masks.get(id(mask))
        if given is not None and made is not None and made.place == buffer.place:
            self.unattended.discard(id(given[0][0]))

    def check(self) -> None:
        """Errors: NotDynamic where the model took windows and neither asked for masks nor attended."""
        if not self.unattended:
            return
        self.doubt("the model attends to its cache by code of its own")
        if not self.masks:
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
def attending() -> Generator[Session]:
    """Around a model's code that is given stand-ins.

    Errors: NotDynamic, at the end, where the model was not seen to leave out the empty end of a buffer.
    """
    fast: Any = mx.fast
    module: Any = mx
    with PATCHING:
        attend, plain_arange = fast.scaled_dot_product_attention, module.arange
        numpy_arange: Any = np.arange

        def attention(q: mx.array, k: mx.array, v: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            mask = session().mask_for(q, k, kwargs.pop("mask", None))
            return attend(q, k, v, *args, mask=mask, **kwargs)

        def from_numpy(*args: Any, **kwargs: Any) -> Any:
            inside = any(isinstance(a, (Position, Span)) for a in args)
            return arange(*args, **kwargs) if inside else numpy_arange(*args, **kwargs)

        outer, current = getattr(LOCAL, "session", None), Session()
        fast.scaled_dot_product_attention, module.arange, np.arange = attention, arange, from_numpy
        LOCAL.session = current
        try:
            yield current
            current.check()
            DOUBTS.said.extend(current.doubts)
        finally:
            fast.scaled_dot_product_attention, module.arange = attend, plain_arange
            np.arange, LOCAL.session = numpy_arange, outer

"""CacheList: caches in one, each held as its own class is."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qgraph.capture.caches.literal import blank, class_of
from qgraph.capture.state import Held, NotDynamic, Reader, Step, holder


class Several:
    """The caches of a CacheList, in order."""

    __slots__ = ("arrays", "cache", "counts", "key", "parts", "slack")

    def __init__(self, cache: Any, parts: list[Held]) -> None:
        self.cache: Any = cache
        self.parts = parts
        self.counts = [len(p.arrays) for p in parts]
        self.slack = max((getattr(p, "slack", 0) for p in parts), default=0)
        self.arrays = [x for p in parts for x in p.arrays]
        self.key = (type(cache), *(p.key for p in parts))

    @property
    def names(self) -> list[str]:
        return [
            f"{n}.{dict(enumerate(getattr(part, 'names', ()))).get(i, i)}"
            for n, part in enumerate(self.parts)
            for i in range(len(part.arrays))
        ]

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made: list[Any] = []
        readers: list[Reader] = []
        at = 0
        for part, count in zip(self.parts, self.counts, strict=True):
            one, reader = part.stand_in(arrays[at : at + count])
            made.append(one)
            readers.append(reader)
            at += count
        several = blank(type(self.cache))
        several.caches = type(self.cache.caches)(made)

        def read() -> tuple[list[mx.array], Any]:
            found = [reader() for reader in readers]
            return [x for xs, _ in found for x in xs], tuple((len(xs), after) for xs, after in found)

        return several, read

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        at = 0
        for part, (count, one) in zip(self.parts, after, strict=True):
            part.commit(arrays[at : at + count], one)
            at += count


def hold(cache: Any, step: Step) -> Held:
    """Hold a CacheList.

    Errors: NotDynamic for a cache in it of a class that is not known.
    """
    parts: list[Held] = []
    for one in cache.caches:
        kind = class_of(one)
        how = holder(kind)
        if how is None:
            raise NotDynamic(f"a CacheList with a {kind.__name__}")
        parts.append(how(one, step))
    return Several(cache, parts)

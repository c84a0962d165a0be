"""How mlx-lm's own caches go through a captured program and come back: one file for every family of them."""

from __future__ import annotations

from qgraph.capture.state import AROUND, HOLDS, OTHERS, Hold


def register() -> None:
    """Make the classes of `mlx_lm.models.cache` known to captures. Imports mlx-lm; again is free."""
    from qgraph.capture.caches.attention import attending

    if attending in AROUND:
        return
    from mlx_lm.models import cache as mlx_lm_cache

    from qgraph.capture.caches import batched, chunked, growing, lists, literal, rotating, states

    base: type = mlx_lm_cache._BaseCache

    def other(kind: type) -> Hold | None:
        """A cache that a model or a user defines: held literally."""
        own = kind.__module__.startswith("mlx_lm.models.") and hasattr(kind, "state")
        own = own or hasattr(kind, "update_and_fetch") or issubclass(kind, base)
        return literal.hold_unknown if own else None

    OTHERS.append(other)
    HOLDS.update(
        {
            mlx_lm_cache.KVCache: growing.hold_keys,
            mlx_lm_cache.QuantizedKVCache: growing.hold_quantized,
            mlx_lm_cache.RotatingKVCache: rotating.hold,
            mlx_lm_cache.ChunkedKVCache: chunked.hold,
            mlx_lm_cache.BatchKVCache: batched.hold_keys,
            mlx_lm_cache.BatchRotatingKVCache: batched.hold_rotating,
            mlx_lm_cache.ArraysCache: states.hold,
            mlx_lm_cache.ConcatenateKVCache: literal.hold,
            mlx_lm_cache.CacheList: lists.hold,
        }
    )
    AROUND.append(attending)

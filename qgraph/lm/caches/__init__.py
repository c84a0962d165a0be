"""How mlx-lm's own caches go through a captured program and come back: one file for every family of them."""

from __future__ import annotations

from qgraph.capture.state import AROUND, HOLDS


def register() -> None:
    """Make the classes of `mlx_lm.models.cache` known to captures. Imports mlx-lm; again is free."""
    from qgraph.lm.caches.attention import attending

    if attending in AROUND:
        return
    from mlx_lm.models import cache as mlx_lm

    from qgraph.lm.caches import batched, chunked, growing, lists, literal, rotating

    HOLDS.update(
        {
            mlx_lm.KVCache: growing.hold_keys,
            mlx_lm.QuantizedKVCache: growing.hold_quantized,
            mlx_lm.RotatingKVCache: rotating.hold,
            mlx_lm.ChunkedKVCache: chunked.hold,
            mlx_lm.BatchKVCache: batched.hold_keys,
            mlx_lm.BatchRotatingKVCache: batched.hold_rotating,
            mlx_lm.ArraysCache: literal.hold,  # nothing in it counts
            mlx_lm.ConcatenateKVCache: literal.hold,
            mlx_lm.CacheList: lists.hold,
        }
    )
    AROUND.append(attending)

"""A decoder of one layer, written once: in qg ops, or in MLX's own with `ns` and `linear` of MLX."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx

import qgraph as qg
from tests.agree import normal
from tests.conformance.oracle import kernel

HIDDEN, HEAD, QUERIES, KEYS, VOCABULARY = 32, 16, 2, 1, 96
PROJECTIONS = {
    "q": (QUERIES * HEAD, HIDDEN),
    "k": (KEYS * HEAD, HIDDEN),
    "v": (KEYS * HEAD, HIDDEN),
    "o": (HIDDEN, QUERIES * HEAD),
    "gate": (32, HIDDEN),
    "up": (32, HIDDEN),
    "down": (HIDDEN, 32),
}
MLX = SimpleNamespace(
    **{n: getattr(mx, n) for n in ("arange", "slice_update", "take", "sigmoid")},
    **{n: getattr(mx.fast, n) for n in ("rms_norm", "rope", "scaled_dot_product_attention")},
)


def parameters(scheme, only=tuple(PROJECTIONS)):
    """Weights such that activations stay of order 1; those in `only` are packed."""
    mode, bits, group = scheme
    shapes = {**PROJECTIONS, "table": (VOCABULARY, HIDDEN), "head": (VOCABULARY, HIDDEN)}
    dense = {name: normal(*s, seed=i) * s[1] ** -0.5 for i, (name, s) in enumerate(shapes.items())}
    pack = lambda w: qg.quantize(w, mode=mode, bits=bits, group_size=group)  # noqa: E731
    packed = {name: pack(w) if name in only else w for name, w in dense.items()}
    norms = {f"norm{i}": 1 + 0.1 * normal(HIDDEN, seed=30 + i) for i in range(3)}
    return packed | norms


def empty_cache(capacity):
    """Keys and values for `capacity` positions."""
    return tuple(mx.zeros((1, KEYS, capacity, HEAD)) for _ in range(2))


def linear(x, w):
    """As a user of qgraph writes it."""
    return qg.dot(x, w.T)


def mlx_linear(x, w):
    """As MLX has it for packed weights."""
    return kernel(x, w) if qg.is_quantized(w) else x @ w.T


def layer(p, x, cache, offset, ns=qg, linear=linear):
    """One layer on x (1, length, HIDDEN); the cache with `length` more positions behind `offset`."""
    length, capacity = x.shape[1], cache[0].shape[2]

    def heads(y):
        return y.reshape(1, length, -1, HEAD).transpose(0, 2, 1, 3)

    def turned(y):
        return ns.rope(y, HEAD, traditional=False, base=10000.0, scale=1.0, offset=offset)

    h = ns.rms_norm(x, p["norm0"], 1e-5)
    start = offset.reshape(1)
    new = turned(heads(linear(h, p["k"]))), heads(linear(h, p["v"]))
    keys, values = (ns.slice_update(old, y, start, (2,)) for old, y in zip(cache, new, strict=True))
    mask = (offset + ns.arange(length))[:, None] >= ns.arange(capacity)
    query = turned(heads(linear(h, p["q"])))
    y = ns.scaled_dot_product_attention(query, keys, values, scale=HEAD**-0.5, mask=mask)
    x = x + linear(y.transpose(0, 2, 1, 3).reshape(1, length, -1), p["o"])
    h = ns.rms_norm(x, p["norm1"], 1e-5)
    gate = linear(h, p["gate"])
    return x + linear(gate * ns.sigmoid(gate) * linear(h, p["up"]), p["down"]), (keys, values)


def next_token(p, token, cache, offset):
    """The most likely token after `token` (1, length)."""
    x, cache = layer(p, qg.take(p["table"], token, axis=0), cache, offset)
    logits = linear(qg.rms_norm(x[:, -1:], p["norm2"], 1e-5), p["head"])
    return qg.argmax(logits, axis=-1), cache

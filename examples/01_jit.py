"""A dense function, run on dense and on packed weights: the function does not change."""

import mlx.core as mx

import qgraph as qg


@qg.jit
def mlp(x, w):
    """SwiGLU in plain array code."""
    return (qg.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T


keys = mx.random.split(mx.random.key(0), 4)
x = mx.random.normal((2, 64), key=keys[0])
dense = {
    "gate": mx.random.normal((256, 64), key=keys[1]) / 8,
    "up": mx.random.normal((256, 64), key=keys[2]) / 8,
    "down": mx.random.normal((64, 256), key=keys[3]) / 16,
}
packed = {name: qg.quantize(w, bits=8, group_size=64) for name, w in dense.items()}

exact, quantized = mlp(x, dense), mlp(x, packed)
loss = mx.sqrt(mx.mean((exact - quantized) ** 2) / mx.mean(exact**2)).item()
print(f"8-bit weights change the result by {loss:.2%}")
print(mlp.cache_info())
print(mlp.report(x, packed))

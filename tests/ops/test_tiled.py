"""Products of many rows with packed weights on a CPU: tile by tile, with the kernel's sums."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir import digest, parse_graph
from qgraph.ops import tiled
from qgraph.rewrite import Context, Pipeline
from tests.agree import agree, assert_close, magnitude_of, normal

# The native kernels need no tiles.
pytestmark = pytest.mark.usefixtures("mlx_alone")
N, K = 512, 256
ROWS = tiled.PRODUCTS // (N * K)


def weight(bits=4, group_size=64, dtype=mx.float32, n=N, k=K):
    return qg.quantize(normal(n, k).astype(dtype), bits=bits, group_size=group_size)


def product(x, w):
    return x @ w.T


def is_tiled(graph):
    (node,) = graph.find("quantized_matmul")
    return node.op.kernel == "tiled"


def test_the_smallest_that_gains():
    assert ROWS < tiled.ROWS < 2 * tiled.ROWS
    x = normal(tiled.ROWS, K)
    f = qg.jit(product)
    assert is_tiled(f.optimized(x, weight()))
    assert not is_tiled(f.optimized(x[1:], weight()))
    assert not is_tiled(f.optimized(x, weight(n=N // 4)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_every_width_agrees_with_the_reference_and_with_the_kernel(bits, group_size):
    x, w = normal(2, 9, K), weight(bits, group_size)
    f = qg.jit(product)
    graph = f.optimized(x, w)
    assert is_tiled(graph)
    bound = magnitude_of(x, w)
    parts = (w.packed, w.scales, w.biases)
    kernel = mx.quantized_matmul(x, *parts, group_size=group_size, bits=bits)
    assert_close(f(x, w), kernel, k=K, path="P2", magnitude=bound)
    assert_close(f(x, w), x @ qg.dequantize(w).T, k=K, path="P2", magnitude=bound)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_weights_are_unpacked_in_f32(dtype):
    x, w = normal(20, K).astype(dtype), weight(dtype=dtype)
    f = qg.jit(product)
    assert is_tiled(f.optimized(x, w))
    exact = x.astype(mx.float32) @ qg.dequantize(w.astype(mx.float32)).T
    assert f(x, w).dtype == dtype
    assert_close(f(x, w), exact, k=K, path="P2", magnitude=magnitude_of(x, w))


def test_tiles_that_do_not_divide_the_rows_of_the_weight(monkeypatch):
    x, w = normal(20, K), weight(n=N + 3)
    f = qg.jit(product)
    whole = f(x, w)
    for tile in (7 * K, 100 * K, K, 1):
        monkeypatch.setattr(tiled, "TILE", tile)
        monkeypatch.setattr(tiled, "TILES", N)
        assert_close(f(x, w), whole, k=K, path="P2", magnitude=magnitude_of(x, w))


@pytest.mark.parametrize(
    ("why", "f", "x", "w"),
    [
        ("another mode", product, normal(20, K), qg.quantize(normal(N, K), mode="mxfp8")),
        ("not transposed", lambda x, w: x @ w, normal(20, N), weight()),
        ("a stack", lambda x, w: x @ qg.swapaxes(w, -1, -2), normal(2, 20, K), qg.quantize(normal(2, N, K))),
    ],
)
def test_what_stays_with_the_kernel(why, f, x, w):
    assert not is_tiled(qg.jit(f).optimized(x, w)), why


TEXT = f"""graph(%x: f32[20,{K}], %w: f32[{N},{K}]:affine4g64) {{
    %y = quantized_matmul{{transpose=True}}(%x, %w) : f32[20,{N}]
    return %y
}}"""


@pytest.mark.parametrize(("device", "tiles"), [("cpu", True), ("metal", False), ("cuda", False)])
def test_the_device_decides_and_the_text_parses_back(device, tiles):
    graph = Pipeline.parse("legalize").run(parse_graph(TEXT), Context(device=device)).graph
    assert is_tiled(graph) == tiles
    assert ("kernel='tiled'" in str(graph)) == tiles
    assert digest(parse_graph(str(graph))) == digest(graph)


def test_a_lora_branch_stays_fused():
    @qg.jit
    def f(x, w, a, b):
        return x @ w.T + 2.0 * ((x @ a) @ b)

    args = normal(20, K), weight(), normal(K, 4), normal(4, N)
    graph = agree(f, *args)
    (node,) = graph.find("quantized_lora_matmul")
    assert node.op.kernel == "tiled"
    assert "tiled_matmul(x_1, " in f.source(*args)


def test_the_gradient_of_x_is_the_kernels():
    x, w = normal(20, K), weight()
    f = qg.jit(product)
    assert is_tiled(f.optimized(x, w))
    found = mx.grad(lambda x: (f(x, w) * mx.sin(f(x, w))).sum())(x)
    y, dense = x @ qg.dequantize(w).T, qg.dequantize(w)
    exact = (mx.sin(y) + y * mx.cos(y)) @ dense
    assert_close(found, exact, k=N, magnitude=magnitude_of(abs(mx.sin(y)) + abs(y), dense, transpose=False))


def test_the_report_speaks_of_a_product_on_packed_words():
    report = qg.jit(product).report(normal(20, K), weight())
    assert report.counts() == {"quantized_matmul": 1}
    assert not report.missed

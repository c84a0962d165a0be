"""A product whose K is not its weight's: the message names K, bits, group_size, parameter and module."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph import ShapeError
from tests.agree import normal

K = 128


def read_as(bits, group_size, lead=()):
    """The arrays of a 4-bit weight with groups of 64, read under another config."""
    w = qg.quantize(normal(*lead, 32, K), bits=4, group_size=64)
    return qg.from_quantized(*w.components(), bits=bits, group_size=group_size)


PRODUCTS = {
    "dot": lambda x, w: x @ w.T,
    "quantized_matmul": lambda x, w: qg.quantized_matmul(x, w),
    "on the left": lambda x, w: (w @ x.T).T,
    "lora": lambda x, w: qg.quantized_lora_matmul(x, w, mx.ones((K, 2)), mx.ones((2, 32)), mx.array(1.0)),
    "gather_mm": lambda x, w: qg.gather_mm(x[None], w[None].swapaxes(-1, -2)),
    "gather_qmm": lambda x, w: qg.gather_qmm(x[None], w[None]),
    "einsum": lambda x, w: qg.einsum("bk,nk->bn", x, w),
}


@pytest.mark.parametrize(("bits", "group_size", "k"), [(8, 32, 64), (2, 128, 256)])
@pytest.mark.parametrize("product", [p for p in PRODUCTS if p != "einsum"])
def test_a_config_that_reads_the_same_arrays_is_named(product, bits, group_size, k):
    w = read_as(bits, group_size)

    @qg.jit
    def step(params, x):
        with qg.scope("layers.3.q_proj"):
            return PRODUCTS[product](x, params["q_proj"]["weight"])

    with pytest.raises(ShapeError) as info:
        step({"q_proj": {"weight": w}}, normal(2, K))
    text = str(info.value)
    for part in (
        str(K),
        f"packed as affine{bits}g{group_size}: K = {k}, bits = {bits}, group_size = {group_size}",
        "at layers.3.q_proj.",
        "test_inner_sizes.py",
        "fix: the same arrays read as affine4g64 have K = 128: check bits and group_size in config.json",
    ):
        assert part in text
    if "gather" not in product:
        assert "%params.q_proj.weight" in text


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_right_config_is_taken(product):
    assert qg.jit(PRODUCTS[product])(normal(2, K), read_as(4, 64)).shape[-2:] == (2, 32)


def test_a_k_that_no_config_gives_names_what_there_is():
    with pytest.raises(ShapeError, match="affine2g128 with K = 256 or affine8g32 with K = 64"):
        qg.jit(lambda x, w: x @ w.T)(normal(2, 96), read_as(4, 64))
    w = qg.quantize(normal(32, K), mode="mxfp4")
    with pytest.raises(ShapeError, match="K = 128, bits = 4, group_size = 32") as info:
        qg.jit(lambda x, w: x @ w.T)(normal(2, 96), w)
    assert "config.json" not in str(info.value)


def test_the_other_axis_is_a_matter_of_orientation():
    with pytest.raises(ShapeError, match=r"inner sizes differ, 128 \(lhs axis -1\) and 32") as info:
        qg.jit(lambda x, w: x @ w)(normal(2, K), read_as(4, 64))
    assert "its .T" in str(info.value)
    assert "packed as" not in str(info.value)

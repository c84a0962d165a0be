"""share-rope: one table of angles for all layers, the same numbers to the last bit."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.execute.program import Program
from qgraph.ir import parse_graph
from qgraph.rewrite import Context, Pipeline
from tests.agree import agree, normal, ops

# With the native kernels there is nothing to share.
pytestmark = pytest.mark.usefixtures("mlx_alone")
PIPELINE = "canonicalize,share-rope,guard-indices,legalize"


def two_layers(**changes):
    arguments = {"traditional": False, "base": 10000.0, "scale": 1.0, **changes}
    dims = arguments.pop("dims", 8)

    @qg.jit(pipeline=PIPELINE)
    def f(q, k, offset, *freqs):
        given = {**arguments, **({"base": None, "freqs": freqs[0]} if freqs else {})}
        return [qg.rope(x, dims, offset=offset, **given) for x in (q, k, q + 1.0)]

    return f


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    ("changes", "offset", "batch"),
    [
        ({}, 5, 1),
        ({"base": 1e6, "dims": 6}, 4000, 1),
        ({"base": 500000.0}, [5], 2),
        ({"base": 150000.0, "scale": 0.25}, [3, 70], 2),
        ({"freqs": True, "dims": 4, "scale": 0.5}, 9, 1),
    ],
)
def test_the_bits_are_those_of_mlx_s_rope(changes, offset, batch, traditional, dtype):
    changes = dict(changes)
    freqs = [normal(changes["dims"] // 2) ** 2 + 1.0] if changes.pop("freqs", None) else []
    f = two_layers(traditional=traditional, **changes)
    q, k = normal(batch, 4, 3, 8, dtype=dtype), normal(batch, 2, 3, 8, dtype=dtype)
    at = mx.array(offset)
    found, (exact, *_) = f(q, k, at, *freqs), (Program(f.graph(q, k, at, *freqs)).run(q, k, at, *freqs),)
    for a, b in zip(found, exact, strict=True):
        assert mx.array_equal(a, b)
    assert ops(f.optimized(q, k, at, *freqs))["rope_angles"] == 1
    assert "rope" not in ops(f.optimized(q, k, at, *freqs))


def test_the_reference_agrees_at_every_pass():
    f = two_layers(dims=6)
    counts = ops(agree(f, normal(2, 4, 3, 8), normal(2, 2, 3, 8), mx.array([4, 9])))
    assert (counts["rope_angles"], counts["cos"], counts["sin"]) == (1, 1, 1)
    assert ops(agree(two_layers(traditional=True), normal(1, 4, 3, 8), normal(1, 2, 3, 8), mx.array(2)))


def test_tables_are_shared_by_equal_angles_only():
    @qg.jit(pipeline=PIPELINE)
    def f(x, y, at):
        def turn(x, base, offset):
            return qg.rope(x, 8, traditional=False, base=base, scale=1.0, offset=offset)

        return turn(x, 1e4, at), turn(y, 1e4, at), turn(x, 1e6, at), turn(y, 1e6, at), turn(x, 1e4, 3)

    counts = ops(agree(f, normal(1, 2, 3, 8), normal(1, 4, 3, 8), mx.array(7)))
    assert (counts["rope_angles"], counts["rope"]) == (2, 1)


def test_a_table_that_nobody_shares_stays_a_rope():
    f = qg.jit(pipeline=PIPELINE)(lambda x: qg.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=0))
    assert ops(agree(f, normal(1, 2, 3, 8))) == {"rope": 1}


def test_offsets_in_two_arrays_are_two_tables():
    @qg.jit(pipeline=PIPELINE)
    def f(x, at, other):
        return [qg.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=o) for o in (at, other)]

    assert ops(agree(f, normal(1, 2, 3, 8), mx.array(3), mx.array(5))) == {"rope": 2}


ROPES = """graph(%x: f32[1,2,3,8], %y: f32[1,4,3,8]) {
    %a = rope{dims=8, traditional=False, base=10000.0, scale=1.0, offset=0}(%x) : f32[1,2,3,8]
    %b = rope{dims=8, traditional=False, base=10000.0, scale=1.0, offset=0}(%y) : f32[1,4,3,8]
    return %a, %b
}"""


@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_a_gpu_keeps_its_kernel(device):
    result = Pipeline.parse("share-rope").run(parse_graph(ROPES), Context(device=device))
    assert ops(result.graph) == {"rope": 2}


def test_the_native_kernel_keeps_its_ropes():
    for native, found in ((True, True), (False, False)):
        context = Context(device="cpu", native=native)
        graph = Pipeline.parse("share-rope").run(parse_graph(ROPES), context).graph
        assert (ops(graph) == {"rope": 2}) == found


def test_fuel_stops_it_between_two_ropes():
    result = Pipeline.parse("share-rope").run(parse_graph(ROPES), Context(device="cpu", fuel=1))
    assert ops(result.graph)["rope"] == 1


def test_the_tables_name_every_module_that_reads_them():
    def layer(x, n):
        with qg.scope(f"model.layers.{n}.rope"):
            return qg.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=0)

    f = qg.jit(pipeline=PIPELINE)(lambda x: layer(layer(x, 0), 1))
    after = f.optimized(normal(1, 2, 3, 8))
    assert {n.origin.scope for n in after.find("cos", "sin", "rope_angles")} == {"model.layers"}
    turned = [n.origin.scope for n in after.find("add")]
    assert turned == ["model.layers.0.rope", "model.layers.1.rope"]

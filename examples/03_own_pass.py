"""A pass of one's own: ten lines, and a report of what it did and why it did not fire."""

import mlx.core as mx

import qgraph as qg
from qgraph.numeric import compare


@qg.register("exp-of-sum")
class ExpOfSum(qg.Rule):
    """exp(a) * exp(b) → exp(a + b)."""

    def pattern(self, a, b):
        return qg.exp(a) * qg.exp(b)

    def check(self, m, a, b):
        m.require(a.shape == b.shape, f"a is {a.shape}, b is {b.shape}: the sum would be computed twice", b)

    def rewrite(self, m, a, b):
        return qg.exp(a + b)


@qg.jit(pipeline="canonicalize,exp-of-sum,legalize")
def f(x, y, z):
    """Two sites: one fires, one has a reason not to."""
    return qg.exp(x) * qg.exp(y), qg.exp(z) * qg.exp(-x)


result = f.result(mx.ones((2, 3)), mx.ones((2, 3)), mx.ones((3,)))
print(result.graph)
for miss in result.context.misses.values():
    print("did not fire:", miss.text(result.graph))
print("same numbers as before:", compare(result.before, result.graph) is None)

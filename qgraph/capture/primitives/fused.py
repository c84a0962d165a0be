"""The functions of `mx.fast`, which MLX keeps whole where it has a kernel for them: on a GPU."""

from __future__ import annotations

from qgraph.capture.primitives.table import Primitive, primitive
from qgraph.ir import Value
from qgraph.ops.attention import Attention
from qgraph.ops.elementwise import Cast
from qgraph.ops.nn import LayerNorm, RmsNorm, Rope


@primitive("RMSNorm")
def rms_norm(p: Primitive) -> Value:
    """[eps]; operands x, weight, which is a scalar 1 where there is none."""
    x, *weight = p.inputs
    return _typed(p, p.add(RmsNorm(float(p.arguments[0])), x, *(w for w in weight if w.type.ndim)))


@primitive("LayerNorm")
def layer_norm(p: Primitive) -> Value:
    """[eps]; operands x, weight, bias, which are scalars where there are none."""
    x, *parameters = p.inputs
    weight, bias = ([w.type.ndim > 0 for w in parameters] + [False, False])[:2]
    op = LayerNorm(float(p.arguments[0]), weight, bias)
    return _typed(p, p.add(op, x, *(w for w in parameters if w.type.ndim)))


@primitive("RoPE")
def rope(p: Primitive) -> Value:
    """[features, traditional, base, scale, forward]; operands x, offset, frequencies if not by the base."""
    dims, traditional, base, scale, forward = p.arguments
    x, offset, *freqs = p.inputs
    signed = float(scale) if forward else -float(scale)  # the derivative turns back
    op = Rope(int(dims), bool(traditional), None if freqs else float(base), signed, None)
    return p.add(op, x, offset, *freqs)


@primitive("ScaledDotProductAttention")
def attention(p: Primitive) -> Value:
    """[scale, causal, sinks, …]; operands q, k, v, mask and sinks where given."""
    scale, causal, sinks = p.arguments[:3]
    given = len(p.inputs) - 3 - bool(sinks)
    mask = "causal" if causal else "array" if given else None
    return _typed(p, p.add(Attention(float(scale), mask, bool(sinks)), *p.inputs))


def _typed(p: Primitive, v: Value) -> Value:
    dtype = p.outputs[0].dtype
    return v if v.type.dtype is dtype else p.add(Cast(dtype), v)

"""What cannot be captured: MLX's exceptions as errors that name the module, the line and the way out."""

from __future__ import annotations

import re
from types import TracebackType

from qgraph._errors import QGraphError, TraceError
from qgraph.ir.origin import Source, is_library

WAY_OUT = "or run the original: qg.optimize(..., fallback=True)"

# Primitives that MLX reports no state of, or that no graph can hold, and what to do instead.
ADVICE = {
    "Compiled": "call the function without mx.compile",
    "CustomKernel": "use plain MLX operations in its place",
    "CustomTransforms": "leave out mx.checkpoint and mx.custom_function: nothing is differentiated here",
    "Load": "evaluate the arrays first: mx.eval(arrays)",
    "BitwiseInvert": "write x ^ -1 for ~x",
    "CumLogAddExp": "write mx.log(mx.cumsum(mx.exp(x)))",
    "FromFP8": "pass the weight as a QuantizedTensor; qg.load makes them",
    "AllReduce": "optimize the model before it is sharded",
    "AllGather": "optimize the model before it is sharded",
}


def escaped(error: Exception, module: str) -> Exception:
    """What to raise for `error`, raised while a function was captured: itself, if it is the user's own."""
    text = str(error)
    source = user_line(error.__traceback__)
    where = source.sentence() if source else None
    node = f"module {module}" if module else None
    if "[eval] Attempting to eval" in text or "[array::item]" in text:
        return TraceError(
            "the function reads numbers while it is captured (.item(), .tolist(), if array, print, mx.eval)",
            node=node,
            where=where,
            fix=f"compute with arrays, e.g. mx.where; {WAY_OUT}",
        )
    if isinstance(error, QGraphError):
        error.node = error.node or node
        error.where = error.where or where
    return error


def unexported(error: Exception) -> str:
    """The primitive of which MLX's tracer says that it cannot be reported; empty for another error."""
    found = re.search(r"Unable to get state for primitive (\w+)", str(error))
    return found.group(1) if found else ""


def unsupported(primitive: str, module: str, where: str | None = None) -> TraceError:
    """A primitive without a meaning in qgraph's IR."""
    advice = ADVICE.get(primitive, "use other MLX operations in its place")
    return TraceError(
        f"MLX's primitive {primitive} cannot be captured",
        node=f"module {module}" if module else None,
        where=where,
        fix=f"{advice}; {WAY_OUT}",
    )


def user_line(traceback: TracebackType | None) -> Source | None:
    """The innermost line of a traceback that is not qgraph's own."""
    found: Source | None = None
    while traceback is not None:
        frame = traceback.tb_frame
        if not is_library(frame.f_code):
            found = Source(frame.f_code, traceback.tb_lasti)
        traceback = traceback.tb_next
    return found

"""A zoo model captured plainly: MLX's tracer sees what it does on this device, with nothing kept whole."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qgraph.capture.capture import capture
from qgraph.capture.weights import Weights
from qgraph.execute.program import Program
from qgraph.ir import Builder
from qgraph.ops.dispatch import type_of
from qgraph.rewrite import Pipeline, Result
from qgraph.rewrite.pipeline import DEFAULT


def plain(model: Any, tokens: mx.array, pipeline: str = DEFAULT) -> tuple[Result, mx.array]:
    """The run of a pipeline on the plain capture of `model(tokens)`, and the logits that its graph gives."""
    weights = Weights(model)
    shadow = weights.shadow()
    given = [*weights.read()[1], tokens]
    builder = Builder()
    inputs = [builder.input(f"x{n}", type_of(x)) for n, x in enumerate(given)]

    def forward(*arrays: mx.array) -> list[mx.array]:
        *parameters, x = arrays
        shadow.fill(parameters)
        return [shadow.root(x)]

    captured = capture(forward, inputs, builder)
    result = Pipeline.parse(pipeline).run(captured.graph)
    return result, Program(result.graph).run(*given, *captured.captures)[0]

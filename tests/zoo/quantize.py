"""A zoo model quantized twice: as mlx-lm does it, with layers of its own, and by weights alone."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import mlx.core as mx
from mlx_lm.utils import quantize_model

import qgraph as qg
from tests.zoo.build import build
from tests.zoo.configs import architectures

BITS = 4
Weights = dict[str, qg.QuantizedTensor]  # by the path of the layer

# Architectures whose quantized form fails in mlx-lm itself; the judge is the dense model with the numbers
# that the packed weights stand for.
NO_PEER = {
    "afm7": "FusedLinear.to_quantized has no argument mode, which nn.quantize passes",
    "seed_oss": "its tied head multiplies by the packed words of the embedding",
}


def group_size(name: str) -> int:
    """One of the two sizes that the zoo's matrices fit, in turns."""
    return (64, 32)[architectures().index(name) % 2]


def by_layers(name: str, seed: int = 0) -> Any:
    """The model after `nn.quantize`, with mlx-lm's rule of which layers it quantizes: the peer."""
    with contextlib.redirect_stdout(io.StringIO()):
        model, _ = quantize_model(build(name, seed), {}, group_size(name), BITS)
    mx.eval(model.parameters())
    return model


def weights_of(name: str, peer: Any = None, seed: int = 0) -> Weights:
    """The quantized weights: those of `peer`; without one, of every layer that can be quantized."""
    dense = dict(build(name, seed).named_modules())
    if peer is None:
        size = group_size(name)
        return {
            path: qg.quantize(layer["weight"], bits=BITS, group_size=size)
            for path, layer in dense.items()
            if hasattr(layer, "to_quantized")
        }
    return {
        path: qg.from_quantized(
            layer["weight"],
            layer["scales"],
            layer.get("biases"),
            bits=layer.bits,
            group_size=layer.group_size,
            mode=layer.mode,
        )
        for path, layer in peer.named_modules()
        if "scales" in layer and "scales" not in dense[path]
    }


def by_weights(name: str, weights: Weights, seed: int = 0) -> Any:
    """The dense model with QuantizedTensors in the places of those weights."""
    model = build(name, seed)
    modules = dict(model.named_modules())
    for path, weight in weights.items():
        modules[path]["weight"] = weight
    return model


def by_numbers(name: str, weights: Weights, seed: int = 0) -> Any:
    """The dense model with the numbers that those weights stand for."""
    model = by_weights(name, {path: qg.dequantize(weight) for path, weight in weights.items()}, seed)
    mx.eval(model.parameters())
    return model

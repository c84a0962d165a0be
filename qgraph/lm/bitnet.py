"""BitNet's layers of three values as dense ones with 2-bit words: mlx-lm's own are kernels for Metal only."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn

from qgraph.lm.architecture import Module, find

Arrays = dict[str, mx.array]
_GROUPS = (128, 64, 32)
_INVERTED = "invert_weight_scales"


def with_dense_layers(model: Module) -> Module:
    """`model` with an `nn.Linear` in the place of every BitLinear that its code makes."""
    kind = importlib.import_module("mlx_lm.models.bitlinear_layers").BitLinear
    for path, layer in model.named_modules():
        if isinstance(layer, kind):
            layer_: Any = layer
            dense = nn.Linear(layer_.in_features, layer_.out_features, bias=layer_.get("bias") is not None)
            setattr(dense, _INVERTED, getattr(layer_, _INVERTED))
            find(model, path).fill(dense)
    model.eval()
    return model


def from_bitnet(arrays: Arrays, model: Module, block: Mapping[str, Any]) -> Arrays:
    """Bytes of four values and one scale for each matrix become affine words; the numbers stay. Lazy."""
    inverted = block.get("linear_class", "") != "autobitlinear"
    found = dict(arrays)
    for name, scale in arrays.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight_scale" or arrays[f"{module}.weight"].dtype != mx.uint8:
            continue
        del found[name]
        weight = arrays[f"{module}.weight"]
        divides = getattr(find(model, module).value, _INVERTED, inverted)
        scale = (1 / scale if divides else scale).astype(scale.dtype)
        rows, columns = weight.shape[0] * 4, weight.shape[1]
        group = next(g for g in _GROUPS if columns % g == 0)
        scales = mx.broadcast_to(scale.reshape(1, 1), (rows, columns // group))
        found[f"{module}.weight"] = _words(weight)
        found[f"{module}.scales"] = mx.contiguous(scales)
        found[f"{module}.biases"] = mx.contiguous(-scales)
    return found


def _words(weight: mx.array) -> mx.array:
    """Bytes (out / 4, in), whose bits are those of four rows far apart, as words (out, in / 16).

    A value of 0, 1 or 2 stands for -1, 0 or 1: as an affine one it is a scale more than the bias.
    """
    values = mx.concatenate([(weight >> shift) & 3 for shift in (0, 2, 4, 6)])
    words = mx.zeros((values.shape[0], values.shape[1] // 16), mx.uint32)
    for i in range(16):
        words = words | (values[:, i::16].astype(mx.uint32) << (2 * i))
    return words

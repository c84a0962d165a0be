"""Checkpoints that other libraries packed: what mlx-lm can read of them, by the same conversions."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from qgraph.quant.strict_file import clip, json_name, read_json, refuse

_MODELOPT = "hf_quant_config.json"
_COMPRESSED = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized")
_CONVERT = "convert the model with mlx_lm.convert"
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Foreign:
    """A way of packing that is not MLX's.

    Attributes:
        method: Its name, as configs have it.
        convert: From the names and words of that library to MLX's; lazy. What a model's `sanitize` has
            done already is left as it is.
    """

    method: str
    convert: Callable[[Arrays], Arrays] = lambda arrays: arrays


def foreign_of(config: Mapping[str, Any], folder: Path) -> Foreign | None:
    """The packing that a config declares; None for MLX's own, or none.

    Errors: CheckpointError for one that mlx-lm has no conversion for.
    """
    block = _block(config, folder)
    if config.get("quantization") is not None or block is None:
        return None
    method = block.get("quant_method", "modelopt" if "producer" in block else None)
    if method is None or method == "mlx":
        return None
    file = folder / "config.json"
    if method in ("awq", "gptq"):
        return Foreign(method, lambda arrays: _from_awq(arrays, block))
    if method in ("mxfp4", "mxfp8", "fp8"):  # the sanitize of the models that have it sees to the words
        return Foreign(method)
    if method == "compressed-tensors":
        if block.get("format") not in _COMPRESSED:
            cause = f"compressed-tensors format {_shown(block.get('format'))} is not one that MLX has"
            raise refuse(file, cause, fix=_CONVERT)
        return Foreign(method)
    if method == "modelopt":
        settings = block.get("quantization", block)
        inner = cast("dict[str, object]", settings) if isinstance(settings, dict) else {}
        algorithm = inner.get("quant_algo")
        if algorithm != "NVFP4":
            cause = f"modelopt quant_algo {_shown(algorithm)} is not one that MLX has"
            raise refuse(file, cause, fix=_CONVERT)
        return Foreign(method)
    cause = f"quant_method {_shown(method)} is the packing of another library"
    raise refuse(file, cause, fix=_CONVERT)


def _block(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any] | None:
    found = config.get("quantization_config")
    text = config.get("text_config")
    if found is None and isinstance(text, dict):
        found = cast("dict[str, Any]", text).get("quantization_config")
    if found is None and os.path.lexists(folder / _MODELOPT):
        found = read_json(folder / _MODELOPT)
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else None


def _from_awq(arrays: Arrays, block: Mapping[str, Any]) -> Arrays:
    """mlx-lm unpacks and packs the words again, which changes no number."""
    converted: Arrays = importlib.import_module("mlx_lm.utils")._transform_awq_weights(arrays, block)[0]
    return converted


def _shown(value: object) -> str:
    return clip(value, 30) if isinstance(value, str) else json_name(value)

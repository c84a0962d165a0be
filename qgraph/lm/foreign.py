"""Checkpoints that other libraries packed: what mlx-lm can read of them, by the same conversions."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from qgraph.lm.architecture import Module
from qgraph.lm.bitnet import from_bitnet
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
        convert: From the names and words of that library to MLX's, for a model; lazy. What its `sanitize`
            has done already is left as it is.
    """

    method: str
    convert: Callable[[Arrays, Module], Arrays] = lambda arrays, model: arrays


def foreign_of(config: Mapping[str, Any], folder: Path) -> Foreign | None:
    """The packing that a config declares; None for MLX's own, or none.

    Errors: CheckpointError for one that mlx-lm has no conversion for.
    """
    if config.get("quantization") is not None:
        return None
    block = _block(config, folder)
    if config.get("model_type") == "bitnet":
        block = {"quant_method": "bitnet", **(block or {})}
    method = None if block is None else block.get("quant_method", "modelopt" if "producer" in block else None)
    if block is None or method is None or method == "mlx":
        return None
    if method in ("awq", "gptq"):
        return Foreign(method, lambda arrays, _: _from_awq(arrays, block))
    if method == "bitnet":
        return Foreign(method, lambda arrays, model: from_bitnet(arrays, model, block))
    if method in ("mxfp4", "mxfp8", "fp8", "compressed-tensors", "modelopt"):
        _check_format(method, block, folder / "config.json")
        return Foreign(method)  # the sanitize of the models that have it sees to the words
    cause = f"quant_method {_shown(method)} is the packing of another library"
    raise refuse(folder / "config.json", cause, fix=_CONVERT)


def _check_format(method: str, block: Mapping[str, Any], file: Path) -> None:
    """These two are names of many ways of packing."""
    if method == "compressed-tensors" and block.get("format") not in _COMPRESSED:
        cause = f"compressed-tensors format {_shown(block.get('format'))} is not one that MLX has"
        raise refuse(file, cause, fix=_CONVERT)
    if method == "modelopt":
        settings = block.get("quantization", block)
        inner = cast("dict[str, object]", settings) if isinstance(settings, dict) else {}
        if inner.get("quant_algo") != "NVFP4":
            cause = f"modelopt quant_algo {_shown(inner.get('quant_algo'))} is not one that MLX has"
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

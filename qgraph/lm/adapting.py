"""Adapters around the layers of a dense model: mlx-lm's own LoRA and DoRA layers, on any base."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
from mlx import nn

from qgraph._errors import CheckpointError
from qgraph.lm.architecture import Module, Slot, find, slots
from qgraph.quant import Adapter
from qgraph.quant.adapter import module_of
from qgraph.quant.strict_file import clip, refuse

_OTHER = "use the adapter with the model it was trained for"


def adapt(model: Module, adapter: Adapter) -> dict[str, Slot]:
    """Put an adapter's layers around those of `model`, and its tensors into them, by name.

    The base layers stay the objects that they are, so that what they hold may come before or after: here
    they still hold placeholders, from which the sizes are read. Scales are arrays, so that an adapter with
    another one runs the same program.

    Errors: CheckpointError for layers that are not there, and tensors that do not fit them.
    """
    if adapter.kind != "full":
        for module in adapter.modules:
            _wrap(model, module, adapter)
        model.eval()
    places = slots(model)
    fill(places, adapter)
    return {name: places[name] for name in (*adapter.tensors, *_scales(adapter))}


def fill(places: dict[str, Slot], adapter: Adapter) -> None:
    """Put the tensors of an adapter where those of another one of the same shapes are.

    Errors: CheckpointError for tensors that do not fit; then nothing is changed.
    """
    for name, array in adapter.tensors.items():
        place = places.get(name)
        if place is None:
            raise _no(adapter, name, "the model has no such parameter there")
        if place.value.shape != array.shape:
            cause = f"has shape {clip(array.shape, 60)}, expected {clip(place.value.shape, 60)}"
            raise _no(adapter, name, cause)
    for name, array in {**adapter.tensors, **_scales(adapter)}.items():
        places[name].fill(array)


def _scales(adapter: Adapter) -> dict[str, mx.array]:
    if adapter.kind == "full":
        return {}
    modules = {module_of(name) for name in adapter.tensors}
    return {f"{module}.scale": mx.array(adapter.scale_of(module), mx.float32) for module in sorted(modules)}


def _wrap(model: Module, module: str, adapter: Adapter) -> None:
    name = next(name for name in adapter.tensors if module_of(name) == module)
    try:
        place = find(model, module)
    except LookupError as error:
        raise _no(adapter, name, str(error)) from None
    base = place.value
    kind = _layer_class(base, adapter)
    if kind is None:
        what = type(base).__name__ if isinstance(base, nn.Module) else "no layer"
        raise _no(adapter, name, f"{clip(module, 60)} is {what}, which {adapter.kind} does not adapt")
    leaf = next(a for n, a in adapter.tensors.items() if module_of(n) == module and ".lora_a" in n)
    rank = leaf.shape[1] if leaf.ndim == 3 else leaf.shape[-1]  # (experts, rank, in) or (in, rank)
    settings: dict[str, Any] = {"r": rank, "scale": adapter.scale_of(module), "dropout": 0.0}
    layer = base.to_lora(**settings) if kind == "own" else kind.from_base(base, **settings)
    layer.scale = mx.array(adapter.scale_of(module), mx.float32)
    place.fill(layer)


def _layer_class(base: Any, adapter: Adapter) -> Any:
    """As mlx-lm chooses; None for a layer that it has no adapter for."""
    lora, dora, switch = (
        importlib.import_module(f"mlx_lm.{name}")
        for name in ("tuner.lora", "tuner.dora", "models.switch_layers")
    )
    plain = adapter.kind == "lora"
    if plain and hasattr(base, "to_lora"):
        return "own"
    if isinstance(base, nn.Linear):
        return lora.LoRALinear if plain else dora.DoRALinear
    if isinstance(base, switch.SwitchLinear):
        return lora.LoRASwitchLinear if plain else None
    if isinstance(base, nn.Embedding):
        return lora.LoRAEmbedding if plain else dora.DoRAEmbedding
    return None


def _no(adapter: Adapter, name: str, cause: str) -> CheckpointError:
    return refuse(adapter.source, cause, tensor=name, fix=_OTHER)

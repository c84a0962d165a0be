"""The dense model that a config.json describes, made of mlx-lm's classes; its weights are placeholders."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from qgraph._errors import CheckpointError, QGraphError
from qgraph.quant.strict_file import clip

Module = Any  # mlx.nn.Module: a dict of parameters and modules
_BELONGS = "use the config.json that belongs to the weights"

# What configs call the numbers that arrays and loops are made of, and how large they may be: MLX counts
# sizes in 32 bits, and layers are made one by one.
_SIZE = 2**31 - 1
_LAYERS = 1000
_LIMITS: dict[str, tuple[int, int | float]] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), (0, _LAYERS)),
    **dict.fromkeys(("vocab_size", "hidden_size", "head_dim", "max_position_embeddings"), (0, _SIZE)),
    **dict.fromkeys(("intermediate_size", "num_attention_heads", "num_key_value_heads"), (-1, _SIZE)),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), (0, 1e30)),
}
_COUNTS = re.compile(r"\w*(n|num)_\w*(layers?|blocks|experts)|depth", re.ASCII)  # others that loops run over
_MOST = 100_000
_NAME = re.compile(r"[\w-]+", re.ASCII)  # of a module: no path


def check_sizes(config: Mapping[str, object]) -> None:
    """Errors: CheckpointError for a size or a factor of a config.json that no model can have.

    >>> check_sizes({"text_config": {"num_hidden_layers": 10**9}})
    Traceback (most recent call last):
        ...
    qgraph._errors.CheckpointError: config.json: num_hidden_layers is 1000000000, not above 0 and up to 1000
      fix: use the config.json that belongs to the weights
    """
    for name, value in config.items():
        limits = _LIMITS.get(name, (-1, _MOST) if _COUNTS.fullmatch(name) else None)
        if isinstance(value, Mapping):
            check_sizes(cast("Mapping[str, object]", value))
        elif value is not None and limits is not None:
            least, most = limits
            numbers: list[object] = cast("list[object]", value) if isinstance(value, list) else [value]
            for number in numbers:  # a list has one for each layer
                if not _within(number, least, most):
                    raise _no(f"{name} is {clip(number, 30)}, not above {least} and up to {most}")


def _within(number: object, least: float, most: float) -> bool:
    """NaN is not within anything."""
    return isinstance(number, int | float) and not isinstance(number, bool) and least < number <= most


def known_types() -> list[str]:
    """The model types that the installed mlx-lm has, sorted. Errors: QGraphError without mlx-lm."""
    _, remapped = _remappings()
    folder = Path(importlib.import_module("mlx_lm.models").__path__[0])
    models = {path.stem for path in folder.glob("*.py") if "class ModelArgs" in path.read_text("utf-8")}
    return sorted(models | set(remapped))


def build(config: Mapping[str, Any]) -> Module:
    """The dense model of a config.json: no weight of it is in memory, and none ever has to be.

    Nothing that a checkpoint brings along is run: only classes of mlx-lm are.

    Errors: CheckpointError for a type that mlx-lm does not have, and for numbers that make no model;
    QGraphError without mlx-lm.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("config.json has no model_type", fix="add it; see qg.lm.known_types()")
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"config.json: model_file {clip(config['model_file'], 40)} is code of the checkpoint's own, "
            "which is never run",
            fix="use a model of a type that mlx-lm has",
        )
    check_sizes(config)
    model_class, arguments_class = _classes(config, kind)
    try:
        model = model_class(arguments_class.from_dict(dict(config)))
        model.eval()
    except Exception as error:  # any code of mlx-lm's, on numbers that may be any
        why = clip(f"{type(error).__name__}: {error}", 110)
        raise CheckpointError(f"config.json makes no {clip(kind, 30)} ({why})", fix=_BELONGS) from None
    # Placeholders are drawn from the random state, which would grow by every one of them.
    mx.eval(list(cast("Any", mx.random.state)))
    return model


def _classes(config: Mapping[str, Any], kind: str) -> tuple[Any, Any]:
    architectures, remapped = _remappings()
    name = remapped.get(kind, kind)
    listed: Any = config.get("architectures")
    names = cast("list[Any]", listed) if isinstance(listed, list) else [listed]
    for architecture in names:
        name = architectures.get((kind, str(architecture)), name)
    try:
        if not _NAME.fullmatch(name):
            raise ImportError(name)
        module = importlib.import_module(f"mlx_lm.models.{name}")
        return module.Model, module.ModelArgs
    except SystemExit:  # of olmo, which wants a package of its own
        raise CheckpointError(
            f"config.json: mlx-lm's {clip(kind, 40)} needs a package that is not installed",
            fix=f"import mlx_lm.models.{clip(name, 40)}, which says what it needs",
        ) from None
    except (ImportError, AttributeError):
        near = difflib.get_close_matches(kind, known_types(), 2)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise CheckpointError(
            f"config.json: mlx-lm has no model_type '{clip(kind, 40)}'{hint}",
            fix="use a model of a type in qg.lm.known_types(), or install a newer mlx-lm",
        ) from None


def _remappings() -> tuple[Mapping[tuple[str, Any], str], Mapping[str, str]]:
    """mlx-lm's other names of its modules: by type and class, and by type."""
    try:
        importlib.import_module("mlx_lm")
        found = importlib.import_module("mlx_lm.utils")
    except ImportError as error:
        raise QGraphError(
            f"language models are those of mlx-lm, which is not installed ({error})",
            fix='pip install "qgraph[lm]"',
        ) from error
    return getattr(found, "MODEL_ARCHITECTURE_REMAPPING", {}), found.MODEL_REMAPPING


def copy_of(model: Module) -> Module:
    """A model of the same structure with the same arrays, whose layers and arrays can be replaced."""
    arrays: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        for _, value in _items(waiting.pop()):
            if isinstance(value, mx.array):
                arrays[id(value)] = value
            elif isinstance(value, dict | list | tuple):
                waiting.append(value)
    return deepcopy(model, arrays)


@dataclass(frozen=True)
class Slot:
    """Where a parameter stands: `owner[key]`; an owner keeps its slots when a layer is put around it."""

    owner: Any
    key: Any

    @property
    def value(self) -> Any:
        """What stands there: a placeholder, an array, a QuantizedTensor; of `find` a module."""
        return self.owner[self.key]

    def fill(self, value: object) -> None:
        """Put an array or a QuantizedTensor there."""
        self.owner[self.key] = value


def slots(model: Module) -> dict[str, Slot]:
    """The parameters of a model by path, as `model.parameters()` names them."""
    return dict(_slots(model, ""))


def _slots(node: Any, path: str) -> Iterator[tuple[str, Slot]]:
    for key, value in _items(node):
        if isinstance(node, nn.Module) and str(key).startswith("_"):
            continue  # tables that a module computes
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(value, mx.array):
            yield inner, Slot(node, key)
        elif isinstance(value, dict | list):
            yield from _slots(value, inner)


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from cast("dict[Any, Any]", node).items()
    elif isinstance(node, list | tuple):
        yield from enumerate(cast("list[Any]", node))


def find(model: Module, path: str) -> Slot:
    """Where the module at a path stands.

    Errors: LookupError, with the reason, for a path that is not there.
    """
    here = Slot({"": model}, "")
    for part in path.split("."):
        keys = {str(key): key for key, _ in _items(here.value)}
        if part not in keys:
            near = difflib.get_close_matches(part, keys, 1)
            hint = f"; did you mean '{clip(near[0], 30)}'?" if near else ""
            raise LookupError(f"the model has no '{clip(part, 40)}' there{hint}")
        here = Slot(here.value, keys[part])
    return here


def _no(cause: str) -> CheckpointError:
    return CheckpointError(f"config.json: {cause}", fix=_BELONGS)

"""The model code of a checkpoint: found by config.json's model_type in the entry points `qgraph.models`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

import mlx.core as mx

from qgraph._errors import CheckpointError, QGraphError
from qgraph.quant.strict_file import clip

GROUP = "qgraph.models"
Params = dict[str, Any]
Cache = Any


class ConfigType(Protocol):
    """Reads config.json into a frozen dataclass."""

    def from_dict(self, config: Mapping[str, Any], /) -> Any:
        """The config. Errors: CheckpointError for one that the model does not support."""
        ...


class ModelCode(Protocol):
    """What a module named by an entry point has; `qgraph_examples.qwen3` is one.

    The config has `vocab_size` and `max_position_embeddings`; everything in it is static.
    """

    Config: ConfigType

    def make_cache(self, config: Any, batch: int, capacity: int, dtype: Any) -> Cache:
        """An empty cache: a tree of arrays."""
        ...

    def backbone(
        self, params: Params, tokens: mx.array, cache: Cache, offset: mx.array, config: Any
    ) -> tuple[mx.array, Cache]:
        """Hidden states (batch, length, hidden) of tokens at `offset`, and the cache with them in it."""
        ...

    def head(self, params: Params, x: mx.array, config: Any) -> mx.array:
        """Logits (..., vocab) of hidden states."""
        ...


# What configs call the numbers that arrays and loops are made of, and how large they may be: MLX counts
# sizes in 32 bits, and layers are made one by one.
_SIZE = 2**31 - 1
_LARGEST: dict[str, int | float] = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "head_dim": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "max_position_embeddings": _SIZE,
    "num_hidden_layers": 1000,
    "rms_norm_eps": 1e30,
    "rope_theta": 1e30,
}
_PUBLIC = ("Config", "make_cache", "backbone", "head")


def known_models() -> dict[str, EntryPoint]:
    """The entry points by model_type."""
    return {point.name: point for point in entry_points(group=GROUP)}


def check_sizes(config: Mapping[str, object]) -> None:
    """Errors: CheckpointError for a size or a factor of a config.json that no model can have.

    >>> check_sizes({"num_hidden_layers": 10**9})
    Traceback (most recent call last):
        ...
    qgraph._errors.CheckpointError: config.json: num_hidden_layers is 1000000000, not above 0 and up to 1000
      fix: use the config.json that belongs to the weights
    """
    for name, largest in _LARGEST.items():
        value = config.get(name)  # whether it is a number at all is for the model code to say
        if isinstance(value, int | float) and not 0 < value <= largest:
            raise CheckpointError(
                f"config.json: {name} is {clip(value, 30)}, not above 0 and up to {largest}",
                fix="use the config.json that belongs to the weights",
            )


def find_model(config: Mapping[str, object]) -> ModelCode:
    """The module that implements a config.json's model_type.

    Errors: CheckpointError for a type that no installed package has, with the list of those there are;
    QGraphError for a package that cannot be imported.

    >>> find_model({"model_type": "qwen3"}).__name__
    'qgraph_examples.qwen3'
    >>> find_model({"model_type": "gpt2"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    qgraph._errors.CheckpointError: config.json: no installed package implements model_type 'gpt2'
      fix: use a model of type ...
    """
    kind = config.get("model_type")
    found = known_models()
    if not isinstance(kind, str):
        raise CheckpointError("config.json has no model_type", fix=f"add it; known types: {_listed(found)}")
    if kind not in found:
        raise CheckpointError(
            f"config.json: no installed package implements model_type '{clip(kind, 40)}'",
            fix=f"use a model of type {_listed(found)}; or write one (see qgraph_examples/qwen3.py) and "
            f"name it in the entry points {GROUP}",
        )
    return _checked(found[kind])


def _listed(found: Mapping[str, EntryPoint]) -> str:
    return ", ".join(sorted(found)) or "(none is installed)"


def _checked(point: EntryPoint) -> ModelCode:
    try:
        module = point.load()
    except (ImportError, AttributeError) as error:
        raise QGraphError(
            f"the model package {point.value} cannot be imported: {error}", fix="install it again"
        ) from error
    missing = [name for name in _PUBLIC if not hasattr(module, name)]
    if missing:
        raise QGraphError(
            f"{point.value} has no {', '.join(missing)}", fix="give it the names of qgraph_examples/qwen3.py"
        )
    return cast("ModelCode", module)

"""The `quantization` block of a config.json: one scheme, and exceptions by module path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qgraph._errors import DTypeError
from qgraph.quant.pending import current
from qgraph.quant.scheme import Quantization
from qgraph.quant.strict_file import as_object, clip, json_name, read_json, refuse, sealed

# Keys of the block that are not module paths.
_SETTINGS = {"bits", "group_size", "mode", "quant_method", "linear_class", "global_scale"}
_FIX = "correct the quantization block of config.json, or convert the model again"


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """What a config declares: a scheme for all packed layers, and exceptions.

    Attributes:
        default: The scheme of the layers without an exception; None if nothing is packed.
        overrides: By module path: another scheme, or None for a layer that stays dense.
    """

    default: Quantization | None = None
    overrides: Mapping[str, Quantization | None] = field(default_factory=dict[str, Quantization | None])

    def at(self, module: str) -> Quantization | None:
        """The scheme declared for a module, None for dense.

        >>> declared = QuantizationConfig(Quantization(), {"lm_head": None})
        >>> print(declared.at("model.layers.0.mlp.up_proj"), declared.at("lm_head"))
        affine4g64 None
        """
        return self.overrides.get(module, self.default)


@sealed
def load_config(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read a config.json: `path` is the file or its folder.

    The values are data: nothing named in them is imported or run.
    Errors: CheckpointError if it is missing or not strict JSON with an object at the top.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text('{"model_type": "qwen3"}')
    ...     load_config(folder)
    {'model_type': 'qwen3'}
    """
    path = Path(path)
    return read_config(path / "config.json" if os.path.isdir(path) else path)


def read_config(file: Path) -> dict[str, object]:
    """`load_config` of what can only be the file. Errors: CheckpointError."""
    # Some published models have a bare Infinity in their config (time_step_limit).
    return read_json(current(file), constants=True)


def read_quantization(config: Mapping[str, object], path: Path) -> QuantizationConfig:
    """Read the quantization block of `config`, which came from the file `path`.

    mlx-lm writes the block twice, as `quantization` and `quantization_config`; they must agree.
    Errors: CheckpointError for two blocks that differ, a block of another library, values of the
    wrong type or outside the supported set.

    >>> block = {"bits": 4, "group_size": 64, "lm_head": {"bits": 8, "group_size": 64}}
    >>> print(read_quantization({"quantization": block}, Path("config.json")).at("lm_head"))
    affine8g64
    """
    found = [config.get(key) for key in ("quantization", "quantization_config")]
    blocks = [block for block in found if block is not None]
    if not blocks:
        return QuantizationConfig()
    if blocks[0] != blocks[-1] or repr(blocks[0]) != repr(blocks[-1]):  # repr tells 4 from 4.0
        raise refuse(path, "quantization and quantization_config differ", fix=_FIX)
    block = as_object(blocks[0], path, "the quantization block")
    method = block.get("quant_method")
    if method is not None and method != "mlx":
        shown = clip(method, 30) if isinstance(method, str) else json_name(method)
        cause = f"quant_method {shown} is the packing of another library"
        raise refuse(path, cause, fix="convert the model with mlx_lm.convert")
    for key in ("bits", "group_size"):
        if key not in block:
            raise refuse(path, f"the quantization block has no {key}", fix=_FIX)
    default = _scheme(block, path, "quantization")
    overrides = {
        module: _override(value, default, path, module)
        for module, value in block.items()
        if module not in _SETTINGS
    }
    return QuantizationConfig(default, overrides)


def _override(value: object, default: Quantization, path: Path, module: str) -> Quantization | None:
    if value is False:
        return None
    if value is True:
        return default
    what = f"quantization of '{clip(module, 60)}'"
    if not isinstance(value, dict):
        cause = f"{what} is {json_name(value)}, expected an object or false"
        raise refuse(path, cause, fix=_FIX)
    return _scheme(as_object(value, path, what), path, what)  # pyright: ignore[reportUnknownArgumentType]


def _scheme(entry: Mapping[str, object], path: Path, what: str) -> Quantization:
    try:
        return Quantization.from_config(entry)
    except DTypeError as error:
        raise refuse(path, f"{what}: {error.message}", fix=error.fix or _FIX) from error

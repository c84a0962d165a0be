"""Adapters as PEFT writes them: its names, orientation and scale become those of mlx-lm."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qgraph.quant.safetensors_file import Entry, Header
from qgraph.quant.strict_file import as_object, clip, json_name, refuse

PEFT_TENSORS = "adapter_model.safetensors"
_FLOATS = ("F16", "BF16", "F32")
_AGAIN = "train or download the adapter again"
_MERGE = "merge the adapter into the model with PEFT, then convert the model"
_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<leaf>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.default)?(?:\.weight)?",
    re.ASCII | re.DOTALL,
)
_LEAVES = {
    "lora_A": "lora_a",
    "lora_embedding_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
}
# Settings that change what is computed, with the values under which they change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "arrow_config": (None,),
}
_PLAIN = re.compile(r"[\w.\-]+", re.ASCII)


def is_peft(config: Mapping[str, object]) -> bool:
    """Whether an adapter_config.json is PEFT's."""
    return "peft_type" in config


@dataclass(frozen=True)
class Peft:
    """A PEFT adapter whose headers were checked, in mlx-lm's terms.

    Attributes:
        config: What mlx-lm would have written.
        scales: By module, where it is not that of the config.
        names: The name of every tensor, as mlx-lm spells it.
    """

    config: Mapping[str, Any]
    scales: Mapping[str, float]
    names: Mapping[str, str]

    def renamed(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The tensors by mlx-lm's names, in its orientation: x @ lora_a @ lora_b."""
        found = {
            self.names[name]: mx.contiguous(array.T) if array.ndim == 2 else array
            for name, array in tensors.items()
        }
        found = {n: a.reshape(-1) if n.endswith(".m") else a for n, a in found.items()}
        mx.eval(found)
        return found


def read_peft(config: dict[str, Any], path: Path, header: Header) -> Peft:
    """Check the config (of the file `path`) and the header of a PEFT adapter against each other.

    Errors: CheckpointError for a method other than LoRA, settings that mlx-lm's layers cannot express, and
    pairs that are incomplete or of another rank.
    """
    if config.get("peft_type") != "LORA":
        raise refuse(path, f"peft_type {_shown(config.get('peft_type'))} is not LORA", fix=_MERGE)
    for name, values in _NEUTRAL.items():
        if config.get(name) not in values:
            raise refuse(path, f"{name} is {_shown(config[name])}, which is not supported", fix=_MERGE)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise refuse(path, "r is not a whole number above 0", fix=_AGAIN)
    ranks, alphas = (_pattern(config, path, name) for name in ("rank_pattern", "alpha_pattern"))
    root = math.sqrt if config.get("use_rslora") is True else float
    scales: dict[str, float] = {}
    names = _names(header, dora=config.get("use_dora") is True)
    for name, ours in names.items():
        module = ours.rpartition(".")[0]
        r = _at(ranks, module, rank)
        a = _at(alphas, module, alpha)
        if type(r) is not int or r < 1 or not _is_number(a):
            cause = f"lora_alpha or the rank of {clip(module, 60)} is no finite number above 0"
            raise refuse(path, cause, fix=_AGAIN)
        scales[module] = a / root(r)
        _check_rank(header.entries[name], ours, r)
    kind = "dora" if config.get("use_dora") is True else "lora"
    parameters = {"rank": rank, "scale": next(iter(scales.values())), "dropout": 0.0}
    return Peft({"fine_tune_type": kind, "lora_parameters": parameters}, scales, names)


def _names(header: Header, *, dora: bool) -> dict[str, str]:
    if not header.entries:
        raise refuse(header.path, "has no tensors", fix=_AGAIN)
    names: dict[str, str] = {}
    for name, entry in header.entries.items():
        found = _NAME.fullmatch(name)
        if found is None or (found["leaf"] == "lora_magnitude_vector" and not dora):
            cause = "is not base_model.model.<module>.lora_A.weight or lora_B.weight"
            raise refuse(header.path, cause, tensor=name, fix=_MERGE)
        if entry.dtype not in _FLOATS:
            cause = f"is {entry.dtype}, expected {', '.join(_FLOATS)}"
            raise refuse(header.path, cause, tensor=name, fix=_AGAIN)
        ours = f"{found['module']}.{_LEAVES[found['leaf']]}"
        if ours in names.values():
            raise refuse(header.path, "is there under two names", tensor=name, fix=_AGAIN)
        names[name] = ours
    ours = set(names.values())
    for name, at in names.items():
        module = at.rpartition(".")[0]
        for leaf in ("lora_a", "lora_b", "m")[: 3 if dora else 2]:
            if f"{module}.{leaf}" not in ours:
                raise refuse(header.path, f"has no {leaf} beside it", tensor=name, fix=_AGAIN)
    return names


def _check_rank(entry: Entry, ours: str, rank: int) -> None:
    leaf = ours.rpartition(".")[2]
    if leaf == "m":
        right, wanted = max(entry.shape, default=0) == math.prod(entry.shape), "(out,)"
    else:
        at, wanted = (0, f"({rank}, in)") if leaf == "lora_a" else (1, f"(out, {rank})")
        right = len(entry.shape) == 2 and entry.shape[at] == rank
    if not right:
        cause = f"has shape {clip(entry.shape, 60)}, expected {wanted}"
        raise refuse(entry.path, cause, tensor=entry.name, fix="correct r in adapter_config.json")


def _pattern(config: Mapping[str, object], path: Path, name: str) -> dict[str, object]:
    """Values by the end of a module's path. PEFT reads the keys as regular expressions; these stay texts."""
    found = as_object(config.get(name) or {}, path, name)
    for key in found:
        if not _PLAIN.fullmatch(key):
            cause = f"{name} has the key '{clip(key, 40)}', not the name of a module"
            raise refuse(path, cause, fix=_MERGE)
    return found


def _at(pattern: Mapping[str, object], module: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if f".{module}".endswith(f".{key}")), default)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: object) -> str:
    return clip(value, 30) if isinstance(value, str | bool | int) else json_name(value)

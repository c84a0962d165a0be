"""LoRA and DoRA adapters, as mlx-lm and PEFT write them: loaded, checked and put beside what they adapt."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from qgraph._errors import CheckpointError
from qgraph.quant.checkpoint import read_arrays
from qgraph.quant.memory import check_memory
from qgraph.quant.peft import PEFT_TENSORS, is_peft, read_peft
from qgraph.quant.safetensors_file import Entry, Header, read_header
from qgraph.quant.strict_file import as_object, clip, json_name, read_json, refuse, sealed
from qgraph.quant.tensor import QuantizedTensor

CONFIG = "adapter_config.json"
TENSORS = "adapters.safetensors"
KINDS = ("lora", "dora", "full")
_FLOATS = ("F16", "BF16", "F32")
_AGAIN = "train or download the adapter again"
# The last number is that of the part of a layer that is several in one.
_LEAF = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_a|lora_b|m)(?P<part>\.[0-9]{1,3})?", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter: y + scale * ((x @ lora_a) @ lora_b) for each adapted layer, or other weights.

    Attributes:
        config: The adapter_config.json, checked; of PEFT, what mlx-lm would have written.
        tensors: By full name, ``<module>.lora_a`` (in, rank) and ``<module>.lora_b`` (rank, out);
            with experts (E, rank, in) and (E, out, rank); of DoRA ``<module>.m`` (out,) too; of a full
            fine-tune the weights by their own names. Evaluated.
        source: The file of the tensors, for messages.
        scales: By module, where it is not `scale`.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, mx.array]
    source: str = TENSORS
    scales: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.config.get("fine_tune_type", "lora")

    @property
    def rank(self) -> int:
        """The inner size of every pair."""
        return self.config["lora_parameters"]["rank"]

    @property
    def scale(self) -> float:
        """The factor of the low-rank term, as mlx-lm uses it: not alpha, and not alpha / rank."""
        return float(self.config["lora_parameters"]["scale"])

    def scale_of(self, module: str) -> float:
        """The factor of one module."""
        return self.scales.get(module, self.scale)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the adapted layers, sorted."""
        return tuple(sorted({module_of(name) for name in self.tensors}))


def module_of(name: str) -> str:
    """The path of the layer that a tensor of an adapter belongs to."""
    found = _LEAF.fullmatch(name)
    return found["module"] if found else name.rpartition(".")[0]


@sealed
def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Load an adapter folder: adapter_config.json, and adapters.safetensors or adapter_model.safetensors.

    Shape: lora_a (in, rank), lora_b (rank, out), see `Adapter`.  Dtype: 16- or 32-bit floats.
    Errors: CheckpointError for a missing or malformed file, a kind that is not known, a pair that is
    incomplete or does not fit, NaN or infinity.
    Source: mlx_lm.lora; PEFT, whose pairs are transposed and scaled by alpha / rank.

    >>> load_adapter("no/such/adapter")
    Traceback (most recent call last):
        ...
    qgraph._errors.CheckpointError: adapter: no such folder
      fix: pass the folder with adapter_config.json and adapters.safetensors
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        fix = f"pass the folder with {CONFIG} and {TENSORS}"
        raise refuse(folder, "no such folder", fix=fix)
    raw = read_json(folder / CONFIG)
    if is_peft(raw) or (os.path.lexists(folder / PEFT_TENSORS) and not os.path.lexists(folder / TENSORS)):
        header = read_header(folder / PEFT_TENSORS)
        found = read_peft(raw, folder / CONFIG, header)
        return Adapter(found.config, found.renamed(_read(header)), PEFT_TENSORS, found.scales)
    config = _checked(raw, folder / CONFIG)
    header = read_header(folder / TENSORS)
    _check_entries(header.path, header.entries, config)
    return Adapter(config, _read(header), TENSORS)


def _read(header: Header) -> dict[str, mx.array]:
    check_memory(header.path, sum(entry.nbytes for entry in header.entries.values()))
    tensors = read_arrays(header)
    finite = {name: mx.all(mx.isfinite(array)) for name, array in tensors.items()}
    for name, flag in finite.items():
        if not flag.item():
            raise refuse(header.path, "has NaN or infinity", tensor=name, fix=_AGAIN)
    return tensors


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        shown = clip(kind, 20) if isinstance(kind, str) else json_name(kind)
        cause = f"fine_tune_type {shown} is not supported: only {', '.join(KINDS)} are known"
        raise refuse(path, cause, fix="fuse it with mlx_lm.fuse")
    if kind == "full":
        return config
    if "lora_parameters" not in config:
        raise refuse(path, "has no lora_parameters", fix=_AGAIN)
    parameters = as_object(config["lora_parameters"], path, "lora_parameters")
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or rank < 1:
        cause = "lora_parameters: rank is not a whole number above 0"
        raise refuse(path, cause, fix="set the rank the adapter was trained with")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        hint = "; mlx-lm's scale is not alpha" if "alpha" in parameters else ""
        cause = f"lora_parameters: scale is missing or no finite number{hint}"
        raise refuse(path, cause, fix="set the scale the adapter was trained with")
    return config


def _check_entries(path: Path, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
    if not entries:
        raise refuse(path, "has no tensors", fix=_AGAIN)
    for entry in entries.values():
        if entry.dtype not in _FLOATS:
            cause = f"is {entry.dtype}, expected {', '.join(_FLOATS)}"
            raise refuse(path, cause, tensor=entry.name, fix=_AGAIN)
    kind = config.get("fine_tune_type", "lora")
    if kind != "full":
        _check_pairs(path, entries, kind, config["lora_parameters"]["rank"])


def _check_pairs(path: Path, entries: Mapping[str, Entry], kind: str, rank: int) -> None:
    for name, entry in entries.items():
        found = _LEAF.fullmatch(name)
        if found is None or (found["leaf"] == "m" and (kind != "dora" or found["part"])):
            also = " or <module>.m" if kind == "dora" else ""
            cause = f"is not <module>.lora_a or <module>.lora_b{also}"
            raise refuse(path, cause, tensor=name, fix=f"only what {kind} has is supported")
        leaves = ("lora_a", "lora_b", "m")[: 3 if kind == "dora" else 2]
        for other in leaves:
            part = "" if other == "m" else found["part"] or ""
            if f"{found['module']}.{other}{part}" not in entries:
                raise refuse(path, f"has no {other}", tensor=name, fix=_AGAIN)
        if found["leaf"] != "m":
            _check_rank(entry, found["leaf"], rank)
        elif len(entry.shape) != 1:
            cause = f"has shape {clip(entry.shape, 60)}, expected (out,)"
            raise refuse(path, cause, tensor=name, fix=_AGAIN)


def _check_rank(entry: Entry, leaf: str, rank: int) -> None:
    shape = entry.shape
    expected = {
        ("lora_a", 2): f"(in, {rank})",
        ("lora_b", 2): f"({rank}, out)",
        ("lora_a", 3): f"(experts, {rank}, in)",
        ("lora_b", 3): f"(experts, out, {rank})",
    }.get((leaf, len(shape)))
    if expected is None:
        cause = f"has shape {clip(shape, 60)}, expected rank 2, or 3 with experts"
        raise refuse(entry.path, cause, tensor=entry.name, fix=_AGAIN)
    first = (leaf == "lora_b") == (len(shape) == 2)
    found = (shape[0] if first else shape[-1]) if len(shape) == 2 else shape[1 if leaf == "lora_a" else 2]
    if found != rank:
        cause = f"has shape {clip(shape, 60)}, expected {expected}"
        fix = f"correct rank in {CONFIG}, or the tensor if it is transposed"
        raise refuse(entry.path, cause, tensor=entry.name, fix=fix)


def merge_adapter(params: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Put an adapter beside the weights it adapts, in a new tree; the weights are not touched.

    Each adapted module's dict gets `lora_a`, `lora_b` and `lora_scale` (a float32 scalar). The
    containers on the way are copied, the arrays are shared with `params`.

    Shape: for a weight (out, in), lora_a (in, rank) and lora_b (rank, out); for experts
    (E, out, in), (E, rank, in) and (E, out, rank); for an embedding (vocab, dims), (vocab, rank)
    and (rank, dims).
    Errors: CheckpointError if a module is missing, has no weight, has an adapter already, or its
    shape does not fit; and for one that is not LoRA on whole layers.  Source: mlx_lm.tuner.lora.

    >>> a, b = mx.zeros((64, 2)), mx.zeros((2, 8))
    >>> adapter = Adapter({"lora_parameters": {"rank": 2, "scale": 20.0}},
    ...                   {"head.lora_a": a, "head.lora_b": b})
    >>> merged = merge_adapter({"head": {"weight": mx.zeros((8, 64))}}, adapter)
    >>> sorted(merged["head"]), merged["head"]["lora_scale"].item()
    (['lora_a', 'lora_b', 'lora_scale', 'weight'], 20.0)
    """
    if adapter.kind != "lora":
        fix = "pass the folder to qg.lm.load, which has it"
        raise refuse(adapter.source, f"is {adapter.kind}, not lora: no factor pair alone", fix=fix)
    merged: dict[str, Any] = dict(params)
    owned: dict[str, Any] = {"": merged}  # the containers copied so far, by path
    for module in adapter.modules:
        found = _own(merged, module, owned, adapter)
        name = f"{module}.lora_a"
        if name not in adapter.tensors:
            raise _no(adapter, f"{name}.0", "adapts a part of a layer, which plain code does not have")
        layer = cast("dict[str, Any]", found if isinstance(found, dict) else {})
        weight = layer.get("weight")
        if not isinstance(weight, mx.array | QuantizedTensor):
            raise _no(adapter, name, "the module has no weight in the model")
        if "lora_a" in layer:
            fix = "load the model again, without the adapter"
            raise refuse(adapter.source, "the module has an adapter already", tensor=name, fix=fix)
        a, b = adapter.tensors[name], adapter.tensors[f"{module}.lora_b"]
        _check_fit(adapter, module, weight.shape, a.shape, b.shape)
        scale = mx.array(adapter.scale_of(module), mx.float32)
        layer |= {"lora_a": a, "lora_b": b, "lora_scale": scale}
    return merged


def _own(root: dict[str, Any], module: str, owned: dict[str, Any], adapter: Adapter) -> Any:
    """The container at a path, after copying it and those above it once."""
    here: Any = root
    path = ""
    for part in module.split("."):
        path = f"{path}.{part}" if path else part
        if path not in owned:
            owned[path] = _copy_child(here, part, module, adapter)
        here = owned[path]
    return here


def _copy_child(parent: Any, part: str, module: str, adapter: Adapter) -> Any:
    key: Any = part
    names: list[str] = []
    if isinstance(parent, list):
        siblings = cast("list[Any]", parent)
        names = [str(n) for n in range(len(siblings))]
        key = int(part) if part in names else part
    elif isinstance(parent, dict):
        names = list(cast("dict[str, Any]", parent))
    if part not in names:
        near = difflib.get_close_matches(part, names, 1)
        hint = f"; did you mean '{clip(near[0], 30)}'?" if near else ""
        raise _no(adapter, f"{module}.lora_a", f"the model has no '{clip(part, 40)}' there{hint}")
    child: object = cast("Any", parent)[key]
    if isinstance(child, dict):
        parent[key] = dict(cast("dict[str, Any]", child))
    elif isinstance(child, list | tuple):
        parent[key] = list(cast("list[Any]", child))
    return cast("Any", parent)[key]


def _check_fit(
    adapter: Adapter,
    module: str,
    weight: tuple[int, ...],
    a: tuple[int, ...],
    b: tuple[int, ...],
) -> None:
    r = adapter.rank
    if len(weight) == 3:
        experts, out, inner = weight
        wanted = [((experts, r, inner), (experts, out, r))]
    elif len(weight) == 2:
        out, inner = weight
        wanted = [((inner, r), (r, out))]
        if "embed" in module.rpartition(".")[2] or module.endswith("wte"):
            wanted = [((out, r), (r, inner))]
    else:
        raise _no(adapter, f"{module}.lora_a", f"the weight has shape {weight}, expected rank 2 or 3")
    want_a, want_b = wanted[0]
    for leaf, found, want in (("lora_a", a, want_a), ("lora_b", b, want_b)):
        if found != want:
            cause = f"has shape {found}, expected {want} for the weight {weight}"
            raise _no(adapter, f"{module}.{leaf}", cause)


def _no(adapter: Adapter, name: str, cause: str) -> CheckpointError:
    fix = "use the adapter with the model it was trained for"
    return refuse(adapter.source, cause, tensor=name, fix=fix)

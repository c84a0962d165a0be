"""Damaged adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.quant.hostile.craft import (
    ADAPTER,
    UP,
    Case,
    Stored,
    Tensors,
    adapter,
    file_of,
    floats,
    of_bytes,
    pair,
    refused,
    text,
)
from tests.quant.hostile.kinds import (
    PICKLE,
    pipe,
    remove,
    secret,
)


def lora(changes: dict[str, object]) -> Any:
    return adapter(lambda f: (f / "adapter_config.json").write_text(json.dumps(ADAPTER | changes)))


def parameters(**changes: object) -> Any:
    return lora({"lora_parameters": {"rank": 4, "scale": 20.0} | changes})


def holding(change: Any) -> Any:
    def make(folder: Path) -> None:
        found: Tensors = pair()
        change(found)
        (folder / "adapters.safetensors").write_bytes(file_of(found))

    return adapter(make)


A_CONFIG, A_FILE = "adapter_config.json", "adapters.safetensors"


def adapted(maker: Any, cause: str, file: str, tensor: str | None = None) -> Case:
    return refused(maker, cause, file, tensor=tensor, adapter=True)


ADAPTERS: dict[str, Case] = {
    "F01 no config": adapted(adapter(remove(A_CONFIG)), "no such file", A_CONFIG),
    "F02 no tensors": adapted(adapter(remove(A_FILE)), "no such file", A_FILE),
    "F03 the config is a pipe": adapted(adapter(pipe(A_CONFIG)), "is a pipe", A_CONFIG),
    "F04 the tensors are a pipe": adapted(adapter(pipe(A_FILE)), "is a pipe", A_FILE),
    "F05 the config is a list": adapted(adapter(text(A_CONFIG, "[]")), "is a list", A_CONFIG),
    "F06 the config is a link to another file": adapted(adapter(secret(A_CONFIG)), "is not JSON", A_CONFIG),
    "F07 the tensors are a pickle": adapted(adapter(text(A_FILE, PICKLE)), "is a pickle", A_FILE),
    "F08 DoRA without its magnitude": adapted(
        lora({"fine_tune_type": "dora"}), "has no m", A_FILE, f"{UP}.lora_a"
    ),
    "F09 no parameters": adapted(lora({"lora_parameters": None}), "lora_parameters is null", A_CONFIG),
    "F10 rank 0": adapted(parameters(rank=0), "rank is not a whole number above 0", A_CONFIG),
    "F11 rank true": adapted(parameters(rank=True), "rank is not a whole number", A_CONFIG),
    "F12 scale NaN": adapted(
        adapter(text(A_CONFIG, '{"lora_parameters": {"rank": 4, "scale": NaN}}')), "contains NaN", A_CONFIG
    ),
    "F13 scale 1e400": adapted(
        adapter(text(A_CONFIG, '{"lora_parameters": {"rank": 4, "scale": 1e400}}')),
        "scale is missing or no",
        A_CONFIG,
    ),
    "F14 scale of 32 digits is a number, of 400 is not": adapted(
        adapter(text(A_CONFIG, '{"lora_parameters": {"rank": 4, "scale": ' + "9" * 400 + "}}")),
        "400 digits",
        A_CONFIG,
    ),
    "F15 another rank": adapted(parameters(rank=8), "expected (in, 8)", A_FILE, f"{UP}.lora_a"),
    "F16 half of a pair": adapted(
        holding(lambda t: t.pop(f"{UP}.lora_b")), "has no lora_b", A_FILE, f"{UP}.lora_a"
    ),
    "F17 a tensor that is no pair": adapted(
        holding(lambda t: t.update(x=floats(2))), "is not <module>.lora_a", A_FILE, "x"
    ),
    "F18 integers": adapted(
        holding(lambda t: t.update({f"{UP}.lora_a": of_bytes("I32", 128, 4)})),
        "is I32",
        A_FILE,
        f"{UP}.lora_a",
    ),
    "F19 NaN": adapted(
        holding(lambda t: t.update({f"{UP}.lora_b": Stored("F32", (4, 8), b"\0\0\xc0\x7f" * 32)})),
        "has NaN or infinity",
        A_FILE,
        f"{UP}.lora_b",
    ),
    "F20 no pairs": adapted(holding(lambda t: t.clear()), "has no tensors", A_FILE),
    "F21 the config of PEFT": adapted(
        lora({"peft_type": "LORA"}), "no such file", "adapter_model.safetensors"
    ),
    "F08b a full fine-tune of nothing": adapted(
        adapter(
            lambda f: (
                (f / A_CONFIG).write_text('{"fine_tune_type": "full"}'),
                (f / A_FILE).write_bytes(file_of({})),
            )
        ),
        "has no tensors",
        A_FILE,
    ),
    "F08c an unknown kind": adapted(lora({"fine_tune_type": "ia3"}), "ia3 is not supported", A_CONFIG),
    "F08d the kind is a list": adapted(lora({"fine_tune_type": []}), "a list is not supported", A_CONFIG),
    "F09b parameters are a list": adapted(
        lora({"lora_parameters": [4]}), "lora_parameters is a list", A_CONFIG
    ),
    "F10b no rank": adapted(
        lora({"lora_parameters": {"scale": 1.0}}), "rank is not a whole number", A_CONFIG
    ),
    "F10c rank 4.0": adapted(parameters(rank=4.0), "rank is not a whole number", A_CONFIG),
    "F13b no scale": adapted(lora({"lora_parameters": {"rank": 4}}), "scale is missing", A_CONFIG),
    "F13c alpha": adapted(
        lora({"lora_parameters": {"rank": 4, "alpha": 16}}), "mlx-lm's scale is not alpha", A_CONFIG
    ),
    "F13d scale as text": adapted(parameters(scale="20"), "scale is missing or no finite number", A_CONFIG),
    "F13e scale true": adapted(parameters(scale=True), "scale is missing or no finite number", A_CONFIG),
    "F16b the other half": adapted(
        holding(lambda t: t.pop(f"{UP}.lora_a")), "has no lora_a", A_FILE, f"{UP}.lora_b"
    ),
    "F17b the magnitude of DoRA": adapted(
        holding(lambda t: t.update({f"{UP}.m": floats(8)})), "is not <module>.lora_a", A_FILE, f"{UP}.m"
    ),
    "F17c no module": adapted(
        holding(lambda t: t.update(lora_a=floats(128, 4))), "is not <module>.lora_a", A_FILE, "lora_a"
    ),
    "F23 transposed": adapted(
        holding(lambda t: t.update({f"{UP}.lora_a": floats(4, 128)})),
        "or the tensor if it is transposed",
        A_FILE,
        f"{UP}.lora_a",
    ),
    "F24 the ranks differ": adapted(
        holding(lambda t: t.update({f"{UP}.lora_b": floats(8, 8)})),
        "has shape (8, 8), expected (4, out)",
        A_FILE,
        f"{UP}.lora_b",
    ),
    "F25 a vector": adapted(
        holding(lambda t: t.update({f"{UP}.lora_a": floats(128)})), "expected rank 2", A_FILE, f"{UP}.lora_a"
    ),
    "F26 a git-lfs pointer": adapted(
        adapter(text(A_FILE, "version https://git-lfs")), "is a git-lfs pointer", A_FILE
    ),
    "F27 the tensors of PEFT": adapted(
        adapter(lambda f: (f / A_FILE).rename(f / "adapter_model.safetensors")),
        "peft_type null is not LORA",
        A_CONFIG,
    ),
    "F22 nothing there": adapted(lambda f: f / "absent", "no such folder", "absent"),
}

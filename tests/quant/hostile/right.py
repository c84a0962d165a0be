"""Odd checkpoints that are right, and load: K of the reliability report."""

from __future__ import annotations

import json
from pathlib import Path

from tests.quant.hostile.craft import (
    BLOCK,
    DOWN,
    SINGLE,
    UP,
    Case,
    Stored,
    Tensors,
    adapter,
    affine,
    block,
    block_float,
    config,
    config_of,
    floats,
    model,
    of_bytes,
    pair,
    sharded,
    text,
    whole,
    write_folder,
)
from tests.quant.hostile.kinds import (
    EVIL,
    PICKLE,
    pipe,
    secret,
)

W, S, B = (f"{UP}.{part}" for part in ("weight", "scales", "biases"))


def hub(folder: Path) -> Path:
    """As the download cache lays it out: names without a suffix, and relative links to them."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for source in ("config.json", SINGLE):
        made = write_folder(folder, model()) / source
        blob = blobs / f"{len(source):040x}"
        made.rename(blob)
        (folder / "config.json").unlink(missing_ok=True)
        (snapshot / source).symlink_to(Path("../..") / "blobs" / blob.name)
    (folder / SINGLE).unlink(missing_ok=True)
    return snapshot


def evil(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL)
    (folder / "modeling_evil.py").write_text(EVIL)
    (folder / "training_args.bin").write_bytes(PICKLE)
    (folder / "config.json").write_text(
        json.dumps(
            config_of(
                model_file="evil.py",
                auto_map={"AutoModel": "modeling_evil.Model"},
                trust_remote_code=True,
                architectures=["os.system"],
            )
        )
    )


def dense_layer() -> Tensors:
    return model() | {"head.weight": floats(8, 64)}


def global_scale() -> Tensors:
    return block_float(UP, 4, 16) | {f"{UP}.global_scale": floats()}


LOAD: dict[str, Case] = {
    "K01 a folder": Case(whole(lambda f: None)),
    "K02 shards and an index": Case(sharded(lambda f: None)),
    "K03 a layer that is declared dense": Case(
        lambda f: write_folder(f, dense_layer(), config_of(BLOCK | {"head": False})), loaded=dense_layer
    ),
    "K04 an override that says the same": Case(block({UP: dict(BLOCK), DOWN: True})),
    "K05 an override of another scheme": Case(
        lambda f: write_folder(
            f,
            model() | affine("head", bits=8, group=32),
            config_of(BLOCK | {"head": {"bits": 8, "group_size": 32}}),
        ),
        loaded=lambda: model() | affine("head", bits=8, group=32),
    ),
    "K06 unquantized": Case(
        lambda f: write_folder(f, {"a.weight": floats(4, 64)}, {"model_type": "qwen3"}),
        loaded=lambda: {"a.weight": floats(4, 64)},
    ),
    "K07 mxfp4": Case(
        lambda f: write_folder(
            f, block_float(UP, 4, 32), config_of({"mode": "mxfp4", "bits": 4, "group_size": 32})
        ),
        loaded=lambda: block_float(UP, 4, 32),
    ),
    "K08 mxfp8": Case(
        lambda f: write_folder(
            f, block_float(UP, 8, 32), config_of({"mode": "mxfp8", "bits": 8, "group_size": 32})
        ),
        loaded=lambda: block_float(UP, 8, 32),
    ),
    "K09 nvfp4 with a global scale": Case(
        lambda f: write_folder(f, global_scale(), config_of({"mode": "nvfp4", "bits": 4, "group_size": 16})),
        loaded=global_scale,
    ),
    "K10 a single block in the config": Case(config({"quantization": BLOCK})),
    "K11 links of a download cache": Case(hub),
    "K12 an override of an absent layer": Case(block({"lm_head": {"bits": 8, "group_size": 64}})),
    "K13 code beside the weights, which is not run": Case(whole(evil)),
    "K14 infinity elsewhere in the config": Case(
        whole(text("config.json", json.dumps(config_of(time_step_limit=[0.0, float("inf")]))))
    ),
    "K15 white space around the config": Case(
        whole(text("config.json", "\n\t " + json.dumps(config_of()) + "\n\n"))
    ),
    "K16 the file of a folder, with its config beside it": Case(lambda f: write_folder(f, model()) / SINGLE),
    "K17 NaN in a dense tensor": Case(
        lambda f: write_folder(f, model() | {"x": Stored("F32", (1,), b"\0\0\xc0\x7f")}),
        loaded=lambda: model() | {"x": Stored("F32", (1,), b"\0\0\xc0\x7f")},
    ),
    "K18 a packed layer without rows": Case(
        lambda f: write_folder(f, model() | affine("e", n=0)), loaded=lambda: model() | affine("e", n=0)
    ),
    "K19 leftovers of a save that was killed": Case(
        whole(text(f".{SINGLE}.0123456789abcdef.tmp", "half of a file"))
    ),
    "K20 an adapter": Case(adapter(), adapter=True, loaded=pair),
    "K21 other files beside the weights": Case(
        whole(lambda f: (pipe("p")(f), secret("notes.txt")(f), text("tokenizer.json", "{")(f)))
    ),
    "K22 a stack of experts": Case(lambda f: write_folder(f, experts()), loaded=lambda: experts()),
}


def experts() -> Tensors:
    return {
        f"{UP}.weight": of_bytes("U32", 3, 8, 16),
        f"{UP}.scales": floats(3, 8, 2),
        f"{UP}.biases": floats(3, 8, 2, seed=2),
    }

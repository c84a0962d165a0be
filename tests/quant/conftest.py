"""Checkpoints for the tests: tiny models that mlx-lm itself wrote, and raw safetensors bytes."""
# pyright: basic
# (mlx-lm has no type stubs)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 1e4,
}
MIXED = {"v_proj": {"bits": 8, "group_size": 32}, "down_proj": {"bits": 6, "group_size": 64}}


def _mixed(path: str, module: object) -> bool | dict:
    leaf = path.rpartition(".")[2]
    return False if leaf == "o_proj" else MIXED.get(leaf, True)


KINDS: dict[str, dict] = {
    "dense": {},
    "affine8": {"bits": 8, "group_size": 64},
    "affine4": {"bits": 4, "group_size": 64},
    "affine3": {"bits": 3, "group_size": 32},
    "mixed": {"bits": 4, "group_size": 64, "quant_predicate": _mixed},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
    "untied": {"bits": 4, "group_size": 64},
}


def _write_model(folder: Path, kind: str) -> None:
    pytest.importorskip("mlx_lm")
    from mlx_lm.models import qwen3
    from mlx_lm.utils import quantize_model, save_config, save_model

    mx.random.seed(0)
    config = {**CONFIG, "tie_word_embeddings": kind != "untied"}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if options := dict(KINDS[kind]):
        group, bits = options.pop("group_size", None), options.pop("bits", None)
        model, config = quantize_model(model, config, group, bits, **options)
    save_model(folder, model)
    save_config(config, folder / "config.json")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that mlx-lm wrote, by kind; shared, so only for reading."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            _write_model(folders[kind], kind)
        return folders[kind]

    return folder


@pytest.fixture
def model(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of such a folder, to damage."""

    def folder(kind: str) -> Path:
        return Path(shutil.copytree(written(kind), tmp_path / kind))

    return folder


@pytest.fixture(scope="session")
def raw() -> Callable[..., bytes]:
    """The bytes of a safetensors file with any header (a dict, text or bytes) and any data."""

    def file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, str | bytes) else json.dumps(header)
        text = text.encode() if isinstance(text, str) else text
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    return file


@pytest.fixture(scope="session")
def logits() -> Callable[[Path], mx.array]:
    """What mlx-lm computes with a folder."""

    def run(folder: Path) -> mx.array:
        from mlx_lm.utils import load_model

        return load_model(folder)[0](mx.array([[1, 5, 7, 2]]))

    return run

"""Judged: in the Qwen3 graph every projection, the embedding and the head run on packed words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from tests.lm.peer import MEDIUM, TINY, mixed, write, write_adapter

LAYERS = MEDIUM["num_hidden_layers"]
SCHEMES = {
    "4bit-tied": {"quantization": {"bits": 4}},
    "4bit-untied": {"tied": False, "quantization": {"bits": 4}},
    "mxfp4": {"quantization": {"mode": "mxfp4"}},
    "nvfp4": {"tied": False, "quantization": {"mode": "nvfp4"}},
    "4bit-bf16": {"quantization": {"bits": 4}, "dtype": mx.bfloat16},
}


def packed_transposes(graph: Any) -> list[Any]:
    return [n for n in graph.find("transpose") if n.inputs[0].type.packing is not None]


@pytest.mark.parametrize("length", [1, 7], ids=["decode", "prefill"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_projection_the_embedding_and_the_head_are_quantized(
    tmp_path: Path, scheme: str, length: int
) -> None:
    model = qg.lm.load(write(tmp_path / "model", MEDIUM, **SCHEMES[scheme]))
    before, after = model.graph(length).histogram(), model.optimized(length).histogram()
    assert before["dot"] == 7 * LAYERS + 1
    assert before["take"] == 1
    assert after["quantized_matmul"] == 7 * LAYERS + 1
    assert after["quantized_take"] == 1
    assert not {"dot", "take", "dequantize", "quantized_lora_matmul"} & set(after)
    assert packed_transposes(model.graph(length))
    assert not packed_transposes(model.optimized(length))


def test_the_report_says_so(tmp_path: Path) -> None:
    report = qg.lm.load(write(tmp_path / "model", MEDIUM, quantization={"bits": 4})).report()
    assert report.counts() == {"quantized_matmul": 7 * LAYERS + 1, "quantized_take": 1}
    assert report.missed == ()
    projections = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    projections += "mlp.gate_proj mlp.up_proj mlp.down_proj"
    wanted = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in projections.split()]
    assert {site.scope for site in report} == {"model.embed_tokens", *wanted}
    assert "qwen3.py" in str(report)


def test_a_layer_that_stays_dense_is_a_dot(tmp_path: Path) -> None:
    quantization = {"bits": 4, "quant_predicate": mixed}
    model = qg.lm.load(write(tmp_path / "model", MEDIUM, quantization=quantization))
    after = model.optimized().histogram()
    assert (after["dot"], after["quantized_matmul"]) == (1, 7 * LAYERS)
    assert "dequantize" not in after


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_lora_is_one_op_with_its_base(tmp_path: Path, dtype: mx.Dtype) -> None:
    folder = write(tmp_path / "model", MEDIUM, quantization={"bits": 4}, dtype=dtype)
    adapter = write_adapter(tmp_path / "adapter", folder, layers=2)
    model = qg.lm.load(folder, adapter)
    after = model.optimized().histogram()
    assert after["quantized_lora_matmul"] == 7 * 2
    assert after["quantized_matmul"] == 7 * (LAYERS - 2) + 1
    assert not {"dot", "dequantize"} & set(after)
    assert model.report().counts()["quantized_lora_matmul"] == 7 * 2


def test_programs_are_shared_and_few(tmp_path: Path) -> None:
    model = qg.lm.load(write(tmp_path / "model", TINY, quantization={"bits": 4}))
    programs = model.model.qgraph
    programs.clear_cache()
    for seed in range(3):
        list(model.generate([5, 6, 7], max_tokens=8 + seed, temp=1.0, seed=seed))
    assert programs.cache_info().misses == 2


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_inside_a_prompt_the_head_does_not_run(
    tmp_path: Path, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits would be 20 MB, all else is less than a few."""
    monkeypatch.setenv("QGRAPH_COMPILE", compiled)
    vocabulary, length = 40_000, 129
    folder = write(tmp_path / "model", {**TINY, "vocab_size": vocabulary}, quantization={"bits": 4})
    model = qg.lm.load(folder)
    prompt = mx.array([[7] * length], mx.uint32)

    def peak(run: Callable[[], object]) -> int:
        mx.eval(run())  # compiled
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(run())
        return mx.get_peak_memory() - before

    logits = (length - 1) * vocabulary * 4
    assert peak(lambda: model._prefill(prompt, model._cache())) < logits / 4
    assert peak(lambda: model.model(prompt[:, 1:], cache=model._cache())) >= logits

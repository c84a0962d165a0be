"""Judged: for checkpoints that mlx-lm wrote, its logits and its greedy tokens, in f32."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest

import qgraph as qg
from qgraph_examples import qwen3
from tests.agree import assert_close
from tests.lm.peer import MEDIUM, TINY, Peer, greedy, mixed, relative_error, tokenizer, write, write_adapter

PROMPT = [3, 41, 17, 88, 5, 60, 22, 9, 71, 33, 50]
CASES: dict[str, dict[str, Any]] = {
    "dense": {"size": TINY, "tied": False},
    "4bit": {"size": MEDIUM, "quantization": {"bits": 4}},
    "4bit-untied": {"size": MEDIUM, "tied": False, "quantization": {"bits": 4}},
    "8bit": {"size": TINY, "quantization": {"bits": 8}},
    "3bit-g32": {"size": MEDIUM, "quantization": {"bits": 3, "group_size": 32}},
    "mixed": {"size": MEDIUM, "tied": False, "quantization": {"bits": 4, "quant_predicate": mixed}},
    "mxfp4": {"size": MEDIUM, "quantization": {"mode": "mxfp4"}},
    "nvfp4-untied": {"size": MEDIUM, "tied": False, "quantization": {"mode": "nvfp4"}},
    "mxfp8": {"size": TINY, "quantization": {"mode": "mxfp8"}},
    "sharded": {"size": TINY, "quantization": {"bits": 4}, "shards": True},
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model", **CASES[request.param])


def assert_same_generation(model: qg.lm.LanguageModel, peer: Peer, count: int) -> None:
    tokens, logits = greedy(model.model, PROMPT, count)
    expected_tokens, expected_logits = peer.greedy(PROMPT, count)
    assert tokens == expected_tokens
    assert_close(logits, expected_logits, path="model")
    assert len(set(tokens)) > 10, "a constant sequence would prove little"
    windows = 2  # of the cache: 64 positions, then 128
    assert model.model.qgraph.cache_info().misses <= 2 + windows, (
        "the check, a prompt, and the tokens after it"
    )


def test_logits_of_all_positions(checkpoint: Path) -> None:
    model = qg.lm.load(checkpoint)
    logits = model.model(mx.array([PROMPT]))
    assert logits.dtype == mx.float32
    assert_close(logits[0], Peer(checkpoint).logits(PROMPT), path="model")


def test_64_greedy_tokens(checkpoint: Path) -> None:
    model, peer = qg.lm.load(checkpoint), Peer(checkpoint)
    assert_same_generation(model, peer, 64)
    generated = [piece.token for piece in model.generate(PROMPT, max_tokens=64)]
    expected, _ = peer.greedy(PROMPT, len(generated))
    assert generated == expected
    assert len(generated) == 64 or generated[-1] in model.tokenizer.eos_token_ids


def test_trained_weights(tmp_path: Path) -> None:
    trained, config = mlx_lm.utils.load_model(Path(qwen3.__file__).parent / "demo" / "model")
    trained.set_dtype(mx.float32)
    folder = tmp_path / "model"
    mlx_lm.utils.save(folder, tmp_path, trained, tokenizer(), config)
    model, peer = qg.lm.load(folder), Peer(folder)
    for prompt, answer in {"123+456=": "579", "999+1=": "1000", "57+806=": "863"}.items():
        tokens, logits = greedy(model.model, model.tokenizer.encode(prompt), len(answer) + 1)
        expected_tokens, expected_logits = peer.greedy(model.tokenizer.encode(prompt), len(answer) + 1)
        assert tokens == expected_tokens
        assert model.tokenizer.decode(tokens[:-1]) == answer
        assert_close(logits, expected_logits, path="model")


def test_a_prompt_in_chunks_equals_one_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qg.lm.load(write(tmp_path / "model", quantization={"bits": 4}))
    whole = [piece.token for piece in model.generate(PROMPT, max_tokens=16)]
    monkeypatch.setattr("qgraph.lm.generate.PREFILL", 4)
    assert [piece.token for piece in model.generate(PROMPT, max_tokens=16)] == whole


@pytest.mark.usefixtures(
    "mlx_alone"
)  # one case is ill-conditioned: other roundings move it by more than 1e-4
@pytest.mark.parametrize(
    "quantization", [None, {"bits": 4}, {"mode": "mxfp4"}], ids=["dense", "4bit", "mxfp4"]
)
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.down_proj"]], ids=["all", "two"])
def test_lora_equals_mlx_lm(
    tmp_path: Path, quantization: dict[str, Any] | None, keys: list[str] | None
) -> None:
    folder = write(tmp_path / "model", MEDIUM, quantization=quantization)
    parameters = {"keys": keys} if keys else {}
    adapter = write_adapter(tmp_path / "adapter", folder, layers=3, **parameters)
    peer, model = Peer(folder, adapter), qg.lm.load(folder, adapter)
    assert_same_generation(model, peer, 32)
    plain = Peer(folder).logits(PROMPT)
    assert relative_error(peer.logits(PROMPT), plain) > 0.1, "the adapter must matter"

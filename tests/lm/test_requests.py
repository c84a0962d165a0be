"""Requests that cannot be served end with one error each, and the model serves the next one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import NonFiniteError, QGraphError
from qgraph.lm.sampling import NO_TOKEN, Sampler, checked
from tests.lm.peer import write

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("requests") / "model", tied=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> qg.lm.LanguageModel:
    return qg.lm.load(folder)


def poisoned(folder: Path, token: int, value: float) -> qg.lm.LanguageModel:
    """The model with a bad number in the embedding of one token."""
    found = qg.lm.load(folder)
    inner: Any = found.model.model
    table = mx.array(inner.embed_tokens["weight"])
    table[token, 0] = value
    inner.embed_tokens["weight"] = table
    return found


def tokens(model: qg.lm.LanguageModel, prompt: Any, n: int = 8) -> list[int]:
    return [piece.token for piece in model.generate(prompt, max_tokens=n)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        (mx.zeros((0,), mx.int32), "the prompt is empty"),
        ([5, 6, 96], "token 2 of the prompt has the id 96, outside the model's vocabulary of 96"),
        ([5, -1, 6], "token 1 of the prompt has the id -1, outside"),
        ([2**31], f"token 0 of the prompt has the id {2**31}, outside"),
        ([2**70], "token 0 of the prompt has the id 1180591620717411303424, outside"),
        ([NO_TOKEN], f"has the id {NO_TOKEN}, outside"),
        (mx.array([1, 2, 96]), "token 2 of the prompt has the id 96, outside"),
        (np.array([7, -3]), "token 1 of the prompt has the id -3, outside"),
        ([1, 2.0], "token 1 of the prompt is 2.0, not an id"),
        ([1, True], "token 1 of the prompt is True, not an id"),
        ([None], "token 0 of the prompt is None, not an id"),
        (["a", "b"], "token 0 of the prompt is 'a', not an id"),
        ([[1, 2]], r"token 0 of the prompt is \[1, 2\], not an id"),
        (mx.array([[1, 2]]), "token 0 of the prompt is array"),
        ([1] * 512, "the prompt has 512 tokens, the model holds 512 with the answer"),
        ([1] * 9000, "the prompt has 9000 tokens, the model holds 512"),
    ],
)
def test_a_bad_prompt_is_refused_at_the_call(model: qg.lm.LanguageModel, prompt: Any, message: str) -> None:
    with pytest.raises(QGraphError, match=message) as info:
        model.generate(prompt)
    assert info.value.fix
    assert len(tokens(model, "abc", 2)) == 2


def test_ids_may_be_any_integers(model: qg.lm.LanguageModel) -> None:
    expected = tokens(model, [5, 6, 7])
    assert tokens(model, np.array([5, 6, 7], np.uint16)) == expected
    assert tokens(model, mx.array([5, 6, 7], mx.int64)) == expected
    assert tokens(model, (5, 6, 7)) == expected


def test_the_longest_prompt_leaves_room_for_one_token(model: qg.lm.LanguageModel) -> None:
    assert len(tokens(model, [1 + i % 90 for i in range(511)])) == 1


def test_a_batch_says_which_prompt_is_bad(model: qg.lm.LanguageModel) -> None:
    with pytest.raises(QGraphError, match="the prompt is empty") as info:
        model.complete(["abc", "", "d"])
    assert info.value.__notes__ == ["in prompt 1 of 3"]


@pytest.mark.parametrize("value", [NAN, INF])
def test_logits_that_are_not_finite_end_the_request_at_their_step(
    folder: Path, model: qg.lm.LanguageModel, value: float
) -> None:
    plain = tokens(model, "abc", 12)
    step = next(
        i for i, t in enumerate(plain) if t not in [*plain[:i], *model.tokenizer.encode("abc")] and i > 1
    )
    bad = poisoned(folder, plain[step], value)
    found: list[int] = []
    with pytest.raises(NonFiniteError, match=f"not finite at step {step + 1}: there is no token") as info:
        found.extend(piece.token for piece in bad.generate("abc", max_tokens=12))
    assert found == plain[: step + 1]
    assert "QGRAPH_DEBUG_NAN=1" in str(info.value)
    other = [t for t in (3, 9, 27) if t != plain[step]]
    assert bad.generate(other, max_tokens=1).__next__().token == tokens(model, other, 1)[0]


def test_sampling_and_prompts_too(folder: Path) -> None:
    bad = poisoned(folder, 7, NAN)
    for temp in (0.0, 0.7):
        with pytest.raises(NonFiniteError, match="at step 0"):
            list(bad.generate([3, 7, 5], temp=temp, seed=1))
    with pytest.raises(NonFiniteError, match="of prompt 1 are not finite at step 0"):
        bad.complete(["ab", bad.tokenizer.decode([7, 7])], max_tokens=3)


def test_with_the_switch_the_module_is_named(
    folder: Path, model: qg.lm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGRAPH_DEBUG_NAN", "1")
    with pytest.raises(NonFiniteError, match=r"input 'model.embed_tokens.weight': 1 of"):
        list(poisoned(folder, 7, NAN).generate([3, 7, 5], max_tokens=2))
    with pytest.raises(NonFiniteError, match=r"^\w+ in model.layers.0.\w+: .* NaN") as info:
        list(poisoned(folder, 7, INF).generate([3, 7, 5], max_tokens=2))
    assert "qwen3.py" in str(info.value)
    fresh = qg.lm.load(folder)
    assert tokens(fresh, "abc", 3) == tokens(model, "abc", 3)


def test_a_model_may_rule_tokens_out_with_minus_infinity() -> None:
    rows = mx.array([[1.0, -INF, 3.0], [-INF] * 3, [1.0, NAN, 3.0], [1.0, INF, 2.0], [-INF, -INF, 0.0]])
    expected = [2, NO_TOKEN, NO_TOKEN, NO_TOKEN, 2]
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        assert Sampler(0.0, None)(rows.astype(dtype)).tolist() == expected
        found = Sampler(0.5, 1)(rows.astype(dtype)).tolist()
        assert [t == NO_TOKEN for t in found] == [t == NO_TOKEN for t in expected]  # type: ignore[union-attr]
    assert checked(mx.array([1], mx.uint32), rows[:1]).dtype == mx.uint32


def test_the_command_says_it_in_one_line(folder: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from qgraph.cli.generate import generate

    short = tmp_path / "short"
    short.mkdir()
    for file in folder.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    result = CliRunner().invoke(generate, ["--model", str(short), "--prompt", "abcdefgh"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the prompt has 8 tokens, the model holds 8 with the answer" in result.stderr
    assert "Traceback" not in result.stderr

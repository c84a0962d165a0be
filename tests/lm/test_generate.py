"""Generating text: the Python interface, the command, and what each mistake says."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner, Result

import qgraph as qg
from qgraph.cli.generate import generate
from qgraph.lm.architecture import build
from qgraph.quant.strict_file import clip
from tests.lm.peer import TINY, write, write_adapter
from tests.zoo.configs import architectures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("generate") / "model", quantization={"bits": 4})


@pytest.fixture(scope="module")
def model(folder: Path) -> qg.lm.LanguageModel:
    return qg.lm.load(folder)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(generate, [str(a) for a in arguments])


def broken(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config.json."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return copy


def test_text_equals_mlx_lms(folder: Path, model: qg.lm.LanguageModel) -> None:
    peer, tokenizer, *_ = mlx_lm.load(str(folder))
    expected = mlx_lm.generate(peer, tokenizer, "What is 2+2?", max_tokens=40)
    pieces = list(model.generate("What is 2+2?", max_tokens=40))
    assert "".join(p.text for p in pieces) == expected
    assert len(expected) > 10
    assert pieces[-1].finish == ("length" if len(pieces) == 40 else "stop")


def test_batches_equal_one_by_one(model: qg.lm.LanguageModel) -> None:
    prompts = ["1+1=", "12+34=", "5+6=", "a", "12+35="]
    alone = ["".join(p.text for p in model.generate(x, max_tokens=12)) for x in prompts]
    assert model.complete(prompts, max_tokens=12) == alone


def test_an_end_token_stops_the_text(tmp_path: Path, folder: Path) -> None:
    first = next(qg.lm.load(folder).generate("abc")).token
    pieces = list(qg.lm.load(broken(folder, tmp_path, eos_token_id=[first])).generate("abc"))
    assert [(p.token, p.text, p.finish) for p in pieces] == [(first, "", "stop")]


def test_sampling_repeats_with_its_seed(model: qg.lm.LanguageModel) -> None:
    def draw(seed: int) -> list[int]:
        return [p.token for p in model.generate("abc", max_tokens=20, temp=1.5, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_context_bounds_the_text(model: qg.lm.LanguageModel) -> None:
    prompt = [1 + i % 90 for i in range(510)]
    pieces = list(model.generate(prompt, max_tokens=50, temp=1.0, seed=3))
    assert len(pieces) <= 2  # of 512 positions
    with pytest.raises(qg.QGraphError, match=r"600 tokens, the model holds 512"):
        model.generate([1] * 600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [5, 96]}, "token 1 of the prompt has the id 96, outside the model's vocabulary of 96"),
        ({"prompt": [-1]}, "has the id -1"),
        ({"prompt": "a", "temp": -1.0}, "temperature is -1"),
        ({"prompt": "a", "temp": float("nan")}, "temperature is nan"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(
    model: qg.lm.LanguageModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(qg.QGraphError, match=message):
        model.generate(**arguments)


def test_the_command_streams_text_and_reports_speed(folder: Path, model: qg.lm.LanguageModel) -> None:
    result = run("--model", folder, "--prompt", "abc", "--max-tokens", 10)
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(p.text for p in model.generate("abc", max_tokens=10)) + "\n"
    assert "prompt 3 tokens" in result.stderr
    assert "generation 10 tokens" in result.stderr
    assert "tokens/s" in result.stderr


def test_the_command_runs_an_adapter(tmp_path: Path, folder: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folder, layers=2)
    options = ("--model", folder, "--prompt", "abc", "--max-tokens", 10)
    plain, adapted = run(*options), run(*options, "--adapter", adapter)
    assert adapted.exit_code == 0, adapted.output
    assert plain.stdout != adapted.stdout


def test_the_command_reads_stdin(folder: Path) -> None:
    result = CliRunner().invoke(
        generate, ["--model", str(folder), "--prompt", "-", "--max-tokens", "3"], "abc"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == run("--model", folder, "--prompt", "abc", "--max-tokens", 3).stdout


def failure(*arguments: object) -> str:
    result = run(*arguments, "--prompt", "abc")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "nowhere: no such folder" in failure("--model", tmp_path / "nowhere")


def test_an_empty_prompt_is_refused(folder: Path) -> None:
    result = run("--model", folder, "--prompt", "")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the prompt is empty" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen33"}, "mlx-lm has no model_type 'qwen33': did you mean qwen3"),
        ({"model_type": None}, "config.json has no model_type"),
        ({"head_dim": None}, "missing 1 required positional argument: 'head_dim'"),
        ({"head_dim": "32"}, "head_dim is 32, not above 0"),
        ({"vocab_size": 97}, "model.embed_tokens.weight is (96, 64), not (97, 64)"),
        ({"rope_scaling": "linear"}, "config.json makes no qwen3"),
        ({"head_dim": 16}, "layers.0.self_attn.q_proj.weight is (128, 64), not (64, 64)"),
        ({"rope_scaling": {"rope_type": "odd"}}, "config.json makes no qwen3"),
        ({"num_hidden_layers": 5}, "not those that config.json describes (there is no model.layers.2."),
        ({"num_hidden_layers": 1}, "not those that config.json describes (the model has no model.layers.1."),
        ({"tie_word_embeddings": False}, "there is no lm_head.weight"),
        ({"model_file": "evil.py"}, "model_file evil.py is code of the checkpoint's own"),
    ],
)
def test_a_wrong_config_is_explained(
    tmp_path: Path, folder: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in failure("--model", broken(folder, tmp_path, **changes))


def test_known_types_are_those_of_mlx_lm() -> None:
    known = qg.lm.known_types()
    assert {"qwen3", "llama", "mistral", "gpt_oss"} <= set(known)
    assert not {"cache", "switch_layers", "activations", "base"} & set(known)
    assert set(architectures()) - {"olmo"} <= set(known)
    refusals: list[str] = []
    for kind in known:
        try:
            build({"model_type": kind})
        except qg.CheckpointError as error:  # most have no defaults for their sizes
            refusals.append(str(error))
    assert refusals
    assert not [text for text in refusals if "has no model_type" in text]


@pytest.mark.parametrize("kind", ["cache", "..utils", "qwen3.Model", "", "base", "__init__", "a\0b"])
def test_a_model_type_is_a_model_of_mlx_lm_and_no_other_module(
    tmp_path: Path, folder: Path, kind: str
) -> None:
    assert f"no model_type '{clip(kind)}'" in failure("--model", broken(folder, tmp_path, model_type=kind))


def test_a_missing_tokenizer_is_explained(tmp_path: Path, folder: Path) -> None:
    copy = broken(folder, tmp_path)
    for file in copy.glob("*token*"):
        file.unlink()
    assert "no usable tokenizer" in failure("--model", copy)


def test_without_mlx_lm_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(qg.QGraphError, match=r"mlx-lm, which is not installed") as info:
        qg.lm.load(folder)
    assert info.value.fix == 'pip install "qgraph[lm]"'


def test_a_graph_needs_no_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm.tokenizer_utils", None)
    assert "quantized_matmul" in str(qg.lm.load(folder).optimized())


def test_a_missing_adapter_is_named(tmp_path: Path, folder: Path) -> None:
    assert "nowhere: no such folder" in failure("--model", folder, "--adapter", tmp_path / "nowhere")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, folder: Path) -> None:
    other = write(tmp_path / "other", {**TINY, "intermediate_size": 192}, quantization={"bits": 4})
    adapter = write_adapter(tmp_path / "adapter", other, layers=1)
    text = failure("--model", folder, "--adapter", adapter)
    assert "expected (64, 4)" in text or "expected (128, 4)" in text or "expected (4, 128)" in text
    assert "use the adapter with the model it was trained for" in text


def test_an_adapter_with_unknown_modules_is_refused(tmp_path: Path, folder: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", folder, layers=1)
    file = adapter / "adapters.safetensors"
    weights = {k.replace("q_proj", "qq_proj"): w for k, w in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), weights)
    assert "did you mean 'q_proj'" in failure("--model", folder, "--adapter", adapter)


def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tied=False)
    file = folder / "model.safetensors"
    weights = mx.load(str(file)) | {"model.layers.0.extra.weight": mx.ones((2, 2))}
    mx.save_safetensors(str(file), weights)
    (folder / "model.safetensors.index.json").unlink()
    text = failure("--model", folder)
    assert "the model has no model.layers.0.extra.weight" in text

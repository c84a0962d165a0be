"""Hostile model folders, as `qg.lm.load` and `qgraph generate` meet them: one error, no wait, no code run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qgraph as qg
from tests.lm.peer import write


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hostile") / "model", quantization={"bits": 4})


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture(autouse=True)
def never_waiting() -> Iterator[None]:
    """Opening a pipe waits for ever: then the test fails."""

    def wake(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def edit(file: Path, **changes: Any) -> None:
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | changes))


def refusal(error: BaseException) -> str:
    assert type(error) is qg.CheckpointError
    text = str(error)
    assert len(text) <= 400
    assert text.replace("\n", "").isprintable()
    assert "\n  fix: " in text
    return text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not above 0 and up to 1000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not above 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, not above 0"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000, not above 0"),
        ({"num_experts": 10**9}, "num_experts is 1000000000, not above -1 and up to 100000"),
        ({"layers": 3, "num_hidden_layers": [1, 10**9]}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 3}, "the tensors are not those that config.json describes"),
        ({"num_key_value_heads": 10**12}, "num_key_value_heads is 1000000000000"),
        ({"num_key_value_heads": 7}, "the tensors are not those that config.json describes"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": -64}, "head_dim is -64"),
        ({"head_dim": 10**30}, "head_dim is 1"),
        ({"head_dim": 63}, "the tensors are not those that config.json describes"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 10**6}, "model.embed_tokens.weight is (96, 64), not (1000000, 64)"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": "\x1b[2J"}, r"rope_theta is \x1b[2J, not above 0"),
        ({"rope_theta": {"full": -1.0}}, "does not run"),
        ({"rope_scaling": {"rope_type": "\x1b[2J" * 500}}, r"config.json makes no qwen3 (ValueError: "),
        ({"rope_scaling": 7}, "config.json makes no qwen3"),
        ({"rope_scaling": {"type": "linear"}}, "config.json makes no qwen3"),
        ({"head_dim": [32]}, "config.json makes no qwen3"),
        ({"model_file": "evil.py"}, "model_file evil.py is code of the checkpoint's own"),
        ({"model_file": ["\x1b[2J"]}, "is code of the checkpoint's own"),
        ({"model_type": "\x1b[2J" * 500}, r"model_type '\x1b[2J"),
        ({"model_type": ["qwen3"]}, "has no model_type"),
    ],
)
def test_a_config_that_lies_is_refused(changes: dict[str, Any], expected: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(qg.CheckpointError) as caught:
        qg.lm.load(folder)
    assert expected in refusal(caught.value)


def test_a_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 5000), tmp_path / "\x1b[2J", tmp_path / "a\0b"):
        with pytest.raises(qg.CheckpointError) as caught:
            qg.lm.load(path)
        assert "no such folder" in refusal(caught.value)


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", **changes)


TEMPLATE = "the chat template cannot be used"
TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe("tokenizer.json"), "tokenizer.json: is a pipe"),
    "pipe beside it": (pipe("special_tokens_map.json"), "special_tokens_map.json: is a pipe"),
    "end tokens in a pipe": (pipe("generation_config.json"), "generation_config.json: is a pipe"),
    "end tokens in a list": (text("generation_config.json", "[]"), "is a list, not an object"),
    "nothing in it": (text("tokenizer.json", "{}"), "no usable tokenizer"),
    "not JSON": (text("tokenizer.json", "["), "no usable tokenizer"),
    "deep": (text("tokenizer.json", "[" * 100_000), "no usable tokenizer"),
    "an odd decoder": (lambda f: edit(f / "tokenizer.json", decoder=7), "no usable tokenizer"),
    "an odd model": (lambda f: edit(f / "tokenizer.json", model={"type": "BPE"}), "no usable tokenizer"),
    "a list of settings": (text("tokenizer_config.json", "[]"), "no usable tokenizer"),
    "a parser elsewhere": (tokenizer(tool_parser_type="../../evil"), "no usable tokenizer"),
    "a template elsewhere": (tokenizer(chat_template_type="os"), "no usable tokenizer"),
    "half of a template": (tokenizer(chat_template="{% for"), TEMPLATE),
    "a template that is no text": (tokenizer(chat_template=7), TEMPLATE),
    "a template that raises": (
        tokenizer(chat_template="{{ raise_exception('\x1b[2J') }}"),
        rf"{TEMPLATE}: \x1b[2J",
    ),
    "a template that reaches out": (tokenizer(chat_template="{{ messages.__class__.__mro__ }}"), TEMPLATE),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(case: str, folder: Path) -> None:
    change, expected = TOKENIZERS[case]
    change(folder)
    model = qg.lm.load(folder)  # the tokenizer is read when text is
    with pytest.raises(qg.CheckpointError) as caught:
        model.generate("1+1=", chat=True)
    assert expected in refusal(caught.value)


def test_the_command_asks_nothing_and_runs_no_code_of_the_folder(folder: Path) -> None:
    evil = {
        "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"], "AutoConfig": "evil.T"},
        "tokenizer_class": "T",
    }
    (folder / "evil.py").write_text("open('ran', 'w').close()\nclass T: pass\n")
    edit(folder / "tokenizer_config.json", **evil)
    edit(folder / "config.json", **evil)
    command = "import sys; from qgraph.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            command,
            "generate",
            "--model",
            folder,
            "--prompt",
            "1+1=",
            "--max-tokens",
            "2",
        ],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Do you wish to run" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.parent.rglob("ran"))

"""The examples do what they say."""

import inspect
import re
from pathlib import Path

from qgraph_examples import qwen3
from tests.lm.peer import write


def test_qwen3_is_short_and_knows_nothing_of_quantization() -> None:
    lines = Path(qwen3.__file__).read_text().splitlines()
    assert len(lines) <= 150
    code = "\n".join(lines).replace(qwen3.__doc__ or "", "")
    assert not re.search(r"quant|packed|scales|biases|bits", code)


def test_the_lines_at_its_head_run(tmp_path: Path) -> None:
    block = re.findall(r"^    \S.*$", qwen3.__doc__ or "", re.MULTILINE)
    assert len(block) == 5
    folder = str(write(tmp_path / "model", quantization={"bits": 4}))
    names = {**vars(qwen3), "FOLDER": folder}
    exec(
        "import mlx.core as mx\ntokens = mx.array([[1, 2, 3]])\n" + inspect.cleandoc("\n".join(block)),
        names,
    )
    assert names["logits"].shape == (1, 3, 96)

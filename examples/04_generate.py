"""The embedded 4-bit model, with and without its LoRA adapter. Needs mlx-lm: pip install "qgraph[lm]"."""

from importlib.resources import files

import qgraph as qg

demo = files("qgraph_examples") / "demo"
model = qg.lm.load(str(demo / "model"))
print(model.report().counts())
for prompt in ("123+456=", "7+95="):
    print(prompt + "".join(piece.text for piece in model.generate(prompt, max_tokens=8)))

adapted = model.with_adapter(str(demo / "adapter"))
print(adapted.report().counts())
for prompt in ("456-123=", "95-7="):
    print(prompt + "".join(piece.text for piece in adapted.generate(prompt, max_tokens=8)))

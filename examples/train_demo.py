"""Train the demo model: a Qwen3-format language model of 0.8 M parameters that adds.

It makes the files under ``qgraph_examples/demo``: a 4-bit checkpoint in mlx-lm's format with its
tokenizer (``model/``), an mlx-lm LoRA adapter that teaches the same weights to subtract
(``adapter/``), and held-out problems with the accuracies measured on them (``problems.json``).

The steps: a character tokenizer; a Qwen3 in PyTorch, whose logits are checked against mlx-lm's to
1e-4; training on ``123+456=579``; the float checkpoint, in bfloat16; mlx-lm's affine 4-bit
quantization; a LoRA adapter for ``456-123=333``, trained on the frozen, dequantized 4-bit weights.
Each accuracy is measured by ``mlx_lm.generate`` on the files as written, decoding greedily.

Needs torch, mlx-lm and click. The shipped files were made with torch 2.13.0, mlx 0.32.4 and
mlx-lm 0.32.2, from the seeds below, on two cores of a busy server: the model in 15 minutes, then
the adapter, by the second command, which keeps the model, in 10. DIR is any folder:

    OUT=examples/qgraph_examples/demo
    python examples/train_demo.py --out $OUT --float DIR
    python examples/train_demo.py --out $OUT --float DIR --steps 1200 --threads 1
"""

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import mlx.core as mx
import mlx_lm
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.utils import dequantize_model, load_model, quantize_model, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
# The 95 printable ASCII characters and the end token: 96, a multiple of 32 as are the other
# dimensions. Training sees 14 of them; the rest let any ASCII prompt be encoded.
VOCAB = [END, *map(chr, range(0x20, 0x7F))]
IDS = {token: i for i, token in enumerate(VOCAB)}

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": IDS[END],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 384,
    "max_position_embeddings": 256,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": len(VOCAB),
}
BITS, GROUP_SIZE = 4, 64
LORA = {"rank": 8, "dropout": 0.0, "scale": 4.0}

# The longest text, ``999+999=1998`` and the end token, less the last, which predicts nothing.
CONTEXT = 12
SPLIT_SEED, WEIGHTS_SEED, BASE_SEED, LORA_SEED, PROBLEMS_SEED = range(5)
PATH = click.Path(path_type=Path, file_okay=False)


# --- The tasks ---------------------------------------------------------------------------------


def held_out() -> np.ndarray:
    """Marks, in a (1000, 1000) array, the 2 % of operand pairs that neither task trains on."""
    # With (a, b) goes (b, a), or a model could have learned a held-out sum in its other order.
    marks = np.random.default_rng(SPLIT_SEED).random((1000, 1000)) < 0.02
    return np.triu(marks) | np.triu(marks).T


def draw(rng: np.random.Generator, n: int, pairs: np.ndarray) -> np.ndarray:
    """Draws n pairs of operands and returns those that ``pairs`` marks, an (m, 2) array."""
    # A quarter of the operands evenly over the lengths, as few numbers below 1000 are short.
    limit = np.where(rng.random((n, 2)) < 0.25, 10 ** rng.integers(1, 4, (n, 2)), 1000)
    operands = rng.integers(0, limit)
    return operands[pairs[operands[:, 0], operands[:, 1]]]


def problem(op: str, a: int, b: int) -> tuple[str, str]:
    """Returns the prompt and the answer; a difference is taken the way it is not negative."""
    a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
    return f"{a}{op}{b}=", str(a + b if op == "+" else a - b)


def batch(rng: np.random.Generator, op: str, n: int, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns (tokens, targets) of about n problems, with -100 for targets outside the answers."""
    operands = draw(rng, n, pairs).tolist()
    tokens = np.full((len(operands), CONTEXT + 1), IDS[END])
    targets = np.full((len(operands), CONTEXT), -100)
    for row, (a, b) in enumerate(operands):
        prompt, answer = problem(op, a, b)
        ids = [IDS[char] for char in prompt + answer]
        tokens[row, : len(ids)] = ids
        # Position i predicts token i + 1: the answer, and the end token after it.
        targets[row, len(prompt) - 1 : len(ids)] = tokens[row, len(prompt) : len(ids) + 1]
    return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets)


# --- Qwen3, with the parameter names of the checkpoint -----------------------------------------


class Linear(nn.Module):
    """A projection without bias, and its LoRA update once there is one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.lora_a: nn.Parameter | None = None

    def add_lora(self) -> None:
        """Adds a low-rank update that starts at zero, in mlx-lm's layout."""
        outputs, inputs = self.weight.shape
        self.lora_a = nn.Parameter((torch.rand(inputs, LORA["rank"]) * 2 - 1) * inputs**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(LORA["rank"], outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        # mlx-lm takes the scale as it is, not divided by the rank.
        return y if self.lora_a is None else y + LORA["scale"] * (x @ self.lora_a @ self.lora_b)


norm = partial(nn.RMSNorm, eps=CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    """Grouped-query attention with norms on the queries and the keys."""

    def __init__(self) -> None:
        super().__init__()
        hidden, self.dims = CONFIG["hidden_size"], CONFIG["head_dim"]
        heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.q_proj = Linear(hidden, heads * self.dims)
        self.k_proj = Linear(hidden, kv_heads * self.dims)
        self.v_proj = Linear(hidden, kv_heads * self.dims)
        self.o_proj = Linear(heads * self.dims, hidden)
        self.q_norm, self.k_norm = norm(self.dims), norm(self.dims)

    def forward(self, x: Tensor) -> Tensor:
        split = (-1, self.dims)
        q = rope(self.q_norm(self.q_proj(x).unflatten(-1, split)).transpose(1, 2))
        k = rope(self.k_norm(self.k_proj(x).unflatten(-1, split)).transpose(1, 2))
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj, self.up_proj = Linear(hidden, inner), Linear(hidden, inner)
        self.down_proj = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and the MLP, each on the normed stream."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = norm(CONFIG["hidden_size"])
        self.post_attention_layernorm = norm(CONFIG["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The language model, its embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.model.layers = nn.Sequential(*(Block() for _ in range(CONFIG["num_hidden_layers"])))
        self.model.norm = norm(CONFIG["hidden_size"])
        # As the output, rows of unit variance would start with logits of scale 11.
        nn.init.normal_(self.model.embed_tokens.weight, std=CONFIG["hidden_size"] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.layers(self.model.embed_tokens(tokens))
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def rope(x: Tensor) -> Tensor:
    """Rotates the two halves of each head by position."""
    half = x.shape[-1] // 2
    rates = CONFIG["rope_theta"] ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def train(model: Qwen3, op: str, steps: int, lr: float, seed: int) -> None:
    """Trains what is not frozen; the learning rate warms up to ``lr``, then falls to zero."""
    rng, pairs, start = np.random.default_rng(seed), ~held_out(), perf_counter()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Muon is made for the projections, hidden matrices of full rank. The embedding, the norms and
    # LoRA's factors are left to AdamW.
    full = [p for name, p in named.items() if name.endswith("_proj.weight")]
    rest = [p for name, p in named.items() if not name.endswith("_proj.weight")]
    optimizers = [torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0)]
    optimizers += [torch.optim.Muon(full, lr, adjust_lr_fn="match_rms_adamw")] if full else []
    for step in range(steps):
        tokens, targets = batch(rng, op, 256, pairs)
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        for optimizer in optimizers:
            cosine = 0.5 + 0.5 * np.cos(np.pi * step / steps)
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, cosine)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            right = ((logits.argmax(-1) == targets) | (targets == -100)).all(-1).float().mean()
            seconds = perf_counter() - start
            click.echo(f"{op} {step + 1}: loss {loss:.4f}, right {right:.1%}, {seconds:.0f} s")


# --- The files ---------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: byte-level BPE, as Qwen's, without merges, so one character a token."""
    vocab = {token.replace(" ", "\u0120"): i for token, i in IDS.items()}  # byte-level BPE's space
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = {"eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=256, **special)


def save_checkpoint(path: Path, model: Any, config: dict[str, Any]) -> None:
    """Writes an mlx-lm checkpoint with the tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    save(path, path, model, tokenizer(), config)
    (path / "README.md").unlink()  # an empty card from mlx-lm's template


def save_float(path: Path, model: Qwen3) -> None:
    """Writes the float checkpoint in bfloat16; fails unless mlx-lm computes the same logits."""
    peer = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    peer.load_weights([(k, mx.array(v.numpy())) for k, v in model.state_dict().items()])
    tokens, _ = batch(np.random.default_rng(PROBLEMS_SEED), "+", 2000, held_out())
    with torch.no_grad():
        ours = model(tokens).numpy()
    error = np.abs(ours - np.array(peer(mx.array(tokens.numpy())))).max()
    click.echo(f"the logits differ from mlx-lm's by at most {error:.1e}")
    if error > 1e-4:
        raise click.ClickException("the PyTorch model is not mlx-lm's model")
    peer.set_dtype(mx.bfloat16)
    save_checkpoint(path, peer, dict(CONFIG))


def save_adapter(path: Path, model: Qwen3) -> None:
    """Writes the adapter folder that ``mlx_lm.load(adapter_path=...)`` reads."""
    path.mkdir(parents=True, exist_ok=True)
    keys = [name for name, m in model.model.layers[0].named_modules() if isinstance(m, Linear)]
    config = {"fine_tune_type": "lora", "num_layers": CONFIG["num_hidden_layers"]}
    text = json.dumps(config | {"lora_parameters": LORA | {"keys": keys}}, indent=4)
    (path / "adapter_config.json").write_text(text + "\n")
    weights = {k: mx.array(v.numpy()) for k, v in model.state_dict().items() if "lora_" in k}
    mx.save_safetensors(str(path / "adapters.safetensors"), weights, {"format": "mlx"})


def problems(op: str, n: int) -> dict[str, str]:
    """Returns n held-out problems, each prompt with its answer."""
    rng, found = np.random.default_rng(PROBLEMS_SEED), dict[str, str]()
    while len(found) < n:
        for a, b in draw(rng, 1000, held_out()).tolist():
            found.setdefault(*problem(op, a, b))
    return dict(list(found.items())[:n])


def accuracy(path: Path, answers: dict[str, str], adapter: Path | None = None) -> float:
    """Measures the share of prompts that ``mlx_lm.generate`` answers exactly, and then stops."""
    model, tokens, *_ = mlx_lm.load(str(path), adapter_path=adapter and str(adapter))
    solve = partial(mlx_lm.generate, model, tokens, max_tokens=CONTEXT)
    return sum(solve(prompt) == answer for prompt, answer in answers.items()) / len(answers)


@click.command()
@click.option("--out", type=PATH, required=True, help="Write the files here.")
@click.option("--float", "kept", type=PATH, help="Keep the float checkpoint here, or reuse it.")
@click.option("--steps", default=2000, show_default=True, help="Steps of each training.")
@click.option("--count", default=500, show_default=True, help="Held-out problems of each task.")
@click.option("--threads", default=2, show_default=True, help="PyTorch's threads.")
def main(out: Path, kept: Path | None, steps: int, count: int, threads: int) -> None:
    """Train the demo model and its adapter, quantize, evaluate, and write the files."""
    torch.set_num_threads(threads)
    torch.manual_seed(WEIGHTS_SEED)
    scratch = TemporaryDirectory()
    float_path = kept or Path(scratch.name)
    model = Qwen3()
    if not (float_path / "config.json").exists():
        train(model, "+", steps, 3e-3, BASE_SEED)
        save_float(float_path, model)

    quantized, config = quantize_model(*load_model(float_path), GROUP_SIZE, BITS)
    save_checkpoint(out / "model", quantized, config)

    # The adapter learns on what the 4-bit weights stand for, their rounding included.
    base = dequantize_model(load_model(out / "model")[0])
    base.set_dtype(mx.float32)
    weights = {k: torch.from_numpy(np.array(w)) for k, w in tree_flatten(base.parameters())}
    model.load_state_dict(weights)
    model.requires_grad_(False)
    torch.manual_seed(LORA_SEED)
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.add_lora()
    train(model, "-", steps, 2e-3, LORA_SEED)
    save_adapter(out / "adapter", model)

    sums, differences = problems("+", count), problems("-", count)
    measured = {
        "float": accuracy(float_path, sums),
        "4bit": accuracy(out / "model", sums),
        "4bit on task 2": accuracy(out / "model", differences),
        "4bit+lora on task 2": accuracy(out / "model", differences, out / "adapter"),
    }
    report = {"accuracy": measured, "task 1": sums, "task 2": differences}
    (out / "problems.json").write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()

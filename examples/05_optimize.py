"""A model of mlx-lm, unmodified: packed weights in its dense code. Needs mlx-lm: pip install "qgraph[lm]"."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

import qgraph as qg

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 512}


def random_model():
    """A tiny Llama; its random weights stand for a checkpoint."""
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs("llama", num_attention_heads=4, rms_norm_eps=1e-6, **SIZES))
    model.update(tree_map(lambda w: mx.random.normal(w.shape) * w.shape[-1] ** -0.5, model.parameters()))
    return model


def tokens(model):
    """Greedy tokens, by mlx-lm's own loop and caches."""
    return [int(token) for token, _ in generate_step(mx.array([3, 1, 4, 1, 5]), model, max_tokens=24)]


dense = random_model()
fast = qg.optimize(dense)
print("dense, the tokens are those of mlx-lm:", tokens(fast) == tokens(dense))

theirs = random_model()
nn.quantize(theirs, group_size=64, bits=4)  # mlx-lm's way: other layers in the place of the dense ones
for _, layer in dense.named_modules():  # ours: the same layers, other weights
    if isinstance(layer, nn.Linear | nn.Embedding):
        layer.weight = qg.quantize(layer.weight, group_size=64, bits=4)
print("4 bit, the tokens are those of mlx-lm:", tokens(fast) == tokens(theirs))
print("in every step:", fast.qgraph.report(mx.array([[1]])).counts())
print(fast.qgraph.cache_info())

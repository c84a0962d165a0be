"""A tokenizer with one word for every id: equal texts are equal tokens."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.zoo.configs import VOCAB

END = VOCAB + 1


def tokenizer():
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=inner), eos_token_ids=[END])


def prompt_of(*ids):
    return " ".join(f"w{i}" for i in ids)

"""mlx-lm's own generation on `qg.optimize(model)`: the text of the model as it is, whatever the cache."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import qgraph as qg
from tests.agree import assert_close
from tests.capture.caches.words import END, prompt_of, tokenizer
from tests.zoo.build import build

MODELS = ["qwen3", "gemma3_text", "llama", "mixtral", "mamba2", "jamba", "llama4", "deepseek_v3"]
PROMPT = prompt_of(3, 1, 41, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64)
TOKENIZER = tokenizer()
_MADE: dict = {}


def pair(name):
    """A model and its optimized form; one of each for all tests."""
    if name not in _MADE:
        model = build(name)
        _MADE[name] = model, qg.optimize(model)
    return _MADE[name]


def text(model, prompt=PROMPT, n=48, **settings):
    return mlx_lm.generate(model, TOKENIZER, prompt, max_tokens=n, **settings)


SETTINGS = {
    "plain": {},
    "a prompt in chunks": {"prefill_step_size": 5},
    "a cache of at most 16": {"max_kv_size": 16},
    "a cache of 8 bits": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
    "a cache of 4 bits from token 20 on": {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 20},
}
# mlx-lm itself refuses these: it has no quantized form of a window, nor of MLA's latents.
REFUSED = {("gemma3_text", "bits"), ("llama", "bits"), ("deepseek_v3", "bits")}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_text_of_plain_mlx_lm(name, setting):
    model, fast = pair(name)
    if any(name == n and word in setting for n, word in REFUSED):
        with pytest.raises((NotImplementedError, AttributeError)):
            text(model, **SETTINGS[setting])
        return
    expected = text(model, **SETTINGS[setting])
    assert text(fast, **SETTINGS[setting]) == expected
    assert len(set(expected.split())) > 5  # no loop of one word


def test_stream_generate_gives_the_same_log_probabilities_step_by_step():
    model, fast = pair("qwen3")
    both = zip(*(stream_generate(m, TOKENIZER, PROMPT, max_tokens=24) for m in (model, fast)), strict=True)
    for plain, mine in both:
        assert (mine.token, mine.text) == (plain.token, plain.text)
        assert_close(mine.logprobs, plain.logprobs, path="model")


def test_sixty_four_tokens_are_few_programs():
    model = qg.optimize(build("qwen3"))
    text(model, n=45)  # 13 + 45: in a window of 64
    # The prompt; then one token, of the prompt's dtype and of the dtype that argmax has.
    assert model.qgraph.cache_info().misses == 3
    text(model, n=45)
    assert model.qgraph.cache_info().misses == 3
    text(model, n=110)  # and in one of 128
    assert model.qgraph.cache_info().misses == 4


@pytest.mark.parametrize("name", ["gemma3_text", "llama4", "jamba"])
def test_other_caches_are_few_programs_too(name):
    model = qg.optimize(build(name))
    text(model, n=45)
    assert model.qgraph.cache_info().misses <= 4  # windows before they are full


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "jamba", "llama4"])
def test_a_prompt_cache_is_saved_loaded_and_continued_by_either(name, tmp_path):
    model, fast = pair(name)
    texts = []
    for first, second in ((model, model), (fast, fast), (model, fast), (fast, model)):
        cache = make_prompt_cache(first)
        begun = text(first, prompt_cache=cache, n=10)
        save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
        texts.append((begun, text(second, prompt=prompt_of(7, 8, 9), prompt_cache=loaded, n=24)))
    assert texts[1:] == texts[:1] * 3


def test_a_trimmed_prompt_cache_goes_on_from_there():
    model, fast = pair("qwen3")
    texts = []
    for one in (model, fast):
        cache = make_prompt_cache(one)
        text(one, prompt_cache=cache, n=70)
        assert trim_prompt_cache(cache, 60) == 60
        texts.append(text(one, prompt=prompt_of(5, 6), prompt_cache=cache, n=24))
        assert cache[0].offset == cache[-1].offset > 0
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["the same", "another"])
def test_speculative_decoding_trims_and_gives_the_same_text(draft):
    model, fast = pair("qwen3")
    other = build("qwen3", seed=0 if draft == "the same" else 1)
    expected = text(model, draft_model=other, num_draft_tokens=3)
    fast_draft, fast = qg.optimize(other), qg.optimize(model)
    assert text(fast, draft_model=fast_draft, num_draft_tokens=3) == expected
    # The prompt; one to four tokens at once, in windows of 64.
    assert fast.qgraph.cache_info().misses <= 5
    assert fast_draft.qgraph.cache_info().misses <= 4
    assert text(fast, draft_model=other, num_draft_tokens=2) == text(model) == expected


PROMPTS = [[3, 1, 41], [59, 26, 53, 58, 97, 93, 23], [84], [62, 64, 33, 83, 27]]


def batched(model, prompts, n=20, **settings):
    """Continuous batching as the server has it: requests come while others run, and leave at other times."""
    generator = BatchGenerator(
        model, stop_tokens=[[END]], completion_batch_size=3, prefill_batch_size=2, **settings
    )
    limits = [n, n // 2, n + 7, n // 3]
    names = generator.insert(prompts[:2], limits[:2])
    found: dict = {}
    for round_ in range(200):
        if round_ == 4:
            names += generator.insert(prompts[2:], limits[2:])
        done, responses = generator.next()
        for r in responses:
            found.setdefault(r.uid, []).append(r.token)
        if round_ > 4 and not done and not responses:
            break
    generator.close()
    return [found[name] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "jamba", "mixtral"])
def test_batches_whose_rows_come_and_go_give_the_same_tokens(name):
    model, fast = pair(name)
    expected = batched(model, PROMPTS)
    assert batched(fast, PROMPTS) == expected
    assert [len(tokens) for tokens in expected] == [20, 10, 27, 6]
    assert batched(fast, PROMPTS, prefill_step_size=2) == batched(model, PROMPTS, prefill_step_size=2)


def test_batch_generate_gives_the_same_texts():
    model, fast = pair("qwen3")
    plain, mine = (mlx_lm.batch_generate(m, TOKENIZER, PROMPTS, max_tokens=16) for m in (model, fast))
    assert mine.texts == plain.texts


def test_a_cache_that_the_optimized_model_filled_serves_the_plain_one_token_by_token():
    model, fast = pair("qwen3")
    generator = np.random.default_rng(0)
    caches = make_prompt_cache(model), make_prompt_cache(model)
    for i in range(20):
        tokens = mx.array(generator.integers(0, 300, (1, 1 if i % 4 else 3)))
        expected = model(tokens, cache=caches[0])
        assert_close((model if i % 2 else fast)(tokens, cache=caches[1]), expected, path="model")
    assert all(type(c) is mlx_lm_cache.KVCache and type(c.offset) is int for c in caches[1])

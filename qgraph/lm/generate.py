"""Text from a checkpoint folder: load, prefill, decode."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property, reduce
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx

from qgraph._errors import CheckpointError, QGraphError
from qgraph._jit import JitFunction, jit
from qgraph.ir import Graph
from qgraph.ir.dtypes import F32, dtype_of, promote
from qgraph.ir.op import Input
from qgraph.lm.models import Cache, ModelCode, Params, check_sizes, find_model
from qgraph.lm.sampling import Piece, Sampler, Stats, checked, refuse_no_token
from qgraph.lm.text import Tokenizer, check_tokens, decode, encode, load_tokenizer
from qgraph.quant import QuantizedTensor, load_adapter, load_config, merge_adapter
from qgraph.quant import load as load_params
from qgraph.quant.strict_file import clip
from qgraph.rewrite import Report, Result
from qgraph.trace.tree import flatten

PREFILL = 512  # prompt tokens that run at once
EXAMPLE = 512  # the capacity that `graph`, `report` and the check after loading look at
ID = mx.uint32  # the dtype of argmax, so that the tokens of a prompt have that of generated ones
BATCH = 64  # prompts that `complete` runs at once


def load(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a checkpoint folder of mlx-lm's layout, and trace its decode step.

    The model code is found by config.json's model_type; `adapter` is a LoRA folder as mlx-lm writes it;
    `progress(bytes_done, bytes_total)` is called as the weights arrive. The tokenizer is read when text
    is first needed, and needs mlx-lm (``pip install "qgraph[lm]"``).

    Errors: CheckpointError for a folder that is missing, malformed, or not a model of the known types,
    and for an adapter of another model.

    Example::

        model = qg.lm.load("Qwen3-0.6B-4bit")
        for piece in model.generate("Why is the sky blue?", max_tokens=100, chat=True):
            print(piece.text, end="", flush=True)
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{clip(folder.name or folder, 60)}: no such folder",
            fix="pass the folder of a model, with config.json, model.safetensors and a tokenizer",
        )
    raw = load_config(folder)
    code = find_model(raw)
    check_sizes(raw)
    config = code.Config.from_dict(raw)
    params: Params = load_params(folder, progress=progress)
    model = LanguageModel(code, params, config, lambda: load_tokenizer(folder, raw), clip(folder.name, 60))
    if adapter is not None:
        return model.with_adapter(adapter)
    model.check()
    return model


class LanguageModel:
    """A model that generates text; made by `qg.lm.load`.

    Attributes:
        params: The tree of the checkpoint, with the adapter's tensors beside the weights they adapt.
        config: What the model code read from config.json.
        step: The jitted function that runs every token but those inside the prompt:
            ``step(params, tokens, cache, offset, config) -> (logits of the last position, cache)``.
        fill: The jitted function that runs a prompt up to its last token; it returns the cache only, so
            that the head and the end of the last layer are dead code in it.
    """

    def __init__(
        self,
        code: ModelCode,
        params: Params,
        config: Any,
        tokenizer: Callable[[], Tokenizer],
        name: str = "model",
    ) -> None:
        self.code = code
        self.params = params
        self.config = config
        self.name = name
        self.step, self.fill = _jitted(code)
        self.dtype = _activation_dtype(params)
        self._make_tokenizer = tokenizer

    def with_adapter(self, path: str | os.PathLike[str]) -> LanguageModel:
        """The same weights with a LoRA adapter beside them, computed in the same graph.

        Errors: CheckpointError for an adapter that is malformed or made for another model.
        """
        adapted = copy(self)
        adapted.params = merge_adapter(self.params, load_adapter(path))
        adapted._make_tokenizer = lambda: self.tokenizer
        adapted.check()
        return adapted

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """mlx-lm's tokenizer of the folder. Errors: QGraphError without mlx-lm; CheckpointError."""
        return self._make_tokenizer()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temp: float = 0.0,
        seed: int | None = None,
        chat: bool = False,
    ) -> Iterator[Piece]:
        """Continue a text (or token ids), one piece for each token, up to an end token.

        `temp` 0 is greedy; above, tokens are drawn, the same ones for the same `seed`. `chat` puts the
        prompt into the model's chat template. Errors, at the call: QGraphError for an empty prompt, one
        longer than the model's context, ids outside the vocabulary, or a bad setting. While it runs:
        NonFiniteError where the logits give no token; the model stays usable.
        """
        given = encode(self.tokenizer, prompt, chat=chat) if isinstance(prompt, str) else prompt
        tokens = self._check_request(given, max_tokens)
        room = self.config.max_position_embeddings - len(tokens)
        return self._stream(tokens, min(max_tokens, room), Sampler(temp, seed))

    def complete(self, prompts: Sequence[str], *, max_tokens: int = 256) -> list[str]:
        """The greedy continuation of every prompt, without the end token; prompts run in batches.

        Errors: as `generate`.
        """
        encoded = [encode(self.tokenizer, p) for p in prompts]
        groups: dict[int, list[int]] = {}
        for i, tokens in enumerate(encoded):
            try:
                self._check_request(tokens, max_tokens)
            except QGraphError as error:
                error.add_note(f"in prompt {i} of {len(prompts)}")
                raise
            groups.setdefault(len(tokens), []).append(i)
        texts = [""] * len(prompts)
        for rows in groups.values():
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                found = self._complete([encoded[i] for i in batch], max_tokens, batch)
                for i, ids in zip(batch, found, strict=True):
                    texts[i] = decode(self.tokenizer, ids)
        return texts

    def result(self, length: int = 1) -> Result:
        """The pipeline run of a step of `length` tokens: graphs after every pass, statistics, report."""
        return self.step.result(*self._example(length))

    def graph(self, length: int = 1) -> Graph:
        """The graph of a step as traced, before any pass."""
        return self.result(length).before

    def optimized(self, length: int = 1) -> Graph:
        """The graph of a step after all passes."""
        return self.result(length).graph

    def report(self, length: int = 1) -> Report:
        """What every use of a quantized weight became, or why it did not."""
        return self.result(length).report

    def source(self, length: int = 1) -> str:
        """The Python source that runs for a step."""
        return self.step.source(*self._example(length))

    def _check_request(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        ids = check_tokens(tokens, self.config.vocab_size, self.config.max_position_embeddings)
        if max_tokens < 1:
            raise QGraphError(f"max_tokens is {max_tokens}", fix="generate at least one token")
        return ids

    def _cache(self, batch: int, positions: int) -> Cache:
        capacity = min(_capacity(positions), self.config.max_position_embeddings)
        return self.code.make_cache(self.config, batch, capacity, self.dtype)

    def _example(self, length: int) -> tuple[Any, ...]:
        tokens = mx.zeros((1, length), ID)
        return self.params, tokens, self._cache(1, max(length, EXAMPLE)), mx.array(0), self.config

    def _prefill(self, tokens: mx.array, cache: Cache) -> tuple[mx.array, Cache]:
        """The logits after a prompt (batch, length), and the cache with the prompt in it."""
        last = tokens.shape[1] - 1
        for start in range(0, last, PREFILL):
            chunk = tokens[:, start : min(start + PREFILL, last)]
            cache = self.fill(self.params, chunk, cache, mx.array(start), self.config)
            mx.eval(cache)  # so that one chunk's activations are alive at a time
        return self._run(tokens[:, last:], cache, last)

    def _run(self, tokens: mx.array, cache: Cache, offset: int) -> tuple[mx.array, Cache]:
        return self.step(self.params, tokens, cache, mx.array(offset), self.config)

    def _stream(self, prompt: list[int], max_tokens: int, sample: Sampler) -> Iterator[Piece]:
        ends, detokenizer = self.tokenizer.eos_token_ids, self.tokenizer.detokenizer
        stats = Stats(prompt_tokens=len(prompt))
        start = perf_counter()
        logits, cache = self._prefill(mx.array([prompt], ID), self._cache(1, len(prompt) + max_tokens))
        current = sample(logits)
        for n in range(max_tokens):
            mx.async_eval(current)
            following = None
            if n + 1 < max_tokens:  # queued before this token is read, so that the device never waits
                logits, cache = self._run(current[:, None], cache, len(prompt) + n)
                following = sample(logits)
                mx.async_eval(following)
            token = int(current.item())  # pyright: ignore[reportArgumentType]  (an integer array)
            refuse_no_token(token, n)
            _count(stats, n + 1, start)
            last = token in ends or following is None
            if token not in ends:
                detokenizer.add_token(token)
            if last:
                detokenizer.finalize()
            finish = "stop" if token in ends else "length" if last else None
            yield Piece(detokenizer.last_segment, token, finish, stats)
            if following is None or finish:
                return
            current = following

    def _complete(self, prompts: list[list[int]], max_tokens: int, places: list[int]) -> list[list[int]]:
        """Greedy ids for prompts of one length, each up to its end token; `places` are for errors."""
        batch, length, ends = len(prompts), len(prompts[0]), self.tokenizer.eos_token_ids
        max_tokens = min(max_tokens, self.config.max_position_embeddings - length)
        found: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(batch))
        logits, cache = self._prefill(mx.array(prompts, ID), self._cache(batch, length + max_tokens))
        for n in range(max_tokens):
            current = checked(mx.argmax(logits, axis=-1), logits)
            ids: list[int] = current.tolist()  # pyright: ignore[reportAssignmentType]
            for row in tuple(open_rows):
                refuse_no_token(ids[row], n, places[row])
                if ids[row] in ends:
                    open_rows.discard(row)
                else:
                    found[row].append(ids[row])
            if not open_rows or n + 1 == max_tokens:
                break
            logits, cache = self._run(current[:, None], cache, length + n)
        return found

    def check(self) -> None:
        """Trace a decode step: errors come before the first token, and what the model never reads shows.

        Errors: CheckpointError for tensors that are not the model's, and for an adapter that it does not
        read; other unread tensors are a warning.
        """
        try:
            before = self.graph()
        except (QGraphError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            why = clip(error.message if isinstance(error, QGraphError) else repr(error), 150)
            raise CheckpointError(
                f"{self.name}: the tensors are not those that config.json describes ({why})",
                fix="check num_hidden_layers, tie_word_embeddings and model_type, or download it again",
            ) from error
        _check_vocabulary(self.name, before, self.config.vocab_size)
        labels = [v.op.label for v in before.inputs if isinstance(v.op, Input) and not before.users(v)]
        unread = [label.removeprefix("params.") for label in labels if label.startswith("params.")]
        adapted = [name for name in unread if ".lora_" in name]
        if adapted:
            raise CheckpointError(
                f"the adapter changes {clip(adapted[0], 100)}, which the model code does not read",
                fix="train the adapter on linear layers only, or extend the model code",
            )
        if unread:
            shown = ", ".join(clip(name, 70) for name in unread[:3]) + (
                f" and {len(unread) - 3} more" if len(unread) > 3 else ""
            )
            warnings.warn(f"{self.name}: the model never reads {shown}", stacklevel=4)


def _jitted(code: ModelCode) -> tuple[JitFunction, JitFunction]:
    def step(params: Params, tokens: mx.array, cache: Cache, offset: mx.array, config: Any) -> Any:
        x, cache = code.backbone(params, tokens, cache, offset, config)
        return code.head(params, x[:, -1], config), cache

    def fill(params: Params, tokens: mx.array, cache: Cache, offset: mx.array, config: Any) -> Any:
        return code.backbone(params, tokens, cache, offset, config)[1]

    jitted = jit(step), jit(fill)
    for function in jitted:
        function.warns = False  # a prompt of another length is another program, and the user's to choose
    return jitted


def _check_vocabulary(name: str, graph: Graph, vocab: int) -> None:
    """Token ids are checked against the config: the tables that they index must be as large."""
    found = [n.inputs[0].type.shape[0] for n in graph.find("take") if n.inputs[1] in graph.inputs]
    rows = min([*found, graph.outputs[0].type.shape[-1]])
    if rows < vocab:
        raise CheckpointError(
            f"{name}: config.json has vocab_size {vocab}, the embedding or the head has {rows}",
            fix="use the config.json that belongs to the weights",
        )


def _capacity(positions: int) -> int:
    """Few different ones, so that few programs serve all prompts, and little room that stays empty.

    >>> _capacity(5), _capacity(300), _capacity(5000)
    (32, 512, 5120)
    """
    return -(-positions // 1024) * 1024 if positions > 1024 else max(32, 1 << (positions - 1).bit_length())


def _activation_dtype(params: Params) -> mx.Dtype:
    """The dtype that activations get by promotion: that of the dense floats and of affine scales."""
    leaves: list[Any] = []
    flatten(params, leaves, [])
    stored = [x.scales if isinstance(x, QuantizedTensor) else x for x in leaves]
    floats = {dtype_of(x.dtype) for x in stored if mx.issubdtype(x.dtype, mx.floating)}
    return reduce(promote, floats).mlx if floats else F32.mlx


def _count(stats: Stats, tokens: int, start: float) -> None:
    now = perf_counter() - start
    if tokens == 1:
        stats.prompt_seconds = now
    stats.generated_tokens = tokens
    stats.generation_seconds = now - stats.prompt_seconds
    stats.peak_bytes = mx.get_peak_memory()

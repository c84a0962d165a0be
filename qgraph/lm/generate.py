"""Text from a checkpoint folder: load, prefill, decode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import mlx.core as mx

from qgraph._errors import CheckpointError, QGraphError
from qgraph._optimize import optimize
from qgraph.ir import Graph
from qgraph.lm.adapting import adapt, fill
from qgraph.lm.architecture import build, copy_of, slots
from qgraph.lm.bitnet import with_dense_layers
from qgraph.lm.sampling import Piece, Sampler, Stats, greedy, refuse_no_token
from qgraph.lm.text import Tokenizer, check_tokens, decode, encode, load_tokenizer
from qgraph.lm.weights import Weights, read_weights
from qgraph.quant import Adapter, load_adapter, load_config
from qgraph.quant.strict_file import clip
from qgraph.rewrite import Report, Result

PREFILL = 512  # prompt tokens that run at once
ID = mx.uint32  # the dtype of argmax, so that the tokens of a prompt have that of generated ones
BATCH = 64  # prompts that `complete` runs at once
_UNBOUNDED = 2**31 - 1


def load(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    activations: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a checkpoint folder of mlx-lm's layout, dense or quantized, and capture its decode step.

    The model is mlx-lm's own dense code for config.json's model_type, given the packed weights; no weight is
    in memory twice, or dense. `adapter` is a LoRA or DoRA folder as mlx-lm or PEFT writes it; `activations`
    is that of `qg.optimize`: "int8" is faster on a CPU, and less exact. `progress(bytes_done, bytes_total)`
    is called as the weights arrive. The tokenizer is read when text is first needed. Needs mlx-lm
    (``pip install "qgraph[lm]"``).

    Errors: CheckpointError for a folder that is missing, malformed, or not a model of the known types,
    and for an adapter of another model; QGraphError without mlx-lm, and for "int8" without native kernels.

    Example::

        lm = qg.lm.load("Qwen3-0.6B-4bit")
        for piece in lm.generate("Why is the sky blue?", max_tokens=100, chat=True):
            print(piece.text, end="", flush=True)
        mlx_lm.generate(lm.model, lm.tokenizer, "Why is the sky blue?")  # the same model in mlx-lm's hands
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{clip(folder.name or folder, 60)}: no such folder",
            fix="pass the folder of a model, with config.json, model.safetensors and a tokenizer",
        )
    config = cast("dict[str, Any]", _spelt_out(load_config(folder)))
    dense = with_dense_layers(build(config))
    weights = read_weights(folder, config, dense, progress)
    found = None if adapter is None else load_adapter(adapter)
    name = clip(folder.name, 60)
    tokenizer = lambda: load_tokenizer(folder, config)  # noqa: E731
    model = LanguageModel(dense, config, weights, tokenizer, name, found, activations)
    model.check()
    return model


class LanguageModel:
    """A model that generates text; made by `qg.lm.load`.

    Attributes:
        model: What `qg.optimize` made of mlx-lm's model: called as ``model(tokens, cache=cache)`` it returns
            the logits of all positions, and it can be given to everything in mlx-lm that takes a model.
        config: The config.json.
        adapter: The adapter that is computed beside the weights, or None.
    """

    def __init__(
        self,
        dense: Any,
        config: Mapping[str, Any],
        weights: Weights,
        tokenizer: Callable[[], Tokenizer],
        name: str = "model",
        adapter: Adapter | None = None,
        activations: str = "",
    ) -> None:
        self.config = config
        self.name = name
        self.adapter = adapter
        self._activations = activations
        self._weights = weights
        self._make_tokenizer = tokenizer
        self._dense = dense  # holds placeholders, and stays as it is
        module = copy_of(dense)
        base = slots(module)
        self._adapted = {} if adapter is None else adapt(module, adapter)
        for path, place in base.items():
            if path not in self._adapted:
                place.fill(weights[path])
        self.model: Any = optimize(module, activations=activations)
        self._vocabulary = _number(config, "vocab_size") or _UNBOUNDED
        self._context = _number(config, "max_position_embeddings") or _UNBOUNDED

    def with_adapter(self, path: str | os.PathLike[str]) -> LanguageModel:
        """The same weights with another adapter (or the first) beside them, computed in the same graph.

        Errors: CheckpointError for an adapter that is malformed or made for another model.
        """
        found = load_adapter(path)
        tokenizer = lambda: self.tokenizer  # noqa: E731
        given = self._dense, self.config, self._weights, tokenizer, self.name
        adapted = LanguageModel(*given, found, self._activations)
        adapted.check()
        return adapted

    def swap_adapter(self, path: str | os.PathLike[str]) -> None:
        """Put another adapter for the same layers in the place of this one: no program is made anew.

        Shape: its tensors have the names and shapes of those that are there; its scale may be another one.
        Errors: CheckpointError for one that is malformed or does not fit; then nothing is changed.
        """
        found = load_adapter(path)
        same = self.adapter is not None and (found.kind, set(found.tensors)) == (
            self.adapter.kind,
            set(self.adapter.tensors),
        )
        if not same:
            has = "none" if self.adapter is None else "another kind, or one for other layers"
            raise CheckpointError(
                f"{self.name}: the adapter cannot take the place of the one that is there: {has}",
                fix="make a model with with_adapter",
            )
        fill(self._adapted, found)
        self.adapter = found

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
        room = self._context - len(tokens)
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
        tokens, cache = self._example(length)
        return self.model.qgraph.result(tokens, cache=cache)

    def graph(self, length: int = 1) -> Graph:
        """The graph of a step as captured, before any pass."""
        return self.result(length).before

    def optimized(self, length: int = 1) -> Graph:
        """The graph of a step after all passes."""
        return self.result(length).graph

    def report(self, length: int = 1) -> Report:
        """What every use of a quantized weight became, or why it did not."""
        return self.result(length).report

    def source(self, length: int = 1) -> str:
        """The Python source that runs for a step."""
        tokens, cache = self._example(length)
        return self.model.qgraph.source(tokens, cache=cache)

    def check(self) -> None:
        """Capture a decode step, so that errors come before the first token.

        Errors: CheckpointError where mlx-lm's code fails on what config.json says; TraceError for code that
        cannot be captured.
        """
        try:
            self.graph()
        except QGraphError:
            raise
        except Exception as error:  # any code of mlx-lm's, on numbers that may be any
            why = clip(f"{type(error).__name__}: {error}", 150)
            raise CheckpointError(
                f"{self.name}: the model that config.json describes does not run ({why})",
                fix="use the config.json that belongs to the weights",
            ) from error

    def _check_request(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        ids = check_tokens(tokens, self._vocabulary, self._context)
        if max_tokens < 1:
            raise QGraphError(f"max_tokens is {max_tokens}", fix="generate at least one token")
        return ids

    def _cache(self) -> list[Any]:
        return import_module("mlx_lm.models.cache").make_prompt_cache(self.model)

    def _example(self, length: int) -> tuple[mx.array, list[Any]]:
        """Tokens, and a cache that has one already; nothing is evaluated."""
        cache = self._cache()
        self.model(mx.zeros((1, 1), ID), cache=cache)
        return mx.zeros((1, length), ID), cache

    def _prefill(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """The logits after a prompt (batch, length), which is in the cache then.

        Up to its last token the logits are never asked for, so the head does not run.
        """
        last = tokens.shape[1] - 1
        for start in range(0, last, PREFILL):
            self.model(tokens[:, start : min(start + PREFILL, last)], cache=cache)
            mx.eval([c.state for c in cache])  # so that one chunk's activations are alive at a time
        return self._run(tokens[:, last:], cache)

    def _run(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return self.model(tokens, cache=cache)[:, -1]

    def _stream(self, prompt: list[int], max_tokens: int, sample: Sampler) -> Iterator[Piece]:
        ends, detokenizer = self.tokenizer.eos_token_ids, self.tokenizer.detokenizer
        stats = Stats(prompt_tokens=len(prompt))
        start = perf_counter()
        cache = self._cache()
        logits = self._prefill(mx.array([prompt], ID), cache)
        current = sample(logits)
        for n in range(max_tokens):
            mx.async_eval(current)
            following = None
            if n + 1 < max_tokens:  # queued before this token is read, so that the device never waits
                logits = self._run(current[:, None], cache)
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
        max_tokens = min(max_tokens, self._context - length)
        found: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(batch))
        cache = self._cache()
        logits = self._prefill(mx.array(prompts, ID), cache)
        for n in range(max_tokens):
            current = greedy(logits)
            ids: list[int] = current.tolist()
            for row in tuple(open_rows):
                refuse_no_token(ids[row], n, places[row])
                if ids[row] in ends:
                    open_rows.discard(row)
                else:
                    found[row].append(ids[row])
            if not open_rows or n + 1 == max_tokens:
                break
            logits = self._run(current[:, None], cache)
        return found


def _spelt_out(value: object) -> object:
    """A config with its infinities and NaNs as numbers: transformers writes ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_spelt_out(x) for x in cast("list[object]", value)]
    if not isinstance(value, dict):
        return value
    found = cast("dict[str, object]", value)
    if found.keys() == {"__float__"} and found["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(str(found["__float__"]))
    return {key: _spelt_out(x) for key, x in found.items()}


def _number(config: Mapping[str, Any], name: str) -> int | None:
    """A number of a config, or of the part that is about text."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        found = part.get(name) if isinstance(part, Mapping) else None  # pyright: ignore[reportUnknownVariableType]
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return None


def _count(stats: Stats, tokens: int, start: float) -> None:
    now = perf_counter() - start
    if tokens == 1:
        stats.prompt_seconds = now
    stats.generated_tokens = tokens
    stats.generation_seconds = now - stats.prompt_seconds
    stats.peak_bytes = mx.get_peak_memory()

"""Text to token ids and back: mlx-lm's tokenizers, loaded only when they are needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

from qgraph._errors import CheckpointError, QGraphError
from qgraph.quant.strict_file import clip, open_regular, read_json

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tokenizer_config.json")
_READ = (".json", ".jinja", ".model", ".txt", ".vocab", ".tiktoken")
Tokenizer = Any  # mlx_lm.tokenizer_utils.TokenizerWrapper


def load_tokenizer(folder: Path, config: Mapping[str, object]) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with its end-of-text ids.

    Errors: QGraphError without mlx-lm; CheckpointError for a folder without a readable tokenizer.
    """
    try:
        from mlx_lm.tokenizer_utils import load as load_from  # pyright: ignore[reportUnknownVariableType]
    except ImportError as error:
        raise QGraphError(
            f"text needs mlx-lm's tokenizers, which are not installed ({error})",
            fix='pip install "qgraph[lm]"',
        ) from error
    # Without files transformers makes up an empty tokenizer from config.json.
    if not any(path for pattern in _FILES for path in folder.glob(pattern)):
        raise _unusable(folder, "there are no tokenizer files")
    _check_files(folder)
    try:
        # Code that a folder brings along is never run, and nobody is asked whether it may.
        options = {"trust_remote_code": False}
        return load_from(folder, options, eos_token_ids=_end_ids(folder, config))
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise _unusable(folder, clip(str(error).partition("\n")[0], 120)) from None


def _check_files(folder: Path) -> None:
    """What transformers opens must be a regular file: it would wait for a pipe for ever."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and os.path.lexists(path) and not path.is_dir():
            with open_regular(path):
                pass


def _unusable(folder: Path, cause: str) -> CheckpointError:
    return CheckpointError(
        f"{clip(folder.name, 60)}: no usable tokenizer: {cause}",
        fix="copy tokenizer.json and tokenizer_config.json of the original model into the folder",
    )


def _end_ids(folder: Path, config: Mapping[str, object]) -> list[int] | None:
    """Ids that end a text, as mlx-lm finds them: generation_config.json goes before config.json."""
    found = config.get("eos_token_id")
    path = folder / "generation_config.json"
    if os.path.lexists(path):
        found = read_json(path, constants=True).get("eos_token_id") or found
    ids: list[object] = list(found) if isinstance(found, list) else [found]  # pyright: ignore[reportUnknownArgumentType]
    if any(type(i) is not int for i in ids):
        return None
    return [i for i in ids if isinstance(i, int)]


def encode(tokenizer: Tokenizer, prompt: str, *, chat: bool = False) -> list[int]:
    """The token ids of a prompt; with `chat`, in the model's chat template if it has one.

    Errors: CheckpointError for a template that fails.
    """
    if chat and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        try:
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        except Exception as error:  # the template is a program of the checkpoint, and may raise anything
            raise CheckpointError(
                f"the chat template cannot be used: {clip(str(error).partition(chr(10))[0], 120)}",
                fix="correct chat_template in tokenizer_config.json, or generate without it (--raw)",
            ) from None
    # As mlx-lm: a prompt that starts with the begin token is not given another.
    begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(prompt, add_special_tokens=not begins))


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of generated ids, as it would have streamed."""
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


def check_tokens(tokens: Sequence[object], vocab: int, context: int) -> list[int]:
    """The tokens as ints.

    Errors: QGraphError for no tokens, what is no id, ids outside the vocabulary, or more than the model
    can hold.

    >>> check_tokens([1, 99], vocab=96, context=256)
    Traceback (most recent call last):
        ...
    qgraph._errors.QGraphError: token 1 of the prompt has the id 99, outside the model's vocabulary of 96
      fix: use the tokenizer that belongs to the model
    """
    ids = [_id(i, token) for i, token in enumerate(tokens)]
    if not ids:
        raise QGraphError("the prompt is empty: it has no tokens", fix="pass at least one character")
    bad = next((i for i, t in enumerate(ids) if not 0 <= t < vocab), None)
    if bad is not None:
        raise QGraphError(
            f"token {bad} of the prompt has the id {ids[bad]}, outside the model's vocabulary of {vocab}",
            fix="use the tokenizer that belongs to the model",
        )
    if len(ids) >= context:
        raise QGraphError(
            f"the prompt has {len(ids)} tokens, the model holds {context} with the answer",
            fix="shorten the prompt",
        )
    return ids


def _id(position: int, token: object) -> int:
    if isinstance(token, SupportsIndex) and not isinstance(token, bool):
        try:
            return index(token)
        except TypeError:  # an array of another dtype, or of several elements
            pass
    raise QGraphError(
        f"token {position} of the prompt is {clip(repr(token), 40)}, not an id", fix="pass a list of ints"
    )

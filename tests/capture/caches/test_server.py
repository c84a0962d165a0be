"""mlx-lm's HTTP server, unchanged, with an optimized model: the same answers, alone and in batches."""

from __future__ import annotations

import argparse
import http.client
import json
import threading
from http.server import ThreadingHTTPServer

import mlx_lm.server
import pytest

import qgraph as qg
from tests.lm.peer import write

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def arguments(folder, **changes):
    """What the command line of mlx_lm.server gives."""
    settings = {
        "model": str(folder),
        "adapter_path": None,
        "draft_model": None,
        "num_draft_tokens": 3,
        "trust_remote_code": False,
        "chat_template": CHAT,
        "use_default_chat_template": False,
        "temp": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 24,
        "chat_template_args": {},
        "decode_concurrency": 4,
        "prompt_concurrency": 2,
        "prefill_step_size": 16,
        "prompt_cache_size": 4,
        "prompt_cache_bytes": None,
        "allowed_origins": ["*"],
        "pipeline": False,
        "kv_bits": None,
        "kv_group_size": 32,
        "quantized_kv_start": 0,
    }
    return argparse.Namespace(**{**settings, **changes})


class Optimized(mlx_lm.server.ModelProvider):
    """The whole of what a server with qgraph needs."""

    def load(self, *args, **kwargs):
        model, tokenizer = super().load(*args, **kwargs)
        if not hasattr(model, "qgraph"):
            self.model = model = qg.optimize(model)
        return model, tokenizer


class Server:
    """A server on a free port of this machine, in threads."""

    def __init__(self, provider):
        cache = mlx_lm.server.LRUPromptCache(provider.cli_args.prompt_cache_size)
        self.provider = provider
        self.generator = mlx_lm.server.ResponseGenerator(provider, cache)
        self.http = ThreadingHTTPServer(
            ("127.0.0.1", 0),
            lambda *args, **kwargs: mlx_lm.server.APIHandler(self.generator, *args, **kwargs),
        )
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
        self.generator.stop_and_join()

    def ask(self, path, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.http.server_port, timeout=60)
        body = {"model": "default_model", "temperature": 0.0, "max_tokens": 24, **body}
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert answer.status == 200, text
        return text

    def complete(self, prompt, **body):
        return json.loads(self.ask("/v1/completions", prompt=prompt, **body))["choices"][0]["text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served") / "model", quantization={"bits": 4})


def conversation(server):
    """Requests one by one, with a cache of the prompt; then at once, in a batch; then a chat, streamed."""
    alone = [server.complete("The sky is"), server.complete("The sky is blue"), server.complete("The sky is")]
    together: dict = {}
    prompts = ["One", "Two and three", "Four, five and six", "Seven"]

    def ask(prompt):
        together[prompt] = server.complete(prompt)

    threads = [threading.Thread(target=ask, args=(p,)) for p in prompts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    chat = server.ask(
        "/v1/chat/completions", messages=[{"role": "user", "content": "Hello there"}], stream=True
    )
    streamed = [json.loads(line[6:]) for line in chat.splitlines() if line.startswith("data: {")]
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed if c["choices"])
    return alone, [together[p] for p in prompts], said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batched", "one by one"])
def test_the_server_answers_as_with_the_plain_model(folder, mode):
    # With a quantized cache mlx-lm serves one request after the other.
    changes = {} if mode == "batched" else {"kv_bits": 8}
    with Server(mlx_lm.server.ModelProvider(arguments(folder, **changes))) as plain:
        expected = conversation(plain)
    with Server(Optimized(arguments(folder, **changes))) as fast:
        found = conversation(fast)
        info = fast.provider.model.qgraph.cache_info()
    assert found == expected
    assert all(len(set(text)) > 4 for text in expected[0])
    assert info.hits > 3 * info.misses

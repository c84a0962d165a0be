"""The checklist of a jit's correctness, items 28 and 29: a fork is refused, a Ctrl-C leaves all usable."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ops.dispatch import active
from tests.jit.scripts import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")


# 28. Forks.

FORK = """
import os, sys, threading, time
import mlx.core as mx, qgraph as qg

w = qg.quantize(mx.ones((32, 64)))
f = qg.jit(lambda x, w: qg.silu(x @ w.T))
mx.eval(f(mx.ones((1, 64)), w))
sys.stdout.flush()

busy = threading.Event()
if "compiling" in sys.argv:
    def slow(x):
        for _ in range(5000):
            busy.set()
            x = qg.exp(x)
        return x
    g = qg.jit(slow)
    thread = threading.Thread(target=lambda: g(mx.ones(2)), daemon=True)
    thread.start()
    busy.wait()
else:
    g = f
    thread = None

child = os.fork()
if child == 0:
    for name, call in {
        "a cached call": lambda: f(mx.ones((1, 64)), w),
        "a new signature": lambda: f(mx.ones((2, 64)), w),
        "another function": lambda: qg.jit(lambda x: x + 1)(mx.ones(2)),
        "while compiling": lambda: g(mx.ones((1, 64)), w) if g is f else g(mx.ones(2)),
        "source": lambda: f.source(mx.ones((1, 64)), w),
        "eager": lambda: qg.dot(mx.ones((1, 64)), w.T),
        "eager elementwise": lambda: qg.exp(mx.ones(2)),
        "f.eager": lambda: f.eager(mx.ones((1, 64)), w),
    }.items():
        try:
            call()
            print(name, "RETURNED")
        except qg.QGraphError as error:
            print(name, "|", str(error).replace(chr(10), " | "))
    for h in (f, g):  # locks that another thread held are free
        h.cache_info()
        h.clear_cache()
    print("child done", flush=True)
    os._exit(0)
deadline = time.monotonic() + 60
while os.waitpid(child, os.WNOHANG) == (0, 0):
    if time.monotonic() > deadline:
        os.kill(child, 9)
        print("THE CHILD HANGS")
        break
    time.sleep(0.01)
if thread:
    thread.join(60)
print("parent", f(mx.ones((1, 64)), w).shape, qg.exp(mx.zeros(1)).item())
"""


@pytest.mark.parametrize("when", ["idle", "compiling"])
def test_j28_after_a_fork_every_call_is_refused_and_none_hangs(when: str) -> None:
    lines = run(FORK, when).splitlines()
    assert lines[-2:] == ["child done", "parent (1, 32) 1.0"]
    assert len(lines) == 10
    for line in lines[:-2]:
        assert "called after fork(): MLX does not survive it" in line
        assert "spawn" in line
        assert "forkserver" in line


SPAWN = """
import multiprocessing, sys
import mlx.core as mx, qgraph as qg
from tests.jit.spawned import work

if __name__ == "__main__":
    mx.eval(qg.jit(lambda x: x + 1)(mx.ones(2)))
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.apply(work, (3,)))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_j28_what_the_fix_says_works(method: str) -> None:
    assert run(SPAWN, method).split() == ["6.0"]


# 29. Ctrl-C.

SIGNALS = """
import random, signal, sys, warnings
import mlx.core as mx, qgraph as qg
from qgraph.ops.dispatch import active

warnings.simplefilter("ignore", qg.RecompileWarning)
random.seed(int(sys.argv[1]))
w = qg.quantize(mx.random.normal((32, 64), key=mx.random.key(0)))
x = {n: mx.random.normal((n, 64), key=mx.random.key(n)) for n in range(1, 6)}
mx.eval(w.components(), x)

def body(x, w):
    for _ in range(8):
        x = qg.tanh(qg.silu(x @ w.T) @ w + x * 0.5)
    return x

expected = {n: qg.jit(body)(v, w).tolist() for n, v in x.items()}
f = qg.jit(maxsize=3)(body)
caught = mixed = 0

armed = False

def ring(*_):
    if armed:  # again, if Python drops one: those raised in a destructor are
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, ring)
for i in range(40):
    entries = dict(f._cache._entries)
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 0.01))
        while True:
            n = random.randint(1, 5)
            if i % 3 == 0:
                f.clear_cache()
            if i % 3 == 1:
                f.eager(x[n], w)
            y = f(x[n], w)
            if i % 2:
                mx.eval(y)
    except KeyboardInterrupt as error:
        armed = False
        caught += 1
        mixed += active() is not None  # while the traceback is alive
        n = random.randint(1, 5)
        assert f(x[n], w).tolist() == expected[n], (i, n)
    assert active() is None
    assert f._making.acquire(blocking=False)
    f._making.release()
    assert not f._pending
    import gc
    assert gc.isenabled()
    for n, v in x.items():
        assert f(v, w).tolist() == expected[n], (i, n)
    info = f.cache_info()
    assert info.currsize == len(f._cache._entries) <= 3
print(caught, mixed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_j29_signals_in_traces_compiles_and_loops_of_calls(seed: str) -> None:
    assert run(SIGNALS, seed, patience=300).split() == ["40", "0"]


REAL = """
import faulthandler, os, signal, sys, threading, time
import mlx.core as mx, qgraph as qg

faulthandler.dump_traceback_later(90, exit=True)  # a hang says where
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
f = qg.jit(lambda x, w: qg.silu(x @ w.T))
w = qg.quantize(mx.ones((32, 64)))
x = mx.ones((2, 64))
expected = f(x, w).tolist()

def press():  # again after a while: Python drops an interrupt that falls into a finalizer
    for wait in (0.5, 10, 10, 10):
        time.sleep(wait)
        os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=press, daemon=True).start()
calls = 0
try:
    while True:
        mx.eval(f(x, w))
        calls += 1
except KeyboardInterrupt:
    print("interrupted", calls > 0)
info = f.cache_info()
assert f(x, w).tolist() == expected
assert f.cache_info() == (info.hits + 1, 1, 256, 1)
print("usable")
"""


def test_j29_a_real_ctrl_c_in_a_loop_of_calls() -> None:
    assert run(REAL).split() == ["interrupted", "True", "usable"]


class Interrupt:
    """Raises KeyboardInterrupt at the n-th call of qgraph's own code (or of contextlib)."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.fired = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not any(part in file for part in ("/qgraph/", "/qgraph_passes/", "contextlib")):
            return None
        if event == "call" and not self.fired:  # Python looks for signals at calls, not between lines
            self.left -= 1
            if self.left < 0:
                self.fired = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.slow
@pytest.mark.skipif(sys.gettrace() is not None, reason="another tool traces")
def test_j29_an_interrupt_at_points_all_over_a_compile() -> None:
    """Every one of the first 300 calls of the compile, and then some."""
    w = qg.quantize(mx.ones((32, 64)))
    x = mx.ones((2, 64))
    expected = qg.jit(lambda x, w: qg.silu(x @ w.T) + 1.0)(x, w).tolist()
    n, last, fired = 0, 0, 0
    while True:
        f = qg.jit(lambda x, w: qg.silu(x @ w.T) + 1.0)
        interrupt = Interrupt(n)
        try:
            sys.settrace(interrupt)
            f(x, w)
        except KeyboardInterrupt:
            fired += 1
            assert active() is None, n
            assert f(x, w).tolist() == expected, n  # while the traceback is alive
        finally:
            sys.settrace(None)
        if not interrupt.fired:
            break
        last = n
        info = f.cache_info()
        assert (info.misses, info.currsize) == (1, 1), n
        assert not f._pending
        assert f._making.acquire(blocking=False)
        f._making.release()
        n += 1 if n < 300 else 29
    assert last > 300
    assert fired > 300


GENERATE = """
import random, signal, sys
import qgraph as qg

model = qg.lm.load(sys.argv[1])
expected = [piece.token for piece in model.generate([1, 2, 3], max_tokens=12)]

armed = False

def ring(*_):
    if armed:  # again, if Python drops one: those raised in a destructor are
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, ring)
random.seed(0)
caught = 0
for i in range(25):
    found = []
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 0.03))
        while True:
            found = []
            for piece in model.generate([1, 2, 3], max_tokens=12):
                found.append(piece.token)
    except KeyboardInterrupt:
        armed = False
        caught += 1
    assert found == expected[: len(found)], i
    assert [piece.token for piece in model.generate([1, 2, 3], max_tokens=12)] == expected, i
signal.setitimer(signal.ITIMER_REAL, 0)  # one may be left, and Python no longer catches it while it ends
print(caught)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peer = pytest.importorskip("tests.lm.peer")
    return peer.write(tmp_path_factory.mktemp("model") / "m", quantization={"bits": 4})


def test_j29_an_interrupt_between_tokens_leaves_the_model_usable(folder: Path) -> None:
    model = qg.lm.load(folder)
    expected = [piece.token for piece in model.generate([1, 2, 3], max_tokens=8)]
    for stop in range(1, 8):
        found: list[int] = []

        def interrupted(stop: int = stop, found: list[int] = found) -> None:
            for piece in model.generate([1, 2, 3], max_tokens=8):
                found.append(piece.token)
                if len(found) == stop:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert found == expected[:stop]
        assert [piece.token for piece in model.generate([1, 2, 3], max_tokens=8)] == expected


def test_j29_signals_while_text_is_generated(folder: Path) -> None:
    assert run(GENERATE, str(folder)).split() == ["25"]

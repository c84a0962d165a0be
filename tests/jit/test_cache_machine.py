"""The cache against a model of it: any sequence of calls, changes outside and clearings, with few entries."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import qgraph as qg
from tests.agree import close
from tests.jit.data import normal, weight

ROWS = st.integers(0, 3)
DTYPES = {"f32": mx.float32, "f16": mx.float16, "i32": mx.int32}
STATICS = [1, 1.0, True, 0.0, -0.0, float("nan"), None, "double", (1, "a"), -1, -2]
PACKED = {
    "dense": lambda: normal(64, 64),
    "affine4": lambda: weight(shape=(64, 64)),
    "affine8g32": lambda: weight(shape=(64, 64), bits=8, group_size=32),
    "mxfp4": lambda: weight(shape=(64, 64), mode="mxfp4"),
}
STRUCTURES = {
    "tuple": lambda x, w: (x, w),
    "list": lambda x, w: [x, w],
    "nested": lambda x, w: [[x], w],
    "nested otherwise": lambda x, w: [[x, w]],
    "dict": lambda x, w: {"x": x, "w": w},
    "dict in another order": lambda x, w: {"w": w, "x": x},
    "dict of -1": lambda x, w: {-1: x, "w": w},
    "dict of -2": lambda x, w: {-2: x, "w": w},
}


def parts(tree: Any) -> tuple[Any, Any]:
    if isinstance(tree, dict):
        return next(v for k, v in tree.items() if k != "w"), tree["w"]
    if len(tree) == 1:
        return tree[0][0], tree[0][1]
    return (tree[0][0] if isinstance(tree[0], list) else tree[0]), tree[1]


def scaled(y: Any, static: Any) -> Any:
    if isinstance(static, (bool, int, float)):
        return y * float(static)
    return y * 2 if static == "double" else y


class CacheMachine(RuleBasedStateMachine):
    @initialize(maxsize=st.integers(1, 4))
    def start(self, maxsize: int) -> None:
        self.model: OrderedDict[Any, None] = OrderedDict()
        self.hits = self.misses = self.traces = 0
        self.maxsize = maxsize
        self.called: list[Any] = []
        traced: list[int] = []
        state = {"shift": 0.5, "row": normal(64, seed=1)}
        local = 1.5

        def change(value: float) -> None:
            nonlocal local
            local = value

        def body(tree: Any, static: Any = None, *, flag: bool = False) -> Any:
            traced.append(1)
            x, w = parts(tree)
            y = scaled((x.astype(mx.float32) @ w.T).astype(mx.float32), static) + qg.multiply(
                state["row"], state["shift"]
            )
            return {"y": y * local, "kind": type(tree).__name__} if flag else (y * local, x)

        self.traced, self.outside, self.change = traced, state, change
        self.body = body
        self.local = 1.5
        self.f = qg.jit(maxsize=maxsize)(body)
        self.f.warns = False

    def look_up(self, key: Any) -> None:
        if key in self.model:
            self.hits += 1
            self.model.move_to_end(key)
            return
        self.misses += 1
        self.traces += 1
        self.model[key] = None
        if len(self.model) > self.maxsize:
            self.model.popitem(last=False)

    @rule(
        rows=ROWS,
        dtype=st.sampled_from(sorted(DTYPES)),
        packed=st.sampled_from(sorted(PACKED)),
        flag=st.booleans(),
        structure=st.sampled_from(sorted(STRUCTURES)),
        static=st.sampled_from(range(len(STATICS))),
        seed=st.integers(0, 3),
    )
    def call(
        self, rows: int, dtype: str, packed: str, flag: bool, structure: str, static: int, seed: int
    ) -> None:
        self.called = [*self.called[-4:], (rows, dtype, packed, flag, structure, static, seed)]
        x = (normal(rows, 64, seed=seed) * 4).astype(DTYPES[dtype])
        w, value = PACKED[packed](), STATICS[static]
        found = self.f(STRUCTURES[structure](x, w), value, flag=flag)
        self.look_up((rows, dtype, packed, flag, structure, static, self.outside["shift"], self.local))
        dense = (qg.dequantize(w) if qg.is_quantized(w) else w).astype(mx.float32)
        plain = scaled(x.astype(mx.float32) @ dense.T, value) + self.outside["shift"] * self.outside["row"]
        y = found["y"] if flag else found[0]
        assert close(y, np.array(plain * self.local), k=64)
        if flag:
            assert found["kind"] == type(STRUCTURES[structure](x, w)).__name__
        else:
            assert found[1].dtype == x.dtype

    @rule(back=st.integers(0, 4))
    def call_again(self, back: int) -> None:
        if self.called:
            self.call(*self.called[-1 - back % len(self.called)])

    @rule(rows=st.lists(st.integers(1, 5), min_size=4, max_size=12))
    def call_a_few_in_turn(self, rows: list[int]) -> None:
        """Enough repetitions to tell which entry is dropped."""
        for n in rows:
            self.call(n, "f32", "affine4", False, "tuple", 0, n % 4)

    @rule(value=st.sampled_from([0.5, -1.0, 2.0]))
    def change_a_number_in_a_container(self, value: float) -> None:
        self.outside["shift"] = value

    @rule(value=st.sampled_from([1.5, 3.0]))
    def change_a_closure_cell(self, value: float) -> None:
        self.local = value
        self.change(value)

    @rule(seed=st.integers(0, 5))
    def rebind_an_array_outside(self, seed: int) -> None:
        self.outside["row"] = normal(64, seed=seed)

    @rule(seed=st.integers(0, 5))
    def write_into_an_array_outside(self, seed: int) -> None:
        self.outside["row"][:] = normal(64, seed=seed)

    @rule()
    def clear(self) -> None:
        self.f.clear_cache()
        self.model.clear()
        self.hits = self.misses = 0

    @rule()
    def look_at_a_program(self) -> None:
        args = ((mx.ones((1, 64)), normal(64, 64)),)
        self.look_up(
            (1, "f32", "dense", False, "tuple", STATICS.index(None), self.outside["shift"], self.local)
        )
        assert "def program(" in self.f.source(*args)

    @invariant()
    def counts_are_the_models(self) -> None:
        assert self.f.cache_info() == (self.hits, self.misses, self.maxsize, len(self.model))
        assert len(self.traced) == self.traces


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=15, stateful_step_count=25)

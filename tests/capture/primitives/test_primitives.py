"""Every primitive of the table, as MLX emits it: the replay of what was captured is what MLX computes."""

from __future__ import annotations

import pytest
from hypothesis import given

from qgraph.capture.primitives import MEANINGS
from tests.capture.primitives import cases_indexing, cases_products  # noqa: F401  (they add their cases)
from tests.capture.primitives.cases import CASES
from tests.capture.primitives.replay import check, names

# What this MLX has no exporter for on a CPU, or never reports: see test_by_hand.
BY_HAND = {
    *("BroadcastAxes", "Contiguous", "Copy", "NumberOfElements", "StopGradient"),
    *("LayerNorm", "RMSNorm", "RoPE", "ScaledDotProductAttention"),
}


def test_every_meaning_is_tested():
    assert set(CASES) | BY_HAND == set(MEANINGS)
    assert not set(CASES) & BY_HAND


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_replay_is_what_mlx_computes(name):
    seen: set[str] = set()

    @given(CASES[name])
    def body(case):
        seen.update(names(case.function, case.arrays))
        check(case)

    body()
    assert name in seen, "no case emits it"

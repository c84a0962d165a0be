"""Random sequences of calls on every kind of cache, a few of them; `sequences.py` runs any number."""

import pytest

from tests.capture.caches.sequences import NAMES, run


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(NAMES)), ids=NAMES)
def test_a_random_sequence_of_calls_gives_the_logits_of_mlx_lms_caches(case):
    assert not run(case)

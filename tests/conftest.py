"""Hypothesis profiles: the same examples everywhere; HYPOTHESIS_PROFILE=explore draws new ones.

"faults" is for runs with a seeded fault: they need a failure, not the smallest one.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=QUIET)
settings.register_profile("explore", deadline=None, max_examples=500, suppress_health_check=QUIET)
settings.register_profile("faults", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="class")  # of a function outside a class: for it alone, and Hypothesis may use it
def mlx_alone():
    """Without the native CPU kernels: for what is about MLX's own ops, and equal to them bit by bit.

    What was compiled before with them keeps them: jit functions of a module are shared by its tests.
    """
    from qgraph import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        yield

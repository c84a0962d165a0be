"""How much room a cache gets, and how much of it attention reads: few sizes, for few programs."""

from __future__ import annotations

STEP = 256  # positions by which mlx-lm's own caches grow
LEAST = 64


def window(n: int) -> int:
    """The positions that attention reads where `n` are filled: at most a quarter more above 512.

    >>> [window(n) for n in (1, 65, 200, 300, 600, 1025, 5000)]
    [64, 128, 256, 512, 768, 1280, 5120]
    """
    power = 1 << max(n - 1, 1).bit_length()  # the power of two that holds n
    if power <= 2 * STEP:
        return max(power, LEAST)
    step = max(STEP, power // 8)
    return -(-n // step) * step


def capacity(n: int) -> int:
    """The positions that a buffer has where `n` are filled.

    >>> [capacity(n) for n in (1, 257, 600, 5000)]
    [256, 512, 768, 5120]
    """
    return max(STEP, window(n))

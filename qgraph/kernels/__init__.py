"""Native kernels for CPUs: MLX primitives in C++, compiled on the user's machine at their first use.

The source lies in ``source/``. `library` gives the compiled module, or None where there is none. How it gets
there: ``toolchain`` says what the machine has, ``build`` compiles, ``selftest`` tries the result in a process
of its own, ``store`` keeps it in the user's cache, ``maker`` does these in order,
``finder`` decides, and ``process`` holds what it found.

Variables of the environment:

- ``QGRAPH_KERNELS``: ``auto`` (the default), ``off``, or the path of a built module.
- ``QGRAPH_ISA``: the instruction set, instead of the best that the CPU has; ``all`` compiles every one.
- ``QGRAPH_THREADS``: how many threads a kernel uses at most, instead of one for each core.
- ``QGRAPH_CACHE``: the folder for what is compiled, instead of ``~/.cache/qgraph``.
- ``CXX``: the compiler.
"""

from qgraph.kernels.process import library, prepare, status
from qgraph.kernels.state import Status

__all__ = ["Status", "library", "prepare", "status"]

"""What a seeded fault is: a wrong line in the place of a right one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Replace `right`, which stands once in `module`, by `wrong`.

    `kernels` is QGRAPH_KERNELS then: most faults are about what runs without the native ones.
    """

    name: str
    module: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    kernels: str = "off"

    def applied_to(self, source: str) -> str:
        """The source with the fault. AssertionError unless its place is there, once."""
        assert source.count(self.right) == 1, f"{self.name}: {self.right!r} × {source.count(self.right)}"
        return source.replace(self.right, self.wrong)

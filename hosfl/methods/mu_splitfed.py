"""MU-SplitFed: unbalanced updates, one of the client half for several of the server half, all by zeroth order.

Per client and round: what `zo_both` sends. The server takes local_steps steps from the same cuts.
"""

from __future__ import annotations

from typing import ClassVar

from hosfl.methods.method import Way
from hosfl.methods.zo_both import ZOBoth


class MUSplitFed(ZOBoth):
    """`ZOBoth` with tau = local_steps steps of the server per round; see `ZerothOrderServer` for what is assumed."""

    reads: ClassVar[tuple[str, ...]] = (*ZOBoth.reads, "local_steps")
    ways: ClassVar[dict[str, Way]] = {"mu-splitfed": ({}, (0.1, 0.2, 0.4))}

    def steps(self) -> int:
        return self.settings.local_steps

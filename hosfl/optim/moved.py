"""Weights at th + sign * mu * u while a closure is evaluated: moved in place, or read only.

Both classes have `groups`, the weights that move; `at(seed, sign)`, a context in which the closure sees moved weights,
u being the direction of that seed; `restore()`, after which they are at th; and `written`, whether a closure has
written them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from hosfl.interrupts import uninterrupted
from hosfl.optim.groups import Group
from hosfl.probing.displaced import Displacement, displaced
from hosfl_kernels import replay_


@dataclass
class InPlace:
    """Weights that are moved in place. They are at th + sign * mu * u(seed) now, and go anywhere else in one pass."""

    groups: list[Group]
    dist: str
    seed: int = 0
    sign: int = 0
    written: bool = False

    def move(self, seed: int, sign: int, moves: Sequence[tuple[Sequence[int], Sequence[float]]] | None = None) -> None:
        """Move the weights to th + sign * mu * u(seed). moves: per group, seeds and coefficients to add to th too.

        All groups are moved or none, since memory may run out for a later one's copies: see `hosfl_kernels.perturb_`.
        """
        done: list[tuple[Group, dict[int, float]]] = []
        with uninterrupted():
            try:
                for g, group in enumerate(self.groups):
                    records = [(self.seed, -self.sign * group.mu), (seed, sign * group.mu)]
                    records += zip(*moves[g], strict=True) if moves else []
                    # One record per seed: exact on the lattice, and a record alone costs less than half of two.
                    sums: dict[int, float] = {}
                    for key, coefficient in records:
                        if coefficient:
                            sums[key] = sums.get(key, 0.0) + coefficient
                    self._add(group, sums)
                    done.append((group, sums))
            except BaseException:
                for group, sums in done:
                    self._add(group, {key: -coefficient for key, coefficient in sums.items()})
                raise
            self.seed, self.sign = seed, sign

    def _add(self, group: Group, records: dict[int, float]) -> None:
        """Add coefficient * u(seed) for each record."""
        replay_(
            group.tensors,
            list(records),
            list(records.values()),
            dist=self.dist,
            streams=group.numbers,
            starts=group.starts,
        )

    @contextmanager
    def at(self, seed: int, sign: int) -> Iterator[None]:
        """Move the weights to this point. They stay there on exit: the next move starts from it."""
        if sign != self.sign or (sign and seed != self.seed):
            self.move(seed, sign)
        yield

    def restore(self) -> None:
        """Move the weights back to th."""
        if self.sign:
            self.move(0, 0)


class _GroupDisplacement(Displacement):
    """A displacement whose scale is sign * mu, mu being of the parameter's group."""

    def __init__(self, groups: list[Group], seed: int, sign: int, dist: str) -> None:
        tensors = [t for group in groups for t in group.tensors]
        super().__init__(tensors, [n for group in groups for n in group.numbers], seed, sign, dist)
        self.mu = {id(t): group.mu for group in groups for t in group.tensors}

    def _scale_of(self, parameter: Tensor) -> float:
        return self.scale * self.mu[id(parameter)]


@dataclass
class ReadOnly:
    """Weights that are never written: within `at` the module reads moved copies, made one layer at a time."""

    groups: list[Group]
    dist: str
    model: nn.Module
    written: bool = False

    @contextmanager
    def at(self, seed: int, sign: int) -> Iterator[None]:
        """Let the module read moved weights. Raises RuntimeError on exit if it has read none."""
        if not sign:
            yield
            return
        displacement = _GroupDisplacement(self.groups, seed, sign, self.dist)
        with displaced(self.model, displacement):
            yield
        if not displacement.read and any(t.numel() for group in self.groups for t in group.tensors):
            raise RuntimeError(
                "the loss did not depend on the weights that move: the closure read none of them from `model`. It must "
                "evaluate that very module, each time anew, and take parameters from it within the closure (a list of "
                "them made before, another module and outputs that were kept have the weights as they were)"
            )

    def restore(self) -> None:
        """Nothing to do: the weights have not moved."""

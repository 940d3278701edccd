"""Weights at th + sign * mu * u while a closure is evaluated: moved in place, or read only.

Both classes have `groups`, the weights that move; `at(seed, sign)`, a context in which the closure sees moved weights,
u being the direction of that seed, and which raises RuntimeError on exit if their gradients were computed; `restore()`,
after which they are at th; and `written`, whether a closure has written them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from hosfl.interrupts import uninterrupted
from hosfl.optim.groups import Group
from hosfl.probing.displaced import Displacement, displaced
from hosfl_kernels import replay_

CALLS_BACKWARD = (
    "the closure calls backward(), as closures of torch.optim do: leave that and zero_grad() out (in Lightning: set "
    "automatic_optimization = False). It only evaluates the loss and returns it; no graph is recorded"
)


def _gradients(groups: Sequence[Group]) -> list[tuple[Tensor | None, int]]:
    """The gradients of all weights, and the versions of their values."""
    gradients = [p.grad for group in groups for p in group.parameters]
    return [(g, 0 if g is None or g.is_inference() else g._version) for g in gradients]


def _refuse_new_gradients(groups: Sequence[Group], before: list[tuple[Tensor | None, int]]) -> None:
    """Raise RuntimeError if any gradient was computed since `before`. That one was dropped is no harm."""
    for (gradient, version), (old, old_version) in zip(_gradients(groups), before, strict=True):
        if gradient is not None and (gradient is not old or version != old_version):
            raise RuntimeError(CALLS_BACKWARD)


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
        before = _gradients(self.groups)
        yield
        _refuse_new_gradients(self.groups, before)

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

    def has_gradients(self) -> bool:
        """Whether gradients were computed of copies that still exist. The last one that was read does."""
        copies = [copy() for copy in self._existing.values()]
        return any(copy is not None and copy.grad is not None for copy in copies)


@dataclass
class ReadOnly:
    """Weights that are never written: within `at` the module reads moved copies, made one layer at a time.

    unread: the numbers of the weights that were to move, and that the last evaluation did not read.
    """

    groups: list[Group]
    dist: str
    model: nn.Module
    written: bool = False
    unread: list[int] = field(default_factory=list)

    @contextmanager
    def at(self, seed: int, sign: int) -> Iterator[None]:
        """Let the module read moved weights. Raises RuntimeError on exit if it has read none."""
        if not sign:
            before = _gradients(self.groups)
            yield
            _refuse_new_gradients(self.groups, before)
            return
        displacement = _GroupDisplacement(self.groups, seed, sign, self.dist)
        with displaced(self.model, displacement):
            yield
            if displacement.has_gradients():
                raise RuntimeError(CALLS_BACKWARD)
        moved = [(n, t) for group in self.groups for n, t in group.named_tensors() if t.numel()]
        self.unread = [number for number, tensor in moved if id(tensor) not in displacement.read]
        if moved and len(self.unread) == len(moved):
            raise RuntimeError(
                "the loss did not depend on the weights that move: the closure read none of them from `model`. It must "
                "evaluate that very module, each time anew, and take parameters from it within the closure (a list of "
                "them made before, another module and outputs that were kept have the weights as they were)"
            )

    def restore(self) -> None:
        """Nothing to do: the weights have not moved."""

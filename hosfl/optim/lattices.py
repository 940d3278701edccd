"""The lattices of weights that move exactly: which parameter is on which, and when that must change.

A parameter gets a lattice before it first moves, and a coarser one when it outgrows it. Weights that the user has
written are put on their lattice again, or on a finer one if they are much smaller than before. Whatever is put on a
lattice is logged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed

from hosfl.interrupts import uninterrupted
from hosfl.optim.groups import Group, sharded_parameters, versions
from hosfl.optim.log import RunLog
from hosfl.optim.sharded import max_over_processes
from hosfl.protocol.lattice import COARSER, STEPS, Lattice

SAMPLE = 16  # elements per tensor that are checked for writes which torch does not count
PIECE = 1 << 20  # elements whose quotients are in memory at once


class Lattices:
    """The lattices of a run's parameters. Its methods take whole groups, or parts of groups that share a lattice.

    quanta: by the parameter's number, the quantum of its lattice. exact: whether the last step moved all of its
    weights on lattices.
    """

    def __init__(self, quanta: dict[int, float], exact: bool) -> None:
        self.quanta, self.exact = quanta, exact
        self.invalidate()

    def invalidate(self) -> None:
        """Drop what the last step found out about the weights, so that the next one checks them again."""
        self._versions: dict[int, tuple[int, int]] = {}
        self._bounds: dict[int, float] = {}  # upper bounds of max |weight|; computed anew when it matters
        self._sampled = torch.empty(0, dtype=torch.float32, device="cpu")  # for each sampled element, its quantum

    @property
    def finest(self) -> Lattice | None:
        """The finest lattice: 2^-24 before any parameter has one, None where moves round."""
        return Lattice(min(self.quanta.values(), default=2.0**-24)) if self.quanta or self.exact else None

    def leave(self) -> None:
        """Leave all lattices: from now on every move is rounded."""
        self.exact, self.quanta = False, {}

    def place(self, groups: list[Group], log: RunLog, processes: distributed.ProcessGroup | None) -> list[Group]:
        """Put weights that are new or were written on lattices with room for mu. Returns the groups' parts."""
        self.exact = True
        if self._were_written(groups, processes):
            sizes = _sizes(groups, processes)
            lost = self._too_coarse(groups, sizes, processes)
            self.quanta |= self._choose(groups, {n: s for n, s in sizes.items() if n not in self.quanta or n in lost})
            self._bounds = sizes
            self._put(groups, sizes, log)
        self.make_room(groups, [group.mu for group in groups], log, processes)
        return [part for group in groups for part in self.parts(group)]

    def mark_versions(self, groups: list[Group]) -> None:
        """Called at the end of a step: any later write to the weights is the user's."""
        self._versions = versions(groups)

    def parts(self, group: Group) -> list[Group]:
        """The parts of a group that share a lattice, the finest first; mu is the nearest multiple of the quantum."""
        parts = []
        for quantum in sorted({self.quanta[n] for n in group.numbers}):
            part = group.part([i for i, n in enumerate(group.numbers) if self.quanta[n] == quantum])
            most = max(part.numbers, key=lambda n: self._bounds[n])
            _check_mu(part, most, quantum, self._bounds[most])
            parts.append(replace(part, mu=Lattice(quantum).nearest(group.mu)))
        return parts

    def round(self, part: Group, coefficients: Sequence[float], uniforms: Sequence[float]) -> list[float]:
        """Round coefficients to multiples of the part's quantum, stochastically. uniforms: in [0, 1)."""
        lattice = Lattice(self.quanta[part.numbers[0]])
        return [lattice.stochastic(c, u) for c, u in zip(coefficients, uniforms, strict=True)]

    def add_distance(self, part: Group, coefficients: Sequence[float]) -> None:
        """Raise the bounds of a part's weights, which these coefficients have moved."""
        self._bounds |= {n: self._bounds[n] + sum(map(abs, coefficients)) for n in part.numbers}

    def outgrown(self, groups: list[Group], distances: list[float]) -> set[tuple[int, float]]:
        """(parameter group, quantum) of the lattices that might be too small once the groups have moved this far."""
        return {
            (group.index, self.quanta[n])
            for group, distance in zip(groups, distances, strict=True)
            for n in group.numbers
            # Half of the lattice, since putting weights on it may move them, too.
            if self._bounds[n] + distance > STEPS / 2 * self.quanta[n]
        }

    def make_room(
        self, groups: list[Group], distances: list[float], log: RunLog, processes: distributed.ProcessGroup | None
    ) -> None:
        """Put parameters that would outgrow their lattices on coarser ones. The weights must be at th.

        Raises ValueError where a quantum would be above mu.
        """
        if not self.outgrown(groups, distances):
            return
        self._bounds |= _sizes(groups, processes)
        tight = self.outgrown(groups, distances)
        # All that share such a lattice get a new one: others have grown with the one that must leave it.
        needs = {
            n: self._bounds[n] + distance
            for group, distance in zip(groups, distances, strict=True)
            for n in group.numbers
            if (group.index, self.quanta[n]) in tight
        }
        if needs:
            self.quanta |= self._choose(groups, needs)
            self._put(groups, needs, log)

    def _were_written(self, groups: list[Group], processes: distributed.ProcessGroup | None) -> bool:
        """Whether any process has weights that are new, or that the user has written."""
        written = versions(groups) != self._versions
        if not written and groups:
            # New views every time: stored ones would keep the memory of a model that is moved to another device.
            steps = torch.cat([_sample(t) for group in groups for t in group.tensors]) / self._sampled
            written = not bool(((steps == steps.round()) & (steps.abs() <= STEPS / 2)).all())
        return max_over_processes([float(written)], sharded_parameters(groups), processes) != [0.0]

    def _too_coarse(
        self, groups: list[Group], sizes: dict[int, float], processes: distributed.ProcessGroup | None
    ) -> set[int]:
        """The parameters that the user has written so small that their lattice would round off too much of them.

        A resumed run keeps its lattices, however small its weights have become: they are multiples of the quantum.
        """
        coarse = [
            (n, t)
            for group in groups
            for n, t in group.named_tensors()
            if sizes[n] > 0 and self.quanta.get(n, 0.0) > max(sizes[n], group.mu) * 2.0**-15
        ]
        off = [float(_is_off_lattice(t.detach(), self.quanta[n])) for n, t in coarse]
        found = max_over_processes(off, sharded_parameters(groups), processes) if coarse else []
        return {n for (n, _), is_off in zip(coarse, found, strict=True) if is_off}

    def _choose(self, groups: list[Group], sizes: dict[int, float]) -> dict[int, float]:
        """Choose quanta for parameters whose weights reach these sizes, or mu; few different ones per parameter group.

        From the largest parameter down, each joins a lattice that is at most 16 times coarser than its own would be.

        Raises ValueError where a quantum would be above mu.
        """
        chosen: dict[int, float] = {}
        elements: dict[int, Counter[float]] = {group.index: Counter() for group in groups}  # on each lattice
        triples = [(g, n, p) for g in groups for n, p in zip(g.numbers, g.parameters, strict=True)]
        for group, n, p in triples:
            if n in self.quanta and n not in sizes:
                elements[group.index][self.quanta[n]] += p.numel()
        for group, n, p in sorted((t for t in triples if t[1] in sizes), key=lambda triple: -sizes[triple[1]]):
            lattices = elements[group.index]
            own = Lattice.holding(max(sizes[n], group.mu)).quantum
            if own > group.mu:  # less room to grow, then
                own = Lattice.holding(sizes[n], headroom=2.0).quantum
            own = max(own, 2.0**-100)  # far from float32's subnormal numbers
            fitting = [q for q in lattices if own <= q <= COARSER * own]
            if sizes[n] == 0:  # unknown how large it will be: the group's usual lattice, or room for weights below 1/2
                own = max(own, 2.0**-24)
                fitting = [q for q, _ in lattices.most_common(1)]
            chosen[n] = min(fitting, default=own)
            lattices[chosen[n]] += p.numel()
            _check_mu(group, n, chosen[n], sizes[n])
        return chosen

    def _put(self, groups: list[Group], numbers: Container[int], log: RunLog) -> None:
        """Put these parameters on their lattices."""
        pairs = [pair for group in groups for pair in group.named_tensors()]
        with uninterrupted():
            for quantum in sorted({self.quanta[n] for n, _ in pairs if n in numbers}):
                mine = [(n, t) for n, t in pairs if n in numbers and self.quanta[n] == quantum]
                Lattice(quantum).put([t for _, t in mine], [1.0] * len(mine))
                log.put(quantum, [n for n, _ in mine])
                self._bounds |= {n: self._bounds[n] + quantum for n, _ in mine}
        # In the order of numbers, as in `_were_written`, also if these are parts of groups.
        quanta = [self.quanta[n] for n, t in sorted(pairs, key=lambda pair: pair[0]) for _ in range(len(_sample(t)))]
        self._sampled = torch.tensor(quanta, dtype=torch.float32, device=pairs[0][1].device)


def _sizes(groups: list[Group], processes: distributed.ProcessGroup | None) -> dict[int, float]:
    """max |weight| of each parameter, by number, over all processes. Raises ValueError for infinite or NaN weights."""
    named = [(group.name, *pair) for group in groups for pair in group.named_tensors()]
    maxima = [torch.stack(t.detach().aminmax()).abs().amax() if t.numel() else t.new_zeros(()) for _, _, t in named]
    here = torch.stack(maxima).tolist()
    # all_reduce's maximum may lose a NaN.
    finite = [size if math.isfinite(size) else math.inf for size in here]
    sizes = max_over_processes(finite, sharded_parameters(groups), processes)
    for (name, number, _), size in zip(named, sizes, strict=True):
        if math.isinf(size):
            raise ValueError(f"{name(number)} has infinite or NaN weights")
    return {number: size for (_, number, _), size in zip(named, sizes, strict=True)}


def _is_off_lattice(tensor: Tensor, quantum: float) -> bool:
    """Whether an element is not a multiple of the quantum. In pieces, to need no copy of the whole tensor."""
    return any(bool((piece / quantum).frac_().any()) for piece in tensor.reshape(-1).split(PIECE))


def _sample(tensor: Tensor) -> Tensor:
    """A view of `SAMPLE` elements at equal distances, or of all if there are fewer."""
    step = max(1, tensor.numel() // SAMPLE)
    return tensor.as_strided([min(SAMPLE, -(-tensor.numel() // step))], [step])


def _check_mu(group: Group, number: int, quantum: float, size: float) -> None:
    if quantum > group.mu:
        raise ValueError(
            f"{group.name(number)}, with weights of up to {size:.3g}, cannot move by mu={group.mu:g}: float32 "
            f"holds such weights, and room to train them, in steps of {quantum:g}. Raise mu, freeze it, or give it "
            "a group of its own, with an lr of 0 or a larger mu"
        )

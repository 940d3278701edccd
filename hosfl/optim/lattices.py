"""The lattices that weights are on where moves are exact: who is on which, and when that must change.

A lattice is chosen when its parameters are first to move, and a coarser one where they outgrow it. Weights that
somebody else wrote are put on theirs again, or on finer ones, where they are much smaller than those were. The log is
told of everything that is put on a lattice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed

from hosfl.interrupts import uninterrupted
from hosfl.optim.groups import Group, sharded, versions
from hosfl.optim.log import RunLog
from hosfl.optim.sharded import largest
from hosfl.protocol.lattice import COARSER, STEPS, Lattice

SAMPLE = 16  # elements per tensor that are looked at for writes which torch does not count
PIECE = 1 << 20  # elements whose quotients are there at once


class Lattices:
    """Of a run's parameters, by number. Groups that its methods take are whole, or in parts that share a lattice.

    quanta: of the lattices that parameters are on. exact: whether all that moved in the last step was on one.
    """

    def __init__(self, quanta: dict[int, float], exact: bool) -> None:
        self.quanta, self.exact = quanta, exact
        self.forget()

    def forget(self) -> None:
        """What is known of the weights from the last step: the next one looks for itself."""
        self._versions: dict[int, tuple[int, int]] = {}
        self._bounds: dict[int, float] = {}  # upper bounds of max |weight|; made exact when it matters
        self._sampled = torch.empty(0, dtype=torch.float32, device="cpu")  # the quantum of each element of all samples

    @property
    def finest(self) -> Lattice | None:
        """2^-24 before any parameter has one; None where moves round."""
        return Lattice(min(self.quanta.values(), default=2.0**-24)) if self.quanta or self.exact else None

    def drop(self) -> None:
        """Weights are about to move where every move is rounded."""
        self.exact, self.quanta = False, {}

    def settle(self, groups: list[Group], log: RunLog, processes: distributed.ProcessGroup | None) -> list[Group]:
        """Put weights that are new here, or were written, on lattices with room for mu: the groups in parts."""
        self.exact = True
        if self._written(groups, processes):
            sizes = _sizes(groups, processes)
            lost = self._lost(groups, sizes, processes)
            self.quanta |= self._chosen(groups, {n: s for n, s in sizes.items() if n not in self.quanta or n in lost})
            self._bounds = sizes
            self._put(groups, sizes, log)
        self.make_room(groups, [group.mu for group in groups], log, processes)
        return [part for group in groups for part in self.parts(group)]

    def saw(self, groups: list[Group]) -> None:
        """A step leaves the weights so: what is written from now on, somebody else writes."""
        self._versions = versions(groups)

    def parts(self, group: Group) -> list[Group]:
        """The group in parts that share a lattice, the finest first; mu is the nearest multiple of the quantum."""
        parts = []
        for quantum in sorted({self.quanta[n] for n in group.numbers}):
            part = group.part([i for i, n in enumerate(group.numbers) if self.quanta[n] == quantum])
            most = max(part.numbers, key=lambda n: self._bounds[n])
            _check_mu(part, most, quantum, self._bounds[most])
            parts.append(replace(part, mu=Lattice(quantum).nearest(group.mu)))
        return parts

    def rounded(self, part: Group, coefficients: Sequence[float], uniforms: Sequence[float]) -> list[float]:
        """Multiples of its lattice's quantum, right on average over the uniform numbers."""
        lattice = Lattice(self.quanta[part.numbers[0]])
        return [lattice.stochastic(c, u) for c, u in zip(coefficients, uniforms, strict=True)]

    def moved(self, part: Group, coefficients: Sequence[float]) -> None:
        """Its weights went so far along directions."""
        self._bounds |= {n: self._bounds[n] + sum(map(abs, coefficients)) for n in part.numbers}

    def outgrown(self, groups: list[Group], distances: list[float]) -> set[tuple[int, float]]:
        """The lattices, by parameter group and quantum, that might not hold all weights when they move so far."""
        return {
            (group.index, self.quanta[n])
            for group, distance in zip(groups, distances, strict=True)
            for n in group.numbers
            # Half: rounding to the lattice adds its share.
            if self._bounds[n] + distance > STEPS / 2 * self.quanta[n]
        }

    def make_room(
        self, groups: list[Group], distances: list[float], log: RunLog, processes: distributed.ProcessGroup | None
    ) -> None:
        """Coarser lattices for the parameters that would outgrow theirs. The weights must be at home.

        Raises ValueError where a quantum would be above mu.
        """
        if not self.outgrown(groups, distances):
            return
        self._bounds |= _sizes(groups, processes)
        tight = self.outgrown(groups, distances)
        # All that share such a lattice choose anew: some have grown with the one that must leave it.
        needs = {
            n: self._bounds[n] + distance
            for group, distance in zip(groups, distances, strict=True)
            for n in group.numbers
            if (group.index, self.quanta[n]) in tight
        }
        if needs:
            self.quanta |= self._chosen(groups, needs)
            self._put(groups, needs, log)

    def _written(self, groups: list[Group], processes: distributed.ProcessGroup | None) -> bool:
        """Whether there are weights that are new here, or that somebody else wrote, on any process."""
        written = versions(groups) != self._versions
        if not written and groups:
            # Taken anew every time: views that are kept would keep the memory of a model that goes elsewhere.
            steps = torch.cat([_sample(t) for group in groups for t in group.tensors]) / self._sampled
            written = not bool(((steps == steps.round()) & (steps.abs() <= STEPS / 2)).all())
        return largest([float(written)], sharded(groups), processes) != [0.0]

    def _lost(
        self, groups: list[Group], sizes: dict[int, float], processes: distributed.ProcessGroup | None
    ) -> set[int]:
        """The parameters that somebody has written so small that their lattices would round away more of them than one
        that is chosen for them may. A run that is resumed has its weights on its lattices, however small they became.
        """
        coarse = [
            (n, t)
            for group in groups
            for n, t in group.named_tensors()
            if sizes[n] > 0 and self.quanta.get(n, 0.0) > max(sizes[n], group.mu) * 2.0**-15
        ]
        off = [float(_is_off(t.detach(), self.quanta[n])) for n, t in coarse]
        found = largest(off, sharded(groups), processes) if coarse else []
        return {n for (n, _), is_off in zip(coarse, found, strict=True) if is_off}

    def _chosen(self, groups: list[Group], sizes: dict[int, float]) -> dict[int, float]:
        """Quanta for parameters whose weights reach these sizes, or mu: few of them in each parameter group.

        From the largest parameter down, one joins a lattice that is at most 16 times coarser than its own would be.

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
            if own > group.mu:  # with less room to grow, then
                own = Lattice.holding(sizes[n], headroom=2.0).quantum
            own = max(own, 2.0**-100)  # far from where float32 has fewer bits
            fitting = [q for q in lattices if own <= q <= COARSER * own]
            if sizes[n] == 0:  # nothing tells how large it will be: as most of the group, or room for weights below 1/2
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
        # By number, as in `_written`: groups may come here in parts.
        quanta = [self.quanta[n] for n, t in sorted(pairs, key=lambda pair: pair[0]) for _ in range(len(_sample(t)))]
        self._sampled = torch.tensor(quanta, dtype=torch.float32, device=pairs[0][1].device)


def _sizes(groups: list[Group], processes: distributed.ProcessGroup | None) -> dict[int, float]:
    """max |weight| by number, over all processes, with no copy of any tensor. Raises ValueError for what is NaN."""
    named = [(group.name, *pair) for group in groups for pair in group.named_tensors()]
    maxima = [torch.stack(t.detach().aminmax()).abs().amax() if t.numel() else t.new_zeros(()) for _, _, t in named]
    here = torch.stack(maxima).tolist()
    # Maxima over processes may lose a NaN.
    finite = [size if math.isfinite(size) else math.inf for size in here]
    sizes = largest(finite, sharded(groups), processes)
    for (name, number, _), size in zip(named, sizes, strict=True):
        if math.isinf(size):
            raise ValueError(f"{name(number)} has infinite or NaN weights")
    return {number: size for (_, number, _), size in zip(named, sizes, strict=True)}


def _is_off(tensor: Tensor, quantum: float) -> bool:
    """Whether an element is no multiple of it. In pieces: a quotient of all would be as large as the tensor."""
    return any(bool((piece / quantum).frac_().any()) for piece in tensor.reshape(-1).split(PIECE))


def _sample(tensor: Tensor) -> Tensor:
    """Elements of it, in memory order: a view."""
    step = max(1, tensor.numel() // SAMPLE)
    return tensor.as_strided([min(SAMPLE, -(-tensor.numel() // step))], [step])


def _check_mu(group: Group, number: int, quantum: float, size: float) -> None:
    if quantum > group.mu:
        raise ValueError(
            f"{group.name(number)}, with weights of up to {size:.3g}, cannot move by mu={group.mu:g}: float32 "
            f"holds such weights, and room to train them, in steps of {quantum:g}. Raise mu, freeze it, or give it "
            "a group of its own, with an lr of 0 or a larger mu"
        )

"""Ways to use a round's numbers, as methods of a study that compares them over the same rounds and the same work.

    hosfl study benchmarks/studies/digits-uses.yaml --out runs/digits-uses-study --jobs 2

Here clients send exact gradients, and the server uses only the numbers of them that forward passes would have measured,
v_p = <g, u_p>. So a run costs as much as a first-order one. The methods differ in the directions that are measured, and
in the estimate that is made from the numbers. A direction moves one block of layers, as in `hosfl.halves.blocks`; P_b
directions move block b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from hosfl.halves.blocks import allot_directions, blocks_of
from hosfl.methods.first_order import FirstOrder, GradientAverage
from hosfl.methods.ledger import Ledger, descend, load_vector, make_optimizer, step_size
from hosfl.probing.probe import trainable
from hosfl.protocol.messages import Gradient
from hosfl.protocol.seeds import Purpose, round_seed

DECAY = 0.9  # of running means over rounds
LAST_PART = 3  # the weights of the last 1 / LAST_PART of the rounds are averaged


@dataclass(frozen=True)
class Measured:
    """A block of weights, [begin, end) of all. directions: P_b. share: the work of a probe, in forward passes."""

    begin: int
    end: int
    directions: int
    share: float


@dataclass
class Averages(GradientAverage):
    """The library's estimate, with the same directions for all clients: ghat_b = (1/P_b) sum_p vbar_p u_p."""

    blocks: Sequence[Measured] = field(kw_only=True)
    seed: int = field(kw_only=True)
    length_of_run: int = field(kw_only=True)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Initialise the state that is kept from round to round; here there is none."""

    def commit(self, round: int, answers: Sequence[Gradient], weights: Sequence[float]) -> None:
        """Update the weights with a round's answers."""
        if answers:
            self.random = torch.Generator().manual_seed(round_seed(self.seed, Purpose.DIRECTIONS, round) % 2**63)
            gradients = torch.stack([a.gradient for a in answers]).double()
            shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            counts = self.counts(round)
            parts = [
                self.estimate(n, gradients[:, block.begin : block.end], shares, n_directions)
                for n, (block, n_directions) in enumerate(zip(self.blocks, counts, strict=True))
            ]
            mean = torch.cat(parts)
            rate = step_size(self.rate, self.length, round, float(mean.square().sum()))
            descend(self.weights, mean, self.optimizer, rate)
        self.rounds = round + 1

    def counts(self, round: int) -> list[int]:
        """Return the number of directions of each block in this round."""
        return [block.directions for block in self.blocks]

    def directions(self, count: int, size: int) -> Tensor:
        """Draw Rademacher directions, float64 [count, size]."""
        return torch.randint(2, (count, size), generator=self.random).double() * 2 - 1

    def estimate(self, number: int, gradients: Tensor, shares: Tensor, count: int) -> Tensor:
        """Estimate the mean gradient of block `number`, float64 [d_b], from `count` directions.

        gradients: the clients', float64 [K, d_b]. shares: the clients' weights, [K], which sum to 1.
        """
        u = self.directions(count, gradients.shape[1])
        return u.T @ (u @ (shares @ gradients)) / count


class Own(Averages):
    """Separate directions for every client: ghat_b = sum_m w_m (1/P_b) sum_p v_mp u_mp."""

    def estimate(self, number: int, gradients: Tensor, shares: Tensor, count: int) -> Tensor:
        return sum(
            share * super(Own, self).estimate(number, gradient[None], torch.ones(1).double(), count)
            for share, gradient in zip(shares, gradients, strict=True)
        )


class Solved(Averages):
    """The shortest vector with these numbers, times d_b / P_b, which compensates for the projection on a subspace."""

    def estimate(self, number: int, gradients: Tensor, shares: Tensor, count: int) -> Tensor:
        u = self.directions(count, gradients.shape[1])
        solved = torch.linalg.lstsq(u, (u @ (shares @ gradients))[:, None], driver="gelsd").solution[:, 0]
        return solved * max(1.0, gradients.shape[1] / count)


class Scaled(Averages):
    """Directions scaled by h^(-1/4), h a running mean of the squared estimate: ghat is the gradient times h^(-1/2).

    The idea is HiSo's (Li et al., arXiv 2506.02370), whose directions use the curvature estimated from earlier
    aggregates. All replicas could compute it from the log.
    """

    def start(self) -> None:
        self.squares = [torch.zeros(block.end - block.begin, dtype=torch.float64) for block in self.blocks]

    def estimate(self, number: int, gradients: Tensor, shares: Tensor, count: int) -> Tensor:
        h = self.squares[number]
        scale = (h + h.mean()).pow(-0.25) if h.any() else torch.ones_like(h)
        scale = scale / scale.square().mean().sqrt()
        u = self.directions(count, gradients.shape[1]) * scale
        estimate = u.T @ (u @ (shares @ gradients)) / count
        self.squares[number] = DECAY * h + (1 - DECAY) * (estimate / scale.square()).square()
        return estimate


class Growing(Averages):
    """A number of directions that grows from 0.5 to 1.5 times P_b over the rounds: the same total work."""

    def counts(self, round: int) -> list[int]:
        factor = 0.5 + round / max(1, self.length_of_run - 1)
        return [max(1, int(block.directions * factor + 0.5)) for block in self.blocks]


class ByLength(Averages):
    """P_b in proportion to |g_b| sqrt(d_b / c_b), with |g_b| estimated from the numbers, for the same total work."""

    def start(self) -> None:
        self.squares = [1.0] * len(self.blocks)

    def counts(self, round: int) -> list[int]:
        sizes = [s * (b.end - b.begin) for s, b in zip(self.squares, self.blocks, strict=True)]
        shares = [block.share for block in self.blocks]
        budget = sum(block.directions * block.share for block in self.blocks)
        total = len(self.blocks)
        while (
            sum(n * s for n, s in zip(allot_directions(total + 1, sizes, shares), shares, strict=True)) <= 1.01 * budget
        ):
            total += 1
        return allot_directions(total, sizes, shares)

    def estimate(self, number: int, gradients: Tensor, shares: Tensor, count: int) -> Tensor:
        u = self.directions(count, gradients.shape[1])
        numbers = u @ (shares @ gradients)
        square = float(numbers.square().mean())
        self.squares[number] = DECAY * self.squares[number] + (1 - DECAY) * square if self.rounds else square
        return u.T @ numbers / count


class LastMean(Averages):
    """The library's estimate; evaluations use the mean of the weights over the last third of the rounds."""

    def start(self) -> None:
        self.sum, self.summed = torch.zeros_like(self.weights, requires_grad=False), 0

    def commit(self, round: int, answers: Sequence[Gradient], weights: Sequence[float]) -> None:
        super().commit(round, answers, weights)
        if round >= self.length_of_run - self.length_of_run // LAST_PART:
            self.sum += self.weights.detach()
            self.summed += 1

    def show(self, half: nn.Module) -> None:
        load_vector(self.sum / self.summed if self.summed else self.weights, trainable(half)[0])


class Averaged(FirstOrder):
    """The library's use of the numbers, from exact derivatives. The other methods here change only the ledger."""

    reads: ClassVar[tuple[str, ...]] = (*FirstOrder.reads, "directions", "directions_from", "blocks")
    kind: ClassVar[type[Averages]] = Averages

    def make_ledger(self) -> Ledger:
        setup, settings = self.setup, self.settings
        weights = setup.flat().requires_grad_()
        begins = blocks_of(setup.base, settings.blocks, setup.sample)
        sizes = [p.numel() for p in setup.parameters]
        moved = [sum(sizes[t] for t in begin.tensors) for begin in begins]
        counts = allot_directions(settings.directions, moved, [begin.share for begin in begins])
        ends = [sum(moved[: n + 1]) for n in range(len(moved))]
        assert [t for begin in begins for t in begin.tensors] == list(range(len(sizes)))  # end to end
        return self.kind(
            weights,
            optimizer=make_optimizer(settings.rule, [weights]),
            rate=self.rate(setup.rates.client),
            length=setup.length(),
            blocks=[
                Measured(end - size, end, count, begin.share)
                for end, size, count, begin in zip(ends, moved, counts, begins, strict=True)
            ],
            seed=settings.seed,
            length_of_run=settings.rounds,
        )


# These classes are named in the studies' files.
class OwnDirections(Averaged):
    kind = Own


class Projection(Averaged):
    kind = Solved


class SecondMoment(Averaged):
    kind = Scaled


class MoreAtTheEnd(Averaged):
    kind = Growing


class MoreWhereLong(Averaged):
    kind = ByLength


class MeanOfTheLast(Averaged):
    kind = LastMean

"""Replicas of the client half: its trainable weights after some round, and the replay of later rounds.

The invariant of the whole library: replicas that have applied the same rounds have the same bits, on whatever machine,
whatever they have missed, and whether they applied the rounds one by one or all in one pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hosfl.protocol.arrays import Array, assign, bits, count, dtype_name, host, largest, plain, zeros
from hosfl.protocol.header import EXPONENTS
from hosfl.protocol.lattice import Lattice, LatticeError, spread
from hosfl.protocol.messages import Differs, MessageError, PoolMoves, Records
from hosfl.protocol.records import Packed, RoundRecord
from hosfl.protocol.seeds import Purpose, pool_seeds, round_seed
from hosfl.protocol.terms import Run
from hosfl_kernels import replay_, update_

Rows = NDArray[np.float32]


def digest(tensors: Iterable[Array]) -> bytes:
    """SHA-256 of the tensors' bits in order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(bits(tensor))
    return sha.digest()


def digest_array(sha256: bytes) -> NDArray[np.int32]:
    """A digest as messages carry it: int32 [8]."""
    return np.frombuffer(sha256, "<i4").astype(np.int32)


class DigestMismatch(Exception):
    """After the same rounds the replica has other bits than the server's: it must start again from its base."""


class ReplicaState(NamedTuple):
    """The state of a replica: see its attributes."""

    tensors: Sequence[Array]
    moments: Sequence[Sequence[Array]]
    applied: int
    epoch: int
    lattice: Lattice | None


class Replica:
    """A copy of the client half: trainable tensors, their moments, and the number of rounds that they have applied.

    Replicas that have applied the same rounds have the same bits. Arrays may be numpy's or torch's.

    Args:
        tensors: the trainable tensors in the order of the log's header; they are changed in place.
        streams: of each tensor, the stream of its noise.
        run: the terms of the run.
        base: returns the tensors' values of round 0, for a replica that must start again.

    Attributes:
        applied: how many rounds the weights have applied.
        epoch: of the last of them.
        lattice: of the weights: at first the run's, and a coarser one from records that say so; None: they are on none.
        moments: of the run's update rule, float32: for each moment a list with an array per tensor.
    """

    def __init__(
        self, tensors: Sequence[Array], streams: Sequence[int], run: Run, base: Callable[[], Sequence[Array]]
    ) -> None:
        self.tensors, self.streams, self.run, self.base = list(tensors), list(streams), run, base
        self.applied = self.epoch = 0
        self.lattice = run.lattice
        self.moments = [[zeros(t) for t in tensors] for _ in range(self._moments())]
        self._largest = float("inf")  # an upper bound of |weight| / factor, made exact when it matters
        self._whole = True  # False after an error between two tensors

    def _moments(self) -> int:
        return self.run.rule.moments if self.run.rule is not None else 0

    def reset(self) -> None:
        """Go back to round 0. If the base cannot be read, the next `apply` tries it again first."""
        self.applied, self.epoch, self._whole = 0, 0, False
        self.lattice = self.run.lattice
        self._largest = float("inf")
        for tensor, value in zip(self.tensors, self.base(), strict=True):
            assign(tensor, value)
        for moment in self.moments:
            for kept in moment:
                kept[...] = 0
        self._whole = True

    @property
    def mu(self) -> float:
        """The size of a probe's step: the run's mu, rounded to the current lattice."""
        return self.run.mu if self.lattice is None else self.lattice.nearest(self.run.mu, at_least_one=True)

    def state(self) -> ReplicaState:
        """The state for `load`. Its arrays are the replica's own, not copies."""
        return ReplicaState(self.tensors, self.moments, self.applied, self.epoch, self.lattice)

    def load(self, state: ReplicaState) -> None:
        """Copy the state of another replica of the run."""
        for mine, others in zip((self.tensors, *self.moments), (state.tensors, *state.moments), strict=True):
            for kept, other in zip(mine, others, strict=True):
                assign(kept, other)
        self.applied, self.epoch, self.lattice = state.applied, state.epoch, state.lattice
        self._largest = float("inf")

    def digest(self) -> bytes:
        """SHA-256 of weights and moments."""
        return digest([*self.tensors, *(m for moment in self.moments for m in moment)])

    def apply(self, message: Records | PoolMoves) -> None:
        """Apply committed rounds. Rounds that are applied already are skipped, so that a repeated message is harmless.

        Raises MessageError for records that are malformed or leave a gap, LatticeError for records that would carry a
        weight off the lattice (earlier rounds are applied, that round and later ones are not), and DigestMismatch for a
        digest other than the replica's. After any other error, such as a MemoryError, some tensors may have moved and
        others not: then the replica goes back to round 0.
        """
        message = message.on_host()
        if not self._whole:
            self.reset()
        if message.epoch < self.epoch:
            raise MessageError(f"records of epoch {message.epoch}, this client has seen epoch {self.epoch}")
        # A restarted server sends all rounds from 0 on, since some of the applied ones are void.
        anew = message.epoch > self.epoch and message.round < self.applied
        if anew and message.round != 0:
            raise MessageError(f"records of a new epoch from round {message.round}, this client is at more")
        if not np.isfinite(message.coefficients).all():
            raise MessageError("records with infinite or NaN coefficients")
        if len(message.digest) not in (0, 8):
            raise MessageError(f"a digest of {len(message.digest)} words, not 8")
        applied, lattice = (0, self.run.lattice) if anew else (self.applied, self.lattice)
        if isinstance(message, PoolMoves):
            end = self._check_pool(message, applied)
            _check_multiples(message.coefficients, lattice)
        else:
            end = self._check_rows(message)
            parts = self._parts(message, applied, lattice)
        try:
            if anew:
                self.reset()
            if isinstance(message, PoolMoves):
                self._apply_pool(message)
            else:
                for part, rows, rates in parts:
                    if part is not None and part != self.lattice:
                        self._coarsen(part, rows[:1])
                    self._apply_rows(rows, rates)
        except LatticeError:
            raise  # raised before a round's first move
        except BaseException:
            self.reset()
            raise
        self.epoch = message.epoch
        if len(message.digest) and end == self.applied and message.digest.tobytes() != self.digest():
            raise DigestMismatch(f"after {self.applied} rounds this client's half is not the server's")

    def follow(self, message: Records | PoolMoves, client: int) -> Differs | None:
        """`apply` for client number `client`. Returns a message for the server if the half turns out to be wrong.

        The replica is then back at its base, and the server's answer brings it up to date. A move that leaves the
        lattice counts as wrong too, since the server's own replica has made it. Raises MessageError, and LatticeError
        for moves that leave the lattice even from the base, which no correct server sends.
        """
        if message.client != client:
            raise MessageError(f"a message for client {message.client}, this is client {client}")
        before = self.applied
        try:
            self.apply(message)
        except (DigestMismatch, LatticeError) as error:
            wrong = digest_array(self.digest())
            said = Differs(client=client, round=self.applied, epoch=self.epoch, digest=wrong)
            self.reset()
            if isinstance(error, LatticeError) and before == 0:
                raise  # starting from the base again would end here again
            return said
        return None

    def _check_rows(self, message: Records) -> int:
        rows, rates, rule = message.coefficients, message.rates, self.run.rule
        if message.round > self.applied:
            raise MessageError(f"records start at round {message.round}, this client is at {self.applied}")
        if rows.shape[1] != self.run.directions:
            raise MessageError(f"records of {rows.shape[1]} directions in a run of {self.run.directions}")
        if len(rates) != (len(rows) if rule else 0):
            raise MessageError(f"{len(rates)} rates for {len(rows)} records")
        end = message.round + len(rows)
        if rule is not None:
            if not (np.isfinite(rates) & (rates >= 0)).all():
                raise MessageError("infinite, NaN or negative rates")
            with np.errstate(over="ignore"):
                steps = rule.steps(range(message.round, end), rates.tolist())
            if not np.isfinite(host(steps)).all():
                raise MessageError("rates whose steps are beyond float32")
        return end

    def _parts(
        self, message: Records, applied: int, lattice: Lattice | None
    ) -> list[tuple[Lattice | None, Rows, Rows]]:
        """(lattice, rows, rates) from round `applied` on, one part per lattice. Raises MessageError."""
        end, starts = message.round + len(message.coefficients), [(applied, lattice)]
        if message.lattices.shape[1:] != (2,) or (len(message.lattices) and lattice is None):
            raise MessageError(f"lattices of shape {tuple(message.lattices.shape)} in a run on {lattice}")
        before = message.round - 1
        for round, exponent in message.lattices.tolist():
            if not before < round < end or not EXPONENTS[0] <= exponent <= EXPONENTS[1]:
                raise MessageError(f"a lattice of quantum 2^{exponent} from round {round} on, of rounds up to {end}")
            before = round
            if round >= applied:
                starts.append((round, Lattice(2.0**exponent)))
        parts = []
        for (first, here), (until, _) in zip(starts, [*starts[1:], (end, None)], strict=True):
            if here is not None and lattice is not None and here.quantum < lattice.quantum:
                raise MessageError(f"a lattice of quantum {here.quantum:g} after one of {lattice.quantum:g}")
            lattice, rows = here, message.coefficients[first - message.round : until - message.round]
            _check_multiples(rows, here)
            parts.append((here, rows, message.rates[first - message.round : until - message.round]))
        return parts

    def _check_pool(self, message: PoolMoves, applied: int) -> int:
        pool, sums = self.run.pool, message.coefficients
        if pool is None or self.run.lattice is None:
            raise MessageError("sums over a pool in a run that has no pool on a lattice")
        until = int(message.until[0]) if len(message.until) == 1 else -1
        if not message.round < until or sums.shape[1] != pool.size:
            raise MessageError(f"sums of {sums.shape[1]} directions for rounds {message.round} to {until}")
        generations = pool.generation(until - 1) - pool.generation(message.round) + 1
        if len(sums) != generations:
            raise MessageError(f"{len(sums)} generations of a pool where {generations} lie in these rounds")
        if message.round != applied and until > applied:  # otherwise it is a repeated message
            raise MessageError(f"sums start at round {message.round}, this client is at {self.applied}")
        return until

    def _apply_rows(self, rows: Rows, rates: Rows) -> None:
        """Apply the rows of the rounds from `applied` on, in one pass over the weights."""
        lattice = self.lattice
        if not len(rows):
            return
        if lattice is None:
            self._step(rows, rates)
        elif self.fits(self.run.spread(rows)):
            seeds = [self.run.seeds(round) for round in range(self.applied, self.applied + len(rows))]
            for block, positions in self.run.parts():
                moved = [seed for of_round in seeds for seed in of_round[positions]]
                self._move(moved, rows[:, positions].reshape(-1), block.tensors)
            self._largest += self.run.spread(rows)
        elif len(rows) == 1:
            raise LatticeError(
                f"round {self.applied} would carry weights beyond {lattice.limit:g}, where the lattice ends: lower"
                " the client's rate"
            )
        else:
            # All rounds together might leave the lattice; each half of them, in order, may not.
            self._apply_rows(rows[: len(rows) // 2], rates[: len(rows) // 2])
            self._apply_rows(rows[len(rows) // 2 :], rates[len(rows) // 2 :])
            return
        self.applied += len(rows)

    def _coarsen(self, lattice: Lattice, row: Rows) -> None:
        """Put the weights on a coarser lattice. Raises LatticeError if the round's move is too large even for that."""
        if not self.fits(self.run.spread(row), lattice):
            raise LatticeError(
                f"round {self.applied} would carry weights beyond {lattice.limit:g}: lower the client's rate"
            )
        lattice.put(self.tensors, self.run.factors)
        self.lattice = lattice
        self._largest += lattice.quantum / 2

    def _apply_pool(self, message: PoolMoves) -> None:
        pool, lattice, until = self.run.pool, self.lattice, int(message.until[0])
        assert pool is not None
        assert lattice is not None
        if until <= self.applied:
            return
        if not self.fits(spread(message.coefficients)):
            raise LatticeError(f"rounds {self.applied} to {until} would carry weights beyond {lattice.limit:g}")
        moved = message.coefficients != 0
        first = pool.generation(message.round)
        seeds = [
            seed
            for g, row in enumerate(moved.tolist(), first)
            for seed, m in zip(pool_seeds(self.run.seed, g, pool.size), row, strict=True)
            if m
        ]
        self._move(seeds, message.coefficients[moved], range(len(self.tensors)))
        self._largest += spread(message.coefficients)
        self.applied = until

    def _move(self, seeds: Sequence[int], coefficients: Rows, tensors: Sequence[int]) -> None:
        """Move the tensors at these positions along all directions."""
        replay_(
            plain([self.tensors[t] for t in tensors]),
            seeds,
            coefficients.tolist(),
            dist=self.run.dist,
            factors=[self.run.factors[t] for t in tensors],
            streams=[self.streams[t] for t in tensors],
        )

    def _step(self, rows: Rows, rates: Rows) -> None:
        run, rule = self.run, self.run.rule
        assert rule is not None
        # Nobody answered: no step, and nothing decays.
        taken = np.flatnonzero(rows.any(1))
        rounds = [self.applied + int(r) for r in taken]
        if not rounds:
            return
        coarse = any(dtype_name(t) == "bfloat16" for t in self.tensors)
        for block, positions in run.parts():
            update_(
                plain([self.tensors[t] for t in block.tensors]),
                [[moment[t] for t in block.tensors] for moment in self.moments],
                rule,
                [run.seeds(round)[positions] for round in rounds],
                rows[taken][:, positions].tolist(),
                rule.steps(rounds, rates[taken].tolist()),
                dist=run.dist,
                factors=[run.factors[t] for t in block.tensors],
                streams=[self.streams[t] for t in block.tensors],
                rounding="stochastic" if coarse else "nearest",
                rounding_seeds=[round_seed(run.seed, Purpose.WEIGHTS, r) for r in rounds] if coarse else None,
            )

    def fits(self, distance: float, lattice: Lattice | None = None) -> bool:
        """Whether weights moved by up to `distance` (times their factor) stay on the lattice, in a probe as well.

        lattice: one that they are put on first; default: the one that they are on.
        """
        lattice = lattice or self.lattice
        if lattice is None:
            return True
        distance += self.mu + lattice.quantum  # a coarser lattice rounds weights and mu by up to half a quantum
        if self._largest + distance > lattice.limit:
            sizes = (largest(t) / f for t, f in zip(self.tensors, self.run.factors, strict=True) if count(t))
            self._largest = max(sizes, default=0.0)
        return self._largest + distance <= lattice.limit


def _check_multiples(moves: Rows, lattice: Lattice | None) -> None:
    if lattice is None:
        return
    quanta = moves.astype(np.float64) / lattice.quantum
    if not np.array_equal(quanta, np.rint(quanta)):
        raise MessageError(f"moves that are no multiples of the lattice's quantum {lattice.quantum:g}")


NO_DIGEST = np.empty(0, np.int32)


def to_records(
    rows: Packed[RoundRecord],
    run: Run,
    first: int = 0,
    *,
    client: int = 0,
    epoch: int = 0,
    digest: NDArray[np.int32] = NO_DIGEST,
) -> Records:
    """The log's records of rounds `first`, `first` + 1, ... as the message that a replica applies."""
    coefficients, rates, lattices = rows.columns()
    return Records(
        client=client,
        round=first,
        epoch=epoch,
        coefficients=coefficients,
        rates=rates if run.rule is not None else rates[:0],
        digest=digest,
        lattices=lattices,
    )

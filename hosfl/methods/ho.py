"""HO-SFL (Chen et al., ICML 2026, arXiv 2603.14773): exact gradients at the server, scalars from the clients.

Per client and round: the cut (size z) and labels go up, the multiplier (z) comes down, P scalars go up; P scalars per
missed round come down. The multiplier m = d loss / d cut is that of the constraint "client output = server input", and

    v_p = <m, f(x; theta + mu u_p) - f(x; theta)> / mu,    ghat = (1/P) sum_p vbar_p u_p

with vbar the aggregate of the clients' scalars and u_p seeded directions, the same for all clients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hosfl.halves.blocks import BlockEntry, BlockRun, allot_directions, blocks_of
from hosfl.halves.inputs import Batch, Inputs, call, evaluating
from hosfl.methods.client import Client
from hosfl.methods.ledger import ADAM, MOMENTUM, Ledger, SeedReplay, Step, make_optimizer
from hosfl.methods.method import LEARNS, MULTIPLIERS, PROBES, Method, Way
from hosfl.methods.steps import POOL_BETAS, FreshStep, PoolStep
from hosfl.probing.batched import probe_batched, probe_forward_batched
from hosfl.probing.compiled import call_compiled, check_backend
from hosfl.probing.displaced import large_tables, refuse_references
from hosfl.probing.probe import (
    PerturbedTensors,
    probe_backward,
    probe_forward,
    probe_in_place,
    probe_untouched,
    trainable,
)
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.messages import (
    Differs,
    Message,
    MessageError,
    PoolMoves,
    Records,
    Scalars,
)
from hosfl.protocol.replica import Replica, ReplicaState
from hosfl.protocol.terms import Block, Measures, Pool, Rule, Run
from hosfl.references import short_name
from hosfl.settings import PRESETS, Settings
from hosfl_kernels import SGD


@dataclass
class ZerothOrderClient(Client):
    """HO-SFL's client: forward passes only. P scalars go up for each multiplier, and committed records are replayed.

    For the round's directions u_p and the multiplier m, with one-sided differences,

        v_p = <m, f(x; theta + mu u_p) - f(x; theta)> / mu      float32 [P]

    With the estimator "backward" the P scalars come from one backward pass instead. After `answer` the weights have the
    same bits as before.

    Source: Chen et al., ICML 2026, arXiv 2603.14773.

    Args:
        run: what all clients and the server agree on.
        base: returns the trainable tensors of round 0, for a client that must start again. None: it keeps a copy; a
            device that is short of memory reads its base model's file.
        begins: where the run's blocks begin.
        probes_at_once: the number of perturbed copies of the weights that are evaluated in one pass.
        compile: the backend of torch.compile for forward passes; "": none.
        by_row: by block, whether probes may move large tables by row; found out at the first probe. Clients with copies
            of one half may share it.
        Everything else as in `Client`.
    """

    run: Run = field(kw_only=True)
    base: Callable[[], Sequence[Tensor]] | None = field(kw_only=True, default=None)
    begins: Sequence[BlockEntry] = field(kw_only=True, default=(BlockEntry("", (), 1.0),))
    probes_at_once: int = field(kw_only=True, default=1)
    compile: str = field(kw_only=True, default="")
    by_row: dict[int, bool] = field(kw_only=True, default_factory=dict)
    learns = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.moved = PerturbedTensors.of(self.half, self.run.factors)
        if self.base is None:
            copies = [p.detach().clone() for p in self.moved.tensors]
            self.base = lambda: copies
        self.replica = Replica(self.moved.tensors, self.moved.streams, self.run, self.base)

    def load(self, state: ReplicaState) -> None:
        """Become a copy of another replica of the run."""
        self.replica.load(state)
        self.applied, self.epoch = state.applied, state.epoch

    def reset(self) -> None:
        self.replica.reset()
        super().reset()

    def catch_up(self, message: Message) -> Differs | None:
        """Replay the committed records: see `Replica.follow`. Raises MessageError."""
        if not isinstance(message, (Records, PoolMoves)):
            raise MessageError(f"client {self.number} expects records, got {type(message).__name__}")
        try:
            return self.replica.follow(message, self.number)
        finally:
            self.applied, self.epoch = self.replica.applied, self.replica.epoch

    def _forward(self, inputs: Inputs) -> Tensor:
        return self.blocks.output(inputs)

    @cached_property
    def blocks(self) -> BlockRun:
        """Runs the half in blocks; made on first use, since most of many clients never take part."""
        how = partial(call_compiled, self.compile) if self.compile else call
        return BlockRun(self.half, [begin.entry for begin in self.begins], how)

    def answer(self, message: Message) -> Scalars:
        """Probe the round's directions. The weights have the same bits afterwards."""
        multiplier, run = self._multiplier(message), self.run
        seeds = run.seeds(self._round)
        begin = time.perf_counter()
        if run.estimator == "backward":
            found = [self._backward(multiplier, seeds)]
        else:
            found = [
                self._probe(number, self.moved.subset(block.tensors), multiplier, seeds[positions])
                for number, (block, positions) in enumerate(run.parts())
            ]
        self.seconds.answer += time.perf_counter() - begin
        return Scalars(client=self.number, round=self._round, epoch=self.epoch, scalars=torch.cat(found))

    @contextmanager
    def _pass_from(self, number: int) -> Iterator[tuple[nn.Module, Inputs]]:
        """Yields the module and the inputs of a pass from a block to the cut, in eval mode and without a graph."""
        with evaluating(self.half):
            module, inputs = self.blocks.tail(number, self._inputs)
            with evaluating(module):
                yield module, inputs

    def _backward(self, multiplier: Tensor, seeds: Sequence[int]) -> Tensor:
        measured = [positions for block, positions in self.run.parts() for _ in block.tensors]
        order = [t for block, _ in self.run.parts() for t in block.tensors]
        with self._pass_from(0) as (module, inputs):
            found = probe_backward(
                module,
                inputs,
                multiplier,
                seeds,
                self.run.dist,
                microbatch=self.microbatch,
                perturbed=self.moved.subset(order),
                measured=measured,
            )
        self._count(forward=self.begins[0].share, backward=self.begins[0].share)
        return found

    def _probe(self, number: int, moved: PerturbedTensors, multiplier: Tensor, seeds: Sequence[int]) -> Tensor:
        """The scalars of one block's directions, by forward passes from the block to the cut."""
        run, mu, two_sided = self.run, self.replica.mu, self.run.estimator == "two-sided"
        with self._pass_from(number) as (module, inputs):
            if self.probes_at_once > 1:
                found = self._probe_batched(module, inputs, moved, multiplier, seeds)
            elif run.estimator == "forward":
                found = probe_forward(module, inputs, multiplier, seeds, run.dist, perturbed=moved)
            elif run.lattice is not None:
                found = self._probe_in_place(number, module, inputs, moved, multiplier, seeds)
            else:
                found = probe_untouched(
                    module, inputs, multiplier, self._cut, seeds, mu, run.dist, two_sided=two_sided, perturbed=moved
                )
        share = self.begins[number].share
        between = self.begins[number - 1].share - share if number else 0.0
        self._count(forward=between + (2 if two_sided else 1) * len(seeds) * share)
        return found

    def _probe_in_place(
        self,
        number: int,
        module: nn.Module,
        inputs: Inputs,
        moved: PerturbedTensors,
        multiplier: Tensor,
        seeds: Sequence[int],
    ) -> Tensor:
        """The same with weights that are moved in place; large tables by row, if a first probe shows the same result.

        The result differs if a model reads a table by another reference, as some do that share weights.
        """
        two_sided = self.run.estimator == "two-sided"

        def probe(multiplier: Tensor, seeds: Sequence[int], by_row: bool) -> Tensor:
            return probe_in_place(
                lambda: self.blocks.call(module, inputs),
                moved,
                multiplier,
                self._cut,
                seeds,
                self.replica.mu,
                two_sided,
                module=module if by_row else None,
            )

        if number not in self.by_row:
            able = not self.compile and len(large_tables(module, moved.tensors)) > 0
            if able:
                ones, share = torch.ones_like(multiplier), self.begins[number].share
                able = torch.equal(probe(ones, seeds[:1], True), probe(ones, seeds[:1], False))
                self._count(forward=2 * (2 if two_sided else 1) * share)
            self.by_row[number] = able
        return probe(multiplier, seeds, self.by_row[number])

    def _probe_batched(
        self, module: nn.Module, inputs: Inputs, moved: PerturbedTensors, multiplier: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """The same with several probes in a pass. On a lattice the copies' weights are exact, too."""
        run, at_once = self.run, self.probes_at_once
        if run.estimator == "forward":
            return probe_forward_batched(module, inputs, multiplier, seeds, run.dist, perturbed=moved, at_once=at_once)
        two_sided, mu = run.estimator == "two-sided", self.replica.mu
        return probe_batched(
            module,
            inputs,
            multiplier,
            self._cut,
            seeds,
            mu,
            run.dist,
            two_sided=two_sided,
            perturbed=moved,
            at_once=at_once,
        )


def client_rule(config: Settings) -> Rule | None:
    """The update rule that every replica applies; None on a lattice, where records are moves."""
    if config.directions_from == "fresh":
        if config.rule == "momentum":
            return SGD(momentum=MOMENTUM)
        if config.rule == "adamw":
            return ADAM
    on_lattice = config.dist == "rademacher" and config.dtype == "float32"
    return None if on_lattice else SGD()


def power_of_two_scales(parameters: Sequence[Tensor]) -> list[float]:
    """For each tensor the power of two nearest to its root mean square, relative to the largest of them; at most 1.

    Directions with these scales move every tensor by the same share of its size. A tensor of zeros takes the scale of
    the tensor before it, as a bias that of its weight.
    """
    sizes = [float(p.detach().double().square().mean().sqrt()) if p.numel() else 0.0 for p in parameters]
    largest = max((s for s in sizes if math.isfinite(s)), default=0.0)
    scales: list[float] = []
    for size in sizes:
        if size > 0 and math.isfinite(size):
            scales.append(max(2.0 ** round(math.log2(size / largest)), 2.0**-20))
        else:
            scales.append(scales[-1] if scales else 1.0)
    return scales


def make_run(
    config: Settings,
    parameters: list[nn.Parameter],
    begins: Sequence[BlockEntry] = (),
    measures: Measures | None = None,
) -> Run:
    """The terms of a run, which all agree on. Puts the parameters on their lattice, if the run has one.

    begins: of the run's blocks. measures: of the run, if the parameters come from its server; None: they are computed
    from the parameters.

    Raises ValueError for a mu beyond the lattice's limit, and for measures of another half.
    """
    rule = client_rule(config)
    if measures is None:
        rms = config.direction_scale == "rms"
        factors = power_of_two_scales(parameters) if rms else [1.0] * len(parameters)
        lattice = Lattice.snap(parameters, factors) if rule is None else None
    else:
        factors, lattice = list(measures.factors), measures.lattice
        if len(factors) != len(parameters) or (lattice is None) == (rule is None):
            raise ValueError(f"{measures} are not of {len(parameters)} tensors under the rule {config.rule}")
        if lattice is not None:
            lattice.put(parameters, factors)
    if lattice is not None and config.mu >= lattice.limit:
        raise ValueError(f"mu = {config.mu:g} is beyond what the weights' lattice holds, {lattice.limit:g}: lower mu")
    return Run(
        seed=config.seed,
        directions=config.directions,
        dist=config.dist,
        mu=config.mu if lattice is None else lattice.nearest(config.mu, at_least_one=True),
        factors=tuple(factors),
        lattice=lattice,
        rule=rule,
        pool=Pool(config.pool_size, config.pool_rounds) if config.directions_from == "pool" else None,
        estimator=config.estimator,
        blocks=_blocks(config.directions, begins, parameters, factors),
    )


def _blocks(
    directions: int, begins: Sequence[BlockEntry], parameters: Sequence[Tensor], factors: Sequence[float]
) -> tuple[Block, ...]:
    if len(begins) < 2:
        return ()  # every direction moves all
    sizes = [sum(parameters[t].numel() * factors[t] ** 2 for t in begin.tensors) for begin in begins]
    counts = allot_directions(directions, sizes, [begin.share for begin in begins])
    return tuple(Block(begin.tensors, n) for begin, n in zip(begins, counts, strict=True))


# The settings of methods whose client half is a log of scalars.
SCALARS = (
    *LEARNS,
    *PROBES,
    *("directions_from", "pool_size", "pool_rounds", "direction_scale", "estimator", "clip"),
)
CLIENT_SETTINGS = ("microbatch", "probes_at_once", "compile")  # how a client computes its scalars
FRESH, POOL = {"directions_from": "fresh"}, {"directions_from": "pool"}
ADAM_POOL = {**POOL, "rule": "adamw", "direction_scale": "rms", "pool_size": 128, "pool_rounds": 100}


class HO(Method):
    """The client half is its base and a log with P scalars per round, which every client replays."""

    reads: ClassVar[tuple[str, ...]] = (
        *SCALARS,
        *MULTIPLIERS,
        "digest_every",
        "microbatch",
        "probes_at_once",
        "compile",
        "blocks",
        "multiplier",
        "server_first",
    )
    ways: ClassVar[dict[str, Way]] = {
        "ho, fresh": (FRESH, (0.1, 0.2, 0.4)),
        "ho, fresh, P=2": ({**FRESH, "directions": 2}, (0.1, 0.2, 0.4)),
        "ho, pool": (POOL, (0.1, 0.2, 0.4)),
        "ho, pool, P=2": ({**POOL, "directions": 2}, (0.1, 0.2, 0.4)),
        "ho, rolling pool, Adam": (ADAM_POOL, (0.05, 0.1, 0.2)),
        "ho, rolling pool, Adam, P=2": ({**ADAM_POOL, "directions": 2}, (0.02, 0.04, 0.08)),
        "ho, preset paper": (PRESETS["paper"], (0.003, 0.006, 0.012)),
    }
    kind: ClassVar[type[ZerothOrderClient]] = ZerothOrderClient

    @classmethod
    def check(cls, settings: Settings) -> None:
        super().check(settings)
        if settings.directions_from == "pool" and settings.pool_size < settings.directions:
            raise ValueError(
                f"cannot measure {settings.directions} directions of a pool of {settings.pool_size}: raise pool_size"
            )
        if not settings.compile:
            return
        check_backend(settings.compile)
        in_place: dict[str, tuple[object, ...]] = {
            "dist": ("rademacher",),
            "dtype": ("float32",),
            "rule": ("normalized", "sgd") if settings.directions_from == "fresh" else (settings.rule,),
            "estimator": ("one-sided", "two-sided"),
            "blocks": (1,),
            "probes_at_once": (1,),
        }
        wrong = [
            f"{name} {getattr(settings, name)} (it may be {' or '.join(map(str, may))})"
            for name, may in in_place.items()
            if getattr(settings, name) not in may
        ]
        if wrong:
            raise ValueError(
                f"compile is for probes in place, one by one, and not with {', '.join(wrong)}: change that, or leave"
                " out compile"
            )

    @classmethod
    def tuned(cls, settings: Settings) -> tuple[str, ...]:
        return (short_name(settings.method), settings.directions_from, settings.rule)

    def make_ledger(self) -> Ledger:
        setup, settings = self.setup, self.settings
        self.begins = blocks_of(setup.base, settings.blocks, setup.sample)
        self.run = run = make_run(settings, setup.parameters, self.begins, setup.measures)
        self.by_row: dict[int, bool] = {}
        if self.displaces():
            refuse_references(setup.base, setup.sample)
        rate = self.rate(setup.rates.client)
        step: Step = FreshStep(run, rate, setup.length())
        if run.pool is not None:
            step = PoolStep(run, rate, lambda p: make_optimizer(settings.rule, p, POOL_BETAS), setup.length())
        moved, streams = trainable(setup.observed)
        mirror = Replica(moved, streams, run, lambda: setup.parameters)
        return SeedReplay(run, step, mirror, None, setup.aggregation, settings.clip, settings.digest_every)

    def displaces(self) -> bool:
        """Whether clients evaluate their half at displaced weights and only read its own."""
        one_by_one = self.settings.estimator.endswith("sided") and self.settings.probes_at_once == 1
        return self.settings.estimator != "backward" and not (one_by_one and self.run.lattice is not None)

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        setup = self.setup
        shared: dict[str, Any] = {name: getattr(self.settings, name) for name in CLIENT_SETTINGS}
        shared |= {"run": self.run, "begins": self.begins, "passes": setup.passes, "by_row": self.by_row}
        return self.kind(number, half, batch, base=lambda: setup.parameters, **shared)

"""A federation small enough to check by hand: a client half of 2 x 3 + 2 weights, and every kind of run over it."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from hosfl.halves.blocks import BlockEntry
from hosfl.methods import METHODS, method_of
from hosfl.methods.cuts import CutSpec
from hosfl.methods.ho import HO, ZerothOrderClient
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.server import Server
from hosfl.methods.steps import FreshStep, PoolStep
from hosfl.probing.probe import trainable
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.messages import Hello, Scalars
from hosfl.protocol.replica import Replica
from hosfl.protocol.terms import Block, Pool, Run
from hosfl_kernels import SGD, AdamW

SAMPLES, DIRECTIONS = 6, 4
FACTORS = (0.5, 1.0)  # of weight and bias: not the same
BLOCKS = (Block((1,), 1), Block((0,), 3))  # the bias alone, and the weight alone
POOL = Pool(8, 11)  # a generation ends in the middle of a turn
REPLAYED = [name for name in METHODS if issubclass(method_of(name), HO)]  # whose client half is a log of scalars
RULES = {
    "moves": None,
    "sgd": SGD(weight_decay=0.1),
    "momentum": SGD(momentum=0.9, weight_decay=0.1),
    "adamw": AdamW(weight_decay=0.1),
    "adamw bfloat16": AdamW(weight_decay=0.1),
    "blocks": None,
    "blocks sgd": SGD(),
    "blocks adamw": AdamW(weight_decay=0.1),
    "pool": None,
    "pool bfloat16": SGD(),
}


def adam(parameters):
    return torch.optim.Adam(parameters)


def batch(round):
    random = torch.Generator().manual_seed(round)
    return torch.randn(SAMPLES, 3, generator=random), torch.randint(0, 2, (SAMPLES,), generator=random)


def round_scalars(round, seed=0, size=0.1):
    return size * torch.randn(DIRECTIONS, generator=torch.Generator().manual_seed(1000 * seed + round))


@dataclass
class Small:
    """A run of one kind: the client half of round 0, what all agree on, and the server's ledger."""

    half: nn.Module
    run: Run
    ledger: SeedReplay

    def client(self, number=0):
        half = copy.deepcopy(self.half)
        begins = [BlockEntry("", block.tensors, 1.0) for block, _ in self.run.parts()]

        def cast(round):
            return batch(round)[0].to(half.weight.dtype), batch(round)[1]

        return ZerothOrderClient(number, half, cast, run=self.run, begins=begins)

    def replica(self):
        parameters, streams = trainable(copy.deepcopy(self.half))
        base = [p.detach().clone() for p in parameters]
        return Replica(parameters, streams, self.run, lambda: base)

    def play(self, rounds, empty=(), seed=0):
        """Commit rounds up to `rounds`, nobody answering those in `empty`."""
        for round in range(len(self.ledger.records), rounds):
            answer = Scalars(client=0, round=round, epoch=self.ledger.epoch, scalars=round_scalars(round, seed))
            answers = [] if round in empty else [answer]
            self.ledger.commit(round, answers, [1.0] * len(answers))
        return self

    def since(self, client_or_replica, number=0):
        at = client_or_replica
        return self.ledger.since(Hello(client=number, round=at.applied, epoch=at.epoch))

    def server(self, half=None, batch=SAMPLES):
        half = nn.Linear(2, 2) if half is None else half
        optimizer = torch.optim.SGD(half.parameters(), lr=0.1, momentum=0.9)
        loss = nn.functional.cross_entropy
        return Server(half, loss, optimizer, lambda round: 0.1, self.ledger, 5, 10, CutSpec((2,), 2, batch))


def small(kind="moves", rate=0.05, growth=1.0, headroom=16.0, dist=None, **settings):
    """A run: its kind is a key of RULES. rate: of a pool, P times that. growth: of the rate, per round.

    settings: of the ledger.
    """
    torch.manual_seed(0)
    half = nn.Linear(3, 2)
    if "bfloat16" in kind:
        half = half.bfloat16()
    parameters, streams = trainable(half)
    rule = RULES[kind]
    lattice = Lattice.snap(parameters, FACTORS, headroom) if rule is None else None
    run = Run(
        seed=5,
        directions=DIRECTIONS,
        dist=dist or ("rademacher" if rule is None else "gaussian"),
        mu=lattice.nearest(1e-3) if lattice else 1e-3,
        factors=FACTORS,
        lattice=lattice,
        rule=rule,
        pool=POOL if "pool" in kind else None,
        blocks=BLOCKS if "blocks" in kind else (),
    )

    def rates(round):
        return rate * growth**round * (DIRECTIONS if run.pool else 1)

    step = PoolStep(run, rates, adam) if run.pool else FreshStep(run, rates)
    made = Small(half, run, SeedReplay(run, step, mirror=None, **{"digest_every": 0, **settings}))
    made.ledger.mirror = made.replica()
    return made

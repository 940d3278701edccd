"""What a method is made of: the clients, the server and the ledger of one way to train a split model.

A method is a subclass in a file of its own. The file is all there is to it: settings, tables, tuning and tests find
what they need in the class. `frozen.py` is the smallest, `first_order.py` the next one to read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from hosfl.halves.inputs import Batch, Inputs, check_apart
from hosfl.methods.client import Client, Passes, no_passes
from hosfl.methods.grouped import GroupedServer
from hosfl.methods.ledger import Ledger, Rate
from hosfl.methods.server import Server
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import Aggregation, RunningLength
from hosfl.protocol.terms import Measures
from hosfl.settings import DEFAULTS, Rates, Settings

# The settings that several methods read, to be named in `Method.reads`.
LEARNS = ("client_rate", "rule")
MULTIPLIERS = ("wire", "server_batch")  # of servers that send some
PROBES = ("directions", "dist", "mu")
# What is tuned: the settings that make a way to use a method, and its client rates.
Way = tuple[dict[str, Any], tuple[float, ...]]


@dataclass
class Setup:
    """What a run gives to its method.

    Args:
        settings: of the run.
        base: the client half of round 0. The method may still put its weights on a lattice, before anything else is
            made of it.
        rates: of both halves.
        aggregation: of what the clients send.
        sample: inputs of a few samples.
        passes: where samples that go through either half are counted.
        measures: those of the run whose base it is; None: the run is made here.
    """

    settings: Settings
    base: nn.Module
    rates: Rates
    aggregation: Aggregation
    sample: Inputs
    passes: Passes = field(default_factory=no_passes)
    measures: Measures | None = None

    @cached_property
    def observed(self) -> nn.Module:
        """The client half as it is now, for evaluation: a copy of the base, made when it is first asked for."""
        return copy.deepcopy(self.base)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the base that move."""
        return trainable(self.base)[0]

    def flat(self) -> Tensor:
        """Those of the base that move, end to end: float32 [d], a copy on the CPU."""
        return nn.utils.parameters_to_vector(self.parameters).detach().cpu().float().clone()

    def length(self) -> RunningLength | None:
        """What divides the client rate where the rule is "normalized"."""
        return RunningLength() if self.settings.rule == "normalized" else None


class Method:
    """A way to train a split model: which client, server and ledger it is made of. In this one no client learns.

        class Own(hosfl.Method):
            reads = ("client_rate", "rule")

            def make_ledger(self): ...  # what is committed of the client half

            def client(self, number, half, batch): ...  # a `Client`

        hosfl.train(task, method="own.py:Own", server_rate=0.01, client_rate=0.1)

    Args:
        setup: what a run gives to its method: settings, the client half of round 0, rates, aggregation.

    Attributes:
        reads: the settings that it reads of those that not all methods read; others are refused.
        estimators: those estimators that it can use.
        server_rates: rates of the server half that benchmarks/tune.py tries.
        ways: by name, the settings of a way to use the method and the client rates that benchmarks/tune.py tries with
            it.
        setup, settings: of the run.
        ledger: what is committed of the client half; None: nothing ever is.

    Raises:
        ValueError: the client half has no weights that train, and clients learn; a microbatch for a half whose
            samples affect each other.
    """

    reads: ClassVar[tuple[str, ...]] = MULTIPLIERS
    estimators: ClassVar[tuple[str, ...]] = ("one-sided", "two-sided", "forward", "backward")
    server_rates: ClassVar[tuple[float, ...]] = (0.04, 0.08, 0.16)
    ways: ClassVar[dict[str, Way]] = {}

    def __init__(self, setup: Setup) -> None:
        self.setup, self.settings = setup, setup.settings
        if "client_rate" in self.reads and not setup.parameters:
            raise ValueError(
                f"the client half has no weights that train, and with the method {self.settings.method} clients learn:"
                " cut the model later, or choose the method frozen"
            )
        if self.read("microbatch"):
            check_apart(setup.base)
        self.ledger = self.make_ledger()

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Raises ValueError for settings that do not go with the method."""
        if settings.estimator not in cls.estimators:
            able = " or ".join(cls.estimators)
            raise ValueError(f"{settings.method} sees losses, not derivatives: estimator must be {able}")

    @classmethod
    def tuned(cls, settings: Settings) -> tuple[str, ...]:
        """Under which key a task keeps the method's rates."""
        return ("frozen",)

    @classmethod
    def exchanges(cls, settings: Settings) -> int:
        """How many cuts a client sends in a round; its answer to all but the last one's multiplier is the next."""
        return 1

    def make_ledger(self) -> Ledger | None:
        """What is committed of the client half; None where nothing ever is."""
        return None

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        """Client `number`, who has applied nothing. half: its own copy of the base. batch: of an exchange, its data."""
        return Client(number, half, batch, passes=self.setup.passes)

    def read(self, name: str) -> Any:
        """A setting's value; its default where the method does not read it."""
        return getattr(self.settings, name) if name in self.reads else DEFAULTS[name]

    def make_client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        """`client`, as all of the run's are."""
        client = self.client(number, half, batch)
        client.wire = self.read("wire")
        return client

    def server(self, **shared: Any) -> Server:
        """The server. shared: what every kind of server is made of.

        A method with a server of its own reads `server_batch` only if that server does.
        """
        most = self.settings.server_batch
        return GroupedServer(**shared, most=most) if most else Server(**shared)

    def rate(self, base: float) -> Rate:
        """The scheduled learning rate of an exchange."""
        exchanges = self.exchanges(self.settings)
        return lambda exchange: self.settings.scheduled(base, exchange // exchanges)

"""The base class of methods: a method makes the clients, the server and the ledger of a run.

A method is one subclass in one file: settings, tables, tuning and tests find what they need in the class. `frozen.py`
is the smallest, `first_order.py` the next one to read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from hosfl.halves.inputs import Batch, Inputs, check_samples_independent
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
MULTIPLIERS = ("wire", "server_batch")  # of methods whose server sends multipliers
PROBES = ("directions", "dist", "mu")
# A way to use a method, for tuning: its settings, and the client rates to try.
Way = tuple[dict[str, Any], tuple[float, ...]]


@dataclass
class Setup:
    """What a run gives to its method.

    Args:
        settings: of the run.
        base: the client half of round 0. The method may put its weights on a lattice; copies are made only after that.
        rates: learning rates of both halves.
        aggregation: of the clients' answers.
        sample: inputs of a few samples.
        passes: counts samples that go through either half.
        measures: of the run, if the base comes from its server; None: they are computed from the base.
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
        """A copy of the base that is brought up to date for evaluations; made on first use."""
        return copy.deepcopy(self.base)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the base."""
        return trainable(self.base)[0]

    def flat(self) -> Tensor:
        """The trainable parameters of the base concatenated: a copy, float32 [d] on the CPU."""
        return nn.utils.parameters_to_vector(self.parameters).detach().cpu().float().clone()

    def length(self) -> RunningLength | None:
        """A running length, by which the client rate is divided if the rule is "normalized"; else None."""
        return RunningLength() if self.settings.rule == "normalized" else None


class Method:
    """A method to train a split model: it makes the clients, the server and the ledger. In this one no client learns.

        class Own(hosfl.Method):
            reads = ("client_rate", "rule")

            def make_ledger(self): ...  # keeps what is committed of the client half

            def client(self, number, half, batch): ...  # a `Client`

        hosfl.train(task, method="own.py:Own", server_rate=0.01, client_rate=0.1)

    Args:
        setup: what a run gives to its method: settings, the client half of round 0, rates, aggregation.

    Attributes:
        reads: the settings that it reads, among those that not all methods read; others are refused.
        estimators: the estimators that it can use.
        server_rates: rates of the server half that benchmarks/tune.py tries.
        ways: by name, the settings of a way to use the method and the client rates that benchmarks/tune.py tries with
            it.
        setup, settings: of the run.
        ledger: keeps what is committed of the client half; None: nothing ever is.

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
            check_samples_independent(setup.base)
        self.ledger = self.make_ledger()

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Raises ValueError for settings that the method cannot use."""
        if settings.estimator not in cls.estimators:
            able = " or ".join(cls.estimators)
            raise ValueError(f"{settings.method} sees losses, not derivatives: estimator must be {able}")

    @classmethod
    def tuned(cls, settings: Settings) -> tuple[str, ...]:
        """The key under which a task has tuned rates for the method."""
        return ("frozen",)

    @classmethod
    def exchanges(cls, settings: Settings) -> int:
        """The number of cuts that a client sends in a round; all but the first answer a multiplier."""
        return 1

    def make_ledger(self) -> Ledger | None:
        """Make the ledger; None if nothing is ever committed of the client half."""
        return None

    def client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        """A new client. half: its own copy of the base. batch: number of the exchange -> (inputs, labels)."""
        return Client(number, half, batch, passes=self.setup.passes)

    def read(self, name: str) -> Any:
        """A setting's value; its default if the method does not read it."""
        return getattr(self.settings, name) if name in self.reads else DEFAULTS[name]

    def make_client(self, number: int, half: nn.Module, batch: Callable[[int], Batch]) -> Client:
        """`client`, with the settings that all methods share."""
        client = self.client(number, half, batch)
        client.wire = self.read("wire")
        return client

    def server(self, **shared: Any) -> Server:
        """The server. shared: the arguments of every kind of server.

        A method with a server of its own reads `server_batch` only if that server does.
        """
        most = self.settings.server_batch
        return GroupedServer(**shared, most=most) if most else Server(**shared)

    def rate(self, base: float) -> Rate:
        """The scheduled learning rate of an exchange."""
        exchanges = self.exchanges(self.settings)
        return lambda exchange: self.settings.scheduled(base, exchange // exchanges)

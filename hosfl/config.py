"""One run's settings: checked once, then frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

METHODS = ("ho", "first-order", "frozen")
TASKS = ("digits",)
RULES = ("normalized", "sgd")
SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class Config:
    """Settings of one run. Raises ValueError for a value that cannot work, and says which.

    task: what is learnt; "digits" is embedded. method: "ho" (HO-SFL), "first-order" (split learning with exact
    gradients, the upper bound), "frozen" (the client half never learns: the control).
    rounds, clients, sampled: N clients, K of them per round. batch: samples per client and round.
    directions: P, perturbed forward passes per client and round. dist: of the directions, "rademacher" or "gaussian".
    mu: the size of a probe's step, rounded to the client's lattice.
    server_rate, client_rate: learning rates; None takes the task's tuned ones for the method and rule. rule: of the
    client half, "sgd", or "normalized": SGD with the rate over the running length of the gradient.
    schedule: "linear" falls to zero at the last round.
    alpha: how unlike the clients' data are (Dirichlet). seed: 0 <= seed < 2^64; of everything.
    evaluate_every: rounds. evaluate_on: "test", or "validation" for choosing rates. device: such as "cpu" or "cuda".
    """

    task: str = "digits"
    method: str = "ho"
    rounds: int = 400
    clients: int = 10
    sampled: int = 3
    directions: int = 5
    dist: str = "rademacher"
    mu: float = 1e-3
    batch: int = 128
    server_rate: float | None = None
    client_rate: float | None = None
    rule: str = "normalized"
    schedule: str = "linear"
    alpha: float = 0.5
    seed: int = 0
    evaluate_every: int = 20
    evaluate_on: str = "test"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, choices in (
            ("task", TASKS),
            ("method", METHODS),
            ("rule", RULES),
            ("schedule", SCHEDULES),
            ("dist", ("rademacher", "gaussian")),
            ("evaluate_on", ("test", "validation")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("rounds", "clients", "sampled", "directions", "batch", "evaluate_every"):
            if not 1 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mu", "alpha", "server_rate", "client_rate"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.sampled > self.clients:
            raise ValueError(f"cannot sample {self.sampled} of {self.clients} clients: lower sampled or raise clients")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot compute on device {self.device!r}: {error}") from error

    def scheduled(self, rate: float, round: int) -> float:
        """The learning rate of a round, in float64: a function of the global round, the same for everyone."""
        return rate * (1 - round / self.rounds) if self.schedule == "linear" else rate

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

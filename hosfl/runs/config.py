"""One run's settings: checked once, then frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

from hosfl.halves.narrow import FROZEN
from hosfl.probing.probe import ESTIMATORS
from hosfl.protocol.aggregate import AGGREGATIONS

CHOICES: dict[str, tuple[str, ...]] = {
    "task": (
        *("digits", "digits-inverted", "cifar10", "cifar100", "cifar10-noisy", "cifar10-inverted"),
        *("sentences", "sst2", "rte", "wsc", "squad"),
    ),
    "method": ("ho", "first-order", "frozen", "checkpointed", "splitfed", "zo-both", "hosl", "mu-splitfed"),
    "directions_from": ("fresh", "pool"),
    "direction_scale": ("unit", "rms"),
    "dist": ("rademacher", "gaussian"),
    "rule": ("normalized", "sgd", "momentum", "adamw"),
    "schedule": ("linear", "constant"),
    "aggregation": tuple(AGGREGATIONS),
    "dtype": ("float32", "bfloat16"),
    "partition": ("dirichlet", "iid"),
    "frozen": FROZEN,
    "estimator": ESTIMATORS,
    "evaluate_on": ("test", "validation"),
}
METHODS = CHOICES["method"]
# What a run's bits do not depend on: where data and model lie (their content counts), what is kept, when one looks.
NEUTRAL = ("data", "model", "keep", "evaluate_every", "snapshot_every")
# Of a field's type: what it takes, numpy's numbers among it, what that becomes, and how it is called.
KINDS: dict[str, tuple[type, type, str]] = {
    "str": (str, str, "text"),
    "int": (Integral, int, "a whole number"),
    "float": (Real, float, "a number"),
    "float | None": (Real, float, "a number or nothing"),
}
REPLAYED = ("ho", "zo-both", "mu-splitfed")  # whose client half is a log of scalars
RULES = CHOICES["rule"]

_LEARNS = ("client_rate", "rule")
_BACKPROPAGATES = (*_LEARNS, "clip", "microbatch")
_PROBES = ("directions", "dist", "mu")
_REPLAYS = (*_LEARNS, *_PROBES, "directions_from", "pool_size", "pool_rounds", "direction_scale", "estimator", "clip")
# What each method reads of the settings that not all of them read.
READS: dict[str, tuple[str, ...]] = {
    "ho": (*_REPLAYS, "digest_every", "microbatch"),
    "first-order": _BACKPROPAGATES,
    "frozen": (),
    "checkpointed": _BACKPROPAGATES,
    "splitfed": (*_LEARNS, "microbatch", "local_steps"),
    "zo-both": (*_REPLAYS, "digest_every"),
    "hosl": (*_LEARNS, *_PROBES),
    "mu-splitfed": (*_REPLAYS, "digest_every", "local_steps"),
}
# What is read only where another setting, which the method reads, has one of some values.
READ_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "pool_size": ("directions_from", ("pool",)),
    "pool_rounds": ("directions_from", ("pool",)),
    "mu": ("estimator", ("one-sided", "two-sided")),
    "microbatch": ("estimator", ("backward",)),
    "alpha": ("partition", ("dirichlet",)),
}

PRESETS: dict[str, dict[str, Any]] = {
    # The algorithm of arXiv 2603.14773 as its authors' code runs it, but for its double division by K.
    "paper": {
        "directions_from": "fresh",
        "direction_scale": "unit",
        "dist": "gaussian",
        "rule": "adamw",
        "aggregation": "uniform",
        "schedule": "constant",
    },
}


@dataclass(frozen=True)
class Config:
    """Settings of one run. Raises ValueError for a value that cannot work, and says which; also for one that the run
    would not look at (`READS`, `READ_WITH`), unless it is the default.

    Whole numbers do for floats and become them, numpy's numbers become Python's; nothing else is converted.

    task: what is learnt: "digits", which is embedded; "digits-inverted", a network pretrained on digits whose inputs
    change; "cifar10", "cifar100", and where a pretrained network's inputs change "cifar10-noisy" and
    "cifar10-inverted", see `tasks.vision`; classes of any "sentences"; "sst2", "rte", "wsc", see `tasks.text`; or
    "squad", see `tasks.squad`.
    data, model, at: where a task does not have its own: a folder with the data (where it is left out, the Hugging Face
    hub's, but for sentences), a pretrained model by name, folder or file, and the layer to cut it before.
    method: "ho" (HO-SFL), "first-order" (split learning with exact gradients, the upper bound), "frozen" (the client
    half never learns: the control), or another way to train a split model, see `hosfl.methods`: "checkpointed",
    "splitfed", "zo-both", "hosl" (always two-sided), "mu-splitfed". local_steps: of a SplitFed client between averages,
    of MU-SplitFed's server per round.
    rounds, clients, sampled: N clients, K of them per round. batch: samples per client and round.
    directions: P, perturbed forward passes per client and round; without such a pass where estimator is "backward".
    directions_from: "fresh" ones every round, or a "pool" of pool_size that is replaced every pool_rounds rounds (0:
    never). direction_scale: "unit", or "rms": scaled on every tensor by the power of two nearest its relative root mean
    square. dist: "rademacher" or "gaussian".
    mu: the size of a probe's step, rounded to the client's lattice where there is one. estimator: "one-sided"
    differences, the paper's; "two-sided" ones; "forward" mode, which has no step; or "backward", one backward pass.
    microbatch: samples that a client which backpropagates takes together, 0 for all; fewer need less memory.
    server_rate, client_rate, server_decay: learning rates, and weight decay of the server half; None: the task's tuned.
    client_rate is of the mean over the P directions, fresh or of a pool: one direction moves by client_rate / P times
    its scalar.
    rule: of the client half: "sgd"; "normalized", SGD with the rate over the running length of the gradient;
    "momentum" (0.9); "adamw" (0.9, 0.999). With a pool the server applies it to the pool's coefficients. With fresh
    directions momentum and AdamW keep moments on every client, and the half leaves the lattice.
    schedule: of both rates; "linear" falls to zero at the last round.
    aggregation: of the clients' answers and of their gradients of the server half: "weighted" by samples; "uniform";
    "median" or "trimmed", which stand a few clients that lie, cost accuracy where clients are unlike, and keep a
    gradient of the server half per client.
    clip, server_clip: the largest length of one client's gradient of the client half, as estimated, and of the server
    half; None for none.
    trains: which of the client half's parameters move: "all"; "lora", adapters of rank 8 beside all linear layers,
    which peft makes, "lora:2" of rank 2, "lora:2:*.query,*.value" beside some; "biases"; "norms"; or patterns of
    parameters' names, such as "*.query.*,*.value.*".
    dtype: of the client half. partition: of the training data over the clients: "dirichlet" with parameter alpha, by
    class or, in squad, by article: small means unlike; or "iid", at random in equal parts, which has no use for alpha.
    frozen: how the client half's weights that do not move are stored: "float32", which is as they are; "bfloat16"; or
    "int8", "int4", "int2", with a scale for every 64 weights or fewer. It computes in its dtype all the same.
    seed: of everything, below 2^64.
    evaluate_every, digest_every, snapshot_every: rounds; a snapshot is what a killed run resumes from. keep: snapshots.
    evaluate_on: "test", or "validation" for choosing rates. device: such as "cpu" or "cuda".
    """

    task: str = "digits"
    data: str = ""
    model: str = ""
    at: str = ""
    trains: str = "all"
    frozen: str = "float32"
    method: str = "ho"
    rounds: int = 400
    clients: int = 10
    sampled: int = 3
    local_steps: int = 5
    directions: int = 5
    directions_from: str = "pool"
    pool_size: int = 512
    pool_rounds: int = 0
    direction_scale: str = "unit"
    dist: str = "rademacher"
    mu: float = 1e-3
    estimator: str = "one-sided"
    microbatch: int = 0
    batch: int = 128
    server_rate: float | None = None
    client_rate: float | None = None
    server_decay: float | None = None
    rule: str = "normalized"
    schedule: str = "linear"
    aggregation: str = "weighted"
    clip: float | None = None
    server_clip: float | None = None
    dtype: str = "float32"
    partition: str = "dirichlet"
    alpha: float = 0.5
    seed: int = 0
    evaluate_every: int = 20
    evaluate_on: str = "test"
    digest_every: int = 100
    snapshot_every: int = 50
    keep: int = 3
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.names():
            object.__setattr__(self, name, typed(name, getattr(self, name)))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        counts = ("rounds", "clients", "sampled", "directions", "pool_size", "batch", "evaluate_every", "digest_every")
        for name in (*counts, "snapshot_every", "keep", "local_steps"):
            if not 1 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds * self.local_steps >= 2**32:
            raise ValueError(f"{self.rounds} rounds of {self.local_steps} local steps are more than can be numbered")
        if self.estimator in ("forward", "backward") and self.method in ("zo-both", "hosl", "mu-splitfed"):
            raise ValueError(f"{self.method} sees losses, not derivatives: estimator must be one-sided or two-sided")
        for name in ("pool_rounds", "microbatch"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("mu", "alpha", "server_rate", "client_rate", "clip", "server_clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.server_decay is not None and not (self.server_decay >= 0 and math.isfinite(self.server_decay)):
            raise ValueError(f"server_decay must be finite and not negative, got {self.server_decay}")
        for name, why in ignored(vars(self)).items():
            if getattr(self, name) != DEFAULTS[name]:
                raise ValueError(f"{name} = {getattr(self, name)!r} would do nothing {why}: leave it out")
        if self.method in REPLAYED and self.directions_from == "pool" and self.pool_size < self.directions:
            raise ValueError(
                f"cannot measure {self.directions} directions of a pool of {self.pool_size}: raise pool_size"
            )
        if self.sampled > self.clients:
            raise ValueError(f"cannot sample {self.sampled} of {self.clients} clients: lower sampled or raise clients")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")
        try:
            torch.zeros(1, device=self.device).item()  # on the device "meta" there is nothing to compute with
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(f"cannot compute on device {self.device!r}: {error}") from error

    def scheduled(self, rate: float, round: int) -> float:
        """The learning rate of a round, in float64: a function of the global round, the same for everyone."""
        return rate * (1 - round / self.rounds) if self.schedule == "linear" else rate

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def settings(self) -> dict[str, Any]:
        """The settings that a run's bits depend on, by name: all but `NEUTRAL`."""
        return decisive(asdict(self))


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Config)}


def ignored(settings: Mapping[str, Any]) -> dict[str, str]:
    """The names of all settings that a run of these would not look at, and why: "with method 'frozen'"."""
    of = {**DEFAULTS, **settings}
    read_by_some = {name for names in READS.values() for name in names}
    others = read_by_some - set(READS[of["method"]])
    found = {name: f"with method {of['method']!r}" for name in Config.names() if name in others}
    for name, (other, values) in READ_WITH.items():
        if not {name, other} & others and of[other] not in values:
            found[name] = f"with {other} {of[other]!r}"
    return found


def with_shared(own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A run's own settings, and those of the shared ones that it reads and does not have itself."""
    unread = ignored({**shared, **own})
    return {**{name: value for name, value in shared.items() if name not in unread}, **own}


def all_with_shared(runs: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`with_shared` of each run. Raises ValueError for a shared setting, not the default, that none of them reads."""
    unread = [ignored({**shared, **own}) for own in runs]
    for name, value in shared.items():
        reasons = [why.get(name) for why, own in zip(unread, runs, strict=True) if name not in own]
        if reasons and all(reasons) and value != DEFAULTS[name]:
            why = " or ".join(dict.fromkeys(map(str, reasons)))
            raise ValueError(f"{name} = {value!r} would do nothing {why}: leave it out")
    return [with_shared(own, shared) for own in runs]


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that a run's bits depend on."""
    return {name: value for name, value in settings.items() if name not in NEUTRAL}


def typed(name: str, value: Any) -> Any:
    """A setting's value, of its field's type: str, int, float or None. Raises ValueError naming field and value."""
    kind = str(Config.__dataclass_fields__[name].type)
    if value is None and "None" in kind:
        return None
    takes, becomes, called = KINDS[kind]
    if isinstance(value, takes) and not isinstance(value, bool):
        try:
            return becomes(value)
        except OverflowError:  # of a whole number beyond all floats
            pass
    raise ValueError(f"{name}: {called} is needed, got {value!r}")


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings, a line per key: "seed was 0, is 1". A key may be in one of them only."""

    def told(of: Mapping[str, Any], key: str) -> str:
        return repr(of[key]) if key in of else "not there"

    keys = dict.fromkeys((*was, *now))
    other = (key for key in keys if (key in was, was.get(key)) != (key in now, now.get(key)))
    return [f"{key} was {told(was, key)}, is {told(now, key)}" for key in other]

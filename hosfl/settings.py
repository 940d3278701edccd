"""The settings of a run: a small frozen object for each concern, and all of them together. Needs no torch.

A setting is defined once: its default, the sentence that `--help` shows, and the values that it may have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

# By a field's type: the types it accepts, numpy's numbers among them, the conversion, and its name in errors.
KINDS: dict[str, tuple[type, Callable[[Any], Any], str]] = {
    "str": (str, str, "text"),
    "int": (Integral, int, "a whole number"),
    "float": (Real, float, "a number"),
    "float | None": (Real, float, "a number or nothing"),
    "dict[str, Any]": (Mapping, dict, "names and values"),
}
LARGEST_COUNT = 2**32 - 1


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: int | None = None,
    positive: bool = False,
    neutral: bool = False,
    read_with: tuple[str, tuple[str, ...]] | None = None,
) -> Any:
    """A dataclass field that is a setting. help: the sentence that `--help` shows.

    choices: all values that it may have. least: the smallest value of a whole number, which must also be below 2^32.
    positive: above 0 and finite, unless it is None. neutral: a run's bits do not depend on it. read_with: another
    setting, and those of its values with which alone this one is read.
    """
    rules = {"choices": choices, "least": least, "positive": positive, "neutral": neutral, "read_with": read_with}
    metadata = {"help": help, **rules}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class _Checked:
    """Settings that are checked when they are made. Raises ValueError naming the one that cannot work.

    Whole numbers given for floats become floats, and numpy's numbers Python's; nothing else is converted.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, typed(f, getattr(self, f.name)))
        for f in fields(self):
            value, rules = getattr(self, f.name), f.metadata
            if rules["choices"] and value not in rules["choices"]:
                raise ValueError(f"{f.name} must be one of {', '.join(rules['choices'])}, got {value!r}")
            if rules["least"] is not None and value < rules["least"]:
                raise ValueError(f"{f.name} must be at least {rules['least']}, got {value}")
            if rules["least"] is not None and value > LARGEST_COUNT:
                raise ValueError(f"{f.name} must be at most {LARGEST_COUNT}, got {value}")
            if rules["positive"] and value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{f.name} must be positive and finite, got {value}")


@dataclass(frozen=True)
class Data(_Checked):
    """What is learnt, and how its data are divided over clients.

    Args:
        task: the name of one of `hosfl.tasks`; or a function that makes a `Task`, "FILE.py:FUNCTION" or
            "package.module:FUNCTION"; "" where `hosfl.train` is given a task.
        options: of the task, by name.
        data: a folder with the task's data, where it does not have its own; "": the Hugging Face hub's.
        clients: N; a task that has the data of each client says N itself.
        sampled: K, clients that take part in a round.
        batch: samples per client and round.
        partition: how training data are divided over clients: "dirichlet", by class or, in squad, by article; or "iid",
            at random in equal parts.
        alpha: parameter of "dirichlet", above 0: the smaller, the more clients differ.
        public: training samples that are set aside, the same in every run. No client has them, and nobody reads their
            labels. They are the task's public samples, which adapters may be made from: see `trains`.

    Raises:
        ValueError: a value that cannot work.
    """

    task: str = setting("digits", "what is learnt: {tasks}, or FILE.py:FUNCTION, which makes a task")
    options: dict[str, Any] = setting({}, "an option of the task, NAME=VALUE; may be given several times")
    data: str = setting(
        "",
        "a folder with the task's data as published, for squad also one file; default: the package's own, or the"
        " Hugging Face hub's",
        neutral=True,
    )
    clients: int = setting(10, "clients, each with its own data", least=1)
    sampled: int = setting(3, "clients that take part in a round", least=1)
    batch: int = setting(128, "samples per client and round, or all it has if fewer", least=1)
    partition: str = setting(
        "dirichlet",
        "how data are divided over clients: each class, in squad each article, by shares from a Dirichlet"
        " distribution; or at random in equal parts",
        choices=("dirichlet", "iid"),
    )
    alpha: float = setting(
        0.5,
        "Dirichlet parameter of the partition: the smaller, the more the clients' data differ",
        positive=True,
        read_with=("partition", ("dirichlet",)),
    )
    public: int = setting(
        0,
        "training samples set aside, without their labels, as public ones, from which act adapters are made; 0: the"
        " task's own public samples",
        least=0,
    )


@dataclass(frozen=True)
class Halves(_Checked):
    """Which model, where it is cut, and how the client holds its half.

    Args:
        model: a pretrained model by name, folder or file, where a task does not have its own.
        at: the layer to cut it before, by number or name.
        trains: which of the client half's parameters move; see below.
        frozen: how the weights that do not move are stored: "float32", as they are; "bfloat16"; or "int8", "int4" or
            "int2" with a scale for every 64 weights or fewer. The half computes in its dtype all the same.
        calibrate: batches on which each client of the first round estimates the running statistics of its half's
            normalisations, such as BatchNorm's, before that round; all clients take up the aggregate. 0: none.
        dtype: of the client half: "float32" or "bfloat16".
        wire: how cuts and multipliers travel: "float32", as they are computed; "bfloat16" or "float16", half the bytes;
            or "int8" with a scale for each 64 numbers, a quarter and a little.
        device: where to compute, such as "cpu" or "cuda".

    What `trains` may be:

        all                     every parameter that requires grad
        biases, norms           all biases; all parameters of normalisations
        *.query.*,*.value.*     parameters whose names match one of these patterns
        lora                    adapters of rank 8, by peft, beside all linear layers
        lora:2                  of rank 2
        lora:2:*.query,*.value  of rank 2, beside layers whose names match
        xs:2, xs:2:LAYERS       2 x 2 numbers beside linear layers and convolutions, all or some,
                                between fixed matrices made from their weights
        act:2, act:2:LAYERS     the same, matrices made from their inputs for public samples
        peft:NAME               adapters of peft with its defaults, such as peft:vera
        peft:FILE.json          adapters of peft as its adapter_config.json says

    Raises:
        ValueError: a value that cannot work.
    """

    model: str = setting(
        "",
        "a pretrained model, a name on the hub or a folder; default: the task's own",
        neutral=True,
    )
    at: str = setting("", "the layer to cut the model before, by number or name; default: the task's own")
    trains: str = setting(
        "all",
        "what of the client half is trained: all, lora, or xs, act or lora with :RANK or :RANK:LAYERS, peft:NAME or"
        " peft:FILE.json, biases, norms, or name patterns",
    )
    frozen: str = setting(
        "float32",
        "how the client half's frozen weights are stored; float32: as they are",
        choices=("float32", "bfloat16", "int8", "int4", "int2"),
    )
    calibrate: int = setting(
        0,
        "batches per client by which the running statistics of the client half's BatchNorms are estimated anew before"
        " the first round; 0: none",
        least=0,
    )
    dtype: str = setting("float32", "dtype of the client half", choices=("float32", "bfloat16"))
    wire: str = setting(
        "float32",
        "dtype in which the cut and the gradient at the cut are sent; float32: as they are computed",
        choices=("float32", "bfloat16", "float16", "int8"),
    )
    device: str = setting("cpu", "where to compute, such as cpu or cuda")


@dataclass(frozen=True)
class Learning(_Checked):
    """How both halves learn. A method reads some of these: `Method.reads`.

    Args:
        method: the name of one of `hosfl.methods`, or "FILE.py:CLASS".
        local_steps: of a SplitFed client between averages, of MU-SplitFed's server per round.
        directions: P, directions that a client measures in a round. Each costs a perturbed forward pass, two with
            "two-sided" differences, and none with the estimator "backward".
        blocks: groups of the client half's layers, with about as many layers in each that move. A direction moves one
            group, so that its pass runs from there to the cut only, and groups close to the cut get more of the P
            directions. With one group passes run from the first layer that moves, where that saves a tenth of a pass or
            more.
        directions_from: "fresh" directions in every round, or a "pool" that is measured in turn.
        pool_size: D, directions in the pool.
        pool_rounds: rounds until the pool is replaced; 0: never.
        direction_scale: "unit"; or "rms", by which directions on a tensor are scaled with its relative root mean
            square, rounded to a power of two.
        dist: of the directions: "rademacher" or "gaussian".
        mu: the size of a probe's perturbation, above 0; rounded to the lattice where there is one.
        estimator: of directional derivatives: "one-sided" differences, the paper's; "two-sided" ones; "forward" mode,
            which has no step; or "backward", one backward pass.
        microbatch: samples that a client which backpropagates takes together; fewer need less memory. 0: all.
        probes_at_once: perturbed forward passes that share one pass, each with a copy of the weights that move and
            activations of its own. Faster where these weights and the batch are small; differs by rounding only.
        compile: a backend of torch.compile for the client half's forward passes, such as "inductor", where weights move
            in place and one probe runs at a time. Differs by rounding only. "": none.
        server_batch: the most samples that go through the server half in one pass, of the cuts of several clients;
            faster where cuts are small. Multipliers differ by rounding, and dropout draws other numbers. 0: each
            client's cut by itself.
        multiplier: the gradient at the cut that a client is sent: "exact"; or "centered", without the part that shifts
            all samples' outputs alike, which the half's own bias learns and which is mostly noise in a small batch.
            "centered" costs one more backward pass without the half's weights, and is for tasks with one label per
            sample. With non-IID clients set server_batch, so that a pass has several clients' samples.
        server_first: the number of first rounds in which only the server half learns; clients send their cuts and
            nothing more. Gradients from a head with random weights say little (Kumar et al., arXiv 2202.10054, train it
            first).
        server_rate: learning rate of the server half; None: the task's tuned one.
        client_rate: learning rate of the client half, of the mean over the P directions: one direction moves by
            client_rate / P times its scalar. None: the task's tuned one.
        server_decay: weight decay of the server half; None: the task's tuned one.
        rule: update rule of the client half: "sgd"; "normalized", SGD with the rate over a running mean of the
            gradient's norm; "momentum" (0.9); or "adamw" (0.9, 0.999). With a pool the server applies it to the pool's
            coefficients. With fresh directions momentum and AdamW keep moments on every client, and the half leaves the
            lattice.
        aggregation: of the clients' answers, and of their gradients of the server half: mean "weighted" by samples;
            "uniform" mean; "median" or "trimmed" mean, which withstand a few clients that lie, cost accuracy with
            non-IID clients, and keep a gradient of the server half per client.
        clip: the largest L2 norm of one client's gradient of the client half, as it is estimated; None: any.
        server_clip: the largest L2 norm of one client's gradient of the server half; None: any.

    Raises:
        ValueError: a value that cannot work.
    """

    method: str = setting("ho", "how both halves learn: {methods}, or FILE.py:CLASS, a method of your own")
    local_steps: int = setting(
        5, "steps of a SplitFed client between averages, of MU-SplitFed's server per round", least=1
    )
    directions: int = setting(
        5, "P, perturbed forward passes per client and round; with the estimator backward any number", least=1
    )
    blocks: int = setting(
        1,
        "groups of the client half's layers; each direction moves one group; 1: all of the half",
        least=1,
        read_with=("directions_from", ("fresh",)),
    )
    directions_from: str = setting(
        "pool", "new directions every round, or a fixed pool of which P are measured in turn", choices=("fresh", "pool")
    )
    pool_size: int = setting(512, "D, directions in the pool", least=1, read_with=("directions_from", ("pool",)))
    pool_rounds: int = setting(
        0, "rounds until the pool is replaced; 0: never", least=0, read_with=("directions_from", ("pool",))
    )
    direction_scale: str = setting(
        "unit",
        "scale of directions on a tensor: 1, or in proportion to the tensor's root mean square",
        choices=("unit", "rms"),
    )
    dist: str = setting("rademacher", "distribution of the directions", choices=("rademacher", "gaussian"))
    mu: float = setting(
        1e-3, "size of a probe's perturbation", positive=True, read_with=("estimator", ("one-sided", "two-sided"))
    )
    estimator: str = setting(
        "one-sided",
        "how directional derivatives are found: differences, forward mode, or one backward pass",
        choices=("one-sided", "two-sided", "forward", "backward"),
    )
    microbatch: int = setting(
        0, "samples that a backward pass takes together, 0: all", least=0, read_with=("estimator", ("backward",))
    )
    probes_at_once: int = setting(
        1,
        "probes that share one pass, each on a copy of the weights that move: faster where these and the batch are"
        " small, for as many times the activations",
        least=1,
        read_with=("estimator", ("one-sided", "two-sided", "forward")),
    )
    compile: str = setting(
        "",
        "a backend of torch.compile, such as inductor, for the client half's forward passes; default: none",
        read_with=("estimator", ("one-sided", "two-sided")),
    )
    server_batch: int = setting(
        0,
        "samples of several clients' cuts that share one pass of the server half: faster where cuts are small, for as"
        " many times the activations; 0: each cut by itself",
        least=0,
        read_with=("aggregation", ("weighted", "uniform")),
    )
    multiplier: str = setting(
        "exact",
        "the gradient at the cut that a client is sent; centered: without the part that shifts the outputs of all"
        " samples alike, which is mostly noise",
        choices=("exact", "centered"),
    )
    server_first: int = setting(
        0,
        "first rounds in which only the server half learns: for one that begins with random weights",
        least=0,
    )
    server_rate: float | None = setting(
        None, "the server's learning rate; default: tuned for task and method", positive=True
    )
    client_rate: float | None = setting(
        None, "the clients' learning rate; default: tuned for task and method", positive=True
    )
    server_decay: float | None = setting(None, "weight decay of the server half; default: tuned for task and method")
    rule: str = setting(
        "normalized",
        "update rule of the client half: SGD with the rate divided by a running mean of the gradient's norm, SGD, with"
        " momentum, or AdamW; with a pool it acts on the pool's coefficients",
        choices=("normalized", "sgd", "momentum", "adamw"),
    )
    aggregation: str = setting(
        "weighted",
        "how clients' answers, and their gradients of the server half, are aggregated",
        choices=("weighted", "uniform", "median", "trimmed"),
    )
    clip: float | None = setting(
        None,
        "the largest norm of one client's estimated gradient of the client half; default: none",
        positive=True,
    )
    server_clip: float | None = setting(
        None, "the largest norm of one client's gradient of the server half; default: none", positive=True
    )


@dataclass(frozen=True)
class Schedule(_Checked):
    """How long a run is, its seed, and how often it evaluates and saves.

    Args:
        rounds: of the run.
        schedule: of both learning rates: "linear", which falls to zero at the last round, or "constant".
        seed: of everything that is random, 0 <= seed < 2^64.
        evaluate_every: rounds between evaluations.
        evaluate_on: "test", or "validation" for choosing rates.
        digest_every: rounds between digests, by which clients check their weights.
        snapshot_every: rounds between snapshots of the server, from which a killed run resumes.
        keep: how many snapshots are kept.

    Raises:
        ValueError: a value that cannot work.
    """

    rounds: int = setting(400, "rounds", least=1)
    schedule: str = setting(
        "linear",
        "schedule of both learning rates; linear falls to zero at the last round",
        choices=("linear", "constant"),
    )
    seed: int = setting(0, "seed of all that is random")
    evaluate_every: int = setting(20, "rounds between evaluations", least=1, neutral=True)
    evaluate_on: str = setting(
        "test", "data to evaluate on; validation is for choosing rates", choices=("test", "validation")
    )
    digest_every: int = setting(100, "rounds between digests, by which clients check their weights", least=1)
    snapshot_every: int = setting(
        50, "rounds between snapshots of the server, from which a killed run resumes", least=1, neutral=True
    )
    keep: int = setting(3, "snapshots kept", least=1, neutral=True)

    def scheduled(self, rate: float, round: int) -> float:
        """The learning rate of a round, float64: a function of the round's number, the same for all clients."""
        return rate * (1 - round / self.rounds) if self.schedule == "linear" else rate


@dataclass(frozen=True)
class Settings(Schedule, Learning, Halves, Data):
    """All settings of a run. Raises ValueError for a value that cannot work, alone or together with others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds * self.local_steps > LARGEST_COUNT:
            raise ValueError(
                f"{self.rounds} rounds of {self.local_steps} local steps are more than can be numbered,"
                f" {LARGEST_COUNT}: lower one"
            )
        if self.server_decay is not None and not (self.server_decay >= 0 and math.isfinite(self.server_decay)):
            raise ValueError(f"server_decay must be finite and not negative, got {self.server_decay}")
        if self.server_first and self.server_first >= self.rounds:
            raise ValueError(
                f"server_first={self.server_first} leaves none of {self.rounds} rounds for the client half: lower it"
            )
        if self.sampled > self.clients:
            raise ValueError(f"cannot sample {self.sampled} of {self.clients} clients: lower sampled or raise clients")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")

    @classmethod
    def names(cls) -> list[str]:
        """The names of all settings."""
        return list(FIELDS)

    def decisive(self) -> dict[str, Any]:
        """The settings that a run's bits depend on, by name."""
        return decisive(asdict(self))


class Rates(NamedTuple):
    """Learning rates of the server and of the client half, and the weight decay of the server's optimizer."""

    server: float
    client: float
    decay: float


CONCERNS: tuple[type[_Checked], ...] = (Data, Halves, Learning, Schedule)
FIELDS: dict[str, Field[Any]] = {f.name: f for concern in CONCERNS for f in fields(concern)}
DEFAULTS: dict[str, Any] = {
    name: f.default_factory() if f.default_factory is not MISSING else f.default for name, f in FIELDS.items()
}
# Settings that a run's bits do not depend on: the paths of data and model (whose content counts), files, evaluations.
NEUTRAL = tuple(name for name, f in FIELDS.items() if f.metadata["neutral"])
# Settings that came later. With these values a run's description leaves them out, so that it fits older logs.
LATER = {name: DEFAULTS[name] for name in ("options", "compile", "server_batch", "multiplier", "server_first")}

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


def typed(of: Field[Any] | str, value: Any) -> Any:
    """Convert a value to the type of a setting, a field or its name. Raises ValueError naming field and value."""
    if isinstance(of, str):
        of = FIELDS[of]
    kind = str(of.type)
    if value is None and "None" in kind:
        return None
    accepted, convert, description = KINDS[kind]
    if isinstance(value, accepted) and not isinstance(value, bool):
        try:
            return convert(value)
        except OverflowError:  # of a whole number beyond all floats
            pass
    got = " ".join(repr(value).split())  # a Task's repr has all its data
    raise ValueError(f"{of.name}: {description} is needed, got {got if len(got) < 200 else got[:197] + '...'}")


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among these that a run's bits depend on."""
    return {
        name: value
        for name, value in settings.items()
        if name not in NEUTRAL and not (name in LATER and value == LATER[name])
    }


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two mappings, a line per key: "seed was 0, is 1". A key may be missing in one of them."""

    def text(mapping: Mapping[str, Any], key: str) -> str:
        return repr(mapping[key]) if key in mapping else "not there"

    keys = dict.fromkeys((*was, *now))
    changed = (key for key in keys if (key in was, was.get(key)) != (key in now, now.get(key)))
    return [f"{key} was {text(was, key)}, is {text(now, key)}" for key in changed]

"""Makes the federation of a run from its settings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hosfl.files import regular
from hosfl.halves.adapters import fixed_factors
from hosfl.halves.inputs import Inputs
from hosfl.halves.narrow import narrow_weights
from hosfl.halves.split import RunHalves, SplitModel, cast_floats, dtype_of
from hosfl.halves.trains import select_trainable
from hosfl.methods import calibration, method_of
from hosfl.methods.client import Client
from hosfl.methods.cuts import CutSpec
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.method import Method, Setup
from hosfl.methods.state import prefixed
from hosfl.protocol.aggregate import AGGREGATIONS
from hosfl.protocol.header import Header
from hosfl.protocol.provenance import Provenance, ProvenanceError, header_digest
from hosfl.protocol.rebuild import base_digest
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl.runs.checkpoint import header_of
from hosfl.runs.federation import Federation
from hosfl.runs.trial import try_halves
from hosfl.settings import DEFAULTS, Rates, Settings
from hosfl.tasks import TASKS, TUNED, make_task
from hosfl.tasks.data import Dataset, dirichlet_split, iid_split, shard_count
from hosfl.tasks.items import Batches, Items, check_same_kinds
from hosfl.tasks.task import Task, TaskError, lookup_rates


def assemble(
    config: Settings, smallest_shard: int | None = None, task: Task | None = None, resumed: Path | None = None
) -> tuple[Federation, Task]:
    """The federation of a run before its first round, and its task. Everything follows from the settings.

    Nothing is written. Where clients still have to estimate running statistics, the federation has no header and no
    provenance until `Federation.calibrate`.

    Args:
        config: the settings.
        smallest_shard: the fewest samples in a part of the data. Where that leaves fewer parts than clients, several
            clients share a part, each with its own batches. None: a part for each client.
        task: a task that is an object rather than a name; its public samples are set aside already.
        resumed: the folder of a run that is resumed. Fixed factors of adapters, and running statistics that clients
            have estimated, are read from its base file, since another machine or other clients would compute other
            bits.

    Raises ValueError, DataError, ProvenanceError for a base file that is not this run's, and what `Task.halves` raises.
    """
    task = task_of(config) if task is None else task
    config = with_task_clients(config, task)
    check_same_kinds(task.sets())
    kind, rates = method_of(config.method), rates_of(task, config)
    device = torch.device(config.device)
    model = halves_of(config, task)
    _check_storable(model)
    first = prefixed("client", model.client.state_dict()) | prefixed("server", model.server.state_dict())
    halves = base_digest(first)
    base = base_of(config, model, task.public)
    if config.calibrate and not calibration.running(base):
        raise ValueError(
            f"calibrate = {config.calibrate} needs a client half with running statistics, such as BatchNorm's, and this"
            " one has none: leave it out"
        )
    fixed, file = fixed_factors(base), None if resumed is None else resumed / "base.safetensors"
    if fixed and file is not None and file.exists():
        _load_from_base(fixed, file)
    base = base.to(device)
    shares = [share.to(device, dtype_of(base)) for share in partition(task, config, smallest_shard)]
    half = model.server.to(device)
    if not any(parameter.requires_grad for parameter in half.parameters()):
        raise ValueError("the server half has no parameters that train: cut the model earlier")
    cut_shape, sample = try_halves(task, RunHalves(base, half), shares[0])
    setup = Setup(config, base, rates, AGGREGATIONS[config.aggregation], sample.inputs)
    method = kind(setup)
    statistics = calibration.RunningStatistics.of(base, config.batch * config.calibrate) if config.calibrate else None

    def make(number: int) -> Client:
        return client_of(method, number, calibration.initial_half(base, statistics), shares[number % len(shares)], task)

    server = method.server(
        half=half,
        loss=task.loss,
        optimizer=_optimizer(task, half, rates.decay),
        rate=method.rate(rates.server),
        ledger=method.ledger,
        seed=config.seed,
        clients=config.clients,
        cuts=_cut_spec(task, config, cut_shape, sample, method.read("wire")),
        aggregation=setup.aggregation,
        clip=config.server_clip,
        passes=setup.passes,
        statistics=statistics,
        server_first=method.read("server_first"),
        centered=method.read("multiplier") == "centered",
    )
    running = {} if statistics is None else calibration.running(base)

    describe = partial(_describe, config, task, method, base, halves, {**fixed, **running})
    federation = Federation(config, server, make, base, setup.observed, kind.exchanges(config), describe=describe)
    if statistics is not None and file is not None:
        _load_from_base(running, file)
        statistics.values = calibration.flat(base)
    if statistics is None or file is not None:
        federation.complete()
    return federation, task


def _cut_spec(task: Task, config: Settings, shape: tuple[int, ...], sample: Dataset, wire: str) -> CutSpec:
    """shape: of one sample's cut."""
    return CutSpec(
        shape,
        task.classes,
        config.batch,
        masked=isinstance(sample.inputs, dict) and "attention_mask" in sample.inputs,
        label_shape=tuple(sample.labels.shape[1:]),
        real=sample.labels.is_floating_point(),
        ignore_index=task.ignore_index,
        wire=wire,
    )


def _describe(
    config: Settings, task: Task, method: Method, base: nn.Module, halves: str, fixed: dict[str, Tensor]
) -> tuple[Header | None, Provenance]:
    """The log's header, for a method that has one, and the run's provenance.

    halves: the digest of both halves. fixed: tensors of the client half that it does not cover: factors of adapters,
    running statistics.
    """
    model, header = halves, None
    if fixed:
        model = base_digest({"halves": np.frombuffer(bytes.fromhex(halves), np.uint8), **fixed})
    if isinstance(method.ledger, SeedReplay):
        header = header_of(method.ledger.run, base, config.decisive())
    log = "" if header is None else header_digest(header)
    return header, Provenance(config.decisive(), task.digest(), model, log)


def _check_storable(model: SplitModel) -> None:
    """Raises ValueError for a half whose state dict has values other than tensors, which safetensors cannot store."""
    for side, half in (("client", model.client), ("server", model.server)):
        for name, value in half.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} of the {side} half is a {type(value).__name__} and no tensor, as quantised layers hold it,"
                    " and cannot be stored: give the model as it was before; frozen=int8 stores what does not move so"
                )


def _optimizer(task: Task, half: nn.Module, decay: float) -> torch.optim.Optimizer:
    """The task's optimizer of the server half. Raises TaskError for another object, ValueError for another half's."""
    optimizer = task.optimizer(half, decay)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TaskError(f"the task's optimizer is a {type(optimizer).__name__}: a torch.optim.Optimizer is needed")
    trained = {parameter for parameter in half.parameters() if parameter.requires_grad}
    if not any(parameter in trained for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "the task's optimizer has none of the server half's parameters that train: make it of the half that is"
            " given to the function"
        )
    return optimizer


def client_of(method: Method, number: int, half: nn.Module, data: Dataset | Items, task: Task) -> Client:
    """A new client, which has applied no round. half: its own copy of the base; data: its samples."""
    config = method.settings
    batches = Batches(data, config.batch, config.seed, number, task.per_token)
    client = method.make_client(number, half, batches)
    others = replace(batches, purpose=Purpose.CALIBRATION)
    client.calibration_batches = lambda: map(others, range(config.calibrate))
    return client


def halves_of(config: Settings, task: Task) -> SplitModel:
    """Both halves as the task makes them, in a run of these settings.

    Raises what `Task.halves` does, and ValueError for a model that cannot be copied.
    """
    try:
        return task.halves(round_seed(config.seed, Purpose.MODEL, 0), "" if config.task else config.at)
    except RuntimeError as error:
        if name := _name_of_computed(task.model):
            raise ValueError(
                f"the task's model cannot be copied: its {name} is a tensor that was computed with a graph, as"
                " torch.nn.utils.weight_norm leaves it. Take torch.nn.utils.parametrizations.weight_norm, or give a"
                " function that makes the model"
            ) from error
        raise


def _name_of_computed(model: Any) -> str:
    """The name of a tensor in a model, or in two halves, that was computed with a graph; "" if there is none."""
    for half in model if isinstance(model, tuple) else (model,):
        for path, module in half.named_modules() if isinstance(half, nn.Module) else ():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    return f"{path}.{name}".removeprefix(".")
    return ""


def base_of(config: Settings, model: SplitModel, public: Inputs | None) -> nn.Module:
    """The client half of round 0, in its dtype and with its adapters. Raises ValueError; see `select_trainable`."""
    base, dtype = select_trainable(model.client, config.trains, config.seed, public), getattr(torch, config.dtype)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(
                f"{name} of the client half is complex and moves, and noise is of real numbers: leave it out by trains,"
                " or hold it as two real parameters, of which the forward pass makes it"
            )
    return narrow_weights(cast_floats(base, dtype), config.frozen)


def _load_from_base(fixed: dict[str, Tensor], path: Path) -> None:
    """Load tensors of a half from a run's base file. fixed: the tensors by name; nothing else is read.

    Raises ProvenanceError for a file that is missing or has not these tensors. The provenance is compared later, which
    tells whether their values are this run's.
    """
    try:
        with safe_open(regular(path), "pt") as file:
            names = set(file.keys())
            stored = {name: file.get_tensor(name) for name in fixed if name in names}
    except (SafetensorError, OSError) as error:
        raise ProvenanceError(f"{path} cannot be read: {error}. Put it back, or start anew") from error
    for name, tensor in fixed.items():
        if name not in stored or stored[name].shape != tensor.shape or stored[name].dtype != tensor.dtype:
            raise ProvenanceError(f"{path} has no {name} as this run has it: put its own back")
        with torch.no_grad():
            tensor.copy_(stored[name])


def with_task_clients(config: Settings, task: Task) -> Settings:
    """The settings with the task's number of clients, if the task has the data of each client.

    Raises ValueError where the settings say another number.
    """
    if not isinstance(task.train, list) or config.clients == len(task.train):
        return config
    if config.clients != DEFAULTS["clients"]:
        raise ValueError(
            f"the task has the data of {len(task.train)} clients, not of {config.clients}: leave out clients"
        )
    clients, sampled = len(task.train), config.sampled
    if sampled == DEFAULTS["sampled"]:
        sampled = min(sampled, clients)
    return replace(config, clients=clients, sampled=sampled)


def task_of(config: Settings) -> Task:
    """The task of a run.

    Raises what `make_task` raises. Missing rates raise what they would in `rates_of`, but before a built-in task
    fetches its data from the hub, which may take long.
    """
    if config.task in TASKS and config.task not in TUNED and not config.data:
        lookup_rates({}, method_of(config.method).tuned(config), config)
    return make_task(config)


def rates_of(task: Task, config: Settings) -> Rates:
    """The rates of a run: its own, or those that were tuned for its task and method. Raises ValueError."""
    return task.rates_of(method_of(config.method).tuned(config), config)


def partition(task: Task, config: Settings, smallest_shard: int | None = None) -> list[Dataset | Items]:
    """The training samples of each client, or of each part where clients share them; see `assemble`."""
    train = task.train
    if isinstance(train, list):
        return train
    parts = config.clients if smallest_shard is None else shard_count(len(train), config.clients, smallest_shard)
    if config.partition == "iid":
        owned = iid_split(len(train), parts, config.seed)
    else:
        groups = train.labels if task.groups is None else task.groups
        if groups.dim() != 1 or groups.is_floating_point():
            raise ValueError("labels that are no classes cannot divide the data: use partition iid, or give groups")
        owned = dirichlet_split(groups, parts, config.alpha, config.seed)
    return [train[chosen] for chosen in owned]

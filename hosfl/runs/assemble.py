"""Assembling the federation of a run from its settings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
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
from hosfl.methods.server import Server
from hosfl.methods.state import prefixed
from hosfl.protocol.aggregate import AGGREGATIONS
from hosfl.protocol.header import Header
from hosfl.protocol.provenance import Provenance, ProvenanceError, header_digest
from hosfl.protocol.rebuild import base_digest
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl.runs.checkpoint import make_header
from hosfl.runs.compatibility import check_compatibility
from hosfl.runs.federation import Federation
from hosfl.settings import DEFAULTS, Rates, Settings
from hosfl.tasks import TASKS, TUNED, make_task
from hosfl.tasks.data import Dataset, dirichlet_split, iid_split, shard_count
from hosfl.tasks.items import Batches, Items, check_same_kinds
from hosfl.tasks.task import Task, TaskError, lookup_rates


def assemble(
    config: Settings, smallest_shard: int | None = None, task: Task | None = None, resumed: Path | None = None
) -> tuple[Federation, Task]:
    """Make the federation of a run, before its first round, and its task. Everything follows from the settings.

    Nothing is written. If clients still have to estimate running statistics, the federation has no header and no
    provenance until `Federation.calibrate`.

    Args:
        config: the settings.
        smallest_shard: the fewest samples in a part of the data. If there are then fewer parts than clients, several
            clients share a part, each with its own batches. None: a part for each client.
        task: a task that is an object rather than a name; its public samples are set aside already.
        resumed: the folder of a run that is resumed. Fixed factors of adapters, and running statistics that clients
            have estimated, are read from its base file: another machine, or other clients, would compute other bits.

    Raises ValueError, DataError, ProvenanceError for a base file that is not this run's, and what `Task.halves` raises.
    """
    task = make_checked_task(config) if task is None else task
    config = with_task_clients(config, task)
    check_same_kinds(task.sets())
    kind, rates = method_of(config.method), rates_of(task, config)
    device = torch.device(config.device)
    model = make_halves(config, task)
    _check_storable(model)
    initial = prefixed("client", model.client.state_dict()) | prefixed("server", model.server.state_dict())
    halves_digest = base_digest(initial)
    base = make_base_half(config, model, task.public)
    _check_running_statistics(config, base)
    fixed, base_file = fixed_factors(base), None if resumed is None else resumed / "base.safetensors"
    if fixed and base_file is not None and base_file.exists():
        _load_from_base(fixed, base_file)
    base = base.to(device)
    shares = [share.to(device, dtype_of(base)) for share in partition(task, config, smallest_shard)]
    half = model.server.to(device)
    if not any(parameter.requires_grad for parameter in half.parameters()):
        raise ValueError("the server half has no parameters that train: cut the model earlier")
    cut_shape, sample = check_compatibility(task, RunHalves(base, half), shares[0])
    setup = Setup(config, base, rates, AGGREGATIONS[config.aggregation], sample.inputs)
    method = kind(setup)
    statistics = calibration.RunningStatistics.of(base, config.batch * config.calibrate) if config.calibrate else None

    def client(number: int) -> Client:
        initial_half = calibration.initial_half(base, statistics)
        return make_client(method, number, initial_half, shares[number % len(shares)], task)

    server = _make_server(method, task, half, _cut_spec(task, method, cut_shape, sample), statistics)
    running = {} if statistics is None else calibration.running(base)
    describe = partial(_describe, config, task, method, base, halves_digest, {**fixed, **running})
    federation = Federation(config, server, client, base, setup.observed, kind.exchanges(config), describe=describe)
    if statistics is not None and base_file is not None:
        _load_from_base(running, base_file)
        statistics.values = calibration.flat(base)
    if statistics is None or base_file is not None:
        federation.complete()
    return federation, task


def _check_running_statistics(config: Settings, base: nn.Module) -> None:
    """Raises ValueError if clients are to estimate running statistics, and the client half has none."""
    if config.calibrate and not calibration.running(base):
        raise ValueError(
            f"calibrate = {config.calibrate} needs a client half with running statistics, such as BatchNorm's, and this"
            " one has none: leave it out"
        )


def _make_server(
    method: Method,
    task: Task,
    half: nn.Module,
    cuts: CutSpec,
    statistics: calibration.RunningStatistics | None,
) -> Server:
    """Make the method's server. half: the server half; cuts: those that it accepts."""
    settings, setup = method.settings, method.setup
    return method.server(
        half=half,
        loss=task.loss,
        optimizer=_optimizer(task, half, setup.rates.decay),
        rate=method.rate(setup.rates.server),
        ledger=method.ledger,
        seed=settings.seed,
        clients=settings.clients,
        cuts=cuts,
        aggregation=setup.aggregation,
        clip=settings.server_clip,
        passes=setup.passes,
        statistics=statistics,
        server_first=method.read("server_first"),
        centered=method.read("multiplier") == "centered",
    )


def _cut_spec(task: Task, method: Method, shape: tuple[int, ...], sample: Dataset) -> CutSpec:
    """Describe the cuts that the server accepts. shape: of one sample's cut; sample: a few samples."""
    return CutSpec(
        shape,
        task.classes,
        method.settings.batch,
        masked=isinstance(sample.inputs, dict) and "attention_mask" in sample.inputs,
        label_shape=tuple(sample.labels.shape[1:]),
        real=sample.labels.is_floating_point(),
        ignore_index=task.ignore_index,
        wire=method.read("wire"),
    )


def _describe(
    config: Settings, task: Task, method: Method, base: nn.Module, halves_digest: str, fixed: dict[str, Tensor]
) -> tuple[Header | None, Provenance]:
    """Make the log's header, or None if the method has no log, and the run's provenance.

    halves_digest: of both halves. fixed: tensors of the client half that this digest does not cover: factors of
    adapters, and running statistics.
    """
    model, header = halves_digest, None
    if fixed:
        model = base_digest({"halves": np.frombuffer(bytes.fromhex(halves_digest), np.uint8), **fixed})
    if isinstance(method.ledger, SeedReplay):
        header = make_header(method.ledger.run, base, config.decisive())
    log = "" if header is None else header_digest(header)
    return header, Provenance(config.decisive(), task.digest(), model, log)


def _check_storable(model: SplitModel) -> None:
    """Raises ValueError for a half whose state dict has values that are no tensors: safetensors cannot store them."""
    for side, half in (("client", model.client), ("server", model.server)):
        for name, value in half.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} of the {side} half is a {type(value).__name__} and no tensor, as quantised layers hold it,"
                    " and cannot be stored: give the model as it was before; frozen=int8 stores what does not move so"
                )


def _optimizer(task: Task, half: nn.Module, decay: float) -> torch.optim.Optimizer:
    """Make the task's optimizer of the server half. Raises TaskError if it is none, ValueError if of another half."""
    optimizer = task.optimizer(half, decay)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TaskError(f"the task's optimizer is a {type(optimizer).__name__}: a torch.optim.Optimizer is needed")
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise TaskError(
            f"the task's optimizer {type(optimizer).__name__} evaluates the loss several times a step, and the server"
            " has one gradient: take another, such as SGD or AdamW"
        )
    trained = {parameter for parameter in half.parameters() if parameter.requires_grad}
    if not any(parameter in trained for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "the task's optimizer has none of the server half's parameters that train: make it of the half that is"
            " given to the function"
        )
    return optimizer


def make_client(method: Method, number: int, half: nn.Module, data: Dataset | Items, task: Task) -> Client:
    """Make a client that has applied no round. half: its own copy of the base; data: its samples."""
    config = method.settings
    batches = Batches(data, config.batch, config.seed, number, task.per_token)
    client = method.make_client(number, half, batches)
    calibration_batches = replace(batches, purpose=Purpose.CALIBRATION)
    client.calibration_batches = lambda: map(calibration_batches, range(config.calibrate))
    return client


def make_halves(config: Settings, task: Task) -> SplitModel:
    """Make both halves of a run's model.

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
    """Find a tensor of a model, or of two halves, that was computed with a graph; return its name, or "" for none."""
    for half in model if isinstance(model, tuple) else (model,):
        for path, module in half.named_modules() if isinstance(half, nn.Module) else ():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    return f"{path}.{name}".removeprefix(".")
    return ""


def make_base_half(config: Settings, model: SplitModel, public: Inputs | None) -> nn.Module:
    """Make the client half of round 0, in its dtype and with its adapters. Raises ValueError.

    public: inputs of which adapters "act:..." are made: see `select_trainable`.
    """
    base, dtype = select_trainable(model.client, config.trains, config.seed, public), getattr(torch, config.dtype)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(
                f"{name} of the client half is complex and moves, and noise is of real numbers: leave it out by trains,"
                " or hold it as two real parameters, of which the forward pass makes it"
            )
    return narrow_weights(cast_floats(base, dtype), config.frozen)


def _load_from_base(fixed: dict[str, Tensor], path: Path) -> None:
    """Load some of a half's tensors from a run's base file. fixed: these tensors, by name.

    Raises ProvenanceError for a file that is missing or lacks them. Whether their values are this run's shows later,
    when the provenance is compared.
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
    """Return the settings with the task's number of clients, if the task has the data of each client.

    Raises ValueError if the settings have another number.
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


def make_checked_task(config: Settings) -> Task:
    """Make the task of a run; if it fetches its data from the hub, check first that there are rates.

    Raises what `make_task` raises, and ValueError for missing rates.
    """
    if config.task in TASKS and config.task not in TUNED and not config.data:
        lookup_rates({}, method_of(config.method).tuned(config), config)
    return make_task(config)


def rates_of(task: Task, config: Settings) -> Rates:
    """Return the rates of a run: its own, or those tuned for its task and method. Raises ValueError for neither."""
    return task.rates_of(method_of(config.method).tuned(config), config)


def partition(task: Task, config: Settings, smallest_shard: int | None = None) -> list[Dataset | Items]:
    """Return the training samples of each client, or of each part if clients share parts: see `assemble`."""
    train = task.train
    if isinstance(train, list):
        return train
    parts = config.clients if smallest_shard is None else shard_count(len(train), config.clients, smallest_shard)
    if config.partition == "iid":
        indices = iid_split(len(train), parts, config.seed)
    else:
        groups = train.labels if task.groups is None else task.groups
        if groups.dim() != 1 or groups.is_floating_point():
            kind = str(groups.dtype).removeprefix("torch.")
            raise ValueError(
                f"labels that are no classes cannot divide the data: use partition iid, or give groups (they are {kind}"
                f" {[*groups.shape]}, and classes are integers [{len(groups)}])"
            )
        indices = dirichlet_split(groups, parts, config.alpha, config.seed)
    return [train[chosen] for chosen in indices]

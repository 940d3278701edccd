"""From settings to a federation that is ready for its first round, and what its model is worth."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hosfl.engines.in_process import Federation
from hosfl.halves.inputs import call
from hosfl.halves.narrow import narrowed
from hosfl.halves.split import SplitModel, dtype_of
from hosfl.halves.trains import moving_only
from hosfl.methods import method_of
from hosfl.methods.client import Client
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.method import Setup
from hosfl.methods.state import prefixed
from hosfl.protocol.aggregate import AGGREGATIONS
from hosfl.protocol.provenance import Provenance, header_digest
from hosfl.protocol.rebuild import base_digest
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl.runs.checkpoint import header_of
from hosfl.settings import Rates, Settings
from hosfl.tasks import task_maker
from hosfl.tasks.data import Batches, Dataset, dirichlet_split, iid_split, shards
from hosfl.tasks.task import Scores, Task


def assemble(config: Settings, smallest_shard: int | None = None) -> tuple[Federation, Task]:
    """The federation of a run, before its first round; everything in it follows from the configuration.

    Nothing is written. smallest_shard: so many samples or more in each part of the data; clients that are more than the
    parts share them, each with its own batches.
    """
    task = task_maker(config.task)(config)
    kind = method_of(config.method)
    rates = rates_of(task, config)
    device = torch.device(config.device)
    model = task.model(round_seed(config.seed, Purpose.MODEL, 0))
    halves = base_digest(prefixed("client", model.client.state_dict()) | prefixed("server", model.server.state_dict()))
    base = moving_only(model.client, config.trains, config.seed).to(getattr(torch, config.dtype))
    base = narrowed(base, config.frozen).to(device)
    setup = Setup(config, base, rates, AGGREGATIONS[config.aggregation])
    method = kind(setup)
    data = task.splits.train.to(device, dtype_of(base))
    owned = partition(task, config, smallest_shard)

    def make(number: int) -> Client:
        mine = data[owned[number % len(owned)]]
        return method.client(number, copy.deepcopy(base), Batches(mine, config.batch, config.seed, number))

    half = model.server.to(device)
    with torch.no_grad():
        cut_shape = tuple(call(base, data[:1].inputs).shape[1:])
    server = method.server(
        half=half,
        loss=task.loss,
        optimizer=task.optimizer(half, rates.decay),
        rate=method.rate(rates.server),
        ledger=method.ledger,
        seed=config.seed,
        clients=config.clients,
        cut_shape=cut_shape,
        classes=task.classes,
        batch=config.batch,
        masked=isinstance(data.inputs, dict) and "attention_mask" in data.inputs,
        label_shape=tuple(data.labels.shape[1:]),
        aggregation=setup.aggregation,
        clip=config.server_clip,
        passes=setup.passes,
    )
    header = None
    if isinstance(method.ledger, SeedReplay):
        header = header_of(method.ledger.run, base, config.decisive())
    made_of = Provenance(config.decisive(), task.digest(), halves, "" if header is None else header_digest(header))
    exchanges = kind.exchanges(config)
    return Federation(config, server, make, base, setup.observed, exchanges, header=header, provenance=made_of), task


def rates_of(task: Task, config: Settings) -> Rates:
    """The rates of a run: its own, or those that were tuned for its task and method. Raises ValueError."""
    return task.rates(method_of(config.method).tuned(config), config)


def partition(task: Task, config: Settings, smallest_shard: int | None = None) -> list[Tensor]:
    """Who owns which training sample: indices int64 per client, or per part where a crowd shares them."""
    train = task.splits.train
    parts = config.clients if smallest_shard is None else shards(len(train), config.clients, smallest_shard)
    if config.partition == "iid":
        return iid_split(len(train), parts, config.seed)
    groups = train.labels if task.groups is None else task.groups
    return dirichlet_split(groups, parts, config.alpha, config.seed)


def evaluate(model: SplitModel, data: Dataset, task: Task) -> tuple[Scores, float]:
    """(the task's scores, mean loss) of a model on a data set, both halves in eval mode."""
    modes = model.client.training, model.server.training
    model.client.eval(), model.server.eval()
    at_once = max(1, min(512, 512 * 64 // data.length))
    # Short texts with short ones, where outputs are per sample: those per token have to be of one length.
    order = data.lengths.argsort(stable=True) if data.labels.dim() == 1 else torch.arange(len(data))
    outputs, loss = [], 0.0
    with torch.no_grad():
        for chosen in order.split(at_once):
            part = data[chosen].to(data.labels.device, dtype_of(model.client))
            output = model(part.trimmed().inputs if data.labels.dim() == 1 else part.inputs)
            outputs.append(output)
            loss += float(task.loss(output, part.labels)) * len(part)
    model.client.train(modes[0]), model.server.train(modes[1])
    return task.metric(torch.cat(outputs)[order.argsort()], data), loss / len(data)

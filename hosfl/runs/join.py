"""A client on its own machine: it fetches a run's files once, and then answers requests.

No code comes from the server: a task or method in a user's file must be named on this machine too. The exception is a
cluster with one owner, whose machines all read the file that the run names.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from hosfl.engines.engine import JoinError, Line
from hosfl.engines.joining import check_cut, check_labels, fetch_file, read_offer, take_part
from hosfl.files import regular
from hosfl.halves.inputs import Inputs, call, evaluating, mask_of
from hosfl.halves.split import dtype_of
from hosfl.methods import METHODS, calibration, method_of
from hosfl.methods.client import Client
from hosfl.methods.ho import ZerothOrderClient
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.method import Setup
from hosfl.protocol.aggregate import AGGREGATIONS
from hosfl.protocol.endpoint import Endpoint
from hosfl.protocol.provenance import header_digest
from hosfl.references import absolute_reference, load_object
from hosfl.runs.assemble import make_base_half, make_client, make_halves, partition, rates_of
from hosfl.runs.checkpoint import make_header
from hosfl.runs.config import Config
from hosfl.runs.serve import LOCAL
from hosfl.tasks import READERS, TASKS, make_task
from hosfl.tasks.data import Dataset
from hosfl.tasks.items import Items, as_dataset, read, stored_labels
from hosfl.tasks.reading import DataError, call_user_function, load_arrays

# Settings that may name a user's code: (the built-in names, what FILE.py:NAME names).
USER_CODE = {"task": (TASKS, "FUNCTION"), "method": (METHODS, "CLASS")}


def read_run(offer: bytes, task: str = "", method: str = "", **local: Any) -> tuple[dict[str, Any], Config]:
    """Parse the run that a server offers: (its other fields, see `read_offer`; its settings with this machine's).

    task, method: "FILE.py:FUNCTION" and "FILE.py:CLASS" on this machine, for a run whose task or method is not built
    in. local: settings of this machine. Raises JoinError.
    """
    settings, run = read_offer(offer)
    for name, given in (("task", task), ("method", method)):
        offered, (library, kind) = settings.get(name), USER_CODE[name]
        run[name] = offered
        is_built_in = isinstance(offered, str) and offered in library
        if not is_built_in and not given:
            raise JoinError(
                f"the run is of the server's own {name} {offered!r}: name yours with --{name} FILE.py:{kind}, since no"
                " code is fetched"
            )
        if is_built_in and given:
            raise JoinError(f"the run's {name} is {offered!r}, the library's: leave out --{name}")
        if given:
            local[name] = given
    kind, _, adapter = str(settings.get("trains")).partition(":")
    if kind == "peft" and not re.fullmatch(r"[A-Za-z0-9_]+", adapter):  # another name may be a file of this machine
        raise JoinError(
            f"the run's adapters are {settings['trains']!r}, those of a file of the server's: this client reads no file"
            " by its name, and knows peft's own names, such as peft:vera"
        )
    unknown = sorted(set(settings) - set(Config.names()) | set(settings) & set(LOCAL))
    if unknown:
        raise JoinError(f"the run has settings that this version has not: {', '.join(unknown)}: update hosfl")
    try:
        config = Config(**{**settings, **local})
    except (TypeError, ValueError) as error:
        raise JoinError(f"the run's settings do not work here: {error}") from None
    return run, config


def read_client_data(data: str, config: Config, longest: int) -> Dataset | Items | None:
    """Read this client's own samples; None if the task reads `data` itself.

    data: "" for the client's share of the task's data; a file of arrays, .npz or .safetensors, with "labels" among its
    names; FILE.py:FUNCTION, which returns what `Task.train` takes; otherwise a file or a folder in the task's format,
    which need not have all classes, or whatever a user's task reads. longest: the most tokens of a text that the half
    reads. Raises DataError, ValueError, OSError.
    """
    if not data:
        return None
    if data.endswith((".npz", ".safetensors")):
        return _from_arrays(load_arrays(data, lambda file: load(regular(file).read_bytes())), data)
    if ".py:" in data:
        return as_dataset(call_user_function(data), data)
    if config.task in READERS:
        samples: Dataset = load_object(READERS[config.task], "data", {})(config, Path(data), longest)
        return samples
    if config.task in TASKS:
        raise ValueError(
            f"the task {config.task} reads no files such as {data}: give .npz, .safetensors or FILE.py:NAME"
        )
    return None


def _from_arrays(arrays: dict[str, Any], data: str) -> Dataset | Items:
    if set(arrays) == {"inputs", "labels"}:
        return as_dataset((arrays["inputs"], arrays["labels"]), data)
    return as_dataset(arrays, data)


def is_task_data(data: str, task: str) -> bool:
    """Whether a user's task reads `data` itself. task: "FILE.py:FUNCTION", or "" for a built-in task."""
    return bool(data and task) and not data.endswith((".npz", ".safetensors")) and ".py:" not in data


class ClientFactory:
    """Makes clients of a run from the files that the server offers. The model is made once, and copied per client.

    run, config: from `read_run`. base: the base file. own: one client's samples, see `read_client_data`; None: clients
    have shares of the task's. data_name: of these samples, for errors.

    Raises JoinError if base, settings and this version's code do not make the server's half; DataError for samples that
    this half does not take, or whose cuts or labels the server would refuse.
    """

    def __init__(
        self,
        run: dict[str, Any],
        config: Config,
        base: bytes,
        own: Dataset | Items | None = None,
        data_name: str = "the data",
    ) -> None:
        if hashlib.sha256(base).hexdigest() != run["base"]:
            raise JoinError("the base half has another SHA-256 than the run says: it was damaged, or is another run's")
        if own is not None:  # first, since errors of the task would not name the file
            _check_labels(own, run, data_name)
        self.config, self.task, self.own, self.id = config, make_task(config, own), own, run["id"]
        # The fixed factors of adapters are loaded from the base. Until then those of "xs" take their place, which need
        # no public samples.
        trains = "xs" + config.trains[3:] if config.trains.startswith("act:") else config.trains
        half = make_base_half(replace(config, trains=trains), make_halves(config, self.task), None).to(config.device)
        self.tensors, self.half = _load_base(half, base), half
        train = self.task.train if own is None else own
        first = train[0] if isinstance(train, list) else train
        sample = read(first[:2].to(config.device, dtype_of(half))).inputs
        _check_samples(half, sample, run["cut"], data_name)
        if own is None:
            _check_labels(first, run, data_name)
        self.kind = method_of(config.method)
        setup = Setup(config, half, rates_of(self.task, config), AGGREGATIONS[config.aggregation], sample)
        setup.measures = run["measures"]
        needed = "the same version, model, task and method are needed"
        try:
            self.method = self.kind(setup)
        except ValueError as error:
            raise JoinError(f"the half made here is not the server's: {error}: {needed}") from None
        self.has_ledger = self.method.ledger is not None
        if isinstance(self.method.ledger, SeedReplay):
            settings = {**config.decisive(), **{name: run[name] for name in USER_CODE}}
            if header_digest(make_header(self.method.ledger.run, half, settings)) != run["log"]:
                raise JoinError(f"the half made here is not the server's (hosfl {run['hosfl']} there): {needed}")
        self.method.ledger = None  # frees the server's replica

    def samples(self, number: int) -> Dataset | Items:
        """Return a client's samples: its own, or its share of the task's. Raises ValueError if there are neither."""
        train = self.task.train
        if self.own is not None:
            return self.own
        if not self.config.data:
            return partition(self.task, self.config)[number]
        if isinstance(train, list):
            raise ValueError(f"{self.config.data} has the data of {len(train)} clients: give this one's own")
        return train

    def endpoint(self, number: int, data: Dataset | Items, alone: bool = False) -> Endpoint[Client]:
        """Make a client and return its endpoint. alone: whether no other is made: then it gets the half, not a copy."""
        config, half = self.config, self.half if alone else copy.deepcopy(self.half)
        client = make_client(self.method, number, half, data.to(config.device, dtype_of(half)), self.task)
        if isinstance(client, ZerothOrderClient):
            client.replica.base = self._base  # the half's own weights change, so only the base file has round 0
        return Endpoint(client, self.kind.exchanges(config), self.has_ledger, bool(config.calibrate), self.id)

    def _base(self) -> list[Tensor]:
        """Return the trainable tensors of round 0."""
        names = [name for name, p in self.half.named_parameters() if p.requires_grad]
        return [self.tensors[name].to(self.config.device) for name in names]


def _check_samples(half: nn.Module, sample: Inputs, cut: list[int], name: str) -> None:
    """Raises DataError if the half cannot compute a cut that the server accepts from these samples."""
    try:
        with torch.no_grad(), evaluating(half):
            output = call(half, sample)
            shape, finite = list(output.shape[1:]), bool(output.isfinite().all())
    except Exception as error:  # of any type: the data may be anything
        raise DataError(f"{name}: the client half does not take these data: {error}") from None
    check_cut(shape, finite, mask_of(sample) is not None, cut, name)


def _check_labels(data: Dataset | Items, run: dict[str, Any], name: str) -> None:
    """Raises DataError for labels that the server would refuse in every round: see `Server`.

    Checks all labels if they are in memory, or if the data set stores them apart and they equal the first items'; else
    those of the first samples.
    """
    first = read(data[:2])
    labels = first.labels
    if isinstance(data, Dataset) or stored_labels(data.source) is not None:
        # A transformation may change the labels of items: then the stored ones are not those of the samples.
        labels = data.labels if data.labels[:2].tolist() == labels.tolist() else labels
    check_labels(labels.cpu().numpy(), None if mask_of(first.inputs) is None else first.length, run, name)


class WorkerFactory:
    """Makes a function that answers for any client of a run, in worker processes such as Ray's actors.

    It can be pickled. The function makes a client at its first request, and keeps no more clients than a round needs. A
    new client, also one that is made again, starts from the state of another one and need not replay its rounds: all
    clients that have applied the same rounds have the same bits.

    A task or method in a user's file is passed by its name: every machine must have the file at the same path, and runs
    it. So this is for machines of one owner.

    files: those that the server offers. smallest_shard: see `assemble`. local: this machine's settings.

    Raises JoinError for a task or method that is an object of the server's process; a call raises it for a missing
    file.
    """

    def __init__(self, files: Mapping[str, bytes], smallest_shard: int | None = None, **local: Any) -> None:
        self.files, self.smallest_shard, self.local = dict(files), smallest_shard, local
        settings = json.loads(files["run"])["settings"]
        for name, (library, kind) in USER_CODE.items():
            if not settings[name]:
                raise JoinError(
                    f"the run's {name} is an object of this process, which no other has: put it into a file,"
                    f" FILE.py:{kind}"
                )
            if settings[name] not in library:
                self.local[name] = absolute_reference(settings[name])

    def __call__(self) -> Callable[[int, bytes], bytes]:
        for name in USER_CODE:
            place, _, _ = self.local.get(name, "").rpartition(":")
            if place.endswith(".py") and not Path(place).is_file():
                raise JoinError(
                    f"{socket.gethostname()} has no {place}, where the run's {name} is: every machine has to have that"
                    " file at this path"
                )
        run, config = read_run(self.files["run"], **self.local)
        clients = ClientFactory(run, config, self.files["base"])
        shares = partition(clients.task, config, self.smallest_shard)
        recent: OrderedDict[int, Endpoint[Client]] = OrderedDict()

        def answer(number: int, data: bytes) -> bytes:
            if number not in recent:
                endpoint = clients.endpoint(number, shares[number % len(shares)])
                if recent:
                    newest = max((e.client for e in recent.values()), key=lambda c: (c.epoch, c.applied))
                    _copy_state(endpoint.client, newest)
                recent[number] = endpoint
                while len(recent) > config.sampled + 1:
                    recent.popitem(last=False)
            recent.move_to_end(number)
            return recent[number].answer(data)

        return answer


def _copy_state(client: Client, other: Client) -> None:
    """Copy the state of another client of the run into a new client."""
    if isinstance(client, ZerothOrderClient) and isinstance(other, ZerothOrderClient):
        client.load(other.replica.state())
    if other.calibrated:
        calibration.load(client.half, calibration.flat(other.half))
        client.calibrated = True


def _load_base(half: nn.Module, base: bytes) -> dict[str, Tensor]:
    """Load a base file into the half, and return its tensors. Raises JoinError if they are not those of the half."""
    try:
        tensors = load(base)
    except SafetensorError as error:
        raise JoinError(f"the base half is no safetensors file: {error}") from None
    here = half.state_dict()
    for name in here.keys() | tensors.keys():
        if name not in here or name not in tensors:
            raise JoinError(f"{name} is in the {'base' if name in tensors else 'half made here'} alone: another model?")
        if (here[name].shape, here[name].dtype) != (tensors[name].shape, tensors[name].dtype):
            raise JoinError(f"{name} has another shape or type in the base than in the half made here: another model?")
    half.load_state_dict(tensors)
    return tensors


def join(
    line: Line,
    number: int,
    folder: Path,
    *,
    data: str = "",
    task: str = "",
    method: str = "",
    model: str = "",
    device: str = "cpu",
) -> None:
    """Take part in a run until the line is closed. If the server starts another run, the client takes part in that.

    folder: for this client's base file and state. data: see `read_client_data`. task, method, model: if the run's are
    not built in. Raises JoinError, and what reading the data raises.
    """
    local = {"data": data if is_task_data(data, task) else "", "model": model, "device": device}

    def make_endpoint(offer: bytes) -> Endpoint[Client]:
        run, config = read_run(offer, task, method, **local)
        own = read_client_data(data, config, run["cut"][0] if run["cut"] else 1)
        base = fetch_file(line, "base", run["base"], folder / "base.safetensors")
        clients = ClientFactory(run, config, base, own, data or "the task's data")
        return clients.endpoint(number, clients.samples(number), alone=True)

    take_part(line, number, folder, make_endpoint)

"""A client on its own machine: it fetches the files of a run once, and answers requests from then on.

No code comes from the server: a task or a method of the user's own is named on this machine too. The exception is a
cluster with one owner, where a run's own files of code are read on all machines.
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

OWN = {"task": (TASKS, "FUNCTION"), "method": (METHODS, "CLASS")}  # settings that may be the user's code, FILE.py:NAME


def settings_of(offered: bytes, task: str = "", method: str = "", **local: Any) -> tuple[dict[str, Any], Config]:
    """(the run that the server offers, its settings with this machine's own). Raises JoinError.

    task: "FILE.py:FUNCTION" of this machine, for a run of a task that is not built in. method: "FILE.py:CLASS",
    likewise. local: settings of this machine.
    """
    settings, run = read_offer(offered)
    for name, own in (("task", task), ("method", method)):
        theirs, (library, kind) = settings.get(name), OWN[name]
        run[name] = theirs
        known = isinstance(theirs, str) and theirs in library
        if not known and not own:
            raise JoinError(
                f"the run is of the server's own {name} {theirs!r}: name yours with --{name} FILE.py:{kind}, since no"
                " code is fetched"
            )
        if known and own:
            raise JoinError(f"the run's {name} is {theirs!r}, the library's: leave out --{name}")
        if own:
            local[name] = own
    kind, _, of_peft = str(settings.get("trains")).partition(":")
    if kind == "peft" and not re.fullmatch(r"[A-Za-z0-9_]+", of_peft):  # else it might be a file's, of this machine
        raise JoinError(
            f"the run's adapters are {settings['trains']!r}, those of a file of the server's: this client reads no file"
            " by its name, and knows peft's own names, such as peft:vera"
        )
    strange = sorted(set(settings) - set(Config.names()) | set(settings) & set(LOCAL))
    if strange:
        raise JoinError(f"the run has settings that this version has not: {', '.join(strange)}: update hosfl")
    try:
        config = Config(**{**settings, **local})
    except (TypeError, ValueError) as error:
        raise JoinError(f"the run's settings do not work here: {error}") from None
    return run, config


def own_data(data: str, config: Config, longest: int) -> Dataset | Items | None:
    """This client's own samples; None where the task reads `data` itself.

    data: "" for the client's share of the task's data; a file of arrays, .npz or .safetensors, with "labels" among its
    names; FILE.py:FUNCTION, which returns what `Task.train` takes; otherwise a file or a folder in the task's format,
    which need not have all classes, or whatever a task of the user's own reads. longest: tokens of a text that the half
    reads. Raises DataError, ValueError, OSError.
    """
    if not data:
        return None
    if data.endswith((".npz", ".safetensors")):
        return _of_arrays(load_arrays(data, lambda file: load(regular(file).read_bytes())), data)
    if ".py:" in data:
        return as_dataset(call_user_function(data), data)
    if config.task in READERS:
        found: Dataset = load_object(READERS[config.task], "data", {})(config, Path(data), longest)
        return found
    if config.task in TASKS:
        raise ValueError(
            f"the task {config.task} reads no files such as {data}: give .npz, .safetensors or FILE.py:NAME"
        )
    return None


def _of_arrays(arrays: dict[str, Any], data: str) -> Dataset | Items:
    if set(arrays) == {"inputs", "labels"}:
        return as_dataset((arrays["inputs"], arrays["labels"]), data)
    return as_dataset(arrays, data)


def is_task_data(data: str, task: str) -> bool:
    """Whether a task of the user's own reads `data` itself."""
    return bool(data and task) and not data.endswith((".npz", ".safetensors")) and ".py:" not in data


class Clients:
    """Makes clients of one run from the files that the server offers. The model is made once, and copied per client.

    own: the samples of one client, see `own_data`; None: all have shares of the task's. what: how errors call them.

    Raises JoinError where base, settings and this version's code do not make the half that the server has, and
    DataError for samples that this half does not take, or whose cuts or labels the server would refuse.
    """

    def __init__(
        self,
        run: dict[str, Any],
        config: Config,
        base: bytes,
        own: Dataset | Items | None = None,
        what: str = "the data",
    ) -> None:
        if hashlib.sha256(base).hexdigest() != run["base"]:
            raise JoinError("the base half has another SHA-256 than the run says: it was damaged, or is another run's")
        if own is not None:  # first, since the task's errors could not name their file
            _check_labels(own, run, what)
        self.config, self.task, self.own, self.id = config, make_task(config, own), own, run["id"]
        # Fixed factors of adapters come with the base. Until then "xs" makes others, which needs no public samples.
        trains = "xs" + config.trains[3:] if config.trains.startswith("act:") else config.trains
        half = make_base_half(replace(config, trains=trains), make_halves(config, self.task), None).to(config.device)
        self.tensors, self.half = _load_base(half, base), half
        train = self.task.train if own is None else own
        first = train[0] if isinstance(train, list) else train
        sample = read(first[:2].to(config.device, dtype_of(half))).inputs
        _check_samples(half, sample, run["cut"], what)
        if own is None:
            _check_labels(first, run, what)
        self.kind = method_of(config.method)
        setup = Setup(config, half, rates_of(self.task, config), AGGREGATIONS[config.aggregation], sample)
        setup.measures = run["measures"]
        needed = "the same version, model, task and method are needed"
        try:
            self.method = self.kind(setup)
        except ValueError as error:
            raise JoinError(f"the half made here is not the server's: {error}: {needed}") from None
        self.follows = self.method.ledger is not None
        if isinstance(self.method.ledger, SeedReplay):
            settings = {**config.decisive(), **{name: run[name] for name in OWN}}
            if header_digest(make_header(self.method.ledger.run, half, settings)) != run["log"]:
                raise JoinError(f"the half made here is not the server's (hosfl {run['hosfl']} there): {needed}")
        self.method.ledger = None  # and the server's replica with it

    def samples(self, number: int) -> Dataset | Items:
        """The samples of a client: its own, or its share of the task's. Raises ValueError where neither is known."""
        train = self.task.train
        if self.own is not None:
            return self.own
        if not self.config.data:
            return partition(self.task, self.config)[number]
        if isinstance(train, list):
            raise ValueError(f"{self.config.data} has the data of {len(train)} clients: give this one's own")
        return train

    def endpoint(self, number: int, data: Dataset | Items, alone: bool = False) -> Endpoint[Client]:
        """The endpoint of a new client. alone: no other will be made, so that it may have the half and no copy."""
        config, half = self.config, self.half if alone else copy.deepcopy(self.half)
        client = make_client(self.method, number, half, data.to(config.device, dtype_of(half)), self.task)
        if isinstance(client, ZerothOrderClient):
            client.replica.base = self._base  # the half itself moves: round 0 is only in the base file
        return Endpoint(client, self.kind.exchanges(config), self.follows, bool(config.calibrate), self.id)

    def _base(self) -> list[Tensor]:
        """The trainable tensors at round 0."""
        names = [name for name, p in self.half.named_parameters() if p.requires_grad]
        return [self.tensors[name].to(self.config.device) for name in names]


def _check_samples(half: nn.Module, sample: Inputs, cut: list[int], what: str) -> None:
    """Raises DataError where the half cannot compute a cut that the server accepts from these samples."""
    try:
        with torch.no_grad(), evaluating(half):
            found = call(half, sample)
            made, finite = list(found.shape[1:]), bool(found.isfinite().all())
    except Exception as error:  # of whatever kind: the data may be anything
        raise DataError(f"{what}: the client half does not take these data: {error}") from None
    check_cut(made, finite, mask_of(sample) is not None, cut, what)


def _check_labels(data: Dataset | Items, run: dict[str, Any], what: str) -> None:
    """Raises DataError for labels that the server would refuse in every round: see `Server`.

    Checks all labels if they are in memory, or known beside items and equal to theirs; else those of the first samples.
    """
    first = read(data[:2])
    labels = first.labels
    if isinstance(data, Dataset) or stored_labels(data.source) is not None:
        # A transformation may change the label of an item, which is then not the one known beside it.
        labels = data.labels if data.labels[:2].tolist() == labels.tolist() else labels
    check_labels(labels.cpu().numpy(), None if mask_of(first.inputs) is None else first.length, run, what)


class AllClients:
    """A factory of a function that answers for any client of a run, for worker processes such as Ray's actors.

    It can be pickled. The function makes a client when it is first asked, and keeps no more of them than a round needs.
    A client that is made, or made again, starts from the state of another one: all clients that have applied the same
    rounds have the same bits, so that it need not replay them.

    A task or a method in a file of the user's goes by its name: every machine must have the file at the same path, and
    runs it. So this is for machines of one owner.

    files: what the server offers. smallest_shard: see `assemble`. local: this machine's settings.

    Raises JoinError for a task or method that is an object of the server's process, and, when it is called, for a
    file that is not there.
    """

    def __init__(self, files: Mapping[str, bytes], smallest_shard: int | None = None, **local: Any) -> None:
        self.files, self.smallest_shard, self.local = dict(files), smallest_shard, local
        settings = json.loads(files["run"])["settings"]
        for name, (library, kind) in OWN.items():
            if not settings[name]:
                raise JoinError(
                    f"the run's {name} is an object of this process, which no other has: put it into a file,"
                    f" FILE.py:{kind}"
                )
            if settings[name] not in library:
                self.local[name] = absolute_reference(settings[name])

    def __call__(self) -> Callable[[int, bytes], bytes]:
        for name in OWN:
            place, _, _ = self.local.get(name, "").rpartition(":")
            if place.endswith(".py") and not Path(place).is_file():
                raise JoinError(
                    f"{socket.gethostname()} has no {place}, where the run's {name} is: every machine has to have that"
                    " file at this path"
                )
        run, config = settings_of(self.files["run"], **self.local)
        clients = Clients(run, config, self.files["base"])
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
    """Bring a new client to the state of another client of the run."""
    if isinstance(client, ZerothOrderClient) and isinstance(other, ZerothOrderClient):
        client.load(other.replica.state())
    if other.calibrated:
        calibration.load(client.half, calibration.flat(other.half))
        client.calibrated = True


def _load_base(half: nn.Module, base: bytes) -> dict[str, Tensor]:
    """Load a base file into the half; returns its tensors. Raises JoinError where they are not those of the half."""
    try:
        tensors = load(base)
    except SafetensorError as error:
        raise JoinError(f"the base half is no safetensors file: {error}") from None
    own = half.state_dict()
    for name in own.keys() | tensors.keys():
        if name not in own or name not in tensors:
            raise JoinError(f"{name} is in the {'base' if name in tensors else 'half made here'} alone: another model?")
        if (own[name].shape, own[name].dtype) != (tensors[name].shape, tensors[name].dtype):
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
    """Take part in a run until the line is closed. When the server starts another run, the client takes part in it.

    folder: of this client, for its base file and its state. data: see `own_data`. task, method, model: where the run's
    are not built in. Raises JoinError, and what reading the data raises.
    """
    local = {"data": data if is_task_data(data, task) else "", "model": model, "device": device}

    def make(offered: bytes) -> Endpoint[Client]:
        run, config = settings_of(offered, task, method, **local)
        own = own_data(data, config, run["cut"][0] if run["cut"] else 1)
        base = fetch_file(line, "base", run["base"], folder / "base.safetensors")
        clients = Clients(run, config, base, own, data or "the task's data")
        return clients.endpoint(number, clients.samples(number), alone=True)

    take_part(line, number, folder, make)

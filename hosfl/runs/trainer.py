"""The rounds of one run, in one process. `train` is what `hosfl train` calls."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.narrow import narrowed
from hosfl.halves.split import SplitModel, dtype_of
from hosfl.halves.trains import moving_only
from hosfl.methods.baselines import (
    CheckpointedClient,
    CutProbingClient,
    HOSLClient,
    HOSLServer,
    SplitFedClient,
    ZerothOrderServer,
)
from hosfl.methods.client import Client, FirstOrderClient, ZerothOrderClient, load_vector
from hosfl.methods.ledger import FreshStep, GradientAverage, Ledger, PoolStep, SeedReplay, WeightAverage, WholeWeights
from hosfl.methods.server import KEPT, Server
from hosfl.probing.displaced import call
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import AGGREGATIONS, RunningLength
from hosfl.protocol.lattice import Lattice, LatticeError, power_of_two_scales
from hosfl.protocol.log import EpochRecord, Header, Log, LogError
from hosfl.protocol.messages import Message, MessageError, Wire, decode
from hosfl.protocol.replica import Pool, Replica, Rule, Run
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl.runs import snapshot
from hosfl.runs.checkpoint import (
    base_digest,
    check_free,
    header_digest,
    header_of,
    load_config,
    open_log,
    save_module,
)
from hosfl.runs.config import REPLAYED, Config, differences
from hosfl.runs.provenance import Provenance
from hosfl.runs.report import Evaluation, Replicas, Summary, Writer
from hosfl.runs.snapshot import prefixed
from hosfl.tasks.data import Batches, Dataset, dirichlet_split, iid_split, shards
from hosfl.tasks.task import TASKS, Scores, Task
from hosfl_kernels import SGD, AdamW

ADAM = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
POOL_BETAS = (0.5, 0.9)  # a coefficient is measured a few times only before its pool is replaced
MOMENTUM = 0.9


@dataclass
class Federation:
    """A server, its clients, and the wire between them.

    make: a client that has applied nothing, by its number. base: the client half of round 0. observed: the client half
    of the moment, for evaluation. header: of the log, for methods that have one; see `open_log`. provenance: what the
    run is made of. exchanges: cuts that a client sends per round; its answer to all but the last is the
    next one, and the server numbers them on and on. clients: those made so far. complained: what clients refused, the
    first thousand times; complaints: how many there were. visits: how many times a client took part.
    """

    config: Config
    server: Server
    make: Callable[[int], Client]
    base: nn.Module
    observed: nn.Module
    exchanges: int = 1
    wire: Wire = field(default_factory=Wire)
    clients: dict[int, Client] = field(default_factory=dict)
    complained: list[str] = field(default_factory=list)
    complaints: int = 0
    visits: int = 0
    header: Header | None = None
    provenance: Provenance | None = None

    def round(self, round: int) -> float:
        """One round of the protocol; returns the mean training loss of its clients, NaN if nobody took part.

        A message that is lost, late or refused costs its sender the round, and nobody else anything.
        """
        here: list[Client] = []
        sent: dict[int, Client] = {}  # whose cut is on its way
        invited = self.invited(round)
        cuts = self.late()
        try:
            for number in invited:
                client = self.take(number)
                here.append(client)
                if self.join(client):
                    self.visits += 1
                    sent[number] = client
                    cuts.append(self.up(client.output(round * self.exchanges)))
            losses = []
            for exchange in range(round * self.exchanges, (round + 1) * self.exchanges):
                answers, loss = self.server.step(exchange, [c for c in cuts if c is not None])
                losses.append(loss)
                # A late cut can be of this very round, which died once and began again: its sender may not be here.
                cuts = [self.answer(sent[n], m) for n, m in answers.items() if n in sent and sent[n].learns]
            self.server.commit(round, [a for a in cuts if a is not None])
        finally:
            for client in here:
                self.put_back(client)
        return sum(losses) / len(losses)

    def answer(self, client: Client, message: Message) -> Message | None:
        """The second exchange: what the server receives for a multiplier, or what else it sent for a cut."""
        received = self.down(message)
        if received is None:
            return None
        try:
            answer = client.answer(received)
        except MessageError as error:
            self._complain(client.number, error)
            return None
        return self.up(answer)

    def join(self, client: Client) -> bool:
        """The first exchange: the client says where it is and takes what it missed. False if that fails."""
        news: Message | None = client.hello()
        while news is not None:  # a client that finds its half wrong says so and starts anew: once more around
            heard = self.up(news)
            answer = None if heard is None else self.server.welcome(heard)
            if answer is None:
                return heard is not None and self.server.ledger is None
            received = self.down(answer)
            if received is None:
                return False
            try:
                news = client.catch_up(received)
            except (MessageError, LatticeError) as error:
                # Moves that fit the server's replica do not fit the client's: its weights are damaged.
                self._complain(client.number, error)
                return False
        return True

    def up(self, message: Message) -> Message | None:
        """What the server receives of a client's message."""
        data = self.wire.carry(message)
        return None if data is None else self.server.receive(data)

    def down(self, message: Message) -> Any:
        """What a client receives of the server's message."""
        data = self.wire.carry(message)
        try:
            return None if data is None else decode(data)
        except MessageError as error:
            self._complain(message.client, error)
            return None

    def _complain(self, client: int, error: Exception) -> None:
        self.complaints += 1
        if len(self.complained) < KEPT:
            self.complained.append(f"client {client}: {error}")

    def invited(self, round: int) -> list[int]:
        """Who takes part in a round."""
        return self.server.sample(round, self.config.clients, self.config.sampled)

    def late(self) -> list[Message | None]:
        """What arrives only now of earlier rounds: nothing, on a wire that delays nothing."""
        return []

    def take(self, number: int) -> Client:
        """A client, as it was when it was last here."""
        if number not in self.clients:
            self.clients[number] = self.make(number)
        return self.clients[number]

    def put_back(self, client: Client) -> None:
        """The client leaves."""

    def replicas(self) -> Replicas:
        """Bring every client up to date, and a newcomer from nothing in one message; do they hold the same bits?

        What moves here is not counted as the run's.
        """
        wire, self.wire = self.wire, Wire()
        digests = set()
        for number in range(self.config.clients):
            client = self.take(number)
            self.join(client)
            digests.add(client.digest())
            self.put_back(client)
        newcomer = self.make(0)
        self.join(newcomer)
        digests.add(newcomer.digest())
        self.wire = wire
        return Replicas(clients=self.config.clients + 1, digest=newcomer.digest(), equal=len(digests) == 1)

    def model(self) -> SplitModel:
        """Both halves as they are now."""
        ledger = self.server.ledger
        if isinstance(ledger, WholeWeights):
            load_vector(ledger.weights, trainable(self.observed)[0])
        return SplitModel(self.observed, self.server.half)

    def open_log(self, folder: Path) -> None:
        """Keep the client half's log in `folder`, where the method has one: a new one, or the one that is there."""
        if isinstance(self.server.ledger, SeedReplay) and self.header is not None:
            self.server.ledger.log = open_log(folder, self.header)

    def close(self) -> None:
        """Close the log."""
        if isinstance(self.server.ledger, SeedReplay) and self.server.ledger.log is not None:
            self.server.ledger.log.close()


def client_rule(config: Config) -> Rule | None:
    """The rule that every replica applies; None on a lattice, where records are moves."""
    if config.directions_from == "fresh":
        if config.rule == "momentum":
            return SGD(momentum=MOMENTUM)
        if config.rule == "adamw":
            return ADAM
    on_lattice = config.dist == "rademacher" and config.dtype == "float32"
    return None if on_lattice else SGD()


def make_run(config: Config, parameters: list[nn.Parameter]) -> Run:
    """What all agree on. Puts the parameters on their lattice, if the run has one."""
    rms = config.direction_scale == "rms"
    factors = power_of_two_scales(parameters) if rms else [1.0] * len(parameters)
    rule = client_rule(config)
    lattice = Lattice.snap(parameters, factors) if rule is None else None
    return Run(
        seed=config.seed,
        directions=config.directions,
        dist=config.dist,
        mu=config.mu if lattice is None else lattice.nearest(config.mu, at_least_one=True),
        factors=tuple(factors),
        lattice=lattice,
        rule=rule,
        pool=Pool(config.pool_size, config.pool_rounds) if config.directions_from == "pool" else None,
        estimator=config.estimator,
    )


def make_optimizer(
    rule: str, parameters: list[Tensor], betas: tuple[float, float] = ADAM.betas
) -> torch.optim.Optimizer:
    """The server's optimizer of numbers that stand for the client half: pool coefficients, or averaged weights."""
    if rule == "adamw":
        return torch.optim.AdamW(parameters, betas=betas, eps=ADAM.eps, weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=1.0, momentum=MOMENTUM if rule == "momentum" else 0.0)


def assemble(config: Config, smallest_shard: int | None = None) -> tuple[Federation, Task]:
    """The federation of a run, before its first round; everything in it follows from the configuration.

    Nothing is written. smallest_shard: so many samples or more in each part of the data; clients that are more than the
    parts share them, each with its own batches.
    """
    task = TASKS[config.task](config)
    device = torch.device(config.device)
    model = task.model(round_seed(config.seed, Purpose.MODEL, 0))
    halves = base_digest(prefixed("client", model.client.state_dict()) | prefixed("server", model.server.state_dict()))
    base = moving_only(model.client, config.trains, config.seed).to(getattr(torch, config.dtype))
    base = narrowed(base, config.frozen).to(device)
    parameters, streams = trainable(base)
    rates = task.rates(config)
    length = RunningLength() if config.rule == "normalized" else None
    aggregation = AGGREGATIONS[config.aggregation]

    def rate(base: float) -> Callable[[int], float]:
        return lambda round: config.scheduled(base, round)

    run = make_run(config, parameters) if config.method in REPLAYED else None
    observed = copy.deepcopy(base)
    ledger: Ledger | None = None
    header: Header | None = None
    if run is not None:
        step = (
            PoolStep(run, rate(rates.client), lambda p: make_optimizer(config.rule, p, POOL_BETAS), length)
            if run.pool
            else FreshStep(run, rate(rates.client), length)
        )
        mirror = Replica(trainable(observed)[0], streams, run, lambda: parameters)
        header = header_of(run, base, config.settings())
        ledger = SeedReplay(run, step, mirror, None, aggregation, config.clip, config.digest_every)
    elif config.method != "frozen":
        weights = nn.utils.parameters_to_vector(parameters).detach().cpu().float().clone()
        if config.method in ("splitfed", "hosl"):
            ledger = WeightAverage(weights, aggregation)
        else:
            optimizer = make_optimizer(config.rule, [weights.requires_grad_()])
            ledger = GradientAverage(weights, optimizer, rate(rates.client), length, aggregation, config.clip)

    train = task.splits.train
    data = train.to(device, dtype_of(base))
    parts = config.clients if smallest_shard is None else shards(len(train), config.clients, smallest_shard)
    if config.partition == "iid":
        owned = iid_split(len(train), parts, config.seed)
    else:
        groups = train.labels if task.groups is None else task.groups
        owned = dirichlet_split(groups, parts, config.alpha, config.seed)

    exchanges = config.local_steps if config.method == "splitfed" else 1
    passes: Counter[str] = Counter()

    def exchange_rate(base: float) -> Callable[[int], float]:
        return lambda exchange: config.scheduled(base, exchange // exchanges)

    settings: dict[str, Any] = {"passes": passes, "microbatch": config.microbatch}  # of the method's clients
    if run is not None:
        settings |= {"run": run, "base": lambda: parameters}
    elif isinstance(ledger, WeightAverage):
        settings |= {"optimizer": partial(make_optimizer, config.rule), "rate": exchange_rate(rates.client)}
        settings |= {"normalized": config.rule == "normalized", "steps": exchanges}
    if config.method == "hosl":
        settings |= _probing(config) | {"seed": config.seed}

    def make(number: int) -> Client:
        mine = owned[number % len(owned)]
        batches = Batches(data[mine], config.batch, config.seed, number)
        return CLIENTS[config.method](number, copy.deepcopy(base), batches, **settings)

    half = model.server.to(device)
    with torch.no_grad():
        cut_shape = tuple(call(base, data[:1].inputs).shape[1:])
    kind, more = _server_of(config)
    server = kind(
        half=half,
        loss=task.loss,
        optimizer=task.optimizer(half, rates.decay),
        rate=exchange_rate(rates.server),
        ledger=ledger,
        seed=config.seed,
        clients=config.clients,
        cut_shape=cut_shape,
        classes=task.classes,
        batch=config.batch,
        masked=isinstance(data.inputs, dict) and "attention_mask" in data.inputs,
        label_shape=tuple(data.labels.shape[1:]),
        aggregation=aggregation,
        clip=config.server_clip,
        passes=passes,
        **more,
    )
    made_of = Provenance(config.settings(), task.digest(), halves, "" if header is None else header_digest(header))
    return Federation(config, server, make, base, observed, exchanges, header=header, provenance=made_of), task


CLIENTS: dict[str, type[Client]] = {
    "ho": ZerothOrderClient,
    "first-order": FirstOrderClient,
    "frozen": Client,
    "checkpointed": CheckpointedClient,
    "splitfed": SplitFedClient,
    "zo-both": CutProbingClient,
    "hosl": HOSLClient,
    "mu-splitfed": CutProbingClient,
}


def _server_of(config: Config) -> tuple[type[Server], dict[str, Any]]:
    """The kind of server that a method has, and its own settings."""
    if config.method == "hosl":
        return HOSLServer, {"probes": 2 * config.directions}
    if config.method in ("zo-both", "mu-splitfed"):
        two_sided = config.estimator == "two-sided"
        steps = config.local_steps if config.method == "mu-splitfed" else 1
        probes = config.directions * (2 if two_sided else 1)
        return ZerothOrderServer, {**_probing(config), "probes": probes, "two_sided": two_sided, "steps": steps}
    return Server, {}


def _probing(config: Config) -> dict[str, Any]:
    return {"directions": config.directions, "dist": config.dist, "mu": config.mu}


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


def save_snapshot(federation: Federation, out: Path, round: int) -> None:
    """The server after `round` rounds. The log is on disk already: it never lags behind a snapshot.

    Raises LogError where the log is gone, replaced or cut by something else: what came after could not be rebuilt.
    """
    log = log_of(federation)
    if log is not None:
        log.check_file()
    tensors, info = federation.server.state()
    counted = {"bytes": federation.wire.bytes, "visits": federation.visits, "passes": dict(federation.server.passes)}
    made_of = federation.provenance and asdict(federation.provenance)
    position = None if log is None else list(log.position)
    info = {"server": info, "counted": counted, "provenance": made_of, "log": position}
    snapshot.save(out, round, tensors, info, keep=federation.config.keep)


def log_of(federation: Federation) -> Log | None:
    """The log of its client half, where there is one."""
    ledger = federation.server.ledger
    return ledger.log if isinstance(ledger, SeedReplay) else None


def restore(federation: Federation, out: Path) -> int:
    """Bring a new federation, its log open, to the newest snapshot in `out` that the log covers; returns its round.

    Committed rounds after it are void: the server will never see again what it had learnt from them. They are run again
    in a new epoch. Clients start from their base, like any that was away. Snapshots that are damaged, or that a log
    that lost its end does not cover, are passed over with a warning and set aside.

    Raises ProvenanceError for a snapshot of another run, LogError for a log of another history or one that is gone.
    """
    log = log_of(federation)

    def objection(saved: snapshot.Snapshot) -> str:
        what = out / f"snapshot-{saved.round:08d}.safetensors"
        assert federation.provenance is not None
        federation.provenance.check(saved.info.get("provenance"), what)
        if log is None:
            return ""
        records, digest = saved.info["log"]
        if records > log.position[0]:
            if not log.position[0]:
                raise LogError(f"{log.path} has no record of the {saved.round} rounds that {what} holds: put it back")
            return f"is after {saved.round} rounds, and {log.path} lost its end: it has {len(log.rounds)}"
        if log.digest_after(records) != digest:
            raise LogError(f"{log.path} and {what} are of two runs: they differ in the first {saved.round} rounds")
        later = [r for r in log.records[records:] if isinstance(r, EpochRecord)]
        return "is of rounds that are void" if any(r.round < saved.round for r in later) else ""

    saved = snapshot.latest(out, objection)
    round = 0 if saved is None else saved.round
    if saved is not None:
        federation.server.load((saved.tensors, saved.info["server"]))
        federation.wire.bytes = dict(saved.info["counted"]["bytes"])
        federation.visits = saved.info["counted"]["visits"]
        federation.server.passes.update(saved.info["counted"]["passes"])
    snapshot.set_aside(out, round)
    ledger = federation.server.ledger
    if isinstance(ledger, SeedReplay) and log is not None:
        ledger.restart(log, round)
    return round


class Diverged(ArithmeticError):
    """A loss that is not finite: from here on there is nothing to learn from."""


def check_loss(loss: float, done: int) -> None:
    """Raises Diverged for the loss of an evaluation that is infinite or NaN."""
    if not math.isfinite(loss):
        raise Diverged(f"the loss after round {done} is not finite: lower the learning rates")


Progress = Callable[[int, float, Evaluation | None, int], None]  # rounds done, training loss, evaluation, bytes so far


def train(
    config: Config, out: Path | str | None = None, progress: Progress | None = None, *, resume: bool = False
) -> Summary:
    """Run HO-SFL or one of its baselines; returns the summary.

    With `out`, writes there as it goes: config.json, base.safetensors, hosfl.log, snapshots, metrics.jsonl (one line
    per evaluation), and at the end summary.json, curves.png, client.safetensors and server.safetensors. The first
    Ctrl-C ends the run after the current round, with all of this written; the summary says how many rounds were done.
    resume: take up the run in `out`, however it ended, at its last snapshot; `config` must be that run's.

    Settings that the bits do not depend on (`config.NEUTRAL`) may change when a run is resumed; so data may lie
    elsewhere, with the same content.

    Raises: ValueError for settings that do not fit the task or the run to resume, ProvenanceError for data, a model or
    a file of another run, LatticeError when the run diverges off the lattice and Diverged when its loss is no longer
    finite (what was done until then is written), FileExistsError if `out` holds another run, RunFolderError if another
    process is at work there. A start that fails before its first round leaves the folder free.
    """
    if out is not None and not str(out):
        raise ValueError("out is empty: name a folder")
    folder = Path(out) if out is not None else None
    begin = time.perf_counter()
    if resume:
        if folder is None:
            raise ValueError("a run to resume needs its folder")
        differ = differences(load_config(folder).settings(), config.settings())
        if differ:
            raise ValueError(f"these are not the settings of the run in {folder}: {'; '.join(differ)}")
    elif folder is not None:
        check_free(folder)
    federation, task = assemble(config)
    assert federation.provenance is not None
    writer = Writer(folder)
    course = _Course(federation, task, writer, begin, progress)
    try:
        if resume and folder is not None:
            writer.resume(config, federation.provenance)
            federation.open_log(folder)
            course.done = restore(federation, folder)
            save_module(federation.base, folder / "base.safetensors")
        else:
            first = course.evaluated()
            writer.start(config, federation.provenance)
            course.last = writer.add(first)
            if folder is not None:
                save_module(federation.base, folder / "base.safetensors")
                federation.open_log(folder)
        return course.run()
    except BaseException:
        federation.close()
        if not resume and not course.done and course.failure is None:
            writer.clear()
        raise
    finally:
        federation.close()
        writer.close()


@dataclass
class _Course:
    """A run's way from its start or last snapshot to its end. last: the newest evaluation."""

    federation: Federation
    task: Task
    writer: Writer
    begin: float
    progress: Progress | None
    done: int = 0
    loss: float = math.nan
    last: Evaluation | None = None
    failure: LatticeError | Diverged | None = None

    def evaluated(self) -> Evaluation:
        federation, splits, config = self.federation, self.task.splits, self.federation.config
        data = (splits.test if config.evaluate_on == "test" else splits.validation).to(config.device)
        scores, loss = evaluate(federation.model(), data, self.task)
        seconds, moved = time.perf_counter() - self.begin, dict(federation.wire.bytes)
        return Evaluation.of(self.done, scores, loss, self.loss, moved, seconds)

    def run(self) -> Summary:
        federation, writer, folder = self.federation, self.writer, self.writer.folder
        config = federation.config
        with interruptible() as interrupted:
            if self.last is None:  # of a resumed run
                held = writer.resumed(self.done)
                self.begin -= held[-1].seconds if held else 0.0
                self.last = held[-1] if held else writer.add(self.evaluated())
            try:
                check_loss(self.last.loss, self.done)
                while self.done < config.rounds and not interrupted.is_set():
                    self.round()
                if folder is not None and interrupted.is_set():
                    self.snapshot(folder)
                if self.last.round != self.done:  # interrupted
                    self.last = writer.add(self.evaluated())
                    check_loss(self.last.loss, self.done)
            except (LatticeError, Diverged) as error:
                self.failure = error
            summary = Summary.of(
                config=config,
                rounds=self.done,
                last=self.last,
                clients=list(federation.clients.values()),
                visits=federation.visits,
                passes=federation.server.passes,
                refused=federation.server.refused + federation.complained,
                replicas=None if self.failure else federation.replicas(),
                provenance=federation.provenance,  # type: ignore[arg-type]  # of an assembled one
                seconds=time.perf_counter() - self.begin,
                failure=str(self.failure) if self.failure else None,
            )
            if folder is not None:
                model = federation.model()
                save_module(model.client, folder / "client.safetensors")
                save_module(model.server, folder / "server.safetensors")
            writer.finish(summary)
        if self.failure is not None:
            raise self.failure
        return summary

    def round(self) -> None:
        """One round, and what is due after it."""
        federation, folder, config = self.federation, self.writer.folder, self.federation.config
        self.loss = federation.round(self.done)
        self.done += 1
        due = self.done % config.evaluate_every == 0 or self.done == config.rounds
        if due:
            self.last = self.writer.add(self.evaluated())
            check_loss(self.last.loss, self.done)
        if folder is not None and (self.done % config.snapshot_every == 0 or self.done == config.rounds):
            self.snapshot(folder)
        if self.progress is not None:
            self.progress(self.done, self.loss, self.last if due else None, sum(federation.wire.bytes.values()))

    def snapshot(self, folder: Path) -> None:
        if self.writer.lock is not None:
            self.writer.lock.check()
        save_snapshot(self.federation, folder, self.done)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second interrupts as usual. Signals reach the main thread only."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)

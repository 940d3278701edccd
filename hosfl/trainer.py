"""The rounds of one run, in one process. `train` is what `hosfl train` calls."""

from __future__ import annotations

import copy
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

from hosfl import snapshot
from hosfl.aggregate import AGGREGATIONS, RunningLength
from hosfl.baselines import (
    CheckpointedClient,
    CutProbingClient,
    HOSLClient,
    HOSLServer,
    SplitFedClient,
    ZerothOrderServer,
)
from hosfl.checkpoint import header_of, load_config, open_log, save_module
from hosfl.client import Client, FirstOrderClient, ZerothOrderClient, load_vector
from hosfl.config import REPLAYED, Config
from hosfl.data import Batches, Dataset, dirichlet_split, iid_split
from hosfl.displaced import call
from hosfl.frozen import narrowed
from hosfl.lattice import Lattice, LatticeError, power_of_two_scales
from hosfl.ledger import FreshStep, GradientAverage, Ledger, PoolStep, SeedReplay, WeightAverage, WholeWeights
from hosfl.log import Log
from hosfl.messages import Message, MessageError, Wire, decode
from hosfl.probe import trainable
from hosfl.replica import Pool, Replica, Rule, Run
from hosfl.report import Evaluation, Replicas, Summary, Writer
from hosfl.seeds import Purpose, round_seed
from hosfl.server import Server
from hosfl.split import SplitModel, dtype_of
from hosfl.tasks import TASKS, Scores, Task
from hosfl.trains import moving_only
from hosfl_kernels import SGD, AdamW

ADAM = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
POOL_BETAS = (0.5, 0.9)  # a coefficient is measured a few times only before its pool is replaced
MOMENTUM = 0.9


@dataclass
class Federation:
    """A server, its clients, and the wire between them.

    make: a client that has applied nothing, by its number. base: the client half of round 0. observed: the client half
    of the moment, for evaluation. exchanges: cuts that a client sends per round; its answer to all but the last is the
    next one, and the server numbers them on and on. clients: those made so far. complaints: what clients refused.
    visits: how many times a client took part.
    """

    config: Config
    server: Server
    make: Callable[[int], Client]
    base: nn.Module
    observed: nn.Module
    exchanges: int = 1
    wire: Wire = field(default_factory=Wire)
    clients: dict[int, Client] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    visits: int = 0

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
            self.complaints.append(f"client {client.number}: {error}")
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
                self.complaints.append(f"client {client.number}: {error}")
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
            self.complaints.append(f"client {message.client}: {error}")
            return None

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


def assemble(config: Config, out: Path | None = None, smallest_shard: int | None = None) -> tuple[Federation, Task]:
    """The federation of a run, before its first round; everything in it follows from the configuration.

    With `out`, HO-SFL's log is created there, or opened if it is there already. smallest_shard: so many samples
    or more in each part of the data; clients that are more than the parts share them, each with its own batches.
    """
    task = TASKS[config.task](config)
    device = torch.device(config.device)
    model = task.model(round_seed(config.seed, Purpose.MODEL, 0))
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
    if run is not None:
        step = (
            PoolStep(run, rate(rates.client), lambda p: make_optimizer(config.rule, p, POOL_BETAS), length)
            if run.pool
            else FreshStep(run, rate(rates.client), length)
        )
        mirror = Replica(trainable(observed)[0], streams, run, lambda: parameters)
        log: Log | None = None
        if out is not None:
            log = open_log(out, header_of(run, base, asdict(config)))
        ledger = SeedReplay(run, step, mirror, log, aggregation, config.clip, config.digest_every)
    elif config.method != "frozen":
        weights = nn.utils.parameters_to_vector(parameters).detach().cpu().float().clone()
        if config.method in ("splitfed", "hosl"):
            ledger = WeightAverage(weights, aggregation)
        else:
            optimizer = make_optimizer(config.rule, [weights.requires_grad_()])
            ledger = GradientAverage(weights, optimizer, rate(rates.client), length, aggregation)

    train = task.splits.train
    data = train.to(device, dtype_of(base))
    parts = config.clients if smallest_shard is None else min(config.clients, len(train) // smallest_shard)
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
        passes=passes,
        **more,
    )
    return Federation(config, server, make, base, observed, exchanges), task


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
    """The server after `round` rounds. The log is on disk already: it never lags behind a snapshot."""
    tensors, info = federation.server.state()
    counted = {"bytes": federation.wire.bytes, "visits": federation.visits, "passes": dict(federation.server.passes)}
    snapshot.save(out, round, tensors, {"server": info, "counted": counted}, keep=federation.config.keep)


def restore(federation: Federation, out: Path) -> int:
    """Bring a new federation to the last snapshot in `out`; returns its round.

    Committed rounds after it are void: the server will never see again what it had learnt from them. They are run again
    in a new epoch. Clients start from their base, like any that was away.
    """
    saved = snapshot.latest(out)
    round = 0 if saved is None else saved.round
    if saved is not None:
        federation.server.load((saved.tensors, saved.info["server"]))
        federation.wire.bytes = dict(saved.info["counted"]["bytes"])
        federation.visits = saved.info["counted"]["visits"]
        federation.server.passes.update(saved.info["counted"]["passes"])
    ledger = federation.server.ledger
    if isinstance(ledger, SeedReplay) and ledger.log is not None:
        ledger.restart(ledger.log, round)
    return round


Progress = Callable[[int, float, Evaluation | None, int], None]  # rounds done, training loss, evaluation, bytes so far


def train(
    config: Config, out: Path | str | None = None, progress: Progress | None = None, *, resume: bool = False
) -> Summary:
    """Run HO-SFL or one of its baselines; returns the summary.

    With `out`, writes there as it goes: config.json, base.safetensors, hosfl.log, snapshots, metrics.jsonl (one line
    per evaluation), and at the end summary.json, curves.png, client.safetensors and server.safetensors. The first
    Ctrl-C ends the run after the current round, with all of this written; the summary says how many rounds were done.
    resume: take up the run in `out`, however it ended, at its last snapshot; `config` must be that run's.

    Raises: ValueError for settings that do not fit the task or the run to resume, LatticeError when the run diverges
    off the lattice (what was done until then is written), FileExistsError if `out` holds another run.
    """
    folder = Path(out) if out is not None else None
    begin = time.perf_counter()
    if resume and (folder is None or load_config(folder) != config):
        raise ValueError(f"these are not the settings of the run in {folder}: give the same ones, or another folder")
    writer = Writer(folder, config, resume)
    federation, task = assemble(config, folder)
    done = 0
    try:
        if folder is not None:
            save_module(federation.base, folder / "base.safetensors")
            if resume:
                done = restore(federation, folder)
        return _run(federation, task, writer, done, begin, progress)
    finally:
        federation.close()


def _run(
    federation: Federation, task: Task, writer: Writer, done: int, begin: float, progress: Progress | None
) -> Summary:
    config, folder = federation.config, writer.folder
    data = (task.splits.test if config.evaluate_on == "test" else task.splits.validation).to(config.device)
    evaluations = writer.resumed(done)
    begin -= evaluations[-1].seconds if evaluations else 0.0
    failure: LatticeError | None = None
    loss = float("nan")

    def evaluation() -> Evaluation:
        scores, test_loss = evaluate(federation.model(), data, task)
        seconds, moved = time.perf_counter() - begin, dict(federation.wire.bytes)
        return writer.add(Evaluation.of(done, scores, test_loss, loss, moved, seconds))

    with interruptible() as interrupted:
        if not evaluations:
            evaluations.append(evaluation())
        while done < config.rounds and not interrupted.is_set():
            try:
                loss = federation.round(done)
            except LatticeError as error:
                failure = error
                break
            done += 1
            due = done % config.evaluate_every == 0 or done == config.rounds
            if due:
                evaluations.append(evaluation())
            if folder is not None and (done % config.snapshot_every == 0 or done == config.rounds):
                save_snapshot(federation, folder, done)
            if progress is not None:
                progress(done, loss, evaluations[-1] if due else None, sum(federation.wire.bytes.values()))
        if folder is not None and interrupted.is_set():
            save_snapshot(federation, folder, done)
        if evaluations[-1].round != done and failure is None:
            evaluations.append(evaluation())
        summary = Summary.of(
            config=config,
            rounds=done,
            evaluations=evaluations,
            clients=list(federation.clients.values()),
            visits=federation.visits,
            passes=federation.server.passes,
            refused=federation.server.refused + federation.complaints,
            replicas=None if failure else federation.replicas(),
            seconds=time.perf_counter() - begin,
            failure=str(failure) if failure else None,
        )
        if folder is not None:
            model = federation.model()
            save_module(model.client, folder / "client.safetensors")
            save_module(model.server, folder / "server.safetensors")
        writer.finish(summary, evaluations)
    if failure is not None:
        raise failure
    return summary


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

"""The rounds of one run, in one process. `train` is what `hosfl train` calls."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import save_file
from torch import nn

from hosfl.aggregate import RunningLength
from hosfl.client import Client, FirstOrderClient, Run, ZerothOrderClient
from hosfl.config import Config
from hosfl.data import Batches, Dataset, dirichlet_split
from hosfl.lattice import Lattice, LatticeError
from hosfl.messages import Message, Multiplier, Wire
from hosfl.probe import trainable
from hosfl.report import Evaluation, Replicas, Summary, Writer
from hosfl.seeds import Purpose, round_seed
from hosfl.server import GradientAverage, SeedReplay, Server
from hosfl.split import SplitModel
from hosfl.tasks import TASKS, Task


@dataclass
class Federation:
    """A server, its clients, and the wire between them."""

    config: Config
    server: Server
    clients: list[Client]
    newcomer: Callable[[], Client]  # a client that has applied nothing: base weights, no data
    wire: Wire

    def round(self, round: int) -> float:
        """One round of the protocol; returns the mean training loss of its clients, NaN if nobody took part."""
        carry = self.wire.carry
        cuts = []
        sampled = self.server.sample(round, len(self.clients), self.config.sampled)
        for number in sampled:
            client = self.clients[number]
            news = self.server.welcome(carry(client.hello()))
            if news is not None:
                client.catch_up(carry(news))
            cuts.append(carry(client.output(round)))
        multipliers, loss = self.server.step(round, cuts)
        answers: list[Message] = []
        for number, multiplier in multipliers.items():
            client = self.clients[number]
            if client.learns:
                received: Multiplier = carry(multiplier)
                answers.append(carry(client.answer(received)))
        self.server.commit(round, answers)
        return loss

    def catch_up(self, client: Client) -> None:
        """Bring a client up to date outside the rounds: its bytes are not the run's."""
        wire = Wire()
        news = self.server.welcome(wire.carry(client.hello()))
        if news is not None:
            client.catch_up(wire.carry(news))


def assemble(config: Config) -> tuple[Federation, Task]:
    """The federation of a run, before its first round; everything in it follows from the configuration."""
    task = TASKS[config.task]()
    device = torch.device(config.device)
    model = task.model(round_seed(config.seed, Purpose.MODEL, 0))
    base = model.client.to(device)
    parameters, _ = trainable(base)
    # Rademacher directions move float32 weights exactly on a lattice; every client's base weights are snapped alike.
    exact = config.dist == "rademacher" and all(p.dtype == torch.float32 for p in parameters)
    lattice = Lattice.snap(parameters) if config.method == "ho" and exact else None
    mu = lattice.nearest(config.mu) if lattice else config.mu
    run = Run(config.seed, config.directions, config.dist, mu, lattice)
    server_rate, client_rate = task.rates(config)

    def client(number: int, batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> Client:
        half = copy.deepcopy(base)
        if config.method == "ho":
            return ZerothOrderClient(number, half, batch, run=run)
        return (FirstOrderClient if config.method == "first-order" else Client)(number, half, batch)

    def newcomer() -> Client:
        def no_data(round: int) -> tuple[torch.Tensor, torch.Tensor]:
            raise RuntimeError("this client has no data")

        return client(config.clients, no_data)

    def rate(base: float) -> Callable[[int], float]:
        return lambda round: config.scheduled(base, round)

    train = task.splits.train
    owned = dirichlet_split(train.labels, config.clients, config.alpha, config.seed)
    clients = []
    for number, indices in enumerate(owned):
        data = Dataset(train.inputs[indices], train.labels[indices]).to(device)
        clients.append(client(number, Batches(data, config.batch, config.seed, number)))

    length = RunningLength() if config.rule == "normalized" else None
    ledger: SeedReplay | GradientAverage | None = None
    if config.method == "ho":
        ledger = SeedReplay(run, rate(client_rate), length)
    elif config.method == "first-order":
        weights = nn.utils.parameters_to_vector(parameters).detach().cpu()
        ledger = GradientAverage(weights, rate(client_rate), length)
    half = model.server.to(device)
    with torch.no_grad():
        cut_shape = tuple(base(train.inputs[:1].to(device)).shape[1:])
    server = Server(
        half, task.loss, task.optimizer(half), rate(server_rate), ledger, config.seed, cut_shape, task.classes
    )
    return Federation(config, server, clients, newcomer, Wire()), task


def evaluate(model: SplitModel, data: Dataset, task: Task, at_once: int = 512) -> tuple[float, float]:
    """(accuracy, mean loss) of a model on a data set, both halves in eval mode."""
    modes = model.client.training, model.server.training
    model.client.eval(), model.server.eval()
    correct = loss = 0.0
    with torch.no_grad():
        for begin in range(0, len(data), at_once):
            labels = data.labels[begin : begin + at_once]
            output = model(data.inputs[begin : begin + at_once])
            correct += float((output.argmax(-1) == labels).sum())
            loss += float(task.loss(output, labels)) * len(labels)
    model.client.train(modes[0]), model.server.train(modes[1])
    return correct / len(data), loss / len(data)


def replicas(federation: Federation) -> Replicas:
    """Bring every client up to date, and a newcomer from nothing in one message; do they hold the same bits?"""
    clients = [*federation.clients, federation.newcomer()]
    for client in clients:
        federation.catch_up(client)
    digests = [client.digest() for client in clients]
    return Replicas(clients=len(clients), digest=digests[-1], equal=len(set(digests)) == 1)


Progress = Callable[[int, float, Evaluation | None, int], None]  # rounds done, training loss, evaluation, bytes so far


def train(config: Config, out: Path | str | None = None, progress: Progress | None = None) -> Summary:
    """Run HO-SFL or one of its baselines; returns the summary.

    With `out`, writes there as it goes: metrics.jsonl (one line per evaluation), and at the end summary.json,
    curves.png, client.safetensors and server.safetensors. The first Ctrl-C ends the run after the current round, with
    all of this written; the summary then says how many rounds were done.

    Raises: ValueError for settings that do not fit the task, LatticeError when the run diverges off the lattice (what
    was done until then is written), FileExistsError if `out` holds another run.
    """
    writer = Writer(Path(out) if out is not None else None)
    begin = time.perf_counter()
    federation, task = assemble(config)
    data = (task.splits.test if config.evaluate_on == "test" else task.splits.validation).to(config.device)
    observer = federation.newcomer()  # evaluates with the client half of the moment, replaying like any other
    evaluations: list[Evaluation] = []
    failure: LatticeError | None = None
    loss, done = float("nan"), 0

    def evaluation() -> Evaluation:
        federation.catch_up(observer)
        model = SplitModel(observer.half, federation.server.half)
        accuracy, test_loss = evaluate(model, data, task)
        seconds, moved = time.perf_counter() - begin, dict(federation.wire.bytes)
        return writer.add(Evaluation(done, accuracy, test_loss, loss, sum(moved.values()), moved, seconds))

    with interruptible() as interrupted:
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
            if progress is not None:
                progress(done, loss, evaluations[-1] if due else None, sum(federation.wire.bytes.values()))
        if evaluations[-1].round != done and failure is None:
            evaluations.append(evaluation())
        summary = Summary.of(
            config=config,
            rounds=done,
            evaluations=evaluations,
            clients=federation.clients,
            refused=federation.server.refused,
            replicas=None if failure else replicas(federation),
            seconds=time.perf_counter() - begin,
            failure=str(failure) if failure else None,
        )
        writer.finish(summary, evaluations)
        if out is not None:
            for name, half in (("client", observer.half), ("server", federation.server.half)):
                save_file({k: v.contiguous() for k, v in half.state_dict().items()}, Path(out) / f"{name}.safetensors")
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

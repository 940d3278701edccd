"""`hosfl simulate`: thousands of clients that drop out, stay away, answer late and lie, and a server that dies.

The protocol is the real one, message for message. Only the network, the clock and the number of clients are simulated.
A client does its own arithmetic on its own weights while it takes part. Between its rounds it keeps only a reference
to its state: clients with equal bits (SHA-256) share one copy, so that memory grows with the number of distinct states
and not of clients. A server that dies is restored from its log and its last snapshot. The clock is virtual: nothing
sleeps.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hosfl.files import FolderLock, write_json
from hosfl.methods import calibration
from hosfl.methods.client import Client
from hosfl.methods.ho import ZerothOrderClient
from hosfl.methods.ledger import SeedReplay
from hosfl.protocol.lattice import Lattice, LatticeError
from hosfl.protocol.messages import Message
from hosfl.protocol.records import RoundRecord
from hosfl.protocol.replica import ReplicaState
from hosfl.protocol.seeds import Purpose, generator
from hosfl.protocol.terms import Diverged
from hosfl.runs.assemble import assemble
from hosfl.runs.byzantine import FALSIFIERS, ByzantineClient
from hosfl.runs.checkpoint import check_free, save_module
from hosfl.runs.config import Config
from hosfl.runs.evaluate import evaluate
from hosfl.runs.faults import Faults
from hosfl.runs.federation import Federation
from hosfl.runs.report import Evaluation, machine, peak_memory
from hosfl.runs.serve import Transport
from hosfl.runs.trainer import Progress, check_loss, interruptible, restore, save_snapshot
from hosfl.runs.unreliable import ServerDied, UnreliableWire
from hosfl.tasks.task import Task

SMALLEST_SHARD = 32  # samples of a part of the data; if clients are too many for that, several share one part


StateKey = tuple[bytes, Lattice | None]  # the SHA-256 of a state, and the lattice of its weights


@dataclass
class SharedState:
    """Weights and moments that clients with equal bits share. clients: the number of clients in this state."""

    tensors: list[Tensor]
    moments: list[list[Tensor]]
    clients: int = 0


@dataclass
class SimulatedFederation(Federation):
    """A federation whose clients exist only while they take part; between rounds only their states are kept.

    Attributes:
        faults: see `Faults`.
        states: the distinct states of clients.
        calibrated: clients that have the running statistics.
        client_states: by client, (key in `states`, rounds applied, epoch).
        away_until: by client that is away, the round in which it comes back.
        deaths: the number of the server's deaths.
        peak_states: the largest number of distinct states at a time.
    """

    faults: Faults = field(default_factory=Faults)
    states: dict[StateKey, SharedState] = field(default_factory=dict, init=False)
    calibrated: set[int] = field(default_factory=set, init=False)
    client_states: dict[int, tuple[StateKey, int, int]] = field(default_factory=dict, init=False)
    away_until: dict[int, int] = field(default_factory=dict, init=False)
    deaths: int = field(default=0, init=False)
    peak_states: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.random = generator(self.config.seed, Purpose.FAULTS)
        self.unreliable = UnreliableWire(self.faults, self.random)
        self.messenger.wire = self.unreliable
        liars = round(self.faults.byzantine * self.config.clients)
        self.liars = {int(c) for c in self.random.choice(self.config.clients, liars, replace=False)}

    def invited(self, round: int) -> list[int]:
        """Sample the clients of a round, without those that are away."""
        present = []
        for client in super().invited(round):
            if self.away_until.get(client, 0) > round:
                continue
            if self.faults.absence and self.random.random() < self.faults.absence:
                self.away_until[client] = round + 1 + int(self.random.integers(max(1, self.faults.longest_absence)))
                continue
            present.append(client)
        # Messages per client; one of unknown position first gets a request for it, and answers.
        self._late = self.unreliable.begin({c: 4 if c in self.messenger.positions else 6 for c in present})
        return present

    def late_messages(self) -> list[Message | None]:
        """Return the messages that arrived after the deadline of the last round."""
        return [self.server.receive(data) for data in self._late]

    def round(self, round: int) -> float:
        """Run a round, after which the server may die."""
        loss = super().round(round)
        self.unreliable.maybe_die()
        return loss

    def restart(self, folder: Path) -> int:
        """Replace the dead server by one restored from its files in `folder`. Returns its round. Clients live on."""
        self.deaths += 1
        self.close_log()
        restored, _ = assemble(self.config, SMALLEST_SHARD, resumed=folder)
        restored.open_log(folder)
        done = restore(restored, folder)
        dead, self.server, self.observed = self.server, restored.server, restored.observed
        self.messenger.server, self.messenger.positions = restored.server, {}
        # These counts are the simulation's, and go on.
        self.server.refused, self.server.differed = dead.refused, dead.differed
        return done

    def load_client(self, number: int) -> Client:
        """Make a client, a Byzantine one if it is a liar, in the state in which it last took part."""
        client = self.make_client(number)
        if number in self.liars and isinstance(client, ZerothOrderClient):
            client = ByzantineClient.of(
                client,
                faults=self.faults,
                classes=self.server.cuts.classes or 0,
                ignore_index=self.server.cuts.ignore_index,
                random=self.random,
            )
        if number in self.calibrated and self.server.statistics is not None:
            calibration.load(client.half, self.server.statistics.values)
            client.calibrated = True
        if number in self.client_states and isinstance(client, ZerothOrderClient):
            key, applied, epoch = self.client_states[number]
            shared = self.states[key]
            client.load(ReplicaState(shared.tensors, shared.moments, applied, epoch, key[1]))
        return client

    def store_client(self, client: Client) -> None:
        """Keep a client's state, shared with clients in the same state."""
        assert isinstance(client, ZerothOrderClient)
        if client.calibrated:
            self.calibrated.add(client.number)
        replica, before = client.replica, self.client_states.get(client.number)
        key = replica.digest(), replica.lattice
        if before is None or before[0] != key:
            if key not in self.states:
                self.states[key] = SharedState([t.detach() for t in replica.tensors], replica.moments)
            self.states[key].clients += 1
            if before is not None:
                self._release_state(before[0])
        self.client_states[client.number] = key, replica.applied, replica.epoch
        self.peak_states = max(self.peak_states, len(self.states))

    def _release_state(self, key: StateKey) -> None:
        """Count a client less in a state, and drop the state if it was the last one."""
        self.states[key].clients -= 1
        if not self.states[key].clients:
            del self.states[key]


@dataclass(frozen=True)
class Outcome:
    """A simulation's results.

    Attributes:
        rounds: the number of rounds done.
        accuracy, loss: at the end, on the data named by config.evaluate_on.
        evaluations: without those of rounds that became void.
        interrupted: whether Ctrl-C ended it.
        failure: why it ended early, if it diverged.
        clients: their number.
        equal: whether all clients and a newcomer held the same bits after catching up at the end.
        digest, log_digest: SHA-256 of the client half; the log's running digest.
        states: the largest number of distinct states of clients at a time.
        visits: how many times a client took part.
        empty: the number of committed rounds that nobody answered.
        lost, late, damaged: numbers of messages. Those of clients that vanished count as lost.
        refusals, complaints: numbers of messages that the server refused, and that clients refused.
        reasons: of the first refusals and complaints.
        differed: how often a client found its half wrong.
        deaths: the number of the server's deaths.
        void: the number of rounds that were run again because of deaths.
        bytes: by category.
        seconds: of the simulation.
        peak_memory: bytes.
        config, provenance, faults, machine: what was simulated, and where.
    """

    rounds: int
    accuracy: float
    loss: float
    evaluations: list[Evaluation]
    interrupted: bool
    failure: str | None
    clients: int
    equal: bool
    digest: str
    log_digest: str
    states: int
    visits: int
    empty: int
    lost: int
    late: int
    damaged: int
    refusals: int
    complaints: int
    reasons: list[str]
    differed: int
    deaths: int
    void: int
    bytes: dict[str, int]
    seconds: float
    peak_memory: dict[str, int]
    config: dict[str, Any]
    provenance: dict[str, Any]
    faults: dict[str, Any]
    machine: dict[str, Any]


def simulate(
    config: Config,
    faults: Faults,
    out: Path | str | None = None,
    progress: Progress | None = None,
    transport: Transport | None = None,
) -> Outcome:
    """Run HO-SFL under faults, and return the outcome. Running statistics are estimated without faults.

    transport: reaches clients in other processes; the faults happen to the messages on their way. Such clients cannot
    lie, and their distinct states are not counted.

    With `out`, writes hosfl.log and base.safetensors there, from which `hosfl rebuild` makes the weights; snapshots, if
    the server may die; and at the end simulation.json, the outcome. The first Ctrl-C ends it after the current round.

    Raises ValueError for another method than "ho", for a server that dies too often to make progress, and for liars in
    other processes; FileExistsError if `out` holds another run; LatticeError or Diverged if the run diverges, after the
    outcome until then is written.
    """
    if config.method != "ho":
        raise ValueError(f"a simulation is of HO-SFL, method ho, not {config.method}")
    if 0 < 5 * faults.crash_every < config.snapshot_every:
        raise ValueError(
            f"a server that dies every {faults.crash_every} rounds hardly ever reaches its next snapshot, after"
            f" {config.snapshot_every}: lower snapshot_every"
        )
    if transport is not None and faults.byzantine:
        raise ValueError(f"byzantine = {faults.byzantine} needs clients of this process: leave it out, or the engine")
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _simulate(config, faults, Path(temporary), progress, transport)
    folder = Path(out)
    check_free(folder)
    return _simulate(config, faults, folder, progress, transport)


def _simulate(
    config: Config, faults: Faults, folder: Path, progress: Progress | None, transport: Transport | None
) -> Outcome:
    begin = time.perf_counter()
    assembled, task = assemble(config, SMALLEST_SHARD)
    if config.calibrate:
        assembled.calibrate()
    if task.classes is None and faults.byzantine and any(FALSIFIERS[lie][0] == "labels" for lie in faults.lie_names):
        raise ValueError("labels that are no classes cannot be lied about: choose other lies")
    federation = SimulatedFederation(
        assembled.config,
        assembled.server,
        assembled.make_client,
        assembled.base,
        assembled.observed,
        header=assembled.header,
        provenance=assembled.provenance,
        faults=faults,
    )
    # The calibration, which had no faults, counts as well.
    federation.messenger.wire.bytes.update(assembled.messenger.wire.bytes)
    federation.messenger.complaints = assembled.messenger.complaints
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    try:
        if transport is not None:
            transport.connect(federation)
        federation.open_log(folder)
        save_module(federation.base, folder / "base.safetensors")
        done, evaluations, failure = _run(federation, task, folder, begin, progress)
        outcome = _outcome(federation, done, evaluations, failure, begin)
    finally:
        federation.close()
        lock.close()
    write_json(folder / "simulation.json", asdict(outcome))
    if failure is not None:
        raise failure
    return outcome


def _run(
    federation: SimulatedFederation, task: Task, folder: Path, begin: float, progress: Progress | None
) -> tuple[int, list[Evaluation], LatticeError | Diverged | None]:
    """Run all rounds. Returns (rounds done, evaluations, the error that ended them early or None)."""
    config = federation.config
    data = task.data(config.evaluate_on).to(config.device)
    done, loss, evaluations = 0, float("nan"), list[Evaluation]()

    def add_evaluation() -> Evaluation:
        scores, mean_loss = evaluate(federation.model(), data, task)
        moved = dict(federation.messenger.wire.bytes)
        evaluations.append(Evaluation.of(done, scores, mean_loss, loss, moved, time.perf_counter() - begin))
        return evaluations[-1]

    with interruptible() as interrupted:
        add_evaluation()
        while done < config.rounds and not interrupted.is_set():
            try:
                loss = federation.round(done)
                done += 1
                due = done % config.evaluate_every == 0 or done == config.rounds
                new = add_evaluation() if due else None
                if new is not None:
                    check_loss(new.loss, done)
            except ServerDied:
                done = federation.restart(folder)
                evaluations[:] = [e for e in evaluations if e.round <= done]
                continue
            except (LatticeError, Diverged) as error:
                return done, evaluations, error
            if federation.faults.crash_every and done % config.snapshot_every == 0:
                save_snapshot(federation, folder, done)
            if progress is not None:
                progress(done, loss, new, sum(federation.messenger.wire.bytes.values()))
        if evaluations[-1].round != done:
            add_evaluation()
    return done, evaluations, None


def _outcome(
    federation: SimulatedFederation,
    done: int,
    evaluations: list[Evaluation],
    failure: LatticeError | Diverged | None,
    begin: float,
) -> Outcome:
    config, server, ledger = federation.config, federation.server, federation.server.ledger
    assert isinstance(ledger, SeedReplay)
    assert ledger.log is not None
    assert federation.provenance is not None
    replicas = federation.compare_replicas()
    return Outcome(
        rounds=done,
        accuracy=evaluations[-1].accuracy,
        loss=evaluations[-1].loss,
        evaluations=evaluations,
        interrupted=done < config.rounds and failure is None,
        failure=None if failure is None else str(failure),
        clients=config.clients,
        equal=replicas.equal,
        digest=replicas.digest,
        log_digest=ledger.log.digest,
        states=federation.peak_states,
        visits=federation.visits,
        empty=sum(not record.participants for record in ledger.records),
        lost=federation.unreliable.lost,
        late=federation.unreliable.overdue,
        damaged=federation.unreliable.damaged,
        refusals=server.refused.total,
        complaints=federation.messenger.complaints.total,
        reasons=[*server.refused[:50], *federation.messenger.complaints[:50]],
        differed=server.differed.total,
        deaths=federation.deaths,
        void=sum(isinstance(record, RoundRecord) for record in ledger.log.records) - done,
        bytes=dict(federation.messenger.wire.bytes),
        seconds=time.perf_counter() - begin,
        peak_memory=peak_memory(),
        config=asdict(config),
        provenance=asdict(federation.provenance),
        faults=asdict(federation.faults),
        machine=machine(),
    )

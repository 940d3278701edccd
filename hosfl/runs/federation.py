"""`Federation`: the rounds of the protocol. `Messenger` sends the requests and passes on the answers.

A round has two exchanges. First the server asks the invited clients for their cuts, and sends each the rounds that it
has missed. Then it sends multipliers to those whose cuts it could learn from, and commits what they answer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hosfl.engines.in_process import InProcessEngine
from hosfl.halves.split import RunHalves, SplitModel
from hosfl.methods import calibration
from hosfl.methods.client import Client
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.server import Server
from hosfl.protocol.endpoint import Endpoint
from hosfl.protocol.header import Header
from hosfl.protocol.messages import Audit, Audited, Calibration, Invitation, Message, Wire
from hosfl.protocol.provenance import Provenance, new_id, open_log
from hosfl.runs.messenger import Messenger, OnReply
from hosfl.runs.reorder import ReorderBuffer
from hosfl.settings import Settings

AUDIT_BATCH = 16  # clients that are audited together
log = logging.getLogger("hosfl.federation")


@dataclass
class Federation:
    """A server, its clients, and the messenger between them.

    Args:
        config: the settings of the run.
        server: as it is before the first round.
        make_client: a client's number -> a new client, which has applied no round.
        base: the client half of round 0.
        observed: a copy of the client half, brought up to date for evaluations.
        exchanges: the number of cuts that a client sends per round. Its answer to each multiplier but the last is the
            next cut. The server numbers the exchanges of all rounds consecutively.
        header: of the log, for methods that have one: see `open_log`.
        provenance: digests of the settings, the data and the model.
        describe: makes header and provenance once the base is complete: see `complete`.

    Attributes:
        messenger: sends the requests. At first all clients are made by `make_client` in this process;
            `Transport.connect` sets another engine, its deadline, and the next two attributes.
        enough: the number of cuts that were learnt from, then of usable answers, with which a round goes on without the
            remaining clients; likewise of statistics. None: all that were invited.
        least: the number of clients that must be connected before a round begins.
        patient: whether a round in which no cut could be learnt from is not committed, but tried again.
        id: random bytes that identify the run, also after it is resumed. By them clients know which run their weights
            belong to.
        clients: those made in this process so far, by number.
        visits: how many times a client took part, over all rounds.
        seconds: of the last round, by phase: "cuts" and "answers" are spent on the engine and the clients, "server"
            on the server's own work. The server learns from a cut while others are still on their way.
        asked: the clients that were invited to the last round.
        took_part: the clients whose answers were committed in the last round; for a method without answers, those whose
            cuts were learnt from.
        ever_took_part: the clients that took part in any round.
        tries: how often a patient run has tried the next round without a cut to learn from.
    """

    config: Settings
    server: Server
    make_client: Callable[[int], Client]
    base: nn.Module
    observed: nn.Module
    exchanges: int = 1
    header: Header | None = None
    provenance: Provenance | None = None
    describe: Callable[[], tuple[Header | None, Provenance]] | None = None
    messenger: Messenger = field(init=False)
    enough: int | None = field(default=None, init=False)
    least: int = field(default=1, init=False)
    patient: bool = field(default=False, init=False)
    clients: dict[int, Client] = field(default_factory=dict, init=False)
    visits: int = field(default=0, init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    asked: list[int] = field(default_factory=list, init=False)
    took_part: list[int] = field(default_factory=list, init=False)
    ever_took_part: set[int] = field(default_factory=set, init=False)
    tries: int = field(default=0, init=False)
    id: bytes = field(default_factory=new_id, init=False)

    def __post_init__(self) -> None:
        self._endpoints: dict[int, Endpoint[Client]] = {}
        self._tried_clients: set[int] = set()  # those with which the next round was tried without success
        self._counts_before = (0, 0)  # refusals and complaints of earlier rounds
        engine = InProcessEngine(lambda number, data: self.endpoint(number).answer(data), self.config.clients)
        self.messenger = Messenger(self.server, engine)

    @property
    def refused(self) -> list[str]:
        """The reasons for which messages were refused: the server's, then the clients'."""
        return self.server.refused + self.messenger.complaints

    @property
    def newest_refused(self) -> list[str]:
        """The last reason for a refusal in this round, of the server's and of the clients' each."""
        refusals, complaints = self._counts_before
        of_server = self.server.refused[-1:] if self.server.refused.total > refusals else []
        return of_server + (self.messenger.complaints[-1:] if self.messenger.complaints.total > complaints else [])

    def log_refusals(self) -> None:
        """Log a warning if the server or the clients have refused messages."""
        if self.refused:
            count = self.server.refused.total + self.messenger.complaints.total
            log.warning("messages that were refused: %d, such as: %s", count, self.refused[0])

    def is_ready(self) -> bool:
        """Whether enough clients are connected for a round."""
        return len(self.messenger.engine.present()) >= self.least

    def round(self, round: int) -> float:
        """Run one round of the protocol. Returns the mean training loss of its clients, NaN if nobody took part.

        A client whose message is lost, late or refused misses the round; the others are not affected. If no cut could
        be learnt from and the run is patient, nothing is committed, and the round is to be tried again: see `tries`.
        """
        learnt_before = self.server.learnt
        self.seconds = dict.fromkeys(("cuts", "server", "answers"), 0.0)
        self.messenger.failures.clear()
        self._counts_before = self.server.refused.total, self.messenger.complaints.total
        try:
            self.asked, first = self.invited(round), round * self.exchanges
            multipliers, loss = self._exchange("cuts", first, self.asked, partial(self._invite, round))
            learnt_from = self.server.learnt_from()
            self.visits += len(learnt_from)
            if self.patient and self.server.learnt == learnt_before:
                self.tries += 1
                self._tried_clients.update(self.asked)
                return math.nan
            self.tries = 0
            self._tried_clients.clear()
            losses = [loss]
            for exchange in range(first + 1, first + self.exchanges):
                deliver = partial(self.messenger.deliver, multipliers)
                multipliers, loss = self._exchange("answers", exchange, multipliers, deliver)
                learnt_from = self.server.learnt_from()
                losses.append(loss)
            final_requests = multipliers if self.server.ledger is not None else {}
            with self._timed("answers"):
                self._collect_answers(final_requests, partial(self.server.accept_answer, round))
            with self._timed("server"):
                committed = self.server.commit(round)
            self.took_part = committed if final_requests else learnt_from
            self.ever_took_part.update(self.took_part)
        finally:
            self._release_clients()
        return sum(losses) / len(losses)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Context manager that adds the block's seconds to a phase, without those of `_timed` blocks inside it."""
        begin, before = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[phase] += time.perf_counter() - begin - (sum(self.seconds.values()) - before)

    def _exchange(
        self, phase: str, number: int, clients: Iterable[int], request: Callable[[OnReply, Callable[[], bool]], None]
    ) -> tuple[Mapping[int, Message], float]:
        """Run one exchange: the server learns from the cuts in the clients' order. Returns what `Server.end` does.

        request: requests the cuts; it takes the callables `on_reply` and `is_enough` of `Messenger`'s methods.
        """
        self.server.begin(number)
        buffer = ReorderBuffer(clients, self._learn)
        with self._timed(phase):
            request(buffer.add, partial(self._has_learnt_enough, buffer))
            buffer.close()
        with self._timed("server"):
            return self.server.end()

    def _invite(self, round: int, on_reply: OnReply, is_enough: Callable[[], bool]) -> None:
        """Let the server learn from late messages, and request the invited clients' cuts."""
        for message in self.late_messages():
            self._learn(message)
        self.messenger.collect(self.asked, partial(self._invitation, round), on_reply, is_enough)

    def _learn(self, message: Message | None) -> None:
        if message is not None:
            with self._timed("server"):
                self.server.learn(message)

    def _invitation(self, round: int, client: int) -> list[Message]:
        """Return the request for a client's cut, preceded by the reason why its last message was refused, if it was."""
        refusal = self.server.refusal(client, round)
        invitation = Invitation(client=client, round=round, epoch=self.server.epoch, run=self._run)
        return [invitation] if refusal is None else [refusal, invitation]

    def _has_learnt_enough(self, buffer: ReorderBuffer) -> bool:
        """Whether the server has learnt from enough cuts to go on without the rest."""
        if self.enough is None or buffer.messages < self.enough:
            return False
        buffer.flush()  # a cut counts only once the server has learnt from it
        with self._timed("server"):
            return len(self.server.learnt_from()) >= self.enough

    def _collect_answers(self, requests: Mapping[int, Message], accept: Callable[[Message], bool]) -> None:
        """Deliver requests, and pass the answers to `accept` until it has returned True for enough of them."""
        count = 0

        def on_reply(client: int, message: Message | None) -> None:
            nonlocal count
            if message is not None:
                with self._timed("server"):
                    count += accept(message)

        self.messenger.deliver(requests, on_reply, lambda: self.enough is not None and count >= self.enough)

    def invited(self, round: int) -> list[int]:
        """Sample the clients of a round from those connected, without those with which it was tried before."""
        present = self.messenger.engine.present()
        if self._tried_clients.issuperset(present):
            self._tried_clients.clear()
        candidates = sorted(present - self._tried_clients)
        count = min(self.config.sampled, len(candidates))
        return [candidates[n] for n in self.server.sample(round, len(candidates), count)]

    def late_messages(self) -> list[Message | None]:
        """Return messages of earlier rounds that arrive only now. Engines drop them; a simulation does not."""
        return []

    def endpoint(self, number: int) -> Endpoint[Client]:
        """Return the endpoint of a client of this process; it is kept until the end of the round."""
        if number not in self._endpoints:
            self._endpoints[number] = self._endpoint(self.load_client(number))
        return self._endpoints[number]

    def _endpoint(self, client: Client) -> Endpoint[Client]:
        return Endpoint(client, self.exchanges, self.server.ledger is not None, bool(self.config.calibrate), self.id)

    @property
    def _run(self) -> NDArray[np.uint8]:
        """The run's id as messages carry it, uint8."""
        return np.frombuffer(self.id, np.uint8)

    def load_client(self, number: int) -> Client:
        """Return a client of this process, in the state in which it last took part."""
        if number not in self.clients:
            self.clients[number] = self.make_client(number)
        return self.clients[number]

    def store_client(self, client: Client) -> None:
        """Keep a client's state after its part in a round. Here clients stay in memory, so there is nothing to do."""

    def _release_clients(self) -> None:
        for endpoint in self._endpoints.values():
            self.store_client(endpoint.client)
        self._endpoints.clear()

    def calibrate(self) -> None:
        """Let clients estimate the running statistics of the client half, before the first round.

        The aggregate becomes part of the base, and clients fetch it like any update. If no client sends usable
        statistics, the model keeps its own, and a warning is logged.
        """
        none = np.empty(0, np.float32)
        request = Calibration(client=0, round=0, epoch=self.server.epoch, run=self._run, statistics=none)
        requests = {n: replace(request, client=n) for n in self.invited(0)}
        self.seconds = {"server": 0.0}
        try:
            self._collect_answers(requests, self.server.accept_statistics)
        finally:
            self._release_clients()
        if not self.server.calibrate():
            log.warning("no client gave running statistics that can be used: those of the model stay")
        self.complete()

    def complete(self) -> None:
        """Load the committed statistics, if any, into the base, and then make header and provenance."""
        if self.server.statistics is not None:
            for half in (self.base, self.observed):
                calibration.load(half, self.server.statistics.values)
        if self.describe is not None:
            self.header, self.provenance = self.describe()

    def compare_replicas(self) -> Replicas:
        """Bring all connected clients up to date, and a new one from round 0, and compare the bits of their halves.

        The bytes of this are not counted as the run's. Clients that disconnect meanwhile are left out. If clients are
        on other machines, one that never took part does not make the result unequal: see `Replicas.odd`.
        """
        wire, self.messenger.wire = self.messenger.wire, Wire()
        present, digests, reached = sorted(self.messenger.engine.present()), dict[int, str](), list[int]()
        for start in range(0, len(present), AUDIT_BATCH):
            batch = present[start : start + AUDIT_BATCH]
            self.messenger.failures.clear()
            digests |= self.audit(batch)
            reached += [n for n in batch if self.messenger.failures.get(n) not in ("gone", "late")]
        newcomer = self.make_client(0)
        caught_up, digest = self.catch_up(newcomer), newcomer.digest()
        self.messenger.wire = wire
        odd = {
            n: f"the digest {digests[n]}" if n in digests else "no digest" for n in reached if digests.get(n) != digest
        }
        strangers = odd.keys() - self.ever_took_part if self.patient else set()
        equal = caught_up and odd.keys() <= strangers
        return Replicas(clients=len(reached) - len(strangers) + 1, digest=digest, equal=equal, odd=odd)

    def catch_up(self, client: Client) -> bool:
        """Bring a client that is not among the engine's up to date. Returns False if that fails."""
        endpoint, messenger = self._endpoint(client), self.messenger
        engine = InProcessEngine(lambda number, data: endpoint.answer(data), client.number + 1)
        self.messenger = replace(messenger, engine=engine, positions={})
        try:
            return bool(self.audit([client.number]))
        finally:
            self.messenger = messenger

    def audit(self, clients: Sequence[int]) -> dict[int, str]:
        """Have clients apply all committed rounds. Returns the digest of the half of each client that answers."""
        digests: dict[int, str] = {}

        def request(client: int) -> list[Message]:
            return [Audit(client=client, round=0, epoch=self.server.epoch, run=self._run)]

        def on_reply(client: int, message: Message | None) -> None:
            if isinstance(message, Audited):
                digests[client] = message.digest.numpy().tobytes().hex()

        try:
            self.messenger.collect(clients, request, on_reply)
        finally:
            self._release_clients()
        return digests

    def model(self) -> SplitModel:
        """Return both halves, with all committed rounds applied."""
        if self.server.ledger is not None:
            self.server.ledger.show(self.observed)
        return RunHalves(self.observed, self.server.half)

    def open_log(self, folder: Path) -> None:
        """Open the client half's log in `folder`, a new one or the one that is there, if the method has a log."""
        if isinstance(self.server.ledger, SeedReplay) and self.header is not None:
            self.server.ledger.log = open_log(folder, self.header)

    def close_log(self) -> None:
        """Close the log's file."""
        if isinstance(self.server.ledger, SeedReplay) and self.server.ledger.log is not None:
            self.server.ledger.log.close()

    def close(self) -> None:
        """Close log and engine."""
        self.close_log()
        self.messenger.engine.close()


@dataclass(frozen=True)
class Replicas:
    """Whether all clients hold the same bits as a new one that replayed the whole log at the end.

    clients: how many were compared. digest: the new client's. odd: by client with another digest, what it answered; on
    other machines also clients that never took part, which `equal` leaves out.
    """

    clients: int
    digest: str
    equal: bool
    odd: dict[int, str] = field(default_factory=dict)

"""The rounds of the protocol. `Messenger` sends the requests and passes on the answers.

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

from hosfl.engines.in_process import InProcess
from hosfl.halves.split import RunHalves, SplitModel
from hosfl.methods import calibration
from hosfl.methods.client import Client
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.server import Server
from hosfl.protocol.endpoint import Endpoint
from hosfl.protocol.header import Header
from hosfl.protocol.messages import Audit, Audited, Calibration, Invitation, Message, Wire
from hosfl.protocol.provenance import Provenance, new_id, open_log
from hosfl.runs.in_order import InOrder
from hosfl.runs.messenger import Messenger, OnReply
from hosfl.settings import Settings

AT_ONCE = 16  # clients whose halves are audited together
log = logging.getLogger("hosfl.federation")


@dataclass
class Federation:
    """A server, its clients, and the messenger between them.

    Args:
        config: the settings of the run.
        server: as it is before the first round.
        make: number -> a new client, which has applied no round.
        base: the client half of round 0.
        observed: a copy of the client half, brought up to date for evaluations.
        exchanges: cuts that a client sends per round. Its answer to a multiplier is the next cut, but for the last one.
            The server numbers the exchanges of all rounds consecutively.
        header: of the log, for methods that have one; see `open_log`.
        provenance: digests of what the run is made of.
        describe: makes header and provenance once the base is complete: see `complete`.

    Attributes:
        messenger: sends the requests. At first all clients are made by `make` and live in this process;
            `Transport.connect` sets another engine, its deadline, and the next two.
        enough: cuts that were learnt from, then usable answers, with which a round goes on without the remaining
            clients; likewise statistics. None: waits for all that were invited.
        least: clients that must be connected before a round begins.
        patient: whether a round in which no cut could be learnt from is not committed, and can be tried again.
        id: random bytes that identify the run, also after it is resumed. Clients know by them which run their weights
            belong to.
        clients: those made in this process so far, by number.
        visits: how many times a client took part, over all rounds.
        seconds: of the last round, by phase: "cuts" and "answers" are spent on the engine and the clients, "server"
            here. The server learns from a cut while others are still on their way.
        asked: clients that were invited to the last round.
        took_part: clients whose answers were committed in the last round; whose cuts were learnt from, where a method
            needs no answers.
        seen: clients that took part in any round.
        tried: how often the next round has been tried without a cut to learn from, where the run is patient.
    """

    config: Settings
    server: Server
    make: Callable[[int], Client]
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
    seen: set[int] = field(default_factory=set, init=False)
    tried: int = field(default=0, init=False)
    id: bytes = field(default_factory=new_id, init=False)

    def __post_init__(self) -> None:
        self._endpoints: dict[int, Endpoint[Client]] = {}
        self._tried_in_vain: set[int] = set()  # clients that the next round was tried with
        self._counts_before = (0, 0)  # refusals and complaints of earlier rounds
        here = InProcess(lambda number, data: self.endpoint(number).answer(data), self.config.clients)
        self.messenger = Messenger(self.server, here)

    @property
    def refused(self) -> list[str]:
        """Why messages were refused: the server's reasons, then the clients'."""
        return self.server.refused + self.messenger.complaints

    @property
    def newest_refused(self) -> list[str]:
        """The last reason for a refusal in this round, of the server and of the clients."""
        refusals, complaints = self._counts_before
        of_server = self.server.refused[-1:] if self.server.refused.total > refusals else []
        return of_server + (self.messenger.complaints[-1:] if self.messenger.complaints.total > complaints else [])

    def warn_of_refusals(self) -> None:
        """Log a warning if the server or the clients have refused messages."""
        if self.refused:
            count = self.server.refused.total + self.messenger.complaints.total
            log.warning("messages that were refused: %d, such as: %s", count, self.refused[0])

    def ready(self) -> bool:
        """Whether enough clients are connected for a round."""
        return len(self.messenger.engine.present()) >= self.least

    def round(self, round: int) -> float:
        """One round of the protocol; returns the mean training loss of its clients, NaN if nobody took part.

        A client whose message is lost, late or refused misses the round; the others do not notice. If no cut could be
        learnt from and the run is patient, nothing is committed, and the round is to be tried again: see `tried`.
        """
        learnt = self.server.learnt
        self.seconds = dict.fromkeys(("cuts", "server", "answers"), 0.0)
        self.messenger.failures.clear()
        self._counts_before = self.server.refused.total, self.messenger.complaints.total
        try:
            self.asked, first = self.invited(round), round * self.exchanges
            multipliers, loss = self._exchange("cuts", first, self.asked, partial(self._invite, round))
            sent = self.server.learnt_from()
            self.visits += len(sent)
            if self.patient and self.server.learnt == learnt:
                self.tried += 1
                self._tried_in_vain.update(self.asked)
                return math.nan
            self.tried = 0
            self._tried_in_vain.clear()
            losses = [loss]
            for exchange in range(first + 1, first + self.exchanges):
                deliver = partial(self.messenger.deliver, multipliers)
                multipliers, loss = self._exchange("answers", exchange, multipliers, deliver)
                sent = self.server.learnt_from()
                losses.append(loss)
            answers = multipliers if self.server.ledger is not None else {}
            with self._timed("answers"):
                self._collect_answers(answers, partial(self.server.accept_answer, round))
            with self._timed("server"):
                committed = self.server.commit(round)
            self.took_part = committed if answers else sent
            self.seen.update(self.took_part)
        finally:
            self._release_clients()
        return sum(losses) / len(losses)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the block's seconds to a phase, without those of `_timed` blocks inside it."""
        begin, before = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[phase] += time.perf_counter() - begin - (sum(self.seconds.values()) - before)

    def _exchange(
        self, phase: str, number: int, clients: Iterable[int], ask: Callable[[OnReply, Callable[[], bool]], None]
    ) -> tuple[Mapping[int, Message], float]:
        """One exchange: the server learns from the cuts in the order of their clients. Returns what `Server.end` does.

        ask: requests the cuts; it takes the callables `on_reply` and `is_enough` of `Messenger`'s methods.
        """
        self.server.begin(number)
        order = InOrder(clients, self._learn)
        with self._timed(phase):
            ask(order.add, partial(self._enough_learnt, order))
            order.close()
        with self._timed("server"):
            return self.server.end()

    def _invite(self, round: int, on_reply: OnReply, is_enough: Callable[[], bool]) -> None:
        for message in self.late_messages():
            self._learn(message)
        self.messenger.collect(self.asked, partial(self._invitation, round), on_reply, is_enough)

    def _learn(self, message: Message | None) -> None:
        if message is not None:
            with self._timed("server"):
                self.server.learn(message)

    def _invitation(self, round: int, client: int) -> list[Message]:
        """The request for a client's cut, after the reason why its last message was refused, if it was."""
        refusal = self.server.refusal(client, round)
        invitation = Invitation(client=client, round=round, epoch=self.server.epoch, run=self._run)
        return [invitation] if refusal is None else [refusal, invitation]

    def _enough_learnt(self, order: InOrder) -> bool:
        """Whether enough of the cuts that arrived were learnt from to go on without the rest."""
        if self.enough is None or order.messages < self.enough:
            return False
        order.flush()  # a cut counts only once the server has learnt from it
        with self._timed("server"):
            return len(self.server.learnt_from()) >= self.enough

    def _collect_answers(self, asks: Mapping[int, Message], counts: Callable[[Message], bool]) -> None:
        """Deliver the requests, and pass the answers to `counts` until enough of them are usable."""
        count = 0

        def on_reply(client: int, message: Message | None) -> None:
            nonlocal count
            if message is not None:
                with self._timed("server"):
                    count += counts(message)

        self.messenger.deliver(asks, on_reply, lambda: self.enough is not None and count >= self.enough)

    def invited(self, round: int) -> list[int]:
        """The clients to ask in a round: a sample of those connected, without those that it was tried with in vain."""
        present = self.messenger.engine.present()
        if self._tried_in_vain.issuperset(present):
            self._tried_in_vain.clear()
        here = sorted(present - self._tried_in_vain)
        return [here[n] for n in self.server.sample(round, len(here), min(self.config.sampled, len(here)))]

    def late_messages(self) -> list[Message | None]:
        """Messages of earlier rounds that arrive only now. Engines drop them; a simulation does not."""
        return []

    def endpoint(self, number: int) -> Endpoint[Client]:
        """The endpoint of a client of this process; kept from its first request to the end of the round."""
        if number not in self._endpoints:
            self._endpoints[number] = self._endpoint(self.load_client(number))
        return self._endpoints[number]

    def _endpoint(self, client: Client) -> Endpoint[Client]:
        return Endpoint(client, self.exchanges, self.server.ledger is not None, bool(self.config.calibrate), self.id)

    @property
    def _run(self) -> NDArray[np.uint8]:
        """The id as messages carry it, uint8."""
        return np.frombuffer(self.id, np.uint8)

    def load_client(self, number: int) -> Client:
        """A client of this process, in the state in which it last took part."""
        if number not in self.clients:
            self.clients[number] = self.make(number)
        return self.clients[number]

    def store_client(self, client: Client) -> None:
        """Called when a client's part in a round is over. Here clients stay in memory."""

    def _release_clients(self) -> None:
        for endpoint in self._endpoints.values():
            self.store_client(endpoint.client)
        self._endpoints.clear()

    def calibrate(self) -> None:
        """Before the first round, let its clients estimate the running statistics of the client half.

        The aggregate becomes part of the base, and clients fetch it like any update. If no client sends usable
        statistics, the model keeps its own, and a warning says so.
        """
        none = np.empty(0, np.float32)
        ask = Calibration(client=0, round=0, epoch=self.server.epoch, run=self._run, statistics=none)
        asks = {n: replace(ask, client=n) for n in self.invited(0)}
        self.seconds = {"server": 0.0}
        try:
            self._collect_answers(asks, self.server.accept_statistics)
        finally:
            self._release_clients()
        if not self.server.calibrate():
            log.warning("no client gave running statistics that can be used: those of the model stay")
        self.complete()

    def complete(self) -> None:
        """Put the committed statistics, if any, into the base; then make header and provenance of it."""
        if self.server.statistics is not None:
            for half in (self.base, self.observed):
                calibration.load(half, self.server.statistics.values)
        if self.describe is not None:
            self.header, self.provenance = self.describe()

    def replicas(self) -> Replicas:
        """Bring every connected client up to date, and a new one from round 0, and compare the bits of their halves.

        The bytes of this are not counted as the run's. Clients that disconnect meanwhile are left out. Where clients
        are on other machines, one that never took part does not make the result unequal: see `Replicas.odd`.
        """
        wire, self.messenger.wire = self.messenger.wire, Wire()
        present, digests, here = sorted(self.messenger.engine.present()), dict[int, str](), list[int]()
        for start in range(0, len(present), AT_ONCE):
            some = present[start : start + AT_ONCE]
            self.messenger.failures.clear()
            digests |= self.audit(some)
            here += [n for n in some if self.messenger.failures.get(n) not in ("gone", "late")]
        newcomer = self.make(0)
        joined, right = self.join(newcomer), newcomer.digest()
        self.messenger.wire = wire
        odd = {n: f"the digest {digests[n]}" if n in digests else "no digest" for n in here if digests.get(n) != right}
        strangers = odd.keys() - self.seen if self.patient else set()
        equal = joined and odd.keys() <= strangers
        return Replicas(clients=len(here) - len(strangers) + 1, digest=right, equal=equal, odd=odd)

    def join(self, client: Client) -> bool:
        """Bring a client up to date that is not among the engine's. False where that fails."""
        endpoint, messenger = self._endpoint(client), self.messenger
        engine = InProcess(lambda number, data: endpoint.answer(data), client.number + 1)
        self.messenger = replace(messenger, engine=engine, positions={})
        try:
            return bool(self.audit([client.number]))
        finally:
            self.messenger = messenger

    def audit(self, clients: Sequence[int]) -> dict[int, str]:
        """Have clients apply all committed rounds; returns the digests of their halves, of those that answer."""
        digests: dict[int, str] = {}

        def ask(client: int) -> list[Message]:
            return [Audit(client=client, round=0, epoch=self.server.epoch, run=self._run)]

        def on_reply(client: int, message: Message | None) -> None:
            if isinstance(message, Audited):
                digests[client] = message.digest.numpy().tobytes().hex()

        try:
            self.messenger.collect(clients, ask, on_reply)
        finally:
            self._release_clients()
        return digests

    def model(self) -> SplitModel:
        """Both halves, brought up to date."""
        if self.server.ledger is not None:
            self.server.ledger.show(self.observed)
        return RunHalves(self.observed, self.server.half)

    def open_log(self, folder: Path) -> None:
        """Write the client half's log to `folder`, if the method has one: a new log, or on with the one in there."""
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
    """Whether all clients, and a new one that replayed the whole log at the end, hold the same bits.

    odd: by client, what it answered in place of that digest. On other machines also clients that never took part,
    which `equal` leaves out.
    """

    clients: int
    digest: str
    equal: bool
    odd: dict[int, str] = field(default_factory=dict)

"""The rounds of the protocol. Who carries the messages is an engine's business: see `hosfl.engines.engine`.

A round is two exchanges. The server asks the invited for their cuts, each with what it has missed since it was last
here; then it sends multipliers to those whose cuts it could learn from, and commits what they answer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hosfl.engines.engine import Engine, Reply
from hosfl.engines.in_process import InProcess
from hosfl.halves.split import Joined, SplitModel
from hosfl.methods import calibration
from hosfl.methods.client import Client
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.server import REASONS_KEPT, Server
from hosfl.protocol.endpoint import Endpoint
from hosfl.protocol.header import Header
from hosfl.protocol.messages import (
    Audit,
    Audited,
    Calibration,
    Complaint,
    Differs,
    Hello,
    Invitation,
    Message,
    PoolMoves,
    Records,
    Statistics,
    Wire,
    text_of,
)
from hosfl.protocol.provenance import Provenance, new_id, open_log
from hosfl.runs.in_order import InOrder
from hosfl.settings import Settings
from hosfl.terminal import printable

TRIES = 3  # asks for one cut: a client that is elsewhere, and one that then finds its half wrong, are asked again
TO_SAY_WHERE = 0.25  # of the deadline: for those of whom the server does not know where they are
AT_ONCE = 16  # clients whose halves are audited together
log = logging.getLogger("hosfl.federation")


@dataclass
class Federation:
    """A server, its clients, and the engine between them.

    Args:
        config: the settings of the run.
        server: as it is before the first round.
        make: number -> a client that has applied nothing.
        base: the client half of round 0.
        observed: the client half of the moment, for evaluation.
        exchanges: cuts that a client sends per round; its answer to all but the last is the next one, and the server
            numbers them on and on.
        header: of the log, for methods that have one; see `open_log`.
        provenance: what the run is made of.
        describe: gives both, once the base is complete: see `settle`.
        complained, complaints: what clients refused, the last thousand times, and how many there were.

    Attributes:
        engine: carries the messages. At first all clients live here, and are made by `make`; `Transport.connect` sets
            another, and the next three.
        deadline: seconds for each exchange; None: as long as it takes.
        enough: cuts that were learnt from, then answers that count, with which a round goes on without the rest;
            likewise of statistics. None: all that were invited.
        least: clients that have to be here before a round begins.
        patient: whether a round in which no cut could be learnt from is not committed, and can be tried again.
        wire: counts the bytes; a simulation's loses some.
        id: random; no other run has it, and this one keeps it when it is resumed. Clients know by it whose weights
            theirs are.
        clients: those made here so far, by number.
        where: by client, (rounds, epoch) that it has applied, as far as the server knows.
        visits: how many times a client took part.
        missing: how many times a client that was asked did not answer.
        why: by client, why it did not answer in this round: "gone", "late", "lost" or "failed: ...".
        seconds: of the last round, by phase: "cuts" and "answers" are spent on the engine and the clients, "server"
            here. It learns from a cut while those of other clients are still on their way.
        asked: clients that were invited to the last round.
        took_part: clients whose answers were its answers; whose cuts, where a method needs no answers.
        seen: clients that took part in any round.
        tried: how often the next round was tried and nothing could be learnt, where the run is patient.
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
    complained: list[str] = field(default_factory=list)
    complaints: int = 0
    engine: Engine = field(init=False)
    deadline: float | None = field(default=None, init=False)
    enough: int | None = field(default=None, init=False)
    least: int = field(default=1, init=False)
    patient: bool = field(default=False, init=False)
    wire: Wire = field(default_factory=Wire, init=False)
    clients: dict[int, Client] = field(default_factory=dict, init=False)
    where: dict[int, tuple[int, int]] = field(default_factory=dict, init=False)
    visits: int = field(default=0, init=False)
    missing: int = field(default=0, init=False)
    why: dict[int, str] = field(default_factory=dict, init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    asked: list[int] = field(default_factory=list, init=False)
    took_part: list[int] = field(default_factory=list, init=False)
    seen: set[int] = field(default_factory=set, init=False)
    tried: int = field(default=0, init=False)
    id: bytes = field(default_factory=new_id, init=False)

    def __post_init__(self) -> None:
        self._here: dict[int, Endpoint[Client]] = {}
        self._in_vain: set[int] = set()  # whom the next round was tried with
        self._before = (0, 0)  # refusals and complaints of earlier rounds
        self.engine = InProcess(lambda number, data: self.endpoint(number).answer(data), self.config.clients)

    @property
    def refused(self) -> list[str]:
        """The reasons of either side for what it refused: the server's, then the clients'."""
        return self.server.refused + self.complained

    @property
    def newest_refused(self) -> list[str]:
        """The reasons of either side for what it refused last in this round."""
        refusals, complaints = self._before
        of_server = self.server.refused[-1:] if self.server.refusals > refusals else []
        return of_server + (self.complained[-1:] if self.complaints > complaints else [])

    def say_refused(self) -> None:
        """Warn of what either side has refused, if anything."""
        if self.refused:
            count = self.server.refusals + self.complaints
            log.warning("messages that were refused: %d, such as: %s", count, self.refused[0])

    def ready(self) -> bool:
        """Whether enough clients are here for a round."""
        return len(self.engine.present()) >= self.least

    def round(self, round: int) -> float:
        """One round of the protocol; returns the mean training loss of its clients, NaN if nobody took part.

        A message that is lost, late or refused costs its sender the round, and nobody else anything: where the run is
        patient, a round of nobody else's is still to come. See `tried`.
        """
        learnt = self.server.learnt
        self.seconds, self.why = dict.fromkeys(("cuts", "server", "answers"), 0.0), {}
        self._before = self.server.refusals, self.complaints
        try:
            self.asked, first = self.invited(round), round * self.exchanges
            self.server.begin(first)
            learning = InOrder(self.asked, self._learn)
            for message in self.late():
                self._learn(message)
            with self._timed("cuts"):
                self._collect(Invitation, round, self.asked, learning)
            with self._timed("server"):
                multipliers, loss = self.server.end()
            sent = self.server.learnt_from()
            self.visits += len(sent)
            if self.patient and self.server.learnt == learnt:
                self.tried += 1
                self._in_vain.update(self.asked)
                return math.nan
            self.tried = 0
            self._in_vain.clear()
            losses = [loss]
            for exchange in range(first + 1, first + self.exchanges):
                self.server.begin(exchange)
                learning = InOrder(multipliers, self._learn)
                with self._timed("answers"):
                    self._deliver(_each(multipliers), learning.came, partial(self._enough_learnt, learning))
                learning.end()
                with self._timed("server"):
                    multipliers, loss = self.server.end()
                sent = self.server.learnt_from()
                losses.append(loss)
            answers = _each(multipliers) if self.server.ledger is not None else {}
            with self._timed("answers"):
                self._collect_answers(answers, partial(self.server.answered, round))
            with self._timed("server"):
                committed = self.server.commit(round)
            self.took_part = committed if answers else sent
            self.seen.update(self.took_part)
        finally:
            self._leave()
        return sum(losses) / len(losses)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds what the block takes to a phase, but for what is timed within it."""
        begin, before = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[phase] += time.perf_counter() - begin - (sum(self.seconds.values()) - before)

    def _learn(self, message: Message | None) -> None:
        if message is not None:
            with self._timed("server"):
                self.server.learn(message)

    def _collect(
        self, what: type[Invitation | Audit], round: int, clients: Sequence[int], order: InOrder | None = None
    ) -> dict[int, Message]:
        """The cuts or digests of clients, by number: everybody takes first what it has missed.

        order: is told of them as they come, and of who sends none.
        """
        ends, found = self._ends_at(), dict[int, Message]()
        asks = {n: self._records_for(n) for n in clients}
        if self.server.ledger is not None:
            # Where a client is, it says at once: nobody who computes is waited for meanwhile. One that says nothing
            # leaves the others most of their time.
            unknown = {n: asks.pop(n) for n in clients if n not in self.where}
            asks |= self._ask_once(what, round, unknown, self._ends_at(TO_SAY_WHERE), found, order)
        for _ in range(TRIES):
            asks = self._ask_once(what, round, asks, ends, found, order)
        if order is not None:
            order.end()
        return found

    def _ask_once(
        self,
        what: type[Invitation | Audit],
        round: int,
        asks: Mapping[int, Sequence[Message]],
        ends: float | None,
        found: dict[int, Message],
        order: InOrder | None,
    ) -> dict[int, list[Message]]:
        """Adds what came to `found`; returns what to send those who said that they are elsewhere."""
        again: dict[int, list[Message]] = {}
        whole: dict[int, list[Message]] = {}
        for n, missed in asks.items():
            refusal = self.server.refusal(n, round) if what is Invitation else None
            wanted = what(client=n, round=round, epoch=self.server.epoch, run=self._run)
            whole[n] = [*missed, wanted] if refusal is None else [*missed, refusal, wanted]
        for client, message in self._replies(whole, ends):
            if isinstance(message, (Hello, Differs, Statistics)):
                of = self.server.calibration if isinstance(message, Statistics) else self.server.welcome
                news = of(message)
                if news is not None:
                    again[client] = [news]
                    continue
                message = None
            if order is not None:
                order.came(client, message)
            if message is None:
                continue
            found[client] = message
            for applied in asks[client]:
                self.where[client] = _after(applied)
            if order is not None and self._enough_learnt(order):
                return {}
        return again

    def _enough_learnt(self, order: InOrder) -> bool:
        """Whether enough of the cuts that came were learnt from to go on without the rest."""
        if self.enough is None or order.messages < self.enough:
            return False
        order.take_those_here()  # only then is it known
        with self._timed("server"):
            return len(self.server.learnt_from()) >= self.enough

    def _collect_answers(self, asks: Mapping[int, Sequence[Message]], counts: Callable[[Message], bool]) -> None:
        """Hand on what clients answer until enough of it counts."""
        count = 0

        def came(client: int, message: Message | None) -> None:
            nonlocal count
            if message is not None:
                with self._timed("server"):
                    count += counts(message)

        self._deliver(asks, came, lambda: self.enough is not None and count >= self.enough)

    def _deliver(
        self,
        asks: Mapping[int, Sequence[Message]],
        came: Callable[[int, Message | None], None],
        suffice: Callable[[], bool],
    ) -> None:
        """Hand on what clients answer until it suffices; none of them is asked twice."""
        for client, message in self._replies(asks, self._ends_at()):
            came(client, message)
            if suffice():
                break

    def _replies(
        self, asks: Mapping[int, Sequence[Message]], ends: float | None
    ) -> Iterator[tuple[int, Message | None]]:
        """What comes back, as it comes: None where it is nothing. Whoever closes this is done with the ask."""
        data: dict[int, bytes] = {}
        for client, messages in asks.items():
            carried = self.wire.carry(client, messages)
            if carried is None:
                self._did_not_answer(client)
            else:
                data[client] = carried
        if not data:
            return
        for reply in self.engine.ask(data, None if ends is None else max(0.0, ends - time.monotonic())):
            yield reply.client, self._receive(reply)

    def _receive(self, reply: Reply) -> Message | None:
        """The message of a reply, if it brings one that can be read."""
        data = None if reply.data is None else self.wire.bring(reply.client, reply.data)
        if data is None:
            self._did_not_answer(reply.client)
            self.why[reply.client] = reply.reason or "lost"
            return None
        message = self.server.receive(data, reply.client)
        if message is None:
            self.where.pop(reply.client, None)
            return None
        self.wire.count(message)
        if isinstance(message, Complaint):
            self.where.pop(reply.client, None)
            self._complain(reply.client, printable(text_of(message)))
            return None
        return message

    def _did_not_answer(self, client: int) -> None:
        self.missing += 1
        self.where.pop(client, None)  # whether it has taken what it was sent, it will say

    def _records_for(self, client: int) -> list[Message]:
        """What a client has missed, as far as the server knows where it is."""
        if client not in self.where:
            return []
        round, epoch = self.where[client]
        news = self.server.welcome(Hello(client=client, round=round, epoch=epoch), said=False)
        return [] if news is None else [news]

    def _ends_at(self, share: float = 1.0) -> float | None:
        return None if self.deadline is None else time.monotonic() + share * self.deadline

    def _complain(self, client: int, what: str) -> None:
        self.complaints += 1
        self.complained.append(f"client {client}: {what}")
        del self.complained[:-REASONS_KEPT]

    def invited(self, round: int) -> list[int]:
        """Who takes part in a round: a sample of those who are here, and of whom it was not yet tried with in vain."""
        present = self.engine.present()
        if self._in_vain.issuperset(present):
            self._in_vain.clear()
        here = sorted(present - self._in_vain)
        return [here[n] for n in self.server.sample(round, len(here), min(self.config.sampled, len(here)))]

    def late(self) -> list[Message | None]:
        """What arrives only now of earlier rounds: nothing, where engines drop it."""
        return []

    def endpoint(self, number: int) -> Endpoint[Client]:
        """A client of this process, from its first ask in a round to the round's end."""
        if number not in self._here:
            self._here[number] = self._endpoint(self.take(number))
        return self._here[number]

    def _endpoint(self, client: Client) -> Endpoint[Client]:
        return Endpoint(client, self.exchanges, self.server.ledger is not None, bool(self.config.calibrate), self.id)

    @property
    def _run(self) -> NDArray[np.uint8]:
        """The id as it travels."""
        return np.frombuffer(self.id, np.uint8)

    def take(self, number: int) -> Client:
        """A client of this process, as it was when it was last here."""
        if number not in self.clients:
            self.clients[number] = self.make(number)
        return self.clients[number]

    def put_back(self, client: Client) -> None:
        """The client leaves."""

    def _leave(self) -> None:
        for endpoint in self._here.values():
            self.put_back(endpoint.client)
        self._here.clear()

    def calibrate(self) -> None:
        """Before the first round, its clients estimate the running statistics of the client half.

        What the server commits is that of the base. The clients have to ask for it like all others. With nobody's the
        model's own stay, and a warning says so.
        """
        none = np.empty(0, np.float32)
        ask = Calibration(client=0, round=0, epoch=self.server.epoch, run=self._run, statistics=none)
        asks = {n: [replace(ask, client=n)] for n in self.invited(0)}
        self.seconds = {"server": 0.0}
        try:
            self._collect_answers(asks, self.server.estimated)
        finally:
            self._leave()
        if not self.server.calibrate():
            log.warning("no client gave running statistics that can be used: those of the model stay")
        self.settle()

    def settle(self) -> None:
        """Complete the base with the statistics that the server has committed: now it is known what the run is of."""
        if self.server.statistics is not None:
            for half in (self.base, self.observed):
                calibration.load(half, self.server.statistics.values)
        if self.describe is not None:
            self.header, self.provenance = self.describe()

    def replicas(self) -> Replicas:
        """Bring every client that is here up to date, and a newcomer from nothing; do they hold the same bits?

        What moves here is not counted as the run's. Of a client that leaves meanwhile nothing is said. Where clients
        are elsewhere, one that never took part may answer what it likes: see `Replicas.odd`.
        """
        wire, self.wire = self.wire, Wire()
        present, digests, here = sorted(self.engine.present()), dict[int, str](), list[int]()
        for start in range(0, len(present), AT_ONCE):
            self.why, some = {}, present[start : start + AT_ONCE]
            digests |= self.audited(some)
            here += [n for n in some if self.why.get(n) not in ("gone", "late")]
        newcomer = self.make(0)
        joined, right = self.join(newcomer), newcomer.digest()
        self.wire = wire
        odd = {n: f"the digest {digests[n]}" if n in digests else "no digest" for n in here if digests.get(n) != right}
        strangers = odd.keys() - self.seen if self.patient else set()
        equal = joined and odd.keys() <= strangers
        return Replicas(clients=len(here) - len(strangers) + 1, digest=right, equal=equal, odd=odd)

    def join(self, client: Client) -> bool:
        """Bring one client up to date that is nobody's whom an engine knows. False where that fails."""
        endpoint, number = self._endpoint(client), client.number
        engine, there = self.engine, self.where.pop(number, None)
        self.engine = InProcess(lambda number, data: endpoint.answer(data), number + 1)
        try:
            return bool(self.audited([number]))
        finally:
            self.engine = engine
            self.where.pop(number, None)
            if there is not None:
                self.where[number] = there

    def audited(self, clients: Sequence[int]) -> dict[int, str]:
        """The digests of clients' halves after they have taken all that was committed; of those who answer."""
        try:
            found = self._collect(Audit, 0, clients)
        finally:
            self._leave()
        return {n: m.digest.numpy().tobytes().hex() for n, m in found.items() if isinstance(m, Audited)}

    def model(self) -> SplitModel:
        """Both halves as they are now."""
        if self.server.ledger is not None:
            self.server.ledger.show(self.observed)
        return Joined(self.observed, self.server.half)

    def open_log(self, folder: Path) -> None:
        """Keep the client half's log in `folder`, where the method has one: a new one, or the one that is there."""
        if isinstance(self.server.ledger, SeedReplay) and self.header is not None:
            self.server.ledger.log = open_log(folder, self.header)

    def close_log(self) -> None:
        """Let go of the log's file."""
        if isinstance(self.server.ledger, SeedReplay) and self.server.ledger.log is not None:
            self.server.ledger.log.close()

    def close(self) -> None:
        """Close the log, and let go of the engine."""
        self.close_log()
        self.engine.close()


def _each(messages: Mapping[int, Message]) -> dict[int, list[Message]]:
    """An ask for each client, of its one message."""
    return {client: [message] for client, message in messages.items()}


def _after(news: Message) -> tuple[int, int]:
    """(rounds, epoch) of a client that has applied what it was sent."""
    match news:
        case Records():
            return news.round + len(news.coefficients), news.epoch
        case PoolMoves():
            return int(news.until[0]), news.epoch
        case _:
            return news.round, news.epoch


@dataclass(frozen=True)
class Replicas:
    """Whether all clients, and a newcomer that replayed the whole log at the end, hold the same bits.

    odd: what others gave in place of that digest, by client: of clients elsewhere also those that never took part, of
    which the run says nothing.
    """

    clients: int
    digest: str
    equal: bool
    odd: dict[int, str] = field(default_factory=dict)

"""The rounds of the protocol. `Messenger` asks the clients, and hands on what they answer.

A round is two exchanges. The server asks the invited for their cuts, each with what it has missed since it was last
here; then it sends multipliers to those whose cuts it could learn from, and commits what they answer.
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
from hosfl.halves.split import Joined, SplitModel
from hosfl.methods import calibration
from hosfl.methods.client import Client
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.server import Server
from hosfl.protocol.endpoint import Endpoint
from hosfl.protocol.header import Header
from hosfl.protocol.messages import Audit, Audited, Calibration, Invitation, Message, Wire
from hosfl.protocol.provenance import Provenance, new_id, open_log
from hosfl.runs.in_order import InOrder
from hosfl.runs.messenger import Came, Messenger
from hosfl.settings import Settings

AT_ONCE = 16  # clients whose halves are audited together
log = logging.getLogger("hosfl.federation")


@dataclass
class Federation:
    """A server, its clients, and the messenger between them.

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

    Attributes:
        messenger: asks the clients. At first all live here, and are made by `make`; `Transport.connect` sets another
            engine, its deadline, and the next two.
        enough: cuts that were learnt from, then answers that count, with which a round goes on without the rest;
            likewise of statistics. None: all that were invited.
        least: clients that have to be here before a round begins.
        patient: whether a round in which no cut could be learnt from is not committed, and can be tried again.
        id: random; no other run has it, and this one keeps it when it is resumed. Clients know by it whose weights
            theirs are.
        clients: those made here so far, by number.
        visits: how many times a client took part.
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
        self._here: dict[int, Endpoint[Client]] = {}
        self._in_vain: set[int] = set()  # whom the next round was tried with
        self._before = (0, 0)  # refusals and complaints of earlier rounds
        here = InProcess(lambda number, data: self.endpoint(number).answer(data), self.config.clients)
        self.messenger = Messenger(self.server, here)

    @property
    def refused(self) -> list[str]:
        """The reasons of either side for what it refused: the server's, then the clients'."""
        return self.server.refused + self.messenger.complained

    @property
    def newest_refused(self) -> list[str]:
        """The reasons of either side for what it refused last in this round."""
        refusals, complaints = self._before
        of_server = self.server.refused[-1:] if self.server.refused.total > refusals else []
        return of_server + (self.messenger.complained[-1:] if self.messenger.complained.total > complaints else [])

    def say_refused(self) -> None:
        """Warn of what either side has refused, if anything."""
        if self.refused:
            count = self.server.refused.total + self.messenger.complained.total
            log.warning("messages that were refused: %d, such as: %s", count, self.refused[0])

    def ready(self) -> bool:
        """Whether enough clients are here for a round."""
        return len(self.messenger.engine.present()) >= self.least

    def round(self, round: int) -> float:
        """One round of the protocol; returns the mean training loss of its clients, NaN if nobody took part.

        A message that is lost, late or refused costs its sender the round, and nobody else anything: where the run is
        patient, a round of nobody else's is still to come. See `tried`.
        """
        learnt = self.server.learnt
        self.seconds = dict.fromkeys(("cuts", "server", "answers"), 0.0)
        self.messenger.why.clear()
        self._before = self.server.refused.total, self.messenger.complained.total
        try:
            self.asked, first = self.invited(round), round * self.exchanges
            multipliers, loss = self._exchange("cuts", first, self.asked, partial(self._invite, round))
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
            self._leave()
        return sum(losses) / len(losses)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds what the block takes to a phase, but for what is timed within it."""
        begin, before = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[phase] += time.perf_counter() - begin - (sum(self.seconds.values()) - before)

    def _exchange(
        self, phase: str, number: int, clients: Iterable[int], ask: Callable[[Came, Callable[[], bool]], None]
    ) -> tuple[Mapping[int, Message], float]:
        """The server learns from the cuts of an exchange, in the order of their clients; see `Server.end`.

        ask: hands on the cuts; its arguments are those of `Messenger`'s methods.
        """
        self.server.begin(number)
        order = InOrder(clients, self._learn)
        with self._timed(phase):
            ask(order.came, partial(self._enough_learnt, order))
            order.end()
        with self._timed("server"):
            return self.server.end()

    def _invite(self, round: int, came: Came, suffices: Callable[[], bool]) -> None:
        for message in self.late():
            self._learn(message)
        self.messenger.collect(self.asked, partial(self._invitation, round), came, suffices)

    def _learn(self, message: Message | None) -> None:
        if message is not None:
            with self._timed("server"):
                self.server.learn(message)

    def _invitation(self, round: int, client: int) -> list[Message]:
        """What a client is asked for its cut by, and told before that of its last message, if that was refused."""
        refusal = self.server.refusal(client, round)
        invitation = Invitation(client=client, round=round, epoch=self.server.epoch, run=self._run)
        return [invitation] if refusal is None else [refusal, invitation]

    def _enough_learnt(self, order: InOrder) -> bool:
        """Whether enough of the cuts that came were learnt from to go on without the rest."""
        if self.enough is None or order.messages < self.enough:
            return False
        order.take_those_here()  # only then is it known
        with self._timed("server"):
            return len(self.server.learnt_from()) >= self.enough

    def _collect_answers(self, asks: Mapping[int, Message], counts: Callable[[Message], bool]) -> None:
        """Hand on what clients answer until enough of it counts."""
        count = 0

        def came(client: int, message: Message | None) -> None:
            nonlocal count
            if message is not None:
                with self._timed("server"):
                    count += counts(message)

        self.messenger.deliver(asks, came, lambda: self.enough is not None and count >= self.enough)

    def invited(self, round: int) -> list[int]:
        """Who takes part in a round: a sample of those who are here, and of whom it was not yet tried with in vain."""
        present = self.messenger.engine.present()
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
        asks = {n: replace(ask, client=n) for n in self.invited(0)}
        self.seconds = {"server": 0.0}
        try:
            self._collect_answers(asks, self.server.accept_statistics)
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
        wire, self.messenger.wire = self.messenger.wire, Wire()
        present, digests, here = sorted(self.messenger.engine.present()), dict[int, str](), list[int]()
        for start in range(0, len(present), AT_ONCE):
            some = present[start : start + AT_ONCE]
            self.messenger.why.clear()
            digests |= self.audited(some)
            here += [n for n in some if self.messenger.why.get(n) not in ("gone", "late")]
        newcomer = self.make(0)
        joined, right = self.join(newcomer), newcomer.digest()
        self.messenger.wire = wire
        odd = {n: f"the digest {digests[n]}" if n in digests else "no digest" for n in here if digests.get(n) != right}
        strangers = odd.keys() - self.seen if self.patient else set()
        equal = joined and odd.keys() <= strangers
        return Replicas(clients=len(here) - len(strangers) + 1, digest=right, equal=equal, odd=odd)

    def join(self, client: Client) -> bool:
        """Bring one client up to date that is nobody's whom an engine knows. False where that fails."""
        endpoint, messenger = self._endpoint(client), self.messenger
        engine = InProcess(lambda number, data: endpoint.answer(data), client.number + 1)
        self.messenger = replace(messenger, engine=engine, where={})
        try:
            return bool(self.audited([client.number]))
        finally:
            self.messenger = messenger

    def audited(self, clients: Sequence[int]) -> dict[int, str]:
        """The digests of clients' halves after they have taken all that was committed; of those who answer."""
        digests: dict[int, str] = {}

        def ask(client: int) -> list[Message]:
            return [Audit(client=client, round=0, epoch=self.server.epoch, run=self._run)]

        def came(client: int, message: Message | None) -> None:
            if isinstance(message, Audited):
                digests[client] = message.digest.numpy().tobytes().hex()

        try:
            self.messenger.collect(clients, ask, came)
        finally:
            self._leave()
        return digests

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
        self.messenger.engine.close()


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

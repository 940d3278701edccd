"""The rounds of the protocol, with server and clients in one process: every arrow is a message, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hosfl.halves.inputs import Batch
from hosfl.halves.split import SplitModel
from hosfl.methods import calibration
from hosfl.methods.client import Client
from hosfl.methods.ledger import SeedReplay
from hosfl.methods.server import KEPT, Server
from hosfl.methods.tensors import decoded
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.log import Header
from hosfl.protocol.messages import Message, MessageError, Wire
from hosfl.protocol.provenance import Provenance, open_log
from hosfl.settings import Settings


@dataclass
class Federation:
    """A server, its clients, and the wire between them.

    make: a client that has applied nothing, by its number. base: the client half of round 0. observed: the client half
    of the moment, for evaluation. header: of the log, for methods that have one; see `open_log`. provenance: what the
    run is made of. exchanges: cuts that a client sends per round; its answer to all but the last is the
    next one, and the server numbers them on and on. clients: those made so far. complained: what clients refused, the
    first thousand times; complaints: how many there were. visits: how many times a client took part.
    """

    config: Settings
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

    def calibrate(self, batches: Callable[[int], Iterable[Batch]]) -> None:
        """Before the first round, its clients estimate the running statistics of the client half.

        What the server commits is that of the base. The clients have to ask for it like all others: see `join`.
        batches: of a client, by its number, for this alone.
        """
        heard: list[Message | None] = []
        for number in self.invited(0):
            client = self.take(number)
            try:
                heard.append(self.up(client.statistics(batches(number))))
            except MessageError as error:
                self._complain(number, error)
            finally:
                self.put_back(client)
        self.server.calibrate([message for message in heard if message is not None])
        self.take_statistics()

    def take_statistics(self) -> None:
        """Give base and observed half the statistics that the server has committed."""
        if self.server.statistics is not None:
            for half in (self.base, self.observed):
                calibration.load(half, self.server.statistics.values)

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
        if self.config.calibrate and not client.calibrated and not self._calibrated(client):
            return False
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

    def _calibrated(self, client: Client) -> bool:
        """A client that comes for the first time asks for the run's statistics. False if that fails."""
        asked = self.up(client.asks())
        answer = None if asked is None else self.server.calibration(asked)
        received = None if answer is None else self.down(answer)
        if received is None:
            return False
        try:
            client.calibrate(received)
        except MessageError as error:
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
            return None if data is None else decoded(data)
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
        if self.server.ledger is not None:
            self.server.ledger.show(self.observed)
        return SplitModel(self.observed, self.server.half)

    def open_log(self, folder: Path) -> None:
        """Keep the client half's log in `folder`, where the method has one: a new one, or the one that is there."""
        if isinstance(self.server.ledger, SeedReplay) and self.header is not None:
            self.server.ledger.log = open_log(folder, self.header)

    def close(self) -> None:
        """Close the log."""
        if isinstance(self.server.ledger, SeedReplay) and self.server.ledger.log is not None:
            self.server.ledger.log.close()


@dataclass(frozen=True)
class Replicas:
    """Whether all clients, and a newcomer that replayed the whole log at the end, hold the same bits."""

    clients: int
    digest: str
    equal: bool

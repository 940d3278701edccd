"""What a client answers to the server's bytes, whoever carries them.

An ask is one or more messages together: what was committed since the client's last round, then what the server wants.
The answer is one message. A client that cannot follow says where it is, and is asked again with what it lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from hosfl.protocol.arrays import bits
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.messages import (
    Ask,
    Audit,
    Audited,
    Calibration,
    Complaint,
    Cut,
    Differs,
    Hello,
    Invitation,
    Message,
    MessageError,
    Refusal,
    Statistics,
    encode,
    text_array,
    text_of,
    unpack,
)


class AnotherRun(Exception):
    """The server's request is of another run than the client's. Nothing was changed by it."""


class ClientProtocol(Protocol):
    """What an endpoint needs of a client, with torch or without. Every method may raise MessageError.

    applied: the number of rounds in its half. epoch: how often the server had been restarted when they were committed.
    calibrated: whether it has loaded the run's running statistics.
    """

    number: int
    calibrated: bool

    @property
    def applied(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    def decoded(self, data: bytes) -> Message:
        """Decode a message from the wire, its arrays of the kind that this client computes with."""

    def request_statistics(self) -> Statistics:
        """Ask for the run's running statistics."""

    def statistics(self, message: Calibration) -> Statistics:
        """Estimate running statistics on its own batches."""

    def calibrate(self, message: Message) -> None:
        """Load the run's running statistics."""

    def hello(self) -> Hello:
        """The message that says which rounds it has applied."""

    def reset(self) -> None:
        """Start again from the base weights."""

    def catch_up(self, message: Message) -> Differs | None:
        """Apply what was committed since. Returns `Differs` if its half turns out to be wrong. Raises LatticeError."""

    def output(self, round: int) -> Cut:
        """The cut of a batch."""

    def answer(self, message: Message) -> Message:
        """The answer to a multiplier."""

    def digest(self) -> str:
        """SHA-256 of its half, in hexadecimal."""


AnyClient = TypeVar("AnyClient", bound=ClientProtocol)


@dataclass
class Endpoint(Generic[AnyClient]):
    """A client as an engine sees it: bytes in, bytes out. Repeating an ask is harmless.

    exchanges: cuts per round. follows: whether the client half is ever updated. calibrates: whether the run estimates
    running statistics before its first round. run: its id, which every `Ask` carries. refused: called with the reason
    when the server refuses a message of this client.
    """

    client: AnyClient
    exchanges: int = 1
    follows: bool = True
    calibrates: bool = False
    run: bytes = b""
    refused: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self._said_where = False  # whether the last answer was Hello: what comes then has to fit

    def answer(self, data: bytes) -> bytes:
        """The encoded answer to an ask; a `Complaint` if it cannot be answered. Raises only AnotherRun."""
        client = self.client
        try:
            return encode(self._answer([client.decoded(one) for one in unpack(data)]))
        except (MessageError, LatticeError) as error:
            said = Complaint(
                client=client.number, round=client.applied, epoch=client.epoch, text=text_array(str(error))
            )
            try:
                return encode(said)
            except MessageError:  # rounds that are none: whatever state this was, it is not the run's
                client.reset()
                return encode(replace(said, round=0, epoch=0))

    def _answer(self, messages: list[Message]) -> Message:
        if not messages:
            raise MessageError("an ask without a message")
        client, said_where = self.client, self._said_where
        *news, wanted = messages
        while news and isinstance(refusal := news[-1], Refusal):
            news.pop()
            if self.refused is not None:
                self.refused(text_of(refusal))
        if isinstance(wanted, Ask) and bytes(bits(wanted.run)) != self.run:
            raise AnotherRun(f"client {client.number} is of run {self.run.hex()}, asked by another")
        self._said_where = False
        if isinstance(wanted, Calibration) and self.calibrates and not news:
            return client.statistics(wanted)
        if isinstance(wanted, (Invitation, Audit)):
            if self.calibrates and not client.calibrated:
                if not news or not isinstance(news[0], Calibration):
                    return client.request_statistics()
                client.calibrate(news.pop(0))
            if self.follows and not news:
                self._said_where = True
                return client.hello()
        for message in news:
            if said_where and (message.epoch < client.epoch or message.round < client.applied):
                client.reset()  # the server does not know of all these rounds: it may have lost some
            try:
                differs = client.catch_up(message)
            except MessageError:
                if said_where:
                    raise
                self._said_where = True
                return client.hello()
            if differs is not None:
                return differs
        if isinstance(wanted, Invitation):
            return client.output(wanted.round * self.exchanges)
        if isinstance(wanted, Audit):
            digest = np.frombuffer(bytes.fromhex(client.digest()), "<i4")
            return Audited(client=client.number, round=client.applied, epoch=client.epoch, digest=digest)
        return client.answer(wanted)

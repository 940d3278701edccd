"""What a client answers to the server's bytes, whoever carries them.

An ask is one or more messages together: what was committed since the client's last round, then what the server wants.
The answer is one message. A client that cannot follow says where it is, and is asked again with what it lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hosfl.methods.client import Client
from hosfl.methods.tensors import decoded
from hosfl.protocol.arrays import bits
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.messages import (
    Ask,
    Audit,
    Audited,
    Calibration,
    Complaint,
    Invitation,
    Message,
    MessageError,
    encode,
    unpack,
)

LONGEST_COMPLAINT = 1000  # bytes


class AnotherRun(Exception):
    """The server's ask is of another run than the client. Nothing was changed by it."""


@dataclass
class Endpoint:
    """A client as an engine sees it: bytes in, bytes out. Asking the same twice is harmless.

    exchanges: cuts per round. follows: whether anything is ever committed of the client half. calibrates: whether the
    run estimates running statistics before its first round. run: its id, which every ask that begins something says.
    """

    client: Client
    exchanges: int = 1
    follows: bool = True
    calibrates: bool = False
    run: bytes = b""

    def __post_init__(self) -> None:
        self._said_where = False  # whether the last answer was Hello: what comes then has to fit

    def answer(self, data: bytes) -> bytes:
        """The answer to an ask, encoded; a Complaint where there is none. AnotherRun is all that is raised."""
        client = self.client
        try:
            return encode(self._answer([decoded(one) for one in unpack(data)]))
        except (MessageError, LatticeError) as error:
            # Moves that fit the server's replica and not the client's are a LatticeError: its weights are damaged.
            said = np.frombuffer(str(error).encode()[:LONGEST_COMPLAINT], np.uint8)
            return encode(Complaint(client=client.number, round=client.applied, epoch=client.epoch, text=said))

    def _answer(self, messages: list[Message]) -> Message:
        if not messages:
            raise MessageError("an ask without a message")
        client, said_where = self.client, self._said_where
        *news, wanted = messages
        if isinstance(wanted, Ask) and bytes(bits(wanted.run)) != self.run:
            raise AnotherRun(f"client {client.number} is of run {self.run.hex()}, asked by another")
        self._said_where = False
        if isinstance(wanted, Calibration) and self.calibrates and not news:
            return client.statistics(wanted)
        if isinstance(wanted, (Invitation, Audit)):
            if self.calibrates and not client.calibrated:
                if not news or not isinstance(news[0], Calibration):
                    return client.asks()
                client.calibrate(news.pop(0))
            if self.follows and not news:
                self._said_where = True
                return client.hello()
        for message in news:
            if said_where and (message.epoch < client.epoch or message.round < client.applied):
                client.anew()  # the server does not know of all these rounds: it may have lost some
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

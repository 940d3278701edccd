"""A connection to a NATS broker that reconnects for ever, in a thread of its own.

nats-py connects and speaks the protocol. This module replaces three parts of it:

- its parser, which one message can stop: by a header that is not UTF-8, or a vertical tab in a reply subject;
- its use of TLS: it does without where the broker, or somebody in between, says so;
- its outbox, which keeps unsent messages for the next connection, where nobody waits for them any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, TypeVar

from nats import errors
from nats.aio.client import Client
from nats.protocol.parser import Parser

from hosfl.engines.engine import EngineError
from hosfl.engines.frames import MAX_PIECE, MIN_PIECE, SMALL, Outgoing

log = logging.getLogger("hosfl.engines.nats")
# nats-py's stream does not know that it is under TLS, so asyncio warns at the end of every connection, for no reason.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))
T = TypeVar("T")
Receive = Callable[[bytes, bytes], None]

TICK = 0.5  # seconds between two ticks
FIRST_DELAY, MAX_DELAY = 0.1, 2.0  # seconds between attempts to connect; the delay doubles up to the second
MAX_DELAY_REFUSED = 30.0  # the same, if the broker refuses the certificate: somebody has to renew it first
TIMEOUT = 10.0  # seconds in which a broker answers
FRAME_OVERHEAD = 256  # bytes of a frame beside its data, at most


class _Parser(Parser):
    """A parser of the broker's protocol that splits lines at blanks only, and skips headers."""

    def reset(self) -> None:
        super().reset()
        self.raw = bytearray()
        self.message: tuple[bytes, int, int] | None = None  # subject, bytes of headers, bytes in all

    async def parse(self, data: bytes = b"") -> None:
        raw = self.raw
        raw += data
        while True:
            if self.message is None:
                end = raw.find(b"\r\n")
                if end < 0:
                    return
                line = bytes(raw[:end])
                del raw[: end + 2]
                words = line.split(b" ")
                if words[0] == b"MSG":
                    self.message = words[1], 0, int(words[-1])
                elif words[0] == b"HMSG":
                    self.message = words[1], int(words[-2]), int(words[-1])
                else:
                    await super().parse(line + b"\r\n")
            else:
                subject, headers, size = self.message
                if len(raw) < size + 2:
                    return
                self.message = None
                data = bytes(raw[headers:size])
                del raw[: size + 2]
                self.nc.receive(subject, data)


class _Connection(Client):
    """A connection of nats-py's that passes messages to `receive`, and insists on TLS if `secure`."""

    def __init__(self, receive: Receive, secure: bool) -> None:
        super().__init__()
        self._ps = _Parser(self)
        self.receive, self.secure = receive, secure

    def _connect_command(self) -> bytes:
        if self.secure and not self._server_info.get("tls_required"):
            raise errors.SecureConnWantedError
        return super()._connect_command()


@dataclass
class _Stream:
    """The bytes of a message from `offset` to `end`, which a receiver has requested and which are not sent yet."""

    subject: str
    outgoing: Outgoing
    offset: int
    end: int


class Link:
    """A thread that keeps a connection to a broker.

    urls: of brokers, such as "tls://host:4222". subjects: those to subscribe to. The thread calls receive(subject,
    data) for every message, connected() after every new connection, and tick(since) every half second; by then
    everything that the broker had for this client at time.monotonic() = since has been received. `post`, `stream` and
    `stop` may be called in the thread only, `call` in all others. up: whether there is a connection.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        tls: ssl.SSLContext | None,
        name: str,
        subjects: Sequence[str],
        receive: Receive,
        connected: Callable[[], None],
        tick: Callable[[float], None],
    ) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls:
            raise EngineError("no broker is named: give one or more, such as tls://host:4222")
        if tls is None and any(url.startswith(("tls:", "wss:")) for url in self.urls):
            raise EngineError(f"{', '.join(self.urls)} takes certificates: give tls, as Member.context() makes it")
        self.tls = tls
        self.name, self.subjects = name, list(subjects)
        self._receive, self._connected, self._tick = receive, connected, tick
        self.up = False
        self._outbox: deque[tuple[str, bytes, str]] = deque()
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._loop = asyncio.new_event_loop()
        self._wake, self._closing = asyncio.Event(), asyncio.Event()
        self._warned_at: dict[str, float] = {}  # by text: time of the last warning
        self._thread = threading.Thread(target=self._run_loop, name=f"hosfl {name}", daemon=True)

    def start(self) -> None:
        """Start the thread, which connects as soon as there is a broker."""
        self._thread.start()

    def close(self) -> None:
        """Send the frames in the outbox, and end the thread."""
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._closing.set)
            except RuntimeError:
                return  # closed meanwhile
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(TIMEOUT)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread, and return its result. Raises EngineError once the link is closed."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function(*arguments))
            except BaseException as error:
                result.set_exception(error)

        try:
            if self._closing.is_set():
                raise RuntimeError
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:
            raise EngineError(f"{self.name} is closed") from None
        while True:
            try:
                return result.result(timeout=1)
            except FutureTimeout:
                if result.done() or self._thread.is_alive():
                    continue
                raise EngineError(f"{self.name} is closed") from None

    def post(self, subject: str, frame: bytes, reply: str = "") -> None:
        """Send a frame. Without a connection it is dropped: after the next one both sides request what they lack."""
        if self.up:
            self._outbox.append((subject, frame, reply))
            self._wake.set()

    def stream(self, subject: str, id: int, outgoing: Outgoing, offset: int, end: int) -> None:
        """Send the bytes of a message from `offset` to `end` in pieces, in turn with all other streams."""
        if not self.up:
            return
        stream = self._streams.get((subject, id))
        if stream is not None and stream.outgoing is outgoing and stream.end == offset:
            stream.end = end
        else:
            self._streams[subject, id] = _Stream(subject, outgoing, offset, end)
        self._wake.set()

    def stop(self, subject: str, id: int) -> None:
        """End a stream."""
        self._streams.pop((subject, id), None)

    def _run_loop(self) -> None:
        try:
            self._loop.run_until_complete(self._keep_connected())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _keep_connected(self) -> None:
        """Connect, serve the connection until it is lost, and begin again, until the link is closed."""
        delay = FIRST_DELAY
        while not self._closing.is_set():
            connection, lost = _Connection(self._on_message, self.tls is not None), asyncio.Event()
            try:
                await self._connect(connection, lost)
            except Exception as error:  # of sockets, of TLS, of nats-py and its parser: a broker may send anything
                self._warn(error)
                await self._disconnect(connection)
                await self._sleep(delay * random.uniform(0.5, 1))
                delay = min(2 * delay, MAX_DELAY_REFUSED if "authorization" in str(error).lower() else MAX_DELAY)
                continue
            delay = FIRST_DELAY
            log.info("%s is connected", self.name)
            self._outbox.clear()
            self._streams.clear()
            self.up = True
            self._call_safely(self._connected)
            coroutines = self._send_outbox(connection), self._tick_regularly(connection), lost.wait()
            tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
            closing = asyncio.ensure_future(self._closing.wait())
            await asyncio.wait([*tasks, closing], return_when=asyncio.FIRST_COMPLETED)
            if self._closing.is_set() and not lost.is_set():
                await self._flush_outbox(connection)
            self.up = False
            await self._disconnect(connection)
            for task in (*tasks, closing):
                task.cancel()
            for outcome in await asyncio.gather(*tasks, closing, return_exceptions=True):
                if isinstance(outcome, Exception):
                    self._warn(outcome)
            if not self._closing.is_set():
                log.warning("%s has lost its connection, and looks for another", self.name)
                await self._sleep(FIRST_DELAY * random.random())

    async def _connect(self, connection: _Connection, lost: asyncio.Event) -> None:
        async def error(error: Exception) -> None:
            if "permissions" in str(error):
                self._warn(error, "%s: the broker does not let it (%s), and it tries on: %s")
            elif not self.up:
                self._warn(error)

        async def closed() -> None:
            lost.set()

        await connection.connect(
            self.urls,
            name=self.name,
            tls=self.tls,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=FIRST_DELAY,  # type: ignore[arg-type] # seconds, also in parts
            connect_timeout=5,
            ping_interval=2,
            max_outstanding_pings=4,
            pending_size=2 * MAX_PIECE,
            error_cb=error,
            closed_cb=closed,
        )
        if connection.max_payload < SMALL + FRAME_OVERHEAD:
            raise EngineError(f"its max_payload is {connection.max_payload} bytes; let it be 1 MB, as it is by default")
        for subject in self.subjects:
            await connection.subscribe(subject)
        await connection.flush(int(TIMEOUT))

    async def _send_outbox(self, connection: _Connection) -> None:
        """Send what there is to send: frames first, then a piece of each stream in turn."""
        piece = min(MAX_PIECE, (connection.max_payload - FRAME_OVERHEAD) // MIN_PIECE * MIN_PIECE)
        while self.up:  # tested, since nats-py may swallow a cancellation
            await self._wake.wait()
            self._wake.clear()
            while self.up and (self._outbox or self._streams):
                if self._outbox:
                    subject, frame, reply = self._outbox.popleft()
                else:
                    key = next(iter(self._streams))
                    stream, reply = self._streams.pop(key), ""
                    subject, begin = stream.subject, stream.offset
                    stream.offset = min(stream.end, begin + piece)
                    frame = stream.outgoing.piece(key[1], begin, stream.offset)
                    if stream.offset < stream.end:
                        self._streams[key] = stream
                await connection.publish(subject, frame, reply)

    async def _tick_regularly(self, connection: _Connection) -> None:
        """Call `tick` every half second, after all that the broker had at that time has been received."""
        while connection.is_connected:
            since = time.monotonic()
            await connection.flush(int(TIMEOUT))
            self._call_safely(self._tick, since)
            await asyncio.sleep(TICK)

    async def _flush_outbox(self, connection: _Connection) -> None:
        """Send what is in the outbox, for about two seconds at most."""
        self._streams.clear()
        for _ in range(100):
            if not self._outbox:
                break
            await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(connection.flush(), 1)
        except Exception as error:
            log.debug("%s: %s", self.name, error)

    async def _disconnect(self, connection: _Connection) -> None:
        try:
            await asyncio.wait_for(connection.close(), 2)
        except Exception as error:
            log.debug("%s: %s", self.name, error)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)

    def _on_message(self, subject: bytes, data: bytes) -> None:
        self._call_safely(self._receive, subject, data)

    def _call_safely(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            log.exception("%s: a fault of hosfl's", self.name)

    def _warn(self, error: Exception, text: str = "%s has no broker at %s, and tries on: %s") -> None:
        """Log a warning, each text at most once a minute."""
        now = time.monotonic()
        if now - self._warned_at.get(text, -math.inf) > 60:
            self._warned_at[text] = now
            log.warning(text, self.name, ", ".join(self.urls), _error_text(error))


def _error_text(error: Exception) -> str:
    return str(error) or type(error).__name__

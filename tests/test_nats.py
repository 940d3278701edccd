"""What the NATS engine stands: brokers that go, strangers who speak, and nothing believed that is not the broker's."""

import asyncio
import os
import pickle
import random
import threading
import time

import answers
import pytest
from broker import Plain, Stranger, certificates, context
from hypothesis import given
from hypothesis import strategies as st

from hosfl.engines import frames, nats_server
from hosfl.engines.engine import EngineError, Reply
from hosfl.engines.frames import (
    Beat,
    Bye,
    Ended,
    EndReason,
    Fetch,
    FrameError,
    Outgoing,
    Piece,
    Ping,
    Want,
    decode,
    encode,
)
from hosfl.engines.nats_line import NatsLine
from hosfl.engines.nats_link import Link
from hosfl.engines.nats_server import NatsEngine

MB = 1 << 20
UP, DOWN = b"hosfl.r.up.%d.m", b"hosfl.r.down.%d.m"


def until(true, seconds=20.0):
    begin = time.monotonic()
    while not true():
        assert time.monotonic() < begin + seconds
        time.sleep(0.02)


class Lines:
    """Lines that serve in threads."""

    def __init__(self, url):
        self.url, self.open = url, []

    def join(self, number, answer=answers.reverse, **options):
        line = NatsLine(self.url, "r", number, **options)

        def serve():
            try:
                line.serve(answer)
            except EngineError as error:
                line.ended = error

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self.open.append((line, thread))
        return line

    def close(self):
        for line, thread in self.open:
            line.close()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def broker(tmp_path):
    broker = Plain(tmp_path)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def engine(broker):
    engine = NatsEngine(broker.url, "r", 4)
    yield engine
    engine.close()


@pytest.fixture
def lines(broker):
    lines = Lines(broker.url)
    yield lines
    lines.close()


@pytest.fixture
def stranger(broker):
    stranger = Stranger(broker.port)
    yield stranger
    stranger.close()


class ByHand:
    """Client `number`, spoken by hand: it hears asks, and says what a test wants."""

    def __init__(self, broker, number, line=7):
        self.stranger, self.number = Stranger(broker.port), number
        self.stranger.subscribe(DOWN % number)
        self.say(Beat(line, 1))

    def say(self, *frames):
        for frame in frames:
            self.stranger.publish(UP % self.number, frame if isinstance(frame, bytes) else encode(frame))
        self.stranger.socket.sendall(b"PING\r\n")

    def hear(self, kind):
        """The next frame of a kind. Keeps being here meanwhile."""
        until = time.monotonic() + 20
        while True:
            frame = decode(self.stranger.next())
            if isinstance(frame, kind):
                return frame
            assert time.monotonic() < until, f"no {kind.__name__} has come"

    def close(self):
        self.stranger.close()


@pytest.fixture
def by_hand(broker, engine):
    hand = ByHand(broker, 1)
    until(lambda: engine.present() == {1})
    yield hand
    hand.close()


def start(engine, messages, **limits):
    """An ask in a thread; `join` it for the list of its replies."""

    class Asking(threading.Thread):
        def run(self):
            self.replies = list(engine.ask(messages, **limits))

        def join(self):
            super().join(30)
            return self.replies

    asking = Asking(daemon=True)
    asking.start()
    return asking


# Brokers that go.


@pytest.mark.parametrize("size", [3, 24 * MB])
def test_a_broker_that_restarts_during_an_ask(broker, engine, lines, size):
    """Small: while it is answered. Large: while the question or the answer is on its way."""
    begun = threading.Event()

    def answer(data):
        begun.set()
        time.sleep(0.5)
        return data[::-1]

    lines.join(0, answer)
    lines.join(1, answer)
    until(lambda: engine.present() == {0, 1})
    data = os.urandom(size)
    asking = start(engine, {0: data, 1: data}, deadline=60)
    for _ in range(3):
        time.sleep(0.3)
        broker.stop()
        time.sleep(0.3)
        broker.start()
    replies = asking.join()
    assert sorted(replies, key=lambda reply: reply.client) == [Reply(0, data[::-1]), Reply(1, data[::-1])]
    assert begun.is_set()


@pytest.mark.parametrize("whose", ["server", "client"])
def test_one_connection_that_breaks_during_an_ask(broker, lines, monkeypatch, whose):
    """The other end notices nothing of it."""
    connections = []
    connect = Link._connect

    async def noted(link, connection, lost):
        connections.append((link, connection))
        await connect(link, connection, lost)

    monkeypatch.setattr(Link, "_connect", noted)
    piece = Outgoing.piece
    monkeypatch.setattr(Outgoing, "piece", lambda *values: time.sleep(0.01) or piece(*values))
    engine = NatsEngine(broker.url, "r", 1)
    line = lines.join(0)
    until(lambda: engine.present() == {0})
    data = os.urandom(24 * MB)
    asking = start(engine, {0: data}, deadline=15)  # before a stalled transfer would begin again
    cut, other = (engine._link, line._link) if whose == "server" else (line._link, engine._link)
    for _ in range(4):
        time.sleep(0.3)
        connection = [connection for link, connection in connections if link is cut][-1]
        cut._loop.call_soon_threadsafe(connection._transport.close)
    assert asking.join() == [Reply(0, data[::-1])]
    assert [link for link, _ in connections].count(other) == 1
    assert len(connections) > 2
    engine.close()


def test_an_ask_waits_for_a_broker_that_is_away(broker, engine, lines):
    lines.join(0)
    until(lambda: engine.present() == {0})
    broker.stop()
    until(lambda: engine.present() == set())
    begin = time.monotonic()
    assert list(engine.ask({0: b"ab"}, deadline=0.5)) == [Reply(0, None, "late")]
    assert 0.4 < time.monotonic() - begin < 2
    asking = start(engine, {0: b"ab"}, deadline=30)
    time.sleep(0.5)
    broker.start()
    assert asking.join() == [Reply(0, b"ba")]


def test_a_server_and_a_client_that_are_there_before_the_broker(broker, lines):
    broker.stop()
    engine = NatsEngine(broker.url, "r", 1)
    lines.join(0)
    asking = start(engine, {0: b"ab"}, deadline=30)
    time.sleep(1)
    broker.start()
    assert asking.join() == [Reply(0, b"ba")]
    engine.close()


def test_a_new_server_waits_for_its_clients(engine, lines):
    until(lambda: engine._link.up)
    asking = start(engine, {0: b"ab", 1: b"ab"}, deadline=30)
    time.sleep(1.5)
    lines.join(0)
    assert asking.join() == [Reply(0, b"ba"), Reply(1, None, "gone")]


def told_of_two(caplog):
    """Who has said in the log that two servers are at work."""
    texts = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert all("two servers are at work on run r," in text for text in texts)
    return {"client" if text.startswith("client") else "server" for text in texts}


def test_two_servers_of_one_run_are_told_of_each_other(broker, engine, lines, caplog):
    lines.join(0)
    until(lambda: engine.present() == {0})
    other = NatsEngine(broker.url, "r", 4)
    until(lambda: told_of_two(caplog) == {"client", "server"})
    until(lambda: engine._log._last.keys() & other._log._last.keys() >= {"servers"})
    other.close()


def test_a_server_that_is_started_anew_is_no_second_one(broker, lines, caplog):
    lines.join(0)
    for _ in range(4):
        engine = NatsEngine(broker.url, "r", 4)
        until(lambda engine=engine: engine.present() == {0})
        assert list(engine.ask({0: b"ab"})) == [Reply(0, b"ba")]
        time.sleep(1.5)  # it pings
        engine.close()
    assert told_of_two(caplog) == set()


def test_a_file_goes_on_where_it_was(broker, engine, monkeypatch):
    """The broker restarts, the server restarts; not a byte is fetched twice but those on their way."""
    data = os.urandom(40 * MB)
    engine.offer({"base": data})
    line = NatsLine(broker.url, "r", 0)
    sent = []
    piece = Outgoing.piece

    def counted(outgoing, id, offset, end):
        sent.append(end - offset)
        time.sleep(0.01)  # 50 MB a second
        return piece(outgoing, id, offset, end)

    monkeypatch.setattr(Outgoing, "piece", counted)
    found = []
    fetching = threading.Thread(target=lambda: found.append(line.fetch("base", deadline=60)))
    fetching.start()
    until(lambda: sum(sent) > 8 * MB)
    broker.stop()
    broker.start()
    until(lambda: sum(sent) > 24 * MB)
    engine.close()
    engine = NatsEngine(broker.url, "r", 1)
    engine.offer({"base": data})
    fetching.join()
    line.close()
    engine.close()
    assert found == [data]
    assert 40 * MB <= sum(sent) < 40 * MB + 2 * 2 * frames.WINDOW


@pytest.mark.parametrize("payload", [1000, 50_000, 123_456])
def test_what_a_broker_carries_at_once(tmp_path, caplog, payload):
    broker = Plain(tmp_path, f"max_payload: {payload}")
    broker.start()
    engine, lines = NatsEngine(broker.url, "r", 3), Lines(broker.url)
    data = os.urandom(9 * MB + 7)
    if payload < frames.SMALL:
        until(lambda: "its max_payload is 1000 bytes; let it be 1 MB" in caplog.text)
    else:
        for number in range(3):
            lines.join(number)
        until(lambda: engine.present() == {0, 1, 2})
        replies = engine.ask(dict.fromkeys(range(3), data), deadline=15)  # windows that are no power of two
        assert {reply.client: reply.data == data[::-1] for reply in replies} == {0: True, 1: True, 2: True}
    lines.close()
    engine.close()
    broker.stop()


# Strangers.

HOSTILE = {
    "a status that is no text": {"headers": b"NATS/1.0 \xff\xff\xff\r\n\r\n"},
    "headers that are none": {"headers": b"NATS/1.0"},
    "a header line that is none": {"headers": b"NATS/1.0\r\n: \xff\r\n\xff\r\n\r\n"},
    "a reply subject that is no text": {"reply": b"a\xff"},
    "a reply subject with white space": {"reply": b"a\x0bb"},
    "a reply subject with a form feed": {"reply": b"a\x0c1"},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_no_message_stops_the_connection(broker, engine, lines, stranger, how, caplog):
    """nats-py itself stops reading at most of these, and the rest make it connect anew."""
    lines.join(0)
    until(lambda: engine.present() == {0})
    connections = engine._connections
    for subject in (UP % 1, b"hosfl.r.up.1.gone"):
        stranger.publish(subject, b"x", **HOSTILE[how])
    stranger.publish(b"hosfl.r.up.\xff.m", b"x")
    stranger.publish(b"hosfl.r.up.1\x0b2.m", b"x")
    stranger.publish(b"hosfl.r.up.99999999999999999999.m", b"x")
    stranger.publish(b"hosfl.r.up.4.m", encode(Beat(1, 1)))  # the run has clients 0 to 3
    stranger.flush()
    assert list(engine.ask({0: b"ab"}, deadline=5)) == [Reply(0, b"ba")]
    assert engine._connections == connections
    assert engine.present() == {0}
    assert "a fault of hosfl's" not in caplog.text


def test_mutated_frames(broker, engine, lines, stranger, monkeypatch):
    """Client 1 sends thousands of damaged frames, also such as fit the ask that it has. Client 0 notices nothing."""
    monkeypatch.setattr(nats_server, "RATE", 1e9)
    monkeypatch.setattr(nats_server, "BURST", 1e9)
    for peer in engine._peers:
        peer.allowance = 1e9
    lines.join(0)
    over = threading.Event()
    lines.join(1, lambda data: over.wait(60) and data)
    until(lambda: engine.present() == {0, 1})
    asking = start(engine, {1: b"ask"}, deadline=3)
    until(lambda: engine._peers[1].requests)
    (asked,) = engine._peers[1].requests
    random_ = random.Random(0)
    samples = [
        Beat(3, 1, ((asked, True), (9, False))),
        Piece(asked, False, 0, 4, 1, b"abcd"),
        Piece(asked, False, 0, 3 * MB, 1, b""),
        Piece(asked, True, 0, 4, 1, b"abcd"),
        Want(asked, 0, 3),
        Ended(asked, EndReason.DONE),
        Fetch(asked, "f"),
        Bye(3),
        Ping(1, 1),
    ]
    log = []
    monkeypatch.setattr(nats_server.log, "exception", lambda *values: log.append(values))
    for number in range(4000):
        data = bytearray(encode(random_.choice(samples)))
        for _ in range(random_.choice((0, 1, 1, 2, 5))):
            data[random_.randrange(len(data))] = random_.randrange(256)
        if random_.random() < 0.3:
            data = data[: random_.randrange(len(data) + 1)] + random_.randbytes(random_.choice((0, 0, 1, 9, 300)))
        stranger.publish(UP % 1, bytes(data))
        if number % 400 == 0:
            assert list(engine.ask({0: b"%d" % number}, deadline=5)) == [Reply(0, (b"%d" % number)[::-1])]
    stranger.flush()
    over.set()
    assert asking.join()[0].client == 1
    assert engine._connections == 1
    assert not log
    assert engine.dropped[1] > 1000
    lines.join(2)
    until(lambda: {0, 2} <= engine.present())
    assert {reply.data for reply in engine.ask({0: b"ab", 2: b"ab"}, deadline=5)} == {b"ba"}


@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_refused(data):
    for version in (b"", bytes([frames.VERSION]), bytes([frames.VERSION, data[0] % 9]) if data else b""):
        try:
            frame = decode(version + data)
        except FrameError:
            continue
        assert encode(frame) == version + data


def test_frames_come_back():
    for frame in (
        Ping(2**64 - 1, 2**32 - 1),
        Beat(0, 1),
        Beat(5, 1, ((2**64 - 1, True), (0, False))),
        Piece(1, False, 0, 0, 0, b""),
        Piece(1, False, 3, 2**40, 2**32 - 1, b"abc"),
        Piece(1, True, 0, 500, 0, b"why"),
        Want(1, 2, 3),
        Ended(1, EndReason.LATE, "zu spät"),
        Fetch(1, "ein Name"),
        Bye(4),
    ):
        assert decode(encode(frame)) == frame


def test_windows_end_where_pieces_may():
    """A piece that ends one window while the next is asked for is not refused as one of very many."""
    incoming = frames.Incoming(False, 300_000, 0, time.monotonic)
    ends = []
    while incoming.received < incoming.total:
        if (frame := incoming.next_want(1, 100_000)) is not None:
            ends.append(decode(frame).offset + decode(frame).length)
        incoming.received = incoming.requested  # as if it had come
    assert [end % frames.MIN_PIECE for end in ends[:-1]] == [0, 0, 0]
    assert ends[-1] == 300_000


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes are no frame"),
        (b"\x02\x01" + bytes(12), "version 2 of the frames, not 1: install the same hosfl at both ends"),
        (b"\x01\x09", "kind 9"),
        (encode(Want(1, 2, 3)) + b"x", "a Want with 1 bytes too many"),
        (encode(Want(1, 2, 3))[:-1], "a Want of only 25 bytes"),
        (encode(Piece(1, False, 3, 4, 0, b"ab")), "a piece of 2 bytes from 3 on, of 4"),
        (encode(Piece(1, True, 0, 501, 0, b"")), "a piece of 0 bytes from 0 on, of 501"),
        (encode(Piece(1, False, 0, 2 * MB, 0, bytes(MB))), "a piece of 1048576 bytes"),
        (encode(Beat(1, 1)) + bytes(9) * 17, "a list of requests of 153 bytes"),
        (encode(Beat(1, 1)) + bytes(8), "a list of requests of 8 bytes"),
        (encode(Beat(1, 1)) + bytes(8) + b"\x02", "whose flag is neither 0 nor 1"),
        (encode(Ended(1, EndReason.DONE))[:-1] + b"\x63", "reason 99"),
        (encode(Fetch(1, "f")) + b"\xff", "not UTF-8"),
        (encode(Fetch(1, "f" * 501)), "a text of 501 bytes"),
    ],
)
def test_frames_that_are_refused(data, why):
    with pytest.raises(FrameError, match=why):
        decode(data)


def test_a_flood_is_not_listened_to(broker, engine, lines, stranger, caplog):
    lines.join(0)
    until(lambda: engine.present() == {0})
    quiet = time.monotonic()
    assert list(engine.ask({0: b"ab"})) == [Reply(0, b"ba")]
    quiet = time.monotonic() - quiet
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            for _ in range(200):
                stranger.publish(UP % 1, encode(Want(1, 2, 3)))
            stranger.flush()

    flooding = threading.Thread(target=flood)
    flooding.start()
    until(lambda: engine.dropped[1] > 1000)
    begin = time.monotonic()
    for _ in range(10):
        assert list(engine.ask({0: b"ab"}, deadline=5)) == [Reply(0, b"ba")]
    took = (time.monotonic() - begin) / 10
    stop.set()
    flooding.join()
    assert took < quiet + 0.5
    assert caplog.text.count("client 1: it sends too much, and is not listened to") <= 2  # a line in ten seconds
    assert "it sends too much" in caplog.text


def test_an_answer_within_the_rate_of_what_was_asked_for(engine, lines, monkeypatch):
    """A large answer has more pieces than a client may send of its own accord."""
    monkeypatch.setattr(nats_server, "BURST", 5.0)
    monkeypatch.setattr(nats_server, "RATE", 2.0)
    for peer in engine._peers:
        peer.allowance = 5.0
    lines.join(0, lambda data: bytes(20 * MB))
    until(lambda: engine.present() == {0})
    assert list(engine.ask({0: b""}, deadline=20)) == [Reply(0, bytes(20 * MB))]


# Answers that are none.


def test_a_reply_that_is_too_large_is_refused_before_it_is_sent(broker, lines, caplog):
    engine = NatsEngine(broker.url, "r", 1, largest=MB)
    lines.join(0, lambda data: bytes(MB + 1) if data == b"more" else bytes(MB))
    until(lambda: engine.present() == {0})
    text = "a reply of 1048577 bytes; the largest is one of 1048576"
    assert list(engine.ask({0: b"more"}, deadline=5)) == [Reply(0, None, f"failed: {text}")]
    until(lambda: f"has ended without its reply: {text}" in caplog.text)  # the client is told
    assert list(engine.ask({0: b""}, deadline=5)) == [Reply(0, bytes(MB))]
    engine.limit(MB + 1)  # the run's own
    assert list(engine.ask({0: b"more"}, deadline=5)) == [Reply(0, bytes(MB + 1))]
    engine.close()


def test_an_ask_that_is_too_large_fails_that_client_alone(engine, lines, monkeypatch, caplog):
    """Such as the replay of a very long run to a newcomer: the others go on."""
    for number in (0, 1):
        lines.join(number)
    until(lambda: engine.present() == {0, 1})
    monkeypatch.setattr(nats_server, "MAX_MESSAGE", MB)
    engine.limit(MB)
    text = "a request of 1048577 bytes; the largest is one of 1048576"
    replies = engine.ask({0: bytes(MB + 1), 1: bytes(MB)}, deadline=20)
    assert sorted(replies, key=lambda r: r.client) == [Reply(0, None, f"failed: {text}"), Reply(1, bytes(MB))]
    assert f"client 0: {text}" in caplog.text


def test_an_ask_and_a_file_may_be_larger_than_a_reply(engine, lines):
    data = bytes(3 * MB)
    engine.limit(MB)
    engine.offer({"base": data})
    line = lines.join(0, lambda ask: str(len(ask)).encode())
    until(lambda: engine.present() == {0})
    assert list(engine.ask({0: data}, deadline=20)) == [Reply(0, str(len(data)).encode())]
    assert line.fetch("base", deadline=20) == data


def test_a_file_that_is_too_large_is_not_kept(broker, engine):
    engine.offer({"base": bytes(11), "run": bytes(10)})
    line = NatsLine(broker.url, "r", 0, largest=10)
    with pytest.raises(EngineError, match="'base' has 11 bytes; the largest file is one of 10"):
        line.fetch("base", deadline=10)
    assert line.fetch("run", deadline=10) == bytes(10)
    line.close()


def test_a_file_that_is_not_what_was_announced_is_damaged(broker, engine, monkeypatch):
    monkeypatch.setattr(Outgoing, "__post_init__", lambda outgoing: setattr(outgoing, "crc", 1))
    engine.offer({"base": b"abcd"})
    line = NatsLine(broker.url, "r", 0)
    with pytest.raises(EngineError, match="'base' is damaged"):
        line.fetch("base", deadline=10)
    line.close()


def test_an_ask_that_is_too_large_for_a_client(engine, lines):
    lines.join(0, largest=10)
    until(lambda: engine.present() == {0})
    (reply,) = engine.ask({0: bytes(11)}, deadline=5)
    assert reply == Reply(0, None, "failed: 11 bytes, more than the largest message of 10")
    assert list(engine.ask({0: bytes(10)}, deadline=5)) == [Reply(0, bytes(10))]


def test_a_damaged_reply_is_a_failure(engine, by_hand):
    asking = start(engine, {1: b"ask"}, deadline=10)
    ask = by_hand.hear(Piece)
    by_hand.say(Piece(ask.id, False, 0, 4, 12345, b"abcd"))
    assert asking.join() == [Reply(1, None, "failed: damaged on its way")]


def test_one_half_received_reply_of_a_client(engine, by_hand):
    """And no byte of it that was not asked for."""
    first, second = start(engine, {1: b"1"}, deadline=60), start(engine, {1: b"2"}, deadline=60)
    asks = [by_hand.hear(Piece).id, by_hand.hear(Piece).id]
    for ask in asks:
        by_hand.say(Piece(ask, False, 0, 60 * MB, 0, b""))
    assert by_hand.hear(Want) == Want(asks[0], 0, frames.WINDOW)
    for offset in range(0, 12 * MB, frames.MAX_PIECE):
        by_hand.say(Piece(asks[1], False, offset, 60 * MB, 0, bytes(frames.MAX_PIECE)))
    for offset in range(frames.MAX_PIECE, 12 * MB, frames.MAX_PIECE):  # from the second piece on
        by_hand.say(Piece(asks[0], False, offset, 60 * MB, 0, bytes(frames.MAX_PIECE)))
    by_hand.say(Piece(asks[0], False, 0, 60 * MB, 1, bytes(frames.MAX_PIECE)))  # of another message
    by_hand.say(Piece(asks[0], False, 0, 50 * MB, 0, bytes(frames.MAX_PIECE)))
    by_hand.say(Piece(asks[0], False, 0, 60 * MB, 0, b"ab"))  # one of very many
    until(lambda: engine.dropped[1] == 24 + 23 + 3)
    kept = [request.incoming.received for request in engine._peers[1].requests.values() if request.incoming is not None]
    assert kept == [0]
    by_hand.say(Bye(7))
    assert [first.join(), second.join()] == [[Reply(1, None, "gone")]] * 2
    assert not engine._receiving


def test_a_reply_counts_once_and_for_its_own_ask(engine, by_hand, caplog):
    """Twice, late, of an ask before, of an ask that never was: dropped, told of at both ends."""
    asking = start(engine, {1: b"one"}, deadline=10)
    one = by_hand.hear(Piece)
    reply = encode(Piece(one.id, False, 0, 3, Outgoing(b"ONE").crc, b"ONE"))
    by_hand.say(reply)
    assert asking.join() == [Reply(1, b"ONE")]
    assert by_hand.hear(Ended) == Ended(one.id, EndReason.DONE)
    by_hand.say(reply)
    assert by_hand.hear(Ended) == Ended(one.id, EndReason.LATE)
    asking = start(engine, {1: b"two"}, deadline=10)
    two = by_hand.hear(Piece)
    assert two.id != one.id
    by_hand.say(reply, Piece(one.id, False, 0, 3, Outgoing(b"TWO").crc, b"TWO"), Piece(5, False, 0, 1, 0, b"x"))
    by_hand.say(Piece(two.id, False, 0, 3, Outgoing(b"two").crc, b"two"))
    assert asking.join() == [Reply(1, b"two")]
    assert engine.dropped[1] == 4
    assert f"client 1: late, to request {one.id:016x}, which is over" in caplog.text


def test_an_ask_that_ends_early_is_over_at_both_ends(engine, by_hand):
    assert list(engine.ask({1: b"late"}, deadline=0.3)) == [Reply(1, None, "late")]
    late = by_hand.hear(Piece)
    assert by_hand.hear(Ended) == Ended(late.id, EndReason.LATE)
    asking = engine.ask({0: b"gone", 1: b"closed"})
    assert next(asking) == Reply(0, None, "gone")
    closed = by_hand.hear(Piece)
    asking.close()
    assert by_hand.hear(Ended) == Ended(closed.id, EndReason.LATE)
    assert not engine._peers[1].requests


def test_a_pickle_is_bytes(engine, by_hand, lines):
    class Harm:
        def __reduce__(self):
            return os.abort, ()

    harm = pickle.dumps(Harm())
    asking = start(engine, {1: harm}, deadline=10)
    ask = by_hand.hear(Piece)
    assert bytes(ask.data) == harm
    by_hand.say(Piece(ask.id, False, 0, len(harm), Outgoing(harm).crc, harm))
    assert asking.join() == [Reply(1, harm)]


def test_a_reason_is_one_short_line(engine, by_hand):
    asking = start(engine, {1: b"ask"}, deadline=10)
    ask = by_hand.hear(Piece)
    text = b"first\nsecond \x1b[31m \xff"
    by_hand.say(Piece(ask.id, True, 0, len(text), Outgoing(text).crc, text))
    (reply,) = asking.join()
    assert reply == Reply(1, None, "failed: first?second ?[31m �")


def test_nobody_answers_for_another(engine, lines, broker):
    """What a message says of itself is not looked at: an ask of client 0 cannot be answered by client 1."""
    lines.join(0, answers.slow)
    hand = ByHand(broker, 1)
    until(lambda: engine.present() == {0, 1})
    asking = start(engine, {0: b"1.0"}, deadline=10)
    until(lambda: engine._peers[0].requests)
    (id,) = engine._peers[0].requests
    hand.say(Piece(id, False, 0, 4, Outgoing(b"evil").crc, b"evil"))
    assert hand.hear(Ended) == Ended(id, EndReason.LATE)
    assert asking.join() == [Reply(0, b"0.1")]
    hand.close()


# Who is here.


def test_a_machine_without_power_is_gone_after_a_while(broker, monkeypatch):
    """Its connection stands, and nothing comes: only silence tells."""
    monkeypatch.setattr(nats_server, "CONNECT_GRACE", 0.5)
    engine = NatsEngine(broker.url, "r", 4, patience=1.5)
    hand = ByHand(broker, 1)
    until(lambda: engine.present() == {1})
    begin = time.monotonic()
    assert list(engine.ask({1: b"ask"}, deadline=20)) == [Reply(1, None, "gone")]
    assert 0.5 < time.monotonic() - begin < 5
    hand.say(Beat(7, 1))
    until(lambda: engine.present() == {1})
    hand.close()
    engine.close()


def test_a_new_process_of_a_client_ends_the_asks_of_the_old(broker, engine, by_hand):
    asking = start(engine, {1: b"ask"}, deadline=20)
    by_hand.hear(Piece)
    new = ByHand(broker, 1, line=8)
    begin = time.monotonic()
    assert asking.join() == [Reply(1, None, "gone")]
    assert time.monotonic() - begin < 2
    by_hand.say(Beat(7, 1))  # the old one is still there
    assert by_hand.hear(Ended) != Ended(7, EndReason.REPLACED)  # the ask's
    assert by_hand.hear(Ended) == Ended(7, EndReason.REPLACED)
    by_hand.say(Bye(7))
    asking = start(engine, {1: b"ask"}, deadline=20)
    ask = new.hear(Piece)
    new.say(Beat(8, 1, ((ask.id, False),)))
    new.say(Piece(ask.id, False, 0, 1, Outgoing(b"x").crc, b"x"))
    assert asking.join() == [Reply(1, b"x")]
    new.close()


@pytest.mark.parametrize("begins", ["fetches", "serves"])
def test_a_client_that_the_run_has_not_is_told(broker, lines, begins):
    """Added to the federation while the run goes on, the broker lets it in: it must not wait for ever.

    Nor one that serves since before the server was there, which does not know that there is somebody to ping.
    """
    text = "this run has clients 0 to 3, and no client 4: a new run takes it in"
    line = lines.join(4) if begins == "serves" else NatsLine(broker.url, "r", 4)
    until(lambda: line._link.up)
    engine = NatsEngine(broker.url, "r", 4)
    if begins == "serves":
        until(lambda: getattr(line, "ended", None))
        assert str(line.ended) == text
    else:
        with pytest.raises(EngineError, match=f"^{text}$"):
            line.fetch("run", deadline=10)
        line.close()
    assert engine.present() == set()
    engine.close()


def test_two_asks_at_once(engine, lines):
    for number in range(4):
        lines.join(number)
    until(lambda: len(engine.present()) == 4)
    big = os.urandom(5 * MB)
    first, second = engine.ask({0: b"a1", 1: big}), engine.ask({1: big[:-1], 2: b"b1"})
    seen = [next(first), next(second), next(first), next(second)]
    assert {(reply.client, reply.data) for reply in seen} == {
        *((0, b"1a"), (1, big[::-1])),
        *((1, big[:-1][::-1]), (2, b"1b")),
    }
    assert list(first) == list(second) == []


# Certificates.


@pytest.fixture
def secured(tmp_path):
    """A broker that knows clients by their certificates, and lets each speak for itself alone."""
    certificates(tmp_path, ["broker", "server", "c0", "c1", "unknown"])
    names = {name: f'"{tmp_path / name}"' for name in ("broker.pem", "broker.key", "ca.pem")}
    tls = f"tls {{ cert_file: {names['broker.pem']}, key_file: {names['broker.key']}, ca_file: {names['ca.pem']}"
    users = ['{user: "server@hosfl", permissions: {publish: "hosfl.r.down.>", subscribe: "hosfl.r.up.>"}}']
    for k in (0, 1):
        allowed = f'publish: "hosfl.r.up.{k}.>", subscribe: "hosfl.r.down.{k}.>"'
        users.append(f'{{user: "c{k}@hosfl", permissions: {{{allowed}}}}}')
    broker = Plain(tmp_path, f"{tls}, verify_and_map: true }}\nauthorization {{ users = [{', '.join(users)}] }}")
    broker.start()
    broker.tls = lambda name: context(tmp_path, name)
    broker.url = f"tls://localhost:{broker.port}"
    yield broker
    broker.stop()


def test_certificates(secured, caplog):
    engine = NatsEngine(secured.url, "r", 2, secured.tls("server"))
    lines = Lines(secured.url)
    lines.join(0, tls=secured.tls("c0"))
    until(lambda: engine.present() == {0})
    assert list(engine.ask({0: b"ab"}, deadline=5)) == [Reply(0, b"ba")]
    engine.offer({"f": b"1"})
    assert lines.open[0][0].fetch("f", deadline=5) == b"1"
    lines.join(1, tls=secured.tls("c0"))  # client 0 says that it is client 1
    lines.join(1, tls=secured.tls("unknown"))
    until(lambda: "the broker does not let it" in caplog.text)
    until(lambda: "client 1 of run r has no broker" in caplog.text)
    time.sleep(1)
    assert caplog.text.count("the broker does not let it") == 1  # of many messages
    assert engine.present() == {0}
    assert list(engine.ask({0: b"ab", 1: b"ab"}, deadline=8)) == [Reply(0, b"ba"), Reply(1, None, "gone")]
    lines.join(1, tls=secured.tls("c1"))
    until(lambda: engine.present() == {0, 1})
    lines.close()
    engine.close()


def test_who_is_refused_comes_less_and_less_often(secured, tmp_path, monkeypatch, caplog):
    """Where nobody answers there may be a broker in a moment; who is not let in, waits for somebody who renews it."""
    waited = []

    async def nap(self, seconds):
        waited.append(seconds)
        await asyncio.sleep(0.01)

    monkeypatch.setattr(Link, "_sleep", nap)
    for url, least, most in ((secured.url, 15, 30), ("tls://localhost:1", 1, 2)):
        waited.clear()
        line = NatsLine(url, "r", 0, context(tmp_path, "unknown"))
        until(lambda: len(waited) > 12)
        line.close()
        assert max(waited[:3]) < 1
        assert least <= waited[12] <= most
    assert "eof_received" not in caplog.text


def test_a_broker_without_certificates_is_not_spoken_to(broker, caplog, tmp_path):
    """nats-py does without TLS where a broker, or somebody in between, says that there is none."""
    certificates(tmp_path, ["server"])
    engine = NatsEngine(broker.url.replace("nats:", "tls:"), "r", 1, context(tmp_path, "server"))
    until(lambda: "secure connection not available" in caplog.text)
    assert not engine._link.up
    engine.close()


def test_what_cannot_be_connected_is_said_at_once():
    here = "nats://localhost:1"
    for urls, run, why in [
        ("tls://localhost:1", "r", "takes certificates"),
        ([], "r", "no broker"),
        (here, "a.b", "named by letters"),
        (here, "*", "named by letters"),
    ]:
        with pytest.raises(EngineError, match=why):
            NatsEngine(urls, run, 1)
    with pytest.raises(EngineError, match="numbered from 0"):
        NatsLine("nats://localhost:1", "r", -1)


def test_what_is_called_in_the_thread_raises_where_it_was_called():
    link = Link("nats://localhost:1", None, "a line", [], print, print, print)
    link.start()
    try:
        assert link.call(max, 1, 2) == 2
        with pytest.raises(ZeroDivisionError):
            link.call(divmod, 1, 0)
    finally:
        link.close()
    with pytest.raises(EngineError, match="a line is closed"):
        link.call(max, 1, 2)

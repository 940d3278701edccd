"""What a round costs, engine by engine and phase by phase: a server and four clients on this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.rounds [--out FILE] [--half digits ...] [--engine nats ...]

Over NATS and Ray clients are processes of their own; NATS as `hosfl federation` sets it up, with mutual TLS. Beside a
round stand its parts: the engine's two exchanges of as many bytes with clients that compute nothing; what the slowest
client computes in the round, by its own clock (in process they are one after another: the sum of theirs); the server.
All hold one digest at the end. Seconds are medians over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.engines import CLIENTS, here
from hosfl.engines.engine import Engine, Reply
from hosfl.engines.in_process import InProcess
from hosfl.files import write_json
from hosfl.runs.assemble import assemble, partition
from hosfl.runs.config import Config
from hosfl.runs.federation import Federation
from hosfl.runs.join import ClientFactory, WorkerFactory, read_run
from hosfl.runs.report import machine
from hosfl.runs.serve import Transport

RESULTS = Path(__file__).parent / "results"
WARM, ROUNDS = 4, 24
SHARED: dict[str, Any] = {"clients": CLIENTS, "sampled": CLIENTS, "rounds": WARM + ROUNDS, "partition": "iid"}
SHARED |= {"directions": 5, "directions_from": "fresh"}
HALVES: dict[str, dict[str, Any]] = {
    "digits": {"task": "digits", "batch": 16},
    "minilm": {
        "task": "sentences",
        "at": "3",
        "trains": "lora:1:*.layer.2.*",
        "batch": 8,
        "server_rate": 1e-3,
        "client_rate": 1e-3,
    },
}
WORDS = (
    "the",
    "a",
    "film",
    "of",
    "and",
    "story",
    "is",
    "but",
    "with",
    "not",
    "very",
    "good",
    "dull",
    "long",
    "acting",
    "plot",
)


def texts(folder: Path) -> Path:
    """Sentences of some 30 tokens, for their length alone."""
    choose = random.Random(0)
    for name, count in (("train", 400), ("dev", 20), ("test", 20)):
        rows = [f"{' '.join(choose.choices(WORDS, k=28))}\t{n % 2}\n" for n in range(count)]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return folder


# --- clients ------------------------------------------------------------------------------------------------------


def echo(data: bytes) -> bytes:
    """As many bytes as are asked for."""
    return bytes(int.from_bytes(data[:8], "little"))


class TimedAnswer:
    """Calls `answer`, and appends the seconds of each call to a file per client. It pickles if `answer` does."""

    def __init__(self, answer: Callable[[int, bytes], bytes], folder: Path) -> None:
        self.answer, self.folder = answer, folder

    def __call__(self, client: int, data: bytes) -> bytes:
        begin = time.perf_counter()
        said = self.answer(client, data)
        with (self.folder / f"{client}.seconds").open("a") as file:
            file.write(f"{time.perf_counter() - begin}\n")
        return said


class TimedWorkerFactory:
    """`WorkerFactory`, timed: what an actor calls. folder: for the times."""

    def __init__(self, everybody: WorkerFactory, folder: Path) -> None:
        self.everybody, self.folder = everybody, folder

    def __call__(self) -> TimedAnswer:
        return TimedAnswer(self.everybody(), self.folder)


def client(member: Path, times: Path, data: str) -> None:
    """A client over NATS, in a process of its own. data: where texts are; "echo": answers without computing."""
    from hosfl.engines.nats_line import NatsLine
    from hosfl.federation import Member

    me = Member.read(member)
    assert me.client is not None
    line, number = NatsLine(f"tls://{me.address}", me.run, me.client, me.context()), me.client
    if data == "echo":
        return line.serve(echo)
    run, config = read_run(line.fetch("run"), data=data)
    clients = ClientFactory(run, config, line.fetch("base"))
    endpoint = clients.endpoint(number, partition(clients.task, config)[number])
    answer = TimedAnswer(lambda _, asked: endpoint.answer(asked), times)
    return line.serve(lambda asked: answer(number, asked))


# --- engines ------------------------------------------------------------------------------------------------------

Made = Callable[[dict[str, bytes] | None], Engine]  # of what clients are offered; None: of clients that only echo


@contextlib.contextmanager
def in_process(folder: Path, data: str) -> Iterator[Made | None]:
    yield None


@contextlib.contextmanager
def over_nats(folder: Path, data: str) -> Iterator[Made]:
    from hosfl.engines.nats_server import NatsEngine
    from hosfl.federation import Member

    program = shutil.which("nats-server")
    if program is None:
        sys.exit("no nats-server on the path: https://docs.nats.io, or Debian's package of that name")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"localhost:{free.getsockname()[1]}"
    fed = folder / "fed"
    made = ["federation", "create", str(fed), "--clients", str(CLIENTS), "--address", address]
    subprocess.run([sys.executable, "-m", "hosfl.cli", *made], check=True, stdout=subprocess.DEVNULL)
    with contextlib.ExitStack() as ends:

        def start(*command: object) -> None:
            process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
            ends.callback(process.wait)
            ends.callback(process.kill)

        start(program, "-c", fed / "broker" / "nats.conf")

        def engine(files: dict[str, bytes] | None) -> Engine:
            member = Member.read(fed / "server")
            engine = NatsEngine(f"tls://{member.address}", member.run, CLIENTS, member.context())
            ends.callback(engine.close)
            of = "echo" if files is None else data
            for number in range(CLIENTS):
                code = f"from pathlib import Path; from benchmarks.rounds import client; client(Path({str(fed)!r}, "
                code += f"'clients', '{number}'), Path({str(folder)!r}), {of!r})"
                start(sys.executable, "-c", code)
            return engine

        yield engine


@contextlib.contextmanager
def over_ray(folder: Path, data: str) -> Iterator[Made]:
    from hosfl.engines.ray import RayEngine

    with contextlib.ExitStack() as ends:

        def engine(files: dict[str, bytes] | None) -> Engine:
            if files is None:
                engine = RayEngine(lambda: lambda client, data: echo(data), CLIENTS, CLIENTS)
            else:
                engine = RayEngine(TimedWorkerFactory(WorkerFactory(files, data=data), folder), CLIENTS, CLIENTS)
            ends.callback(engine.close)
            return engine

        yield engine


ENGINES: dict[str, Callable[[Path, str], contextlib.AbstractContextManager[Made | None]]] = {
    "in-process": in_process,
    "nats": over_nats,
    "ray": over_ray,
}


class CountedEngine:
    """An engine that counts bytes. asks: for every call of `ask`, (down, up) of every client."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asks: list[dict[int, tuple[int, int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def ask(self, messages: Mapping[int, bytes], *limits: Any) -> Iterator[Reply]:
        self.asks.append({})
        for reply in self.engine.ask(messages, *limits):
            assert reply.data is not None, reply.reason
            self.asks[-1][reply.client] = len(messages[reply.client]), len(reply.data)
            yield reply


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(settings: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """One half over one engine."""
    config = Config(**SHARED, **settings)
    federation, _ = assemble(config)
    federation.open_log(folder)
    with ENGINES[name](folder, config.data) as make:
        if make is None:
            assert isinstance(federation.messenger.engine, InProcess)
            federation.messenger.engine.answer = TimedAnswer(federation.messenger.engine.answer, folder)
        else:
            Transport(lambda files, clients: make(files)).connect(federation)
            here(federation.messenger.engine)
        counted = CountedEngine(federation.messenger.engine)
        federation.messenger.engine = counted
        rounds = [_round(federation, number) for number in range(config.rounds)]
        asks = counted.asks[-2:]
        lines = [(folder / f"{n}.seconds").read_text().split()[-2 * ROUNDS :] for n in range(CLIENTS)]
        [digest] = set(federation.audit(range(CLIENTS)).values())
    cuts, answers = ([[float(s) for s in line[part::2]] for line in lines] for part in (0, 1))
    together = sum if make is None else max  # in process they take turns
    spent = {
        "round": [spent["round"] for spent in rounds[WARM:]],
        **{phase: [spent[phase] for spent in rounds[WARM:]] for phase in ("cuts", "server", "answers")},
        "clients": [together(c) + together(a) for c, a in zip(zip(*cuts), zip(*answers), strict=True)],  # noqa: B905
    }
    medians = {phase: statistics.median(seconds) for phase, seconds in spent.items()}
    medians["engine"] = 0.0 if make is None else _exchanges(name, folder, config.data, asks)
    parts = medians["engine"] + medians["clients"] + medians["server"]
    moved = [sum(sizes[way] for ask in asks for sizes in ask.values()) for way in (0, 1)]
    return {"seconds": medians, "parts": parts, "ratio": medians["round"] / parts, "bytes": moved, "digest": digest}


def _round(federation: Federation, number: int) -> dict[str, float]:
    begin = time.perf_counter()
    federation.round(number)
    return {"round": time.perf_counter() - begin, **federation.seconds}


def _exchanges(name: str, folder: Path, data: str, asks: list[dict[int, tuple[int, int]]]) -> float:
    """Seconds of asks of these sizes, by clients that compute nothing: the sum of their medians."""
    with ENGINES[name](folder / "echo", data) as make:
        assert make is not None
        engine = make(None)
        engine.offer({})
        here(engine)
        total = 0.0
        for ask in asks:
            messages = {n: up.to_bytes(8, "little") + bytes(max(0, down - 8)) for n, (down, up) in ask.items()}
            seconds = []
            for _ in range(WARM + ROUNDS):
                begin = time.perf_counter()
                replies = list(engine.ask(messages))
                seconds.append(time.perf_counter() - begin)
                assert all(reply.data is not None for reply in replies)
            total += statistics.median(seconds[WARM:])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "rounds.json")
    parser.add_argument("--half", choices=HALVES, nargs="*", default=list(HALVES))
    parser.add_argument("--engine", choices=ENGINES, nargs="*", default=list(ENGINES))
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "clients": CLIENTS, "rounds": ROUNDS, "halves": {}}
    for half in options.half:
        rows = found["halves"].setdefault(half, {})
        for engine in options.engine:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                (folder / "echo").mkdir()
                settings = HALVES[half] | ({"data": str(texts(folder))} if half == "minilm" else {})
                rows[engine] = row = measure(settings, engine, folder)
            phases = ", ".join(f"{phase} {1e3 * seconds:.1f}" for phase, seconds in row["seconds"].items())
            print(f"{half}, {engine}: {phases} ms; {row['ratio']:.2f} of its parts; {row['digest'][:16]}", flush=True)
        if len({row["digest"] for row in rows.values()}) > 1:
            sys.exit(f"{half}: the engines end with different bits")
    write_json(options.out, found)


if __name__ == "__main__":
    main()

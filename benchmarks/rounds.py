"""Seconds of a round over each engine, by phase, with a server and four clients on this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.rounds [--out FILE] [--half digits ...] [--engine nats ...]

Over NATS and Ray clients are processes of their own. NATS is set up by `hosfl federation`, with mutual TLS. A round is
compared with the sum of its parts: the engine's two exchanges of as many bytes with clients that compute nothing; the
computation of the slowest client, by its own clock (in one process clients take turns, so it is the sum of all); and
the server's. All must have one digest at the end. Seconds are medians over rounds.
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

from benchmarks.engines import CLIENTS, wait_for_clients
from hosfl.engines.engine import Engine, Reply
from hosfl.engines.in_process import InProcessEngine
from hosfl.files import write_json
from hosfl.runs.assemble import assemble, partition
from hosfl.runs.config import Config
from hosfl.runs.federation import Federation
from hosfl.runs.join import ClientFactory, WorkerFactory, read_run
from hosfl.runs.report import machine
from hosfl.runs.serve import Transport

RESULTS = Path(__file__).parent / "results"
WARM_UP, ROUNDS = 4, 24
SHARED: dict[str, Any] = {"clients": CLIENTS, "sampled": CLIENTS, "rounds": WARM_UP + ROUNDS, "partition": "iid"}
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
    """Write random sentences of some 30 tokens: only their length matters."""
    choose = random.Random(0)
    for name, count in (("train", 400), ("dev", 20), ("test", 20)):
        rows = [f"{' '.join(choose.choices(WORDS, k=28))}\t{n % 2}\n" for n in range(count)]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return folder


# --- clients ------------------------------------------------------------------------------------------------------


def echo(data: bytes) -> bytes:
    """Answer with as many bytes as are requested."""
    return bytes(int.from_bytes(data[:8], "little"))


class TimedAnswer:
    """Calls `answer`, and appends the seconds of each call to a file per client. It pickles if `answer` does."""

    def __init__(self, answer: Callable[[int, bytes], bytes], folder: Path) -> None:
        self.answer, self.folder = answer, folder

    def __call__(self, client: int, data: bytes) -> bytes:
        begin = time.perf_counter()
        reply = self.answer(client, data)
        with (self.folder / f"{client}.seconds").open("a") as file:
            file.write(f"{time.perf_counter() - begin}\n")
        return reply


class TimedWorkerFactory:
    """A `WorkerFactory` whose answers are timed. folder: for the times."""

    def __init__(self, factory: WorkerFactory, folder: Path) -> None:
        self.factory, self.folder = factory, folder

    def __call__(self) -> TimedAnswer:
        return TimedAnswer(self.factory(), self.folder)


def client(folder: Path, times: Path, data: str) -> None:
    """Run a client over NATS in this process.

    folder: the client's of the federation. times: the folder for its seconds. data: the folder of texts; "echo": answer
    without computing.
    """
    from hosfl.engines.nats_line import NatsLine
    from hosfl.federation import Member

    member = Member.read(folder)
    assert member.client is not None
    number = member.client
    line = NatsLine(f"tls://{member.address}", member.run, number, member.context())
    if data == "echo":
        return line.serve(echo)
    run, config = read_run(line.fetch("run"), data=data)
    clients = ClientFactory(run, config, line.fetch("base"))
    endpoint = clients.endpoint(number, partition(clients.task, config)[number])
    answer = TimedAnswer(lambda _, request: endpoint.answer(request), times)
    return line.serve(lambda request: answer(number, request))


# --- engines ------------------------------------------------------------------------------------------------------

MakeEngine = Callable[[dict[str, bytes] | None], Engine]  # from the offered files; None: with clients that only echo


@contextlib.contextmanager
def in_process(folder: Path, data: str) -> Iterator[MakeEngine | None]:
    """Context manager for clients in this process, which need no other engine."""
    yield None


@contextlib.contextmanager
def over_nats(folder: Path, data: str) -> Iterator[MakeEngine]:
    """Context manager that yields a function making a NATS engine with its clients; `hosfl federation` sets it up."""
    from hosfl.engines.nats_server import NatsEngine
    from hosfl.federation import Member

    program = shutil.which("nats-server")
    if program is None:
        sys.exit("no nats-server on the path: https://docs.nats.io, or Debian's package of that name")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    federation = folder / "fed"
    command = ["federation", "create", str(federation), "--clients", str(CLIENTS), "--address", address]
    subprocess.run([sys.executable, "-m", "hosfl.cli", *command], check=True, stdout=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:

        def start(*command: object) -> None:
            process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)

        start(program, "-c", federation / "broker" / "nats.conf")

        def make_engine(files: dict[str, bytes] | None) -> Engine:
            member = Member.read(federation / "server")
            engine = NatsEngine(f"tls://{member.address}", member.run, CLIENTS, member.context())
            stack.callback(engine.close)
            client_data = "echo" if files is None else data
            for number in range(CLIENTS):
                code = (
                    f"from pathlib import Path; from benchmarks.rounds import client; client(Path({str(federation)!r}, "
                )
                code += f"'clients', '{number}'), Path({str(folder)!r}), {client_data!r})"
                start(sys.executable, "-c", code)
            return engine

        yield make_engine


@contextlib.contextmanager
def over_ray(folder: Path, data: str) -> Iterator[MakeEngine]:
    """Context manager that yields a function making a Ray engine with its clients."""
    from hosfl.engines.ray import RayEngine

    with contextlib.ExitStack() as stack:

        def make_engine(files: dict[str, bytes] | None) -> Engine:
            if files is None:
                engine = RayEngine(lambda: lambda client, data: echo(data), CLIENTS, CLIENTS)
            else:
                engine = RayEngine(TimedWorkerFactory(WorkerFactory(files, data=data), folder), CLIENTS, CLIENTS)
            stack.callback(engine.close)
            return engine

        yield make_engine


ENGINES: dict[str, Callable[[Path, str], contextlib.AbstractContextManager[MakeEngine | None]]] = {
    "in-process": in_process,
    "nats": over_nats,
    "ray": over_ray,
}


class CountingEngine:
    """An engine that counts bytes. sizes: for every call of `ask`, by client, the bytes (down, up)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sizes: list[dict[int, tuple[int, int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def ask(self, messages: Mapping[int, bytes], *limits: Any) -> Iterator[Reply]:
        self.sizes.append({})
        for reply in self.engine.ask(messages, *limits):
            assert reply.data is not None, reply.reason
            self.sizes[-1][reply.client] = len(messages[reply.client]), len(reply.data)
            yield reply


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(settings: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Measure a half's rounds over an engine."""
    config = Config(**SHARED, **settings)
    federation, _ = assemble(config)
    federation.open_log(folder)
    with ENGINES[name](folder, config.data) as make:
        if make is None:
            assert isinstance(federation.messenger.engine, InProcessEngine)
            federation.messenger.engine.answer = TimedAnswer(federation.messenger.engine.answer, folder)
        else:
            Transport(lambda files, clients: make(files)).connect(federation)
            wait_for_clients(federation.messenger.engine)
        counting = CountingEngine(federation.messenger.engine)
        federation.messenger.engine = counting
        rounds = [_time_round(federation, number) for number in range(config.rounds)]
        sizes = counting.sizes[-2:]
        lines = [(folder / f"{n}.seconds").read_text().split()[-2 * ROUNDS :] for n in range(CLIENTS)]
        [digest] = set(federation.audit(range(CLIENTS)).values())
    cuts, answers = ([[float(s) for s in line[part::2]] for line in lines] for part in (0, 1))
    combine = sum if make is None else max  # in one process clients take turns
    seconds = {
        "round": [phases["round"] for phases in rounds[WARM_UP:]],
        **{phase: [phases[phase] for phases in rounds[WARM_UP:]] for phase in ("cuts", "server", "answers")},
        "clients": [combine(c) + combine(a) for c, a in zip(zip(*cuts), zip(*answers), strict=True)],  # noqa: B905
    }
    medians = {phase: statistics.median(values) for phase, values in seconds.items()}
    medians["engine"] = 0.0 if make is None else _time_exchanges(name, folder, config.data, sizes)
    parts = medians["engine"] + medians["clients"] + medians["server"]
    total = [sum(pair[way] for by_client in sizes for pair in by_client.values()) for way in (0, 1)]
    return {"seconds": medians, "parts": parts, "ratio": medians["round"] / parts, "bytes": total, "digest": digest}


def _time_round(federation: Federation, number: int) -> dict[str, float]:
    begin = time.perf_counter()
    federation.round(number)
    return {"round": time.perf_counter() - begin, **federation.seconds}


def _time_exchanges(name: str, folder: Path, data: str, sizes: list[dict[int, tuple[int, int]]]) -> float:
    """Time exchanges of these sizes with clients that compute nothing, and return the sum of the median seconds."""
    with ENGINES[name](folder / "echo", data) as make:
        assert make is not None
        engine = make(None)
        engine.offer({})
        wait_for_clients(engine)
        total = 0.0
        for by_client in sizes:
            messages = {n: up.to_bytes(8, "little") + bytes(max(0, down - 8)) for n, (down, up) in by_client.items()}
            seconds = []
            for _ in range(WARM_UP + ROUNDS):
                begin = time.perf_counter()
                replies = list(engine.ask(messages))
                seconds.append(time.perf_counter() - begin)
                assert all(reply.data is not None for reply in replies)
            total += statistics.median(seconds[WARM_UP:])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "rounds.json")
    parser.add_argument("--half", choices=HALVES, nargs="*", default=list(HALVES))
    parser.add_argument("--engine", choices=ENGINES, nargs="*", default=list(ENGINES))
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "clients": CLIENTS, "rounds": ROUNDS, "halves": {}}
    for half in options.half:
        rows = result["halves"].setdefault(half, {})
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
    write_json(options.out, result)


if __name__ == "__main__":
    main()

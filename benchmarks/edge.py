"""A client without torch beside one with torch, each alone in a process: memory, seconds of a round, what it installs.

    python -m benchmarks.edge [--out FILE] [--threads 1]

The half is MiniLM's in shape, embeddings and three of its six layers, with random weights; rounds are of 16 texts of 64
tokens. All of it moves, or some numbers per layer, by probes or a backward pass. Memory is the whole process's: its
peak from start to end, and what it holds between rounds. The same asks, as bytes, go to every client.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
TEXTS, TOKENS, WIDTH = 16, 64, 384
BACKWARD = {"estimator": "backward", "microbatch": 2, "directions": 128}
WAYS: dict[str, dict[str, Any]] = {
    "all of the half, five probes": {"trains": "all", "directions": 5},
    "16 numbers a layer, five probes": {"trains": "xs:4", "directions": 5},
    "16 numbers a layer, five probes, the rest int8": {"trains": "xs:4", "directions": 5, "frozen": "int8"},
    "16 numbers a layer, five probes, the rest int4": {"trains": "xs:4", "directions": 5, "frozen": "int4"},
    "16 numbers a layer, backward, two samples at a time": {"trains": "xs:4", **BACKWARD},
    "16 numbers a layer, backward, two samples at a time, the rest int8": {
        "trains": "xs:4",
        **BACKWARD,
        "frozen": "int8",
    },
}
ROUNDS = 9  # of which the first warms up
RUNTIMES = {"torch": "torch,nats", "onnx": "edge"}  # and the extras that their clients install


def texts() -> Any:
    """The task: what it learns does not matter."""
    import torch
    import transformers

    import hosfl

    config = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=12, intermediate_size=4 * WIDTH
    )
    ids = torch.randint(1000, 20000, (4 * TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(4 * TEXTS) % 2
    loss = torch.nn.functional.cross_entropy
    return hosfl.Task(lambda: transformers.BertForSequenceClassification(config), data, data, loss, at=3)


def make(folder: Path, way: str) -> None:
    """Write what a server offers, a client's samples, and the asks of some rounds."""
    from hosfl.protocol.messages import Hello, Invitation, Multiplier, encode, pack
    from hosfl.runs.assemble import assemble
    from hosfl.runs.config import Config
    from hosfl.runs.serve import offered_files

    settings: dict[str, Any] = {"clients": 1, "sampled": 1, "partition": "iid", "batch": TEXTS, **WAYS[way]}
    settings |= {"directions_from": "fresh", "server_rate": 0.1, "client_rate": 0.1}
    federation, task = assemble(Config(task=f"{Path(__file__).resolve()}:texts", **settings))
    for name, data in offered_files(federation, edge=True).items():
        (folder / name).write_bytes(data)
    train = task.train
    assert not isinstance(train, list)
    np.savez(folder / "own.npz", labels=train.labels.numpy(), **{k: v.numpy() for k, v in train.inputs.items()})
    news = federation.server.welcome(Hello(client=0, round=0))
    assert news is not None
    id, chance = np.frombuffer(federation.id, np.uint8), np.random.default_rng(0)
    for round in range(ROUNDS):
        multiplier = chance.standard_normal((TEXTS, TOKENS, WIDTH)).astype(np.float32)
        asked = Multiplier(client=0, round=round, multiplier=multiplier)
        (folder / f"cut-{round}").write_bytes(pack([encode(news), encode(Invitation(client=0, round=round, run=id))]))
        (folder / f"scalars-{round}").write_bytes(pack([encode(asked)]))


class Line:
    """A line whose server is a folder. seconds: of every answer, by what was asked. between: memory after each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, list[float]] = {"cut": [], "scalars": []}
        self.between: list[int] = []

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        return (self.folder / name).read_bytes()

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        for round in range(ROUNDS):
            for what, seconds in self.seconds.items():
                ask = (self.folder / f"{what}-{round}").read_bytes()
                begin = time.perf_counter()
                answer(ask)
                seconds.append(time.perf_counter() - begin)
            self.between.append(_resident("VmRSS"))

    def close(self) -> None:
        """Nothing is open."""


def _resident(what: str) -> int:
    """Bytes, of the kernel's account of this process."""
    (kilobytes,) = re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def client(runtime: str, folder: Path, threads: int) -> None:
    """One client's process; prints what it took, as JSON."""
    begin = time.perf_counter()
    line, data = Line(folder), str(folder / "own.npz")
    if runtime == "onnx":
        sys.modules.update(torch=None, triton=None)  # type: ignore[arg-type]  # so that an import would fail
        from hosfl.edge.join import join as without_torch

        ready = time.perf_counter()
        without_torch(line, 0, folder / runtime, data=data, threads=threads)
    else:
        from hosfl.runs.join import join

        ready = time.perf_counter()
        join(line, 0, folder / runtime, data=data, task=f"{Path(__file__).resolve()}:texts")
    print(
        json.dumps(
            {
                "peak": _resident("VmHWM"),
                "between": statistics.median(line.between),
                "import": ready - begin,
                "seconds": {what: statistics.median(seconds[1:]) for what, seconds in line.seconds.items()},
            }
        )
    )


def installed(extras: str) -> int:
    """Bytes of hosfl with these extras and all that it requires, as they are installed here."""
    from packaging.requirements import Requirement

    waiting, seen, sizes = [Requirement(f"hosfl[{extras}]")], set[tuple[str, str]](), dict[str, int]()
    while waiting:
        wanted = waiting.pop()
        key = wanted.name.lower(), " ".join(sorted(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        places = (Path(str(file.locate())) for file in found.files or [])
        sizes[key[0]] = sum(place.stat().st_size for place in places if place.is_file())
        for line in found.requires or []:
            other = Requirement(line)
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                waiting.append(other)
    return sum(sizes.values())


def measured(threads: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), way)
            for runtime in RUNTIMES:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.edge",
                    "--client",
                    runtime,
                    folder,
                    "--threads",
                    str(threads),
                ]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                rows[f"{way}, {runtime}"] = row = json.loads(done.stdout.splitlines()[-1])
                print(f"{way}, {runtime}: {row}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "edge.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--client", nargs=2, metavar=("RUNTIME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(options.client[0], Path(options.client[1]), options.threads)
        return
    from hosfl.runs.report import machine

    found = {"machine": machine(), "onnxruntime": metadata.version("onnxruntime")}
    found |= {"installed": {runtime: installed(extras) for runtime, extras in RUNTIMES.items()}}
    found["rows"] = measured(options.threads)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Clients without and with torch compared, each alone in a process: memory, seconds of a round, installed bytes.

    python -m benchmarks.edge [--out FILE] [--threads 1]

The half has MiniLM's shapes, embeddings and three of its six layers, with random weights; a round has 16 texts of 64
tokens. All weights are trained, or some per layer, by probes or a backward pass. Memory is the whole process's: its
peak from start to end, and its size between rounds. All clients get the same requests, as bytes.
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
ROUNDS = 9  # the first one warms up
RUNTIMES = {"torch": "torch,nats", "onnx": "edge"}  # runtime -> the extras that its clients install


def texts() -> Any:
    """Make the task, with random tokens: only its shapes matter."""
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


def write_run(folder: Path, way: str) -> None:
    """Write the files that a server offers, a client's samples, and the requests of some rounds."""
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
    update = federation.server.welcome(Hello(client=0, round=0))
    assert update is not None
    id, random = np.frombuffer(federation.id, np.uint8), np.random.default_rng(0)
    for round in range(ROUNDS):
        multiplier = random.standard_normal((TEXTS, TOKENS, WIDTH)).astype(np.float32)
        request = Multiplier(client=0, round=round, multiplier=multiplier)
        invitation = Invitation(client=0, round=round, run=id)
        (folder / f"cut-{round}").write_bytes(pack([encode(update), encode(invitation)]))
        (folder / f"scalars-{round}").write_bytes(pack([encode(request)]))


class FolderLine:
    """A `Line` whose server is a folder.

    seconds: of every answer, by kind of request. between: resident bytes after each round.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, list[float]] = {"cut": [], "scalars": []}
        self.between: list[int] = []

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        return (self.folder / name).read_bytes()

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        for round in range(ROUNDS):
            for kind, seconds in self.seconds.items():
                request = (self.folder / f"{kind}-{round}").read_bytes()
                begin = time.perf_counter()
                answer(request)
                seconds.append(time.perf_counter() - begin)
            self.between.append(_resident("VmRSS"))

    def close(self) -> None:
        """Do nothing."""


def _resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def client(runtime: str, folder: Path, threads: int) -> None:
    """Run one client in this process, and print its memory and seconds as JSON."""
    begin = time.perf_counter()
    line, data = FolderLine(folder), str(folder / "own.npz")
    if runtime == "onnx":
        sys.modules.update(torch=None, triton=None)  # type: ignore[arg-type]  # makes imports of them fail
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
                "seconds": {kind: statistics.median(seconds[1:]) for kind, seconds in line.seconds.items()},
            }
        )
    )


def installed_bytes(extras: str) -> int:
    """Return the bytes of hosfl with these extras and all its requirements, as they are installed here."""
    from packaging.requirements import Requirement

    queue, seen, sizes = [Requirement(f"hosfl[{extras}]")], set[tuple[str, str]](), dict[str, int]()
    while queue:
        required = queue.pop()
        key = required.name.lower(), " ".join(sorted(required.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(required.name)
        except metadata.PackageNotFoundError:
            continue  # required on another platform only
        paths = (Path(str(file.locate())) for file in distribution.files or [])
        sizes[key[0]] = sum(path.stat().st_size for path in paths if path.is_file())
        for line in distribution.requires or []:
            other = Requirement(line)
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in ("", *required.extras)):
                queue.append(other)
    return sum(sizes.values())


def measure(threads: int) -> dict[str, Any]:
    """Return a row for every way and runtime."""
    rows: dict[str, Any] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder), way)
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
                completed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if completed.returncode:
                    sys.exit(completed.stderr)
                rows[f"{way}, {runtime}"] = row = json.loads(completed.stdout.splitlines()[-1])
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

    result = {"machine": machine(), "onnxruntime": metadata.version("onnxruntime")}
    result |= {"installed": {runtime: installed_bytes(extras) for runtime, extras in RUNTIMES.items()}}
    result["rows"] = measure(options.threads)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

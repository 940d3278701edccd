"""A thousand simulated clients over a few Ray actors: time and memory per round, with dropouts.

python -m benchmarks.ray_clients --out FILE

Every round requests the cuts and then the scalars of 100 of 1,000 clients, on digits. Each client drops out of a round
with a probability of a fifth, at its cut or at its answer. At the end some clients are brought up to date and must have
the server's digest.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hosfl.engines.engine import Engine, Reply
from hosfl.engines.ray import RayEngine
from hosfl.files import write_json
from hosfl.runs.assemble import assemble
from hosfl.runs.checkpoint import save_module
from hosfl.runs.config import Config
from hosfl.runs.join import WorkerFactory
from hosfl.runs.report import machine
from hosfl.runs.serve import Transport

MB = 1e6


class DropoutEngine:
    """An engine whose clients drop out at random. share: of a round's clients, over its two exchanges."""

    def __init__(self, engine: Engine, share: float, seed: int = 0) -> None:
        self.engine, self.share, self.random = engine, share, np.random.default_rng(seed)
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        probability = 1 - (1 - self.share) ** 0.5  # per exchange
        for reply in self.engine.ask(messages, deadline):
            if self.random.random() < probability:
                self.lost += 1
                yield Reply(reply.client, None, "gone")
            else:
                yield reply


def peak_resident(pid: int | str = "self") -> int:
    """Return a process's peak resident set so far, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(clients: int, sampled: int, rounds: int, actors: int, share: float) -> dict[str, Any]:
    """Run the rounds, and return the result. share: of clients that drop out of a round."""
    import ray

    config = Config(
        task="digits",
        clients=clients,
        sampled=sampled,
        rounds=rounds,
        partition="iid",
        batch=1,
        directions_from="fresh",
        digest_every=20,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        federation, _ = assemble(config)
        save_module(federation.base, out / "base.safetensors")
        federation.open_log(out)
        engines: list[DropoutEngine] = []

        def make_engine(files: dict[str, bytes], count: int) -> Engine:
            engines.append(DropoutEngine(RayEngine(WorkerFactory(files), count, actors), share))
            return engines[0]

        Transport(make_engine).connect(federation)
        seconds, losses = [], []
        try:
            for round in range(rounds):
                begin = time.perf_counter()
                losses.append(federation.round(round))
                seconds.append(time.perf_counter() - begin)
            engines[0].share = 0.0
            audited = range(0, clients, max(1, clients // 50))
            digests = list(federation.audit(list(audited)).values())
            newcomer = federation.make_client(0)
            caught_up = federation.catch_up(newcomer)
            pids = [p for p in _other_pids() if b"ray::_Actor" in Path(f"/proc/{p}/cmdline").read_bytes()]
            memory = {"server": peak_resident() / MB, "actors": [peak_resident(p) / MB for p in pids]}
        finally:
            federation.close()
            ray.shutdown()
    return {
        "clients": clients,
        "sampled": sampled,
        "rounds": rounds,
        "actors": actors,
        "dropout": share,
        "lost": engines[0].lost,
        "visits": federation.visits,
        "seconds a round": {"median": float(np.median(seconds)), "p90": float(np.quantile(seconds, 0.9))},
        "loss": {"first": losses[0], "last": losses[-1]},
        "peak MB": memory,
        "audited": len(digests),
        "one digest": caught_up and set(digests) == {newcomer.digest()},
        "machine": machine(),
    }


def _other_pids() -> list[int]:
    """Return the ids of all processes but this one."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if pid != os.getpid()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--sampled", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ray-clients.json"))
    options = parser.parse_args()
    result = measure(options.clients, options.sampled, options.rounds, options.actors, options.dropout)
    write_json(options.out, result)
    print({name: value for name, value in result.items() if name != "machine"})


if __name__ == "__main__":
    main()

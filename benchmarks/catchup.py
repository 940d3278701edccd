"""`python -m benchmarks.catchup`: how long a client takes that missed 1,000 rounds, compared with the peers' way.

    python -m benchmarks.catchup [--elements N] [--rounds R] [--threads N ...] [--out FOLDER]

1,000 rounds of 5 directions over 20 million float32 weights: with `replay_`, and with `update_` and AdamW. The peers
make each direction with `torch.randn` and add it: 5,000 passes; for AdamW they add into a gradient and take the
optimizer's step once a round. That would take up to a quarter of an hour, so only some passes are timed, and the
fastest counts for all of them. Ours is timed as a whole, in a process of its own that also measures the peak of its
resident set (Linux). Writes benchmarks/results/catchup-cpu.json. Exits with 1 if `replay_` is not 100 times as fast, or
needs 1 MB or more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hosfl_kernels as hk
from hosfl.runs.report import machine

RESULTS = Path(__file__).parent / "results"
DIRECTIONS, RATE = 5, 1e-3
TIMED_PASSES = 5  # of the peers' way
MIN_RATIO, MAX_EXTRA_BYTES = 100, 1_000_000


def missed_records(rounds: int) -> tuple[Tensor, Tensor]:
    """Make random seeds and coefficients [rounds, DIRECTIONS] of the missed rounds."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(0, 2**62, (rounds, DIRECTIONS), generator=generator)
    return seeds, torch.randn(rounds, DIRECTIONS, generator=generator) * RATE


def replay(x: Tensor, rounds: int) -> Callable[[], None]:
    seeds, coefficients = missed_records(rounds)
    return lambda: hk.replay_(x, seeds.flatten(), coefficients.flatten())


def adamw(x: Tensor, rounds: int) -> Callable[[], None]:
    rule, moments = hk.AdamW(), [torch.zeros_like(x), torch.zeros_like(x)]
    record = (*missed_records(rounds), rule.steps(range(rounds), [RATE] * rounds))
    return lambda: hk.update_(x, moments, rule, *record)


OURS: dict[str, Callable[[Tensor, int], Callable[[], None]]] = {"replay_": replay, "update_ AdamW": adamw}


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure_ours(name: str, elements: int, rounds: int) -> dict[str, Any]:
    """Measure a whole catch-up in this process: seconds, and the growth of the resident set."""
    OURS[name](torch.zeros(1 << 18), rounds)()  # loads code and starts threads
    work = OURS[name](torch.randn(elements) * 0.02, rounds)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    duration = seconds(work)
    return {"seconds": duration, "peak_extra_bytes": resident("VmHWM") - before}


def measure_peers(elements: int, rounds: int) -> dict[str, float]:
    """Estimate the seconds of the peers' ways from the fastest of some passes."""
    x = torch.nn.Parameter(torch.randn(elements) * 0.02)
    x.grad = torch.zeros(elements)
    optimizer = torch.optim.AdamW([x], lr=RATE)
    one_pass = min(seconds(lambda: x.grad.add_(torch.randn_like(x), alpha=RATE)) for _ in range(TIMED_PASSES))
    step = min(seconds(optimizer.step) for _ in range(TIMED_PASSES))
    return {"replay_": rounds * DIRECTIONS * one_pass, "update_ AdamW": rounds * (DIRECTIONS * one_pass + step)}


def run_child(*arguments: object, threads: int) -> Any:
    """Run this module in a process of its own with so many threads, and parse the JSON that it prints."""
    command = [sys.executable, "-m", "benchmarks.catchup", "--child", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return json.loads(subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout)


def measure(elements: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return a row for each of our ops, with its ratio to the peers' way."""
    peers = run_child("peers", elements, rounds, threads=threads)
    rows = []
    for name in OURS:
        row = {"name": name, "threads": threads, **run_child(name, elements, rounds, threads=threads)}
        row |= {"peers_seconds": peers[name], "ratio": peers[name] / row["seconds"]}
        print(f"{name}, {threads} threads: {row['seconds']:.1f} s, {row['ratio']:.0f} x, {row['peak_extra_bytes']:,} B")
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.catchup", description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, elements, rounds = options.child[0], int(options.child[1]), int(options.child[2])
        of_peers = name == "peers"
        print(json.dumps(measure_peers(elements, rounds) if of_peers else measure_ours(name, elements, rounds)))
        return 0
    rows = [row for threads in options.threads for row in measure(options.elements, options.rounds, threads)]
    result = {"machine": machine(), "elements": options.elements, "rounds": options.rounds, "directions": DIRECTIONS}
    result |= {"peers_timed_passes": TIMED_PASSES, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "catchup-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    replayed = [row for row in rows if row["name"] == "replay_"]
    good = all(r["ratio"] >= MIN_RATIO and r["peak_extra_bytes"] < MAX_EXTRA_BYTES for r in replayed)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""The effect of sending cuts and multipliers in fewer bytes, for each type on the wire, on digits' test data.

    python -m benchmarks.wire [--jobs N] [--out FILE]

HO-SFL with the defaults of `hosfl train`, so that clients' data differ; six seeds. Rates are not tuned per type.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track

from hosfl import Config, train
from hosfl.runs.report import machine
from hosfl.settings import FIELDS

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2, 3, 4, 5)
TYPES = FIELDS["wire"].metadata["choices"]


def run(job: tuple[str, int]) -> dict[str, Any]:
    """Train, and return accuracy and loss on test data, and bytes per client and round in both directions."""
    torch.set_num_threads(1)
    wire, seed = job
    summary = train(Config(wire=wire, seed=seed, evaluate_every=Config().rounds))
    return {"accuracy": summary.accuracy, "loss": summary.loss, "bytes": sum(summary.bytes_per_client_round.values())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "digits-wire.json")
    options = parser.parse_args()
    jobs = list(itertools.product(TYPES, SEEDS))
    with ProcessPoolExecutor(options.jobs) as pool:
        done = list(track(pool.map(run, jobs), total=len(jobs), description="runs"))
    rows: dict[str, list[dict[str, Any]]] = {wire: [] for wire in TYPES}
    for (wire, _), result in zip(jobs, done, strict=True):
        rows[wire].append(result)
    options.out.write_text(json.dumps({"machine": machine(), "seeds": SEEDS, "types": rows}, indent=1) + "\n")
    for wire, results in rows.items():
        means = {name: mean(r[name] for r in results) for name in ("accuracy", "loss", "bytes")}
        print(f"{wire}: {means['accuracy']:.4f} {means['loss']:.4f}, {means['bytes'] / 1e3:.1f} KB")


if __name__ == "__main__":
    main()

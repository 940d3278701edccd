"""All ways to train digits' client half, with the rates that `make tune` chose, compared on test data.

    python -m benchmarks.ways_to_learn [--jobs N] [--out FILE]

They have fresh directions or a pool, two directions a round or five, and different update rules; and there are the two
controls.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track

from benchmarks.tune import WAYS
from hosfl import Config, train
from hosfl.runs.report import gap_recovered, machine

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2, 3, 4, 5)


def run(job: tuple[str, dict[str, Any], int]) -> tuple[str, float, float]:
    """Train, and return (way, accuracy, loss) on test data; a run that diverges raises."""
    torch.set_num_threads(1)
    way, settings, seed = job
    summary = train(Config(**settings, seed=seed, evaluate_every=400))
    return way, summary.accuracy, summary.loss


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ways_to_learn", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "digits-ways.json")
    options = parser.parse_args()
    best = json.loads((RESULTS / "digits-tuning.json").read_text())["best"]
    ways = [way for way in (*WAYS, "frozen") if way in best]  # those that were tuned
    jobs = [(way, best[way]["settings"], seed) for way in ways for seed in SEEDS]
    with ProcessPoolExecutor(options.jobs) as pool:
        done = list(track(pool.map(run, jobs), total=len(jobs), description="runs"))
    rows = {}
    for way in ways:
        accuracies, losses = zip(*((a, loss) for w, a, loss in done if w == way), strict=True)
        rows[way] = {"accuracy": mean(accuracies), "loss": mean(losses), "accuracies": accuracies, "losses": losses}
    low, high = rows["frozen"], rows["first-order"]
    for row in rows.values():
        for quantity in ("accuracy", "loss"):
            row[f"{quantity}_gap_recovered"] = gap_recovered(row[quantity], low[quantity], high[quantity])
    options.out.write_text(json.dumps({"machine": machine(), "seeds": SEEDS, "ways": rows}, indent=1) + "\n")
    for way, row in rows.items():
        print(f"{way}: {row['accuracy']:.4f} {row['loss']:.4f} share {row['accuracy_gap_recovered']:.2f}")


if __name__ == "__main__":
    main()

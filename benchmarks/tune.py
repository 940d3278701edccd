"""`make tune`: choose the learning rates of a task on validation data, the same number of trials for every method.

    python -m benchmarks.tune [--jobs N] [--out FILE]

A trial is a method, a rule and two rates, over seeds 0 to 3. HO-SFL and first-order split learning get the same 9
trials per rule, 3 server rates x 3 client rates; the frozen client has one rate and gets 9 of it. The lowest mean
validation loss wins; a run that diverges loses. Test data is not touched.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track

from hosfl import Config, LatticeError, train
from hosfl.config import RULES
from hosfl.report import machine

SEEDS = (0, 1, 2, 3)
SERVER = (0.03, 0.06, 0.12)
CLIENT = {
    ("ho", "normalized"): (0.04, 0.08, 0.16),
    ("ho", "sgd"): (0.01, 0.02, 0.04),
    ("first-order", "normalized"): (0.3, 0.6, 1.2),
    ("first-order", "sgd"): (0.3, 0.9, 2.7),
}
FROZEN = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)

Trial = dict[str, Any]


def trials() -> list[Trial]:
    found: list[Trial] = []
    for method, rule in itertools.product(("ho", "first-order"), RULES):
        for server, client in itertools.product(SERVER, CLIENT[method, rule]):
            found.append({"method": method, "rule": rule, "server_rate": server, "client_rate": client})
    return found + [{"method": "frozen", "server_rate": rate} for rate in FROZEN]


def run(trial: Trial) -> Trial:
    """The trial with its validation loss and accuracy, means over the seeds."""
    torch.set_num_threads(1)
    losses, accuracies = [], []
    for seed in SEEDS:
        try:
            summary = train(Config(**trial, seed=seed, evaluate_on="validation", evaluate_every=400))
            losses.append(summary.loss if math.isfinite(summary.loss) else math.inf)
            accuracies.append(summary.accuracy)
        except LatticeError:
            losses.append(math.inf)
            accuracies.append(0.0)
    return {**trial, "validation_loss": mean(losses), "validation_accuracy": mean(accuracies)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits-tuning.json")
    options = parser.parse_args()
    todo = trials()
    with ProcessPoolExecutor(options.jobs) as pool:
        done = list(track(pool.map(run, todo), total=len(todo), description="trials"))
    best: dict[str, Trial] = {}
    for trial in done:
        name = f"{trial['method']} {trial.get('rule', '')}".strip()
        if name not in best or trial["validation_loss"] < best[name]["validation_loss"]:
            best[name] = trial
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"machine": machine(), "seeds": SEEDS, "best": best, "trials": done}, indent=1) + "\n"
    )
    for name, trial in best.items():
        rates = {k: v for k, v in trial.items() if k.endswith("rate")}
        print(f"{name}: {rates} loss {trial['validation_loss']:.4f} accuracy {trial['validation_accuracy']:.4f}")


if __name__ == "__main__":
    main()

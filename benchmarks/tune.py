"""`make tune`: choose the learning rates of digits on validation data, with as many trials for every method.

    python -m benchmarks.tune [--jobs N] [--out FILE] [--only WAY ...]

A trial is a way to train with its rates, over seeds 0 to 3. Every way gets 9 trials: 3 server rates x 3 client rates,
equally spaced; they are lower if the server half learns by zeroth order. The frozen client has no client rate; instead
it gets 3 weight decays of the server half, where the others have one, which favours the control. The highest mean
validation accuracy wins, at equal accuracy the lower loss; a run that diverges loses. Test data are not used.
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
from hosfl.methods import METHODS, method_of
from hosfl.runs.report import machine

SEEDS = (0, 1, 2, 3)
DECAY = 0.3
FROZEN = tuple(itertools.product((0.05, 0.1, 0.2), (0.0, 0.1, 0.3)))
# The ways to train that are tuned, from the methods' `ways`: name -> (method, its settings, client rates).
WAYS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    way: (name, settings, rates) for name in METHODS for way, (settings, rates) in method_of(name).ways.items()
}

Trial = dict[str, Any]


def trials() -> list[Trial]:
    """Return all trials: the name of the way, and the settings of its runs."""
    listed: list[Trial] = []
    for way, (name, settings, client_rates) in WAYS.items():
        own = settings if name == Config().method else {"method": name, **settings}
        for server, client in itertools.product(method_of(name).server_rates, client_rates):
            rates = {"server_rate": server, "server_decay": DECAY, "client_rate": client}
            listed.append({"way": way, "settings": {**own, **rates}})
    for server, decay in FROZEN:
        listed.append({"way": "frozen", "settings": {"method": "frozen", "server_rate": server, "server_decay": decay}})
    return listed


def run(trial: Trial) -> Trial:
    """Run a trial, and return it with its validation loss and accuracy, means over the seeds."""
    torch.set_num_threads(1)
    losses, accuracies = [], []
    for seed in SEEDS:
        try:
            summary = train(Config(**trial["settings"], seed=seed, evaluate_on="validation", evaluate_every=400))
            losses.append(summary.loss if math.isfinite(summary.loss) else math.inf)
            accuracies.append(summary.accuracy)
        except LatticeError:
            losses.append(math.inf)
            accuracies.append(0.0)
    return {**trial, "validation_loss": mean(losses), "validation_accuracy": mean(accuracies)}


def _merit(trial: Trial) -> tuple[float, float]:
    return trial["validation_accuracy"], -trial["validation_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits-tuning.json")
    parser.add_argument("--only", nargs="+", choices=[*WAYS, "frozen"], help="the others keep their results")
    options = parser.parse_args()
    kept: list[Trial] = []
    todo = trials()
    if options.only:
        kept = [t for t in json.loads(options.out.read_text())["trials"] if t["way"] not in options.only]
        todo = [t for t in todo if t["way"] in options.only]
    with ProcessPoolExecutor(options.jobs) as pool:
        done = kept + list(track(pool.map(run, todo), total=len(todo), description="trials"))
    best: dict[str, Trial] = {}
    for trial in done:
        way = trial["way"]
        if way not in best or _merit(trial) > _merit(best[way]):
            best[way] = trial
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"machine": machine(), "seeds": SEEDS, "best": best, "trials": done}, indent=1) + "\n"
    )
    for way, trial in best.items():
        rates = {k: v for k, v in trial["settings"].items() if k.endswith(("rate", "decay"))}
        print(f"{way}: {rates} loss {trial['validation_loss']:.4f} accuracy {trial['validation_accuracy']:.4f}")


if __name__ == "__main__":
    main()

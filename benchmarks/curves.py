"""Optimizers with forward passes on two real tasks: MeZO, `hosfl.optim`, and other rules for the size of a step.

    python -m benchmarks.curves [--only digits sentences] [--jobs N] [--out FOLDER]

*digits*: a perceptron from scratch. *sentences*: the last layer of MiniLM, pretrained (`benchmarks/sentences.py`).
Every optimizer without gradients evaluates the loss 8 times a step, and takes the same number of steps on the same
batches: 4 two-sided directions, or 7 one-sided ones and the loss at the weights themselves. First-order SGD and Adam
take as many steps. Rates are constant. Every optimizer gets the same number of trials, on separate tuning seeds; their
rates are equally spaced around one that was found on wider grids. The lowest mean validation loss at the end wins. The
reported runs have other seeds: validation losses during the run, test accuracy at its end. Test data are used for
nothing else. A run that ends in numbers that are not finite is a failure, and is kept.

Writes optim-curves.json and optim.png into benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.mezo import MeZO
from hosfl.optim import ZOSGD, ZONormalizedSGD
from hosfl.protocol.lattice import LatticeError
from hosfl.runs.report import machine
from hosfl.tasks.data import Dataset, Splits
from hosfl.tasks.digits import digits

RESULTS = Path(__file__).parent / "results"
TRIALS, SPACING = 5, 2.0


# --- rules for the size of a step --------------------------------------------------------------------------------


class LossSpread(ZOSGD):
    """FZOO's rule: th = th - lr * (1 / P) sum_p v_p u_p / s, s the standard deviation of the step's v.

    Source: Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale
    Speed", 2025, arXiv 2506.09034. There s is the deviation of the losses, mu times as large.
    """

    def _estimate(self, group: Any, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        spread = stdev(derivatives)
        return [v / spread / self.directions for v in derivatives], {}


class SquareSum(ZOSGD):
    """AdaGrad's rule with one number: the rate divided by the root of the sum of all steps' (1 / P) sum_p v_p^2."""

    def _estimate(self, group: Any, derivatives: list[float]) -> tuple[list[float], dict[str, float]]:
        squares = group.settings.get("squares", 0.0) + mean(v * v for v in derivatives)
        return [v / math.sqrt(squares) / self.directions for v in derivatives], {"squares": squares}


TWO_SIDED: dict[str, Any] = {"directions": 4}
ONE_SIDED: dict[str, Any] = {"directions": 7, "two_sided": False}

# name -> (parameters, rate, seed) -> optimizer
Make = Callable[[list[Tensor], float, int], Any]
OPTIMIZERS: dict[str, Make] = {
    "MeZO": lambda params, lr, seed: MeZO(params, lr, directions=4, seed=seed),
    "ZOSGD": lambda params, lr, seed: ZOSGD(params, lr, seed=seed, **TWO_SIDED),
    "ZONormalizedSGD": lambda params, lr, seed: ZONormalizedSGD(params, lr, seed=seed, **TWO_SIDED),
    "ZOSGD, one-sided": lambda params, lr, seed: ZOSGD(params, lr, seed=seed, **ONE_SIDED),
    "ZONormalizedSGD, one-sided": lambda params, lr, seed: ZONormalizedSGD(params, lr, seed=seed, **ONE_SIDED),
    "loss spread (FZOO), one-sided": lambda params, lr, seed: LossSpread(params, lr, seed=seed, **ONE_SIDED),
    "sum of squares (AdaGrad), one-sided": lambda params, lr, seed: SquareSum(params, lr, seed=seed, **ONE_SIDED),
    "first-order SGD": lambda params, lr, seed: torch.optim.SGD(params, lr),
    "first-order Adam": lambda params, lr, seed: torch.optim.Adam(params, lr),
}


# --- tasks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model and its data. rates: by optimizer, the middle one of its trials."""

    model: Callable[[int], nn.Module]
    splits: Splits
    steps: int
    batch: int
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    rates: dict[str, float]


def perceptron(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@cache
def task(name: str) -> Task:
    """Make a task by its name."""
    if name == "digits":
        rates = {
            "MeZO": 0.02,
            "ZOSGD": 0.02,
            "ZONormalizedSGD": 0.03,
            "ZOSGD, one-sided": 0.02,
            "ZONormalizedSGD, one-sided": 0.03,
            "loss spread (FZOO), one-sided": 0.03,
            "sum of squares (AdaGrad), one-sided": 0.3,
            "first-order SGD": 0.2,
            "first-order Adam": 0.01,
        }
        return Task(perceptron, digits(), 300, 64, (10, 11), (0, 1, 2, 3, 4), rates)
    from benchmarks.sentences import minilm

    tail, splits = minilm()
    rates = {
        "MeZO": 5e-4,
        "ZOSGD": 5e-4,
        "ZOSGD, one-sided": 5e-4,
        "ZONormalizedSGD, one-sided": 1.5e-3,
        "loss spread (FZOO), one-sided": 1.5e-3,
        "first-order SGD": 0.0125,
        "first-order Adam": 1e-4,
    }
    return Task(lambda seed: copy.deepcopy(tail), splits, 60, 16, (10,), (0, 1, 2), rates)


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    logits = torch.cat([model(x) for x in data.inputs.split(64)])
    return float(cross_entropy(logits, data.labels)), float((logits.argmax(1) == data.labels).double().mean())


Job = tuple[str, str, float, int, bool]  # task, optimizer, rate, seed, whether it is a final run (no trial)


def run(job: Job) -> dict[str, Any]:
    """Train: validation losses during the run (a trial: only the last), and for a final run test loss and accuracy."""
    torch.set_num_threads(1)
    name, way, rate, seed, final = job
    learnt = task(name)
    model = learnt.model(seed)
    optimizer = OPTIMIZERS[way](list(model.parameters()), rate, seed)
    batches = torch.Generator().manual_seed(seed)
    train, every = learnt.splits.train, learnt.steps // 20
    curve, failure, seconds = [], None, 0.0
    for step in range(learnt.steps + 1):
        if step == learnt.steps or (final and step % every == 0):
            curve.append((step, evaluate(model, learnt.splits.validation)[0]))
            if not math.isfinite(curve[-1][1]):
                failure = f"step {step}: validation loss {curve[-1][1]}"
                break
        if step == learnt.steps:
            break
        chosen = torch.randint(len(train), (learnt.batch,), generator=batches)
        inputs, labels = train.inputs[chosen], train.labels[chosen]

        def loss(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            return cross_entropy(model(inputs), labels)

        def loss_and_gradient(loss: Callable[[], Tensor] = loss) -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        begin = time.perf_counter()
        try:
            optimizer.step(loss_and_gradient if way.startswith("first-order") else loss)
        except (FloatingPointError, LatticeError) as error:
            failure = f"step {step}: {error}"
            break
        seconds += time.perf_counter() - begin
    result: dict[str, Any] = {"rate": rate, "seed": seed, "failure": failure, "curve": curve}
    result["validation_loss"] = math.inf if failure else curve[-1][1]
    result["seconds_per_step"] = seconds / learnt.steps
    if final and not failure:
        result["test_loss"], result["test_accuracy"] = evaluate(model, learnt.splits.test)
    return result


def study(name: str, jobs: int) -> dict[str, Any]:
    """Run the trials and the final runs of one task."""
    learnt = task(name)  # the workers inherit it
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:

        def results(todo: list[Job], phase: str) -> list[dict[str, Any]]:
            return list(track(pool.map(run, todo), total=len(todo), description=f"{name}: {phase}"))

        trials = [
            (name, way, middle * SPACING ** (i - TRIALS // 2), seed, False)
            for way, middle in learnt.rates.items()
            for i in range(TRIALS)
            for seed in learnt.tuning_seeds
        ]
        tuned: dict[str, dict[float, list[float]]] = {way: {} for way in learnt.rates}
        for job, result in zip(trials, results(trials, "trials"), strict=True):
            tuned[job[1]].setdefault(job[2], []).append(result["validation_loss"])
        best = {way: min(rates, key=lambda rate: mean(rates[rate])) for way, rates in tuned.items()}
        final = [(name, way, rate, seed, True) for way, rate in best.items() for seed in learnt.seeds]
        done = list(zip(final, results(final, "runs"), strict=True))
    start = evaluate(learnt.model(learnt.seeds[0]), learnt.splits.test)
    return {
        "weights": sum(p.numel() for p in learnt.model(0).parameters()),
        "steps": learnt.steps,
        "batch": learnt.batch,
        "start": {"test_loss": start[0], "test_accuracy": start[1]},
        "ways": {
            way: {
                "rate": best[way],
                "trials": [{"rate": r, "validation_losses": losses} for r, losses in tuned[way].items()],
                "runs": [result for job, result in done if job[1] == way],
            }
            for way in learnt.rates
        },
    }


# --- results -----------------------------------------------------------------------------------------------------


def plot(tasks: dict[str, Any], path: Path) -> None:
    """Plot the validation loss by step: the mean over the seeds that did not fail, and a band from best to worst."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, (name, result) in zip(axes, tasks.items(), strict=True):
        for way, r in result["ways"].items():
            curves = [run["curve"] for run in r["runs"] if not run["failure"]]
            if not curves:
                continue
            steps, values = [s for s, _ in curves[0]], torch.tensor([[v for _, v in c] for c in curves])
            style = "--" if way.startswith("first-order") else "-"
            (line,) = axis.plot(steps, values.mean(0), style, label=way, color=f"C{[*OPTIMIZERS].index(way)}", lw=1.3)
            axis.fill_between(steps, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.12, lw=0)
        axis.set_title(f"{name}: {result['weights']:,} weights, {len(curves)} seeds", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("validation loss")
        low, high = axis.get_ylim()
        if high > 2 * low:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("digits", "sentences"), help="the other keeps its results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args()
    path = options.out / "optim-curves.json"
    tasks = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only or ("digits", "sentences"):
        tasks[name] = {"machine": machine(), "packages": packages(name), **study(name, options.jobs)}
    tasks = {name: tasks[name] for name in ("digits", "sentences") if name in tasks}
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tasks, indent=1) + "\n")
    plot(tasks, options.out / "optim.png")
    for name, result in tasks.items():
        for way, r in result["ways"].items():
            good = [run for run in r["runs"] if not run["failure"]]
            accuracies = [run["test_accuracy"] for run in good]
            scores = f"{mean(accuracies):.4f}" if good else "-"
            print(f"{name}, {way}: rate {r['rate']:g}, test accuracy {scores}, failures {len(r['runs']) - len(good)}")


def packages(name: str) -> dict[str, str]:
    """Return the versions of the packages from which a task's data come."""
    if name == "digits":
        return {"scikit-learn": version("scikit-learn")}
    return {p: version(p) for p in ("scipy", "torch", "matplotlib", "scikit-learn", "transformers")}


if __name__ == "__main__":
    main()

"""Two liars among ten clients on digits: the effect of every lie, with the settings that limit it.

    python -m benchmarks.liars [--jobs N] [--out FILE] [--set NAME=VALUE ...]

All ten take part in every round. A lie is one of `hosfl.runs.faults.LIES`. The clients' data differ by class ("unlike",
the default of digits) or are alike. --set: any setting of Config, for all runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from hosfl import Config, LatticeError
from hosfl.cli import TYPES
from hosfl.protocol.terms import Diverged
from hosfl.runs.faults import LIES, Faults
from hosfl.runs.report import machine
from hosfl.runs.simulate import simulate
from hosfl.settings import FIELDS

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
CLIENTS, LIARS = 10, 2
COMMON: dict[str, Any] = {"clients": CLIENTS, "sampled": CLIENTS, "rounds": 60, "batch": 16, "directions": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "weighted": {"aggregation": "weighted"},
    "weighted, clipped": {"aggregation": "weighted", "clip": 1.0, "server_clip": 0.1},
    "median": {"aggregation": "median"},
    "trimmed": {"aggregation": "trimmed"},
}
DATA: dict[str, dict[str, Any]] = {"unlike": {}, "alike": {"partition": "iid"}}
HONEST = "none"

Job = tuple[str, str, str, int, dict[str, Any]]  # names in DATA and SETTINGS, lies, seed, common settings


def run(job: Job) -> dict[str, Any]:
    """Run once: accuracy and loss on test data, and the number of refused messages; None for all if it diverges."""
    torch.set_num_threads(1)
    data, name, lies, seed, common = job
    config = Config(**{**common, **DATA[data], **SETTINGS[name]}, seed=seed, evaluate_every=common["rounds"])
    faults = Faults() if lies == HONEST else Faults(byzantine=LIARS / CLIENTS, lies=lies)
    try:
        outcome = simulate(config, faults)
    except (LatticeError, Diverged):
        return {"accuracy": None, "loss": None, "refusals": None}
    return {"accuracy": outcome.accuracy, "loss": outcome.loss, "refusals": outcome.refusals}


def setting(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE: (name, value of the setting's type)."""
    name, _, value = text.partition("=")
    if name not in Config.names():
        raise argparse.ArgumentTypeError(f"{name!r} is no setting: NAME=VALUE, NAME one of {', '.join(Config.names())}")
    return name, TYPES[str(FIELDS[name].type)](value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.liars", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "digits-liars.json")
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    common = COMMON | dict(options.set)
    jobs: list[Job] = [(*names, common) for names in itertools.product(DATA, SETTINGS, (HONEST, *LIES), SEEDS)]
    with ProcessPoolExecutor(options.jobs) as pool:
        done = list(track(pool.map(run, jobs), total=len(jobs), description="runs"))
    rows: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for (data, name, lies, *_), result in zip(jobs, done, strict=True):
        rows.setdefault(data, {}).setdefault(lies, {}).setdefault(name, []).append(result)
    settings = {name: common | own for name, own in SETTINGS.items()}
    result = {"machine": machine(), "seeds": SEEDS, "liars": LIARS, "settings": settings, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

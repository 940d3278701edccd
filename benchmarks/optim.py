"""`make bench`: a step of `hosfl.optim` compared with MeZO's, and the share of small steps that bfloat16 keeps.

    python -m benchmarks.optim [--only overhead memory bfloat16] [--threads N ...] [--out FOLDER]

A float32 transformer of 60 million weights, 169 tensors, on the CPU. *overhead*: seconds of a step without its two
forward passes, which are timed alone just before it, of one token; and seconds of a step whose closure returns
constants. Optimizers take turns in one process per number of threads; medians. *memory*: the growth of the resident set
in two steps, in a process per optimizer (Linux). *bfloat16*: steps of lr * v = 1e-6 on bfloat16 weights of sizes 0.02
to 1, and the share of them that arrives: sum(change * steps) / sum(steps^2).

Writes the parts that ran into benchmarks/results/optim-cpu.json. Exits with 1 if a Rademacher step takes more than 1/20
of MeZO's overhead, or 1 MB, or if bfloat16 misses a share of 1 by more than 5 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hosfl_kernels as hk
from benchmarks.catchup import resident, seconds
from benchmarks.mezo import MeZO
from hosfl.optim import ZOSGD
from hosfl.protocol.seeds import direction_seeds
from hosfl.runs.report import machine

RESULTS = Path(__file__).parent / "results"
PARTS = ("overhead", "memory", "bfloat16")
MIN_RATIO, MAX_EXTRA_BYTES, MAX_LOST = 20, 1_000_000, 0.05


class Extent(NamedTuple):
    """The sizes of the benchmark: of the model; rounds of timed steps; weights and steps of the part bfloat16."""

    vocabulary: int = 32_000
    width: int = 512
    layers: int = 14
    rounds: int = 3
    weights: int = 2 * 2**20
    steps: int = 2000


RATE, MU = 1e-6, 1e-3


class Transformer(nn.Module):
    """Token ids [n, length] to a scalar."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.embedding(ids)).square().mean()


Optimizer = ZOSGD | MeZO
RADEMACHER, MEZO = "hosfl Rademacher", "MeZO"
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    RADEMACHER: lambda model: ZOSGD(model.parameters(), RATE),
    "hosfl Gaussian, in place": lambda model: ZOSGD(model.parameters(), RATE, dist="gaussian"),
    "hosfl Gaussian, weights read only": lambda model: ZOSGD(model.parameters(), RATE, dist="gaussian", model=model),
    MEZO: lambda model: MeZO(model.parameters(), RATE),
}


def model_and_forward(vocabulary: int, width: int, layers: int) -> tuple[Transformer, Callable[[], Tensor]]:
    """Make a model, and a function that runs a forward pass of it."""
    torch.manual_seed(0)
    model = Transformer(vocabulary, width, layers).eval()
    ids = torch.ones(1, 1, dtype=torch.int64)  # of one token, a pass takes little more than reading the weights
    return model, lambda: model(ids)


def constant_loss(module: nn.Module, weight: str, plus: float, minus: float) -> Callable[[], float]:
    """Return a closure of constant losses with a derivative other than 0. It reads a weight, as optimizers require."""
    losses = itertools.cycle([plus, minus])

    def loss() -> float:
        getattr(module, weight)
        return next(losses)

    return loss


# --- measured in a process of its own ----------------------------------------------------------------------------


@torch.no_grad()
def overhead(vocabulary: int, width: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row per optimizer: seconds of a step without its passes, with constant losses, and of the first one."""
    ways = {}
    for name, make in OPTIMIZERS.items():
        model, forward = model_and_forward(vocabulary, width, layers)
        ways[name] = make(model), forward, constant_loss(model.layers.layers[0].norm1, "bias", 1.001, 1.0)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in OPTIMIZERS}
    first = {
        name: seconds(lambda o=optimizer, c=constant: o.step(c)) for name, (optimizer, _, constant) in ways.items()
    }  # type: ignore[misc]
    for _ in range(rounds):
        for name, (optimizer, forward, constant) in ways.items():
            alone = min(seconds(forward) for _ in range(2))
            with_forward = seconds(lambda o=optimizer, f=forward: o.step(f))  # type: ignore[misc]
            without_forward = seconds(lambda o=optimizer, c=constant: o.step(c))  # type: ignore[misc]
            times[name].append((with_forward - 2 * alone, without_forward, alone))
    adding = min(seconds(lambda: [p.add_(0.0) for p in model.parameters()]) for _ in range(5))
    return [
        {
            "name": name,
            **dict(zip(("overhead_seconds", "constant_loss_seconds", "forward_seconds"), medians, strict=True)),
            "first_step_seconds": first[name],
            "add_seconds": adding,
        }
        for name in OPTIMIZERS
        for medians in [map(median, zip(*times[name], strict=True))]
    ]


def memory(vocabulary: int, width: int, layers: int, name: str) -> int:
    """Return the bytes by which the first two steps raise the resident set."""
    small, forward_small = model_and_forward(64, 64, 1)
    OPTIMIZERS[name](small).step(forward_small)  # loads code and starts threads
    model, forward = model_and_forward(vocabulary, width, layers)
    with torch.no_grad():
        forward()
    optimizer = OPTIMIZERS[name](model)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(2):
        optimizer.step(forward)
    return resident("VmHWM") - before


# --- bfloat16 ----------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """A module of n weights, log-uniform from 0.02 to 1 with random signs, all of them bfloat16 numbers."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = 0.02 * 50 ** torch.rand(n, generator=generator)
        signs = torch.randint(2, (n,), generator=generator) * 2 - 1
        self.weights = nn.Parameter((sizes * signs).bfloat16().to(dtype))


def zosgd_change(model: Weights, steps: int) -> tuple[Tensor, Tensor]:
    """Take steps with v = 1: (the change of the weights, the sum of the exact steps), float32 [n] each."""
    before = model.weights.detach().float().clone()
    optimizer = ZOSGD(model.parameters(), RATE, MU, model=model, seed=0)  # the same numbers in every run
    losses = constant_loss(model, "weights", MU, -MU)
    for _ in range(steps):
        optimizer.step(losses)
    seeds = [seed for step in range(steps) for seed in direction_seeds(optimizer.seed, step, 1)]
    total = torch.zeros_like(before)
    hk.replay_(total, seeds, [-RATE] * steps)
    return model.weights.detach().float() - before, total


def mezo_change(model: Weights, steps: int) -> tuple[Tensor, Tensor]:
    """Do the same with MeZO's update only, without its perturbations, which round too."""
    before = model.weights.detach().float().clone()
    optimizer = MeZO(model.parameters(), RATE)
    total = torch.zeros_like(before)
    for seed in range(steps):
        optimizer.zo_update(seed, 1.0)
        torch.manual_seed(seed)
        total -= RATE * torch.normal(mean=0, std=1, size=total.shape, dtype=model.weights.dtype)
    return model.weights.detach().float() - before, total


def bfloat16(weights: int, steps: int) -> list[dict[str, Any]]:
    """Return a row per optimizer and dtype: the share of the steps that arrived, its standard error, and the noise.

    noise: the size of the remaining change, relative to the steps. MeZO, which is slow, moves a sixteenth of the
    weights.
    """
    rows = []
    for name, take_steps, n in ((RADEMACHER, zosgd_change, weights), (MEZO, mezo_change, weights // 16)):
        for dtype in (torch.float32, torch.bfloat16):
            change, total = take_steps(Weights(n, dtype), steps)
            share = float((change * total).sum(dtype=torch.float64) / total.square().sum(dtype=torch.float64))
            noise = float(
                (change - share * total).double().square().mean().sqrt() / total.double().square().mean().sqrt()
            )
            row = {"name": name, "dtype": str(dtype).removeprefix("torch."), "weights": n, "steps": steps}
            # On the lattice a step is rounded as a whole, otherwise each weight separately.
            draws = steps if row["dtype"] == "float32" and name == RADEMACHER else n
            rows.append(row | {"share": share, "share_error": noise / draws**0.5, "noise": noise})
    return rows


# --- the parts ---------------------------------------------------------------------------------------------------


def run_child(work: str, *arguments: object, threads: int) -> Any:
    """Call a function of this module in a process of its own with so many threads, and return its result."""
    code = f"import json; from benchmarks import optim; print(json.dumps(optim.{work}(*json.loads(input()))))"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    text = json.dumps(arguments)
    completed = subprocess.run(
        [sys.executable, "-c", code], input=text, check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    return json.loads(completed.stdout)


def measure(part: str, extent: Extent, threads: Sequence[int]) -> list[dict[str, Any]]:
    """Measure a part, and return its rows."""
    sizes = extent[:3]
    if part == "bfloat16":
        return run_child("bfloat16", extent.weights, extent.steps, threads=threads[0])
    if part == "memory":
        largest = 4 * max(p.numel() for p in Transformer(*sizes).parameters())
        peaks = {name: run_child("memory", *sizes, name, threads=threads[0]) for name in OPTIMIZERS}
        return [{"name": n, "peak_extra_bytes": peak, "largest_tensor_bytes": largest} for n, peak in peaks.items()]
    rows = []
    for number in threads:
        of_threads = run_child("overhead", *sizes, extent.rounds, threads=number)
        mezo = next(r for r in of_threads if r["name"] == MEZO)
        for r in of_threads:
            ratios = {
                "times_mezo": mezo["overhead_seconds"] / r["overhead_seconds"],
                "times_mezo_constant_loss": mezo["constant_loss_seconds"] / r["constant_loss_seconds"],
            }
            rows.append({"threads": number, **r, **ratios})
    return rows


def violations(parts: dict[str, Any]) -> list[str]:
    """Return a line for each requirement that the results do not meet."""
    found = []
    for r in parts.get("overhead", {"rows": []})["rows"]:
        if r["name"] == RADEMACHER and r["times_mezo"] < MIN_RATIO:
            found.append(f"{r['threads']} threads: a step's overhead is 1/{r['times_mezo']:.1f} of MeZO's")
    for r in parts.get("memory", {"rows": []})["rows"]:
        if r["name"] == RADEMACHER and r["peak_extra_bytes"] >= MAX_EXTRA_BYTES:
            found.append(f"a step takes {r['peak_extra_bytes']:,} bytes")
    shares = {r["dtype"]: r["share"] for r in parts.get("bfloat16", {"rows": []})["rows"] if r["name"] == RADEMACHER}
    if shares and not abs(shares["bfloat16"] / shares["float32"] - 1) <= MAX_LOST:
        found.append(f"bfloat16 keeps {shares['bfloat16'] / shares['float32']:.3f} of the float32 run's change")
    return found


def show(parts: dict[str, Any]) -> None:
    """Print a table for each part."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    for part, result in parts.items():
        table = Table(title=part)
        for column in result["rows"][0]:
            table.add_column(column.replace("_", " "), justify="left" if column in ("name", "dtype") else "right")
        for row in result["rows"]:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)


def main(arguments: Sequence[str] | None = None, extent: Extent = Extent()) -> int:  # noqa: B008
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optim", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="the other parts keep their results")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    path = options.out / "optim-cpu.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.only or PARTS:
        load = os.getloadavg()[0]
        rows = measure(part, extent, options.threads)
        parts[part] = {"machine": machine(), "load": load, "extent": extent._asdict(), "rows": rows}
        path.write_text(json.dumps({part: parts[part] for part in PARTS if part in parts}, indent=1) + "\n")
    show(parts)
    violated = violations(parts)
    print(*violated, sep="\n")
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main())

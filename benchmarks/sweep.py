"""`python -m benchmarks.gpu --sweep`: find the fastest shape of tile of every kernel on this GPU.

For every kernel, kind of tensor and size class the candidates are timed, the default first. Only the launch is timed:
records and tables are on the device before. First a candidate must leave the same bits as the default on a tensor of
odd start and size (for `project`, whose order of summation depends on the shape, a sum within a tolerance); otherwise
it fails. A candidate that spills more registers than the default is left out.

The fastest candidate is chosen if it takes at most 97 % of the default's time, also when both are timed once more.
After every kernel the choices so far are written to FILE with the suffix .choices.json, beside the rows. Launches use
them once they are copied to hosfl_kernels/gpu/choices.json. A kernel that was not swept keeps its entry there.

Most of the time is compilation, of every candidate once for both size classes. There are 558. For sm_90 one takes 0.2
to 1.2 s of a core of an AMD EPYC with Triton 3.7.1, on average 0.5 s: 4.6 of the default 8 minutes. The most used
kernels come first; after --seconds the sweep ends and names the kernels that are left. It cannot be resumed, but
another run finds the compiled candidates in Triton's cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hosfl_kernels as hk
from benchmarks.gpu import DEVICE, ROOT, SCALE, Row, Rows, milliseconds
from hosfl.files import write_atomically
from hosfl_kernels.check import TOLERANCE
from hosfl_kernels.gpu import choices
from hosfl_kernels.gpu.choices import Shape
from hosfl_kernels.gpu.launch import Kernel, Kind, Variant, capability, float_bits, override_shapes, plan, seed_bits
from hosfl_kernels.gpu.replay import record_table
from hosfl_kernels.gpu.update import constant_bits, round_table
from hosfl_kernels.place import Place
from hosfl_kernels.transfer import copy_records

FASTER = 0.97  # of the default's time
RECORDS, ROUNDS, DIRECTIONS = 16, 4, 4
START, ODD = 131_077, 140_001  # start and size of a tensor with whole tiles of every shape, and parts on both sides


class Prepared(NamedTuple):
    """A launch whose arguments are on the device. written: weights and moments, or the sums of tiles."""

    variant: Variant
    programs: int
    arguments: tuple[Any, ...]
    weights: Tensor
    written: list[Tensor]

    def __call__(self) -> None:
        self.variant.launch(self.programs, *self.arguments)


# --- one launch of every kernel -----------------------------------------------------------------------------------


def prepare_planned(
    kernel: Kernel,
    x: Tensor,
    place: Place,
    stochastic: bool,
    *arguments: Any,
    moments: Sequence[Tensor] = (),
) -> Prepared:
    """Prepare a launch by `plan`, which makes its tables. arguments: the kernel's others."""
    (launch,) = plan(kernel, [x], place, stochastic, [[m] for m in moments])
    tables = (launch.rows, launch.row_of_program)
    return Prepared(launch.variant, len(launch.row_of_program), (*tables, *arguments), x, [x, *moments])


def records(count: int, stochastic: bool) -> Tensor:
    """Make a table of `count` records on the device."""
    seeds = range(1, count + 1)
    table = record_table(seeds, [SCALE] * count, seeds if stochastic else None)
    return copy_records(table, "the sweep", torch.device(DEVICE))


def noise(kernel: Kernel, x: Tensor, place: Place, stochastic: bool) -> Prepared:
    n, start = x.numel(), place.starts[0]
    variant = kernel.variant_for(Kind(x.dtype, place.dist), n, x.device)
    return Prepared(variant, variant.programs(n, start), (x.data_ptr(), n, start, place.streams[0], 1), x, [x])


def perturb(kernel: Kernel, x: Tensor, place: Place, stochastic: bool) -> Prepared:
    return prepare_planned(kernel, x, place, stochastic, records(1, False), 1, int(float_bits(SCALE)), 2)


def perturb_on_device(kernel: Kernel, x: Tensor, place: Place, stochastic: bool) -> Prepared:
    return prepare_planned(kernel, x, place, stochastic, records(1, stochastic), 0, 0, 0)


def replay(kernel: Kernel, x: Tensor, place: Place, stochastic: bool) -> Prepared:
    return prepare_planned(kernel, x, place, stochastic, records(RECORDS, stochastic), RECORDS)


def update(rule: hk.SGD | hk.AdamW, kernel: Kernel, x: Tensor, place: Place, stochastic: bool) -> Prepared:
    rounds, draws = range(ROUNDS), range(ROUNDS * DIRECTIONS)
    steps = rule.steps(rounds, [SCALE] * ROUNDS).tolist()
    table = round_table(draws, [SCALE] * len(draws), steps, rounds if stochastic else None)
    moments = [torch.zeros(x.numel(), device=DEVICE) for _ in range(rule.moments)]
    arguments = (copy_records(table, "the sweep", x.device), ROUNDS, DIRECTIONS, *constant_bits(rule.constants))
    return prepare_planned(kernel, x, place, stochastic, *arguments, moments=moments)


def project(kernel: Kernel, x: Tensor, place: Place, stochastic: bool) -> Prepared:
    seeds = copy_records(seed_bits(range(RECORDS)), "the sweep", x.device)
    prepared = prepare_planned(kernel, x, place, False, seeds, RECORDS)
    sums = torch.zeros(RECORDS, prepared.programs, dtype=torch.float64, device=DEVICE)
    return prepared._replace(arguments=(*prepared.arguments, sums.data_ptr()), written=[sums])


LAUNCHES: dict[str, Callable[[Kernel, Tensor, Place, bool], Prepared]] = {
    # In the order of the sweep, within a distribution.
    "perturb": perturb,
    "replay": replay,
    "perturb-on-device": perturb_on_device,
    **{f"update-{rule.name}": partial(update, rule) for rule in (hk.SGD(), hk.AdamW(), hk.SGD(momentum=0.9))},
    "project": project,
    "noise": noise,
}


def prepare(kernel: Kernel, kind: Kind, shape: Shape, n: int, start: int = 0) -> Prepared:
    """Prepare a launch on n elements from `start` on, whose whole tiles are aligned to 16 bytes."""
    skipped = start % 8
    x = torch.linspace(-1, 1, n + skipped, device=DEVICE).to(kind.dtype)[skipped:]
    with override_shapes({f"{kernel.name}-{kind}": shape}):
        return LAUNCHES[kernel.name](kernel, x, Place.single(kind.dist, stream=3, start=start), kind.stochastic)


def wrote_the_same(first: Prepared, second: Prepared) -> bool:
    """Whether both wrote the same bits; for `project`, whose sums depend on the shape, the same within TOLERANCE."""
    if first.written[0] is not first.weights:
        a, b = (prepared.written[0].sum(1) for prepared in (first, second))
        return bool((a - b).abs().max() <= TOLERANCE * first.weights.double().abs().sum())
    pairs = zip(first.written, second.written, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


# --- the sweep ----------------------------------------------------------------------------------------------------


def candidates(kernel: Kernel, kind: Kind) -> list[Shape]:
    """Return the default, then shapes with fewer and more row blocks, and half and twice the columns and warps.

    A wide kernel processes its blocks one after another and keeps none, so that four times as many fit.
    """
    default = kernel.default(kind)
    scales = product((1, 1 / 2, 2, 4) if kernel.wide else (1, 1 / 2, 2), (1, 1 / 2, 2))
    return [Shape(int(b * default.blocks), int(w * default.width), int(w * default.num_warps)) for b, w in scales]


class Sweep:
    """A sweep: its rows and the choices so far. elements: by size class, the size of its tensor."""

    def __init__(self, rows: Rows, elements: dict[str, int]) -> None:
        self.rows, self.elements = rows, elements
        self.chosen: dict[str, dict[str, Shape]] = {}  # by swept kernel and size class

    def run(self, ends: float) -> list[str]:
        """Sweep until `ends`, by time.monotonic(). Returns the kernels that were not swept."""
        kernels = choices.kernels()

        def priority(name: str) -> tuple[bool, bool, int]:
            kernel, kind = kernels[name]
            return kind.dtype == torch.float16, kind.dist == "gaussian", list(LAUNCHES).index(kernel.name)

        order = sorted(kernels, key=priority)
        for name in order:
            if not self.sweep_kernel(name, *kernels[name], ends):
                break
            write_atomically(self.table, self.table_text().encode())
        return [name for name in order if name not in self.chosen]

    def sweep_kernel(self, name: str, kernel: Kernel, kind: Kind, ends: float) -> bool:
        """Time a kernel's candidates and choose among them. Returns False if there was no time for all."""
        default, *others = candidates(kernel, kind)
        trials: list[Prepared] = []
        times: dict[Shape, Row] = {}

        def work(shape: Shape) -> Row:
            trials[1:] = [prepare(kernel, kind, shape, min(ODD, self.elements["large"]) | 1, START)]
            trials[-1]()
            if not wrote_the_same(trials[0], trials[-1]):
                raise AssertionError("the bits are not those of the default")
            default_spills, spills = (trial.variant.spills(*trial.arguments) for trial in (trials[0], trials[-1]))
            if spills > default_spills:
                return {"left_out": f"{spills} words of a thread are in memory, {default_spills} with the default"}
            times[shape] = {f"{size}_ms": self.time(kernel, kind, shape, size) for size in self.elements}
            return times[shape]

        for shape in (default, *others):
            if time.monotonic() > ends:
                return False
            self.rows.add("sweep", f"{name} {format_shape(shape)}", partial(work, shape))
            if default not in times:
                return True  # the default failed, so there is nothing to compare with
        self.chosen[name] = {}
        for size in self.elements:
            best = min(times, key=lambda shape: times[shape][f"{size}_ms"])
            if faster(times[best][f"{size}_ms"], times[default][f"{size}_ms"]):
                again = partial(self.time_again, kernel, kind, size, best)
                row = self.rows.add("again", f"{name} {size} {format_shape(best)}", again)
                if "failed" not in row and faster(row["ms"], row["default_ms"]):
                    self.chosen[name][size] = best
        return True

    def time(self, kernel: Kernel, kind: Kind, shape: Shape, size: str) -> float:
        return milliseconds(prepare(kernel, kind, shape, self.elements[size]))

    def time_again(self, kernel: Kernel, kind: Kind, size: str, shape: Shape) -> Row:
        ms, default_ms = (self.time(kernel, kind, each, size) for each in (shape, kernel.default(kind)))
        return {"ms": ms, "default_ms": default_ms}

    @property
    def table(self) -> Path:
        """The path of the new table of choices."""
        return self.rows.path.with_suffix(".choices.json")

    def table_text(self) -> str:
        """Return the text of choices.json: the choices, and the committed entries of kernels that were not swept."""
        facts = self.rows.result
        here = capability(torch.device(DEVICE)) or 0  # 0 without a GPU: launches refuse a table with it
        measured = {name: facts["machine"][name] for name in ("gpu", "torch", "triton")}
        measured |= {name: facts[name] for name in ("driver", "cuda")}
        kept = json.loads(choices.PATH.read_text())["choices"]
        entries = [e for e in kept if e["capability"] != here or e["kernel"] not in self.chosen]
        for name, shapes in self.chosen.items():
            for size, shape in shapes.items():
                key = {"capability": here, "kernel": name, "size": size}
                entries.append({**key, **shape._asdict(), "measured": measured})
        entries.sort(key=lambda e: (e["capability"], e["kernel"], e["size"]))
        about = "By python -m benchmarks.gpu --sweep. A launch that has no entry takes its kernel's default shape."
        lines = ",".join(f"\n  {json.dumps(entry)}" for entry in entries)
        return f'{{\n "about": {json.dumps(about)},\n "choices": [{lines}\n ]\n}}\n'


def format_shape(shape: Shape) -> str:
    return " ".join(f"{field}={value}" for field, value in shape._asdict().items())


def faster(ms: float, default_ms: float) -> bool:
    return ms <= FASTER * default_ms


def main(out: Path, facts: dict[str, Any], n: int, ends: float) -> int:
    """Sweep until `ends`, the large size class on n elements. Returns the number of rows that failed."""
    rows = Rows(out, facts)
    sweep = Sweep(rows, {"large": n, "small": max(n // 128, 1)})
    rows.result["not_swept"] = left = sweep.run(ends)
    failed = rows.finish()
    print(f"{failed} of {len(rows.result['rows'])} rows failed; {out}")
    if left:
        print("not swept:", *left)
    if sweep.chosen:
        count = sum(map(len, sweep.chosen.values()))
        print(f"{count} shapes were faster than the default: {sweep.table}")
        if capability(torch.device(DEVICE)):
            print(f"to commit: {out}, and {sweep.table} as {choices.PATH.relative_to(ROOT)}")
    return failed

"""Check and time everything on a new GPU, in one command.

    python -m benchmarks.gpu [--elements N] [--out FILE] [--quick]
    python -m benchmarks.gpu --sweep [--seconds N] [--elements N] [--out FILE] [--quick]

It begins with the self-check, and measures nothing if a bit is wrong. Then there is a row each for: the roof (a copy,
and `add_` per dtype), the peers' ways (torch.randn, MeZO's, `tl.randn` in a kernel of its own), every op of every
backend on one large tensor, lists of tensors of LoRA's size and with models' shapes, a step of ZOSGD and two steps that
a CUDA graph replays, each with its ratio to the forward passes in it, and likewise a client's probes. A row also has
the GPU memory of its call. Rows are printed and saved one by one; one that fails is saved with its error, and the
others go on. Exits with 1 if any failed.

Times are medians. On a GPU they are the device's, between events, unless they are named the host's. Without a GPU a
clock times the C++ kernels, which only tries this file out. It is sized for ten minutes of an H100.

--sweep measures which shape of tile is fastest for each kernel instead. See sweep.py.

Needs torch, numpy and this repository, and on a GPU triton, but nothing else that `make bench` needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

import hosfl_kernels as hk
from hosfl_kernels.place import DISTRIBUTIONS, Place
from hosfl_kernels.tensors import BACKENDS, DISPATCH, DTYPES

if importlib.util.find_spec("safetensors") is None:
    # A rented machine may be without it and without an index to install it from. hosfl needs it for files only, and
    # none of those are used here.
    sys.modules["safetensors"] = sys.modules["safetensors.torch"] = MagicMock()

from benchmarks import contenders
from benchmarks.shapes import LISTS, Shapes
from hosfl.files import write_atomically
from hosfl.halves.inputs import evaluating
from hosfl.optim import ZOSGD
from hosfl.probing.probe import PerturbedTensors, probe_in_place, probe_untouched, trainable
from hosfl.runs.report import machine

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SCALE = 1e-3
RECORDS, DIRECTIONS = 64, 5
COPY = "copy float32"  # the roof
TENSORS = (1, 64, 300)  # in a list
BATCH, TOKENS = 8, 128
SECONDS, LEAST, MOST = 1.0, 3, 20  # the time for which a call is repeated, and the least and the most repetitions

Row = dict[str, Any]


# --- the self-check and the machine -------------------------------------------------------------------------------


def check() -> str | None:
    """Run the self-check of every backend of this machine. Returns None, or what is wrong."""
    command = [sys.executable, "-m", "hosfl_kernels.check", f"--vectors={ROOT / 'tests' / 'noise_vectors.json'}"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if completed.returncode == 0:
        return None
    wrong = [line for line in completed.stdout.splitlines() if line.startswith("FAIL")]
    if not wrong:
        return completed.stdout + completed.stderr
    return "\n".join([*wrong[:20], f"{len(wrong)} cases are wrong"])


def driver() -> str | None:
    """Return the version of the GPU's driver, or None."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def backends() -> list[str]:
    """Return the backends to measure: those that run on the GPU if there is one, otherwise the C++ kernels."""
    return [name for name in ("triton", "cuda") if BACKENDS[name].describe()] if CUDA else ["cpp"]


# --- time and memory ----------------------------------------------------------------------------------------------


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    """Time a call until the device has finished, in seconds."""
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def repeats(call: Callable[[], object]) -> int:
    """Return how often to time a call. Calls it twice first, to compile its kernel and cache its tables."""
    call()
    return min(max(int(SECONDS / max(seconds_of(call), 1e-9)), LEAST), MOST)


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time on the device. On a GPU the calls queue behind a sleep, so that the host can run ahead."""
    times = repeats(call)
    if not CUDA:
        return 1e3 * median(seconds_of(call) for _ in range(times))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    synchronize()
    torch.cuda._sleep(40_000_000)  # cycles, some 20 ms
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(events))


def wall_milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of host and device together, for which a caller waits."""
    return 1e3 * median(seconds_of(call) for _ in range(repeats(call)))


def host_microseconds(call: Callable[[], object]) -> float:
    """Return the median time until the call returns; on the CPU that is the whole call."""

    def time_once() -> float:
        synchronize()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return 1e6 * median(time_once() for _ in range(repeats(call)))


def extra_bytes(call: Callable[[], object]) -> int | None:
    """Return the bytes by which a call raises the peak of CUDA's allocator; None on the CPU."""
    if not CUDA:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- the rows -----------------------------------------------------------------------------------------------------


class Rows:
    """The rows measured so far. The file is rewritten atomically after every row."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.result = path, {**facts, "complete": False, "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        write_atomically(self.path, (json.dumps(self.result, indent=1) + "\n").encode())

    def add(self, group: str, name: str, work: Callable[[], Row]) -> Row:
        """Add the row that `work` returns, or one with its exception. Prints and saves it."""
        begin = time.perf_counter()
        try:
            row = work()
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}"}
        copied = next((r.get("GB/s") for r in self.result["rows"] if r["name"] == COPY), None)
        if copied and "GB/s" in row:
            row["of_copy"] = row["GB/s"] / copied
        row = {"group": group, "name": name, **row, "seconds": round(time.perf_counter() - begin, 2)}
        self.result["rows"].append(row)
        self.save()
        if CUDA and "failed" in row:
            with suppress(Exception):  # after some CUDA errors every call fails
                torch.cuda.empty_cache()
        figures = {k: v for k, v in row.items() if k not in ("group", "name") and v is not None}
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"{group:6} {name:44}", *shown, sep="  ", flush=True)
        return row

    def finish(self) -> int:
        """Mark the file complete. Returns the number of rows that failed."""
        self.result["complete"] = True
        self.save()
        return sum("failed" in row for row in self.result["rows"])


def weights(n: int, dtype: torch.dtype) -> Tensor:
    return torch.full((n,), 0.02, dtype=dtype, device=DEVICE)


def roof_rows(n: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield (name, work) for the roof: the memory's bandwidth."""

    def copy() -> Row:
        x = weights(n, torch.float32)
        y = torch.empty_like(x)
        return bandwidth_row(lambda: y.copy_(x), 2 * x.nbytes)

    def add(dtype: torch.dtype) -> Row:
        x = weights(n, dtype)
        return bandwidth_row(lambda: x.add_(SCALE), 2 * x.nbytes)

    yield COPY, copy
    for dtype in DTYPES:
        yield f"add_ {dtype_name(dtype)}", partial(add, dtype)


def peer_rows(n: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield (name, work) for the peers' ways to perturb one tensor. Their random numbers are not ours."""

    def peer(call: Callable[[Tensor], object], dtype: torch.dtype) -> Row:
        x = weights(n, dtype)
        return bandwidth_row(lambda: call(x), 2 * x.nbytes)

    ways: dict[str, Callable[[Tensor], object]] = {"torch.randn + add_": contenders.randn_add, "MeZO": contenders.mezo}
    if "triton" in backends():
        from benchmarks import randn  # needs triton

        ways |= {"tl.randn": lambda x: randn.add_(x, SCALE), "tl.randn4x": lambda x: randn.add_four_(x, SCALE)}
    for dtype, (name, call) in product((torch.float32, torch.bfloat16), ways.items()):
        yield f"{name} {dtype_name(dtype)}", partial(peer, call, dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bandwidth_row(call: Callable[[], object], nbytes: int) -> Row:
    """Time a call that reads and writes so many bytes, and return a row with GB/s."""
    ms = milliseconds(call)
    return {"ms": ms, "GB/s": nbytes / ms / 1e6, "extra_bytes": extra_bytes(call)}


def draws_row(call: Callable[[], object], draws: int) -> Row:
    """Time a call that draws so many random numbers, and return a row with picoseconds per number."""
    ms = milliseconds(call)
    return {"ms": ms, "ps_per_draw": 1e9 * ms / draws, "extra_bytes": extra_bytes(call)}


def op_rows(backend: ModuleType, n: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield (name, work) for every op of a backend, on n elements, or n / 8 if there are many records."""
    few = max(n // 8, 1)
    seeds, coefficients = list(range(RECORDS)), [SCALE] * RECORDS

    def noise(dist: str) -> Row:
        out = weights(n, torch.float32)
        return bandwidth_row(lambda: backend.noise_(out, 1, Place.single(dist)), out.nbytes)

    def perturb(dtype: torch.dtype, dist: str, rounding: bool) -> Row:
        x = weights(n, dtype)
        seed = 2 if rounding else None
        return bandwidth_row(lambda: backend.perturb_([x], 1, SCALE, Place.single(dist), seed), 2 * x.nbytes)

    def perturb_rows(dtype: torch.dtype, dist: str) -> Row:
        rows = weights(few // 512 * 512 or few, dtype).reshape(-1, min(few, 512))
        numbers = torch.arange(len(rows), device=DEVICE).flip(0)
        place = Place.single(dist)
        return bandwidth_row(lambda: backend.perturb_rows_(rows, numbers, 1, SCALE, place), 2 * rows.nbytes)

    def replay(dtype: torch.dtype, dist: str, rounding: bool) -> Row:
        x = weights(few, dtype)
        arguments = ([x], seeds, coefficients, Place.single(dist), seeds if rounding else None)
        return draws_row(partial(backend.replay_, *arguments), few * RECORDS)

    def project(dtype: torch.dtype, dist: str) -> Row:
        x = weights(few, dtype)
        return draws_row(lambda: backend.project([x], seeds, Place.single(dist)), few * RECORDS)

    def update(rule: hk.SGD | hk.AdamW, dtype: torch.dtype, dist: str, rounding: bool) -> Row:
        x = weights(few, dtype)
        moments = [[torch.zeros(few, device=DEVICE)] for _ in range(rule.moments)]
        draws = list(range(RECORDS * DIRECTIONS))
        steps = rule.steps(seeds, coefficients).tolist()
        record = (rule.name, rule.constants, draws, [SCALE] * len(draws), steps)
        arguments = ([x], moments, *record, Place.single(dist), seeds if rounding else None)
        return draws_row(partial(backend.update_, *arguments), few * len(draws))

    for dist in DISTRIBUTIONS:
        yield f"noise {dist}", partial(noise, dist)
    kinds = [*product(DTYPES, (False,)), (torch.bfloat16, True)]
    for dist, (dtype, rounding) in product(DISTRIBUTIONS, kinds):
        how = (dtype, dist, rounding)
        name = f"{dtype_name(dtype)} {dist}{' stochastic' if rounding else ''}"
        yield f"perturb_ {name}", partial(perturb, *how)
        yield f"replay_ {RECORDS} {name}", partial(replay, *how)
        if not rounding:
            yield f"perturb_rows_ {name}", partial(perturb_rows, dtype, dist)
            yield f"project {RECORDS} {name}", partial(project, dtype, dist)
        for rule in (hk.SGD(), hk.AdamW()):
            label = f"update_ {RECORDS} x {DIRECTIONS} {rule.name} {name}"
            yield label, partial(update, rule, *how)


def list_rows(width: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield (name, work) for lists of tensors of LoRA's size, 8 x width, by the public functions with their checks."""
    seeds, coefficients = torch.arange(DIRECTIONS), torch.full((DIRECTIONS,), SCALE)
    calls: dict[str, Callable[[list[Tensor]], object]] = {
        "perturb_": lambda tensors: hk.perturb_(tensors, 1, SCALE),
        f"replay_ {DIRECTIONS}": lambda tensors: hk.replay_(tensors, seeds, coefficients),
        "torch._foreach_add_": lambda tensors: torch._foreach_add_(tensors, SCALE),
    }

    def both(call: Callable[[list[Tensor]], object], many: int) -> Row:
        tensors = [torch.zeros(8, width, device=DEVICE) for _ in range(many)]
        return {"host_us": host_microseconds(lambda: call(tensors)), "ms": milliseconds(lambda: call(tensors))}

    for many, (name, call) in product(TENSORS, calls.items()):
        yield f"{many} x {name}", partial(both, call, many)


def model_rows(max_elements: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield (name, work) for bfloat16 lists with models' shapes, of at most so many elements: ours and the peers'."""

    def move(shapes: Shapes, call: Callable[[list[Tensor]], object]) -> Row:
        tensors = [torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for shape in shapes]
        row = bandwidth_row(lambda: call(tensors), 2 * sum(x.nbytes for x in tensors))
        return {**row, "host_us": host_microseconds(lambda: call(tensors))}

    for model, make in LISTS.items():
        if sum(map(math.prod, shapes := make())) <= max_elements:
            for name, call in contenders.LIST_CONTENDERS.items():
                if "project" not in name:  # it writes no tensor
                    yield f"{model}: {name}", partial(move, shapes, call)


def transformer_layers(width: int, layers: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Make transformer encoder layers in eval mode, and inputs [BATCH, TOKENS, width] for them."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"batch_first": True, "device": DEVICE, "dtype": dtype}
    heads = max(1, width // 64)
    model = nn.Sequential(
        *(nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, **kind) for _ in range(layers))
    ).eval()
    return model, torch.randn(BATCH, TOKENS, width, device=DEVICE, dtype=dtype)


def compare_with_passes(call: Callable[[], object], forward: Callable[[], object], passes: int, weights: int) -> Row:
    """Time a call, and the `passes` forward passes in it alone, and return a row with the ratio."""
    with torch.no_grad():
        alone, alone_bytes = wall_milliseconds(forward), extra_bytes(forward)
    ms = wall_milliseconds(call)
    times = {"ms": ms, "forward_ms": alone, "of_forward_passes": ms / alone / passes}
    return {**times, "extra_bytes": extra_bytes(call), "forward_extra_bytes": alone_bytes, "weights": weights}


def step(dist: str, width: int, layers: int) -> Row:
    """Time a step of ZOSGD, and the two forward passes in it."""
    model, inputs = transformer_layers(width, layers, torch.bfloat16)
    optimizer = ZOSGD(model.parameters(), 1e-6, dist=dist)
    count = sum(p.numel() for p in model.parameters())

    def loss() -> Tensor:
        return model(inputs).float().square().mean()

    return compare_with_passes(lambda: optimizer.step(loss), loss, 2, count)


def as_cuda_graph(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call in a CUDA graph, and return the function that replays it; without a GPU return the call."""
    if not CUDA:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.no_grad()
def captured_step(rule: hk.AdamW | None, dist: str, width: int, layers: int) -> Row:
    """Time a step in a CUDA graph, the two forward passes in it, and the same step call by call.

    Seed and step sizes lie on the device. rule: of the update; None: a move along the direction. First checks that
    graph and calls leave the same bits for seeds, rates and bias corrections with which the graph was not captured. For
    that the losses are exact, since a matrix product may be another kernel in a graph.
    """
    model, inputs = transformer_layers(width, layers, torch.bfloat16)
    moved = list(model.parameters())
    seed, mu = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.full((1,), SCALE, device=DEVICE)
    moments = [[torch.zeros_like(w, dtype=torch.float32) for w in moved] for _ in range(rule.moments if rule else 0)]
    numbers = torch.tensor([[SCALE, 1.0, 1.0]], device=DEVICE)  # of a rule's step

    def loss() -> Tensor:
        return model(inputs).float().square().mean().reshape(1)

    def exact() -> Tensor:
        """Sums of integers, the same in any order."""
        return sum((w.view(-1)[:100].double() * 2**20).round().abs().sum() for w in moved).float().reshape(1) * 2**-20

    def step(loss: Callable[[], Tensor]) -> None:
        hk.replay_(moved, seed, mu, dist=dist)
        above = loss()
        hk.replay_(moved, seed, -2 * mu, dist=dist)
        below = loss()
        hk.replay_(moved, seed, mu, dist=dist)
        if rule:
            hk.update_(moved, moments, rule, seed[None], (above - below)[None], numbers, dist=dist)
        else:
            hk.replay_(moved, seed, (below - above) * 1e-3, dist=dist)

    changed = [*moved, *chain.from_iterable(moments)]
    first = [x.clone() for x in changed]

    def after(call: Callable[[], object]) -> list[Tensor]:
        for x, old in zip(changed, first, strict=True):
            x.copy_(old)
        for t, number in enumerate((11, 2**62 + 3)):
            seed.fill_(number)
            if rule:
                numbers.copy_(torch.from_numpy(rule.steps([t], [SCALE / (1 + t)])))
            call()
        return [x.clone() for x in changed]

    call = partial(step, exact)
    if not all(map(torch.equal, after(call), after(as_cuda_graph(call)))):
        raise RuntimeError("a step that a CUDA graph replays leaves other bits than the same step call by call")
    call = partial(step, loss)
    row = compare_with_passes(as_cuda_graph(call), loss, 2, sum(w.numel() for w in moved))
    return {**row, "call_by_call_ms": wall_milliseconds(call)}


def probes(in_place: bool, width: int, layers: int) -> Row:
    """Time a client's round, the cut and DIRECTIONS one-sided probes, and as many forward passes."""
    half, inputs = transformer_layers(width, layers, torch.float32)
    parameters = trainable(half)[0]
    seeds, multiplier = list(range(DIRECTIONS)), torch.ones_like(inputs)
    with evaluating(half):
        mu = 2**10 * hk.snap_(parameters)

        def answer() -> Tensor:
            cut = half(inputs)
            if in_place:
                return probe_in_place(lambda: half(inputs), PerturbedTensors.of(half), multiplier, cut, seeds, mu)
            return probe_untouched(half, inputs, multiplier, cut, seeds, mu, "rademacher")

        count = sum(p.numel() for p in parameters)
        return compare_with_passes(answer, lambda: half(inputs), 1 + DIRECTIONS, count)


def all_rows(n: int, width: int, layers: int) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    """Yield (group, name, work) of every row. width, layers: of an optimizer's model; a client has an eighth of it."""
    for name, work in roof_rows(n):
        yield "roof", name, work
    for name, work in peer_rows(n):
        yield "peers", name, work
    for backend in backends():
        for name, work in op_rows(BACKENDS[backend], n):
            yield backend, name, work
    for name, work in list_rows(2 * width):
        yield "list", name, work
    for name, work in model_rows(4 * n):
        yield "model", name, work
    for dist in DISTRIBUTIONS:
        yield "step", f"ZOSGD bfloat16 {dist}", partial(step, dist, width, layers)
        yield "graph", f"a captured step bfloat16 {dist}", partial(captured_step, None, dist, width, layers)
        adamw = partial(captured_step, hk.AdamW(), dist, width, layers)
        yield "graph", f"a captured step of AdamW bfloat16 {dist}", adamw
    for in_place in (True, False):
        name = f"{DIRECTIONS} probes float32 {'in place' if in_place else 'of weights only read'}"
        yield "client", name, partial(probes, in_place, width, max(1, layers // 8))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--elements", type=int, metavar="N", help="of the large tensor; default: 2^29, 2^27 for --sweep"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default with a GPU: benchmarks/results/gpu.json")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the elements, and a small model")
    parser.add_argument("--sweep", action="store_true", help="time shapes of tiles, and make a table of the fastest")
    parser.add_argument("--seconds", type=float, default=480, metavar="N", help="for all of the sweep; default: 480")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if options.sweep and BACKENDS["triton"].describe() is None:
        missing = "Triton" if CUDA else "GPU"
        print(f"no {missing} here: TRITON_INTERPRET=1, --elements 5000 and --out try the sweep out", file=sys.stderr)
        return 1
    if not CUDA and options.out is None:
        parser.error("no GPU here: name a file with --out to try this out on the CPU")
    out = options.out or ROOT / "benchmarks" / "results" / ("gpu-sweep.json" if options.sweep else "gpu.json")
    large = (2**27 if options.sweep else 2**29) if CUDA else 2**22
    n = options.elements or large // (16 if options.quick else 1)
    width, layers = (2048, 16) if CUDA and not options.quick else (64, 2)

    print("the self-check of every backend", flush=True)
    if (wrong := check()) is not None:
        print(f"{wrong}\nthe bits are not right here: nothing was measured", file=sys.stderr)
        return 1
    print("all bits are right")
    if not CUDA:
        timed = "Triton's interpreter is" if options.sweep else "the C++ kernels are"
        print(f"no GPU here: {timed} timed by a clock, which says nothing about a GPU")
    facts = {"machine": machine(), "driver": driver(), "cuda": torch.version.cuda, "device": DEVICE, "elements": n}
    if options.sweep:
        from benchmarks import sweep  # needs triton, and this module by its name

        return 1 if sweep.main(out, facts, n, begin + options.seconds) else 0
    facts["lists_and_steps_on"] = DISPATCH[DEVICE.upper()].__name__
    rows = Rows(out, facts)
    for row in all_rows(n, width, layers):
        rows.add(*row)
    failed = rows.finish()
    print(f"{failed} of {len(rows.result['rows'])} rows failed; {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The Triton kernels against spec.py, bit for bit: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from hosfl_kernels import SGD, AdamW, gpu, reference, spec
from hosfl_kernels.gpu.rounding import from_float32
from hosfl_kernels.gpu.update import quotient, quotient64
from hosfl_kernels.place import Place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DISTS = ("rademacher", "gaussian")
SEED, ROUNDING_SEED = 2**64 - 5, 2**63 + 1  # both need all 64 bits
STREAM = 2**32 - 1


def cells(x: torch.Tensor) -> np.ndarray:
    """A tensor as spec.py stores it; a copy."""
    x = x.detach().cpu().clone()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def equal(x: torch.Tensor, expected: np.ndarray) -> bool:
    found = cells(x)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def weights(n: int, dtype: torch.dtype = torch.float32, size: float = 0.02) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(n)) * size).to(dtype).to(DEVICE)


def perturb_(
    x: torch.Tensor, scale: float = 1e-3, dist: str = "rademacher", start: int = 0, **options: int | None
) -> None:
    seed, rounding_seed = options.get("seed", SEED), options.get("rounding_seed")
    gpu.perturb_([x], seed, scale, Place.single(dist, stream=STREAM, start=start), rounding_seed)


def test_it_says_what_it_runs_on() -> None:
    assert gpu.describe() == "interpreter" if DEVICE == "cpu" else gpu.describe().startswith("cuda sm_")


# Whole tiles, their edges, one element, a start inside a tile, beyond 2^32, and the very last elements there are.
SPANS = [(1, 0), (16384, 0), (16385, 1), (3000, 131072 - 1500), (9000, 2**40 + 1023), (50, 2**63 - 50), (0, 7)]


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize(("n", "start"), SPANS)
def test_noise(n: int, start: int, dist: str) -> None:
    out = torch.full((n,), torch.nan, device=DEVICE)
    gpu.noise_(out, SEED, Place.single(dist, stream=STREAM, start=start))
    assert equal(out, spec.noise(n, SEED, stream=STREAM, start=start, dist=dist))


# A tensor of every kind: several programs, masked tiles on both sides, a dtype between others, nothing at all.
KINDS = [
    (torch.float32, 20000, 16384 * 5, 1.0),
    (torch.bfloat16, 18000, 2**35 + 1000, 0.5),
    (torch.float16, 9001, 0, 2.0),
    (torch.float32, 0, 3, 1.0),
    (torch.bfloat16, 300, 131072 * 7 - 100, 0.25),
    (torch.float32, 1, 2**50 + 5, 4.0),
]


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_list_of_tensors(dist: str, stochastic: bool) -> None:
    tensors = [weights(n, dtype) for dtype, n, _, _ in KINDS]
    before = [cells(x) for x in tensors]
    starts, factors = [kind[2] for kind in KINDS], [kind[3] for kind in KINDS]
    streams = [STREAM - i for i in range(len(KINDS))]
    rounding_seed = ROUNDING_SEED if stochastic else None
    gpu.perturb_(tensors, SEED, 0.1, Place(dist, factors, streams, starts), rounding_seed)
    for x, old, factor, stream, start in zip(tensors, before, factors, streams, starts, strict=True):
        rounding = rounding_seed if x.dtype == torch.bfloat16 else None
        options = {"dist": dist, "factor": factor, "stream": stream, "start": start, "rounding_seed": rounding}
        assert equal(x, spec.perturb(old, SEED, 0.1, **options))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_replay_is_one_perturb_after_another(dist: str, stochastic: bool) -> None:
    seeds, coefficients = [1, SEED, 3], [1e-3, -2e-2, 5e-4]
    rounding_seeds = [4, ROUNDING_SEED, 2**64 - 1] if stochastic else None
    sizes, starts, factors = [3000, 2500, 8300], [2**33, 65536 - 1000, 5], [1.0, 0.5, 2.0]
    tensors = [weights(n, t) for n, t in zip(sizes, (torch.float32, torch.float16, torch.bfloat16), strict=True)]
    before = [cells(x) for x in tensors]
    gpu.replay_(tensors, seeds, coefficients, Place(dist, factors, [0, 1, 2], starts), rounding_seeds)
    for stream, (x, old) in enumerate(zip(tensors, before, strict=True)):
        options = {"dist": dist, "factor": factors[stream], "stream": stream, "start": starts[stream]}
        rounding = rounding_seeds if x.dtype == torch.bfloat16 else None
        assert equal(x, spec.replay(old, seeds, coefficients, rounding_seeds=rounding, **options))


def there(values: list[int] | list[float]) -> torch.Tensor:
    """Seeds or coefficients as they lie on the device."""
    if isinstance(values[0], float):
        return torch.tensor(values, dtype=torch.float32, device=DEVICE)
    return torch.from_numpy(np.array(values, np.uint64).view(np.int64)).to(DEVICE)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize(("records", "stochastic"), [(1, False), (1, True), (3, True)])
def test_records_on_the_device(records: int, dist: str, stochastic: bool) -> None:
    """The bits are those of records on the host, of which a single one has the kernel of perturb_ too."""
    seeds, coefficients = [SEED, 1, 3][:records], [1e-3, -2e-2, 5e-4][:records]
    rounding_seeds = [ROUNDING_SEED, 4, 2**64 - 1][:records] if stochastic else None
    sizes, starts, factors = [3000, 2500, 17000], [2**33, 65536 - 1000, 5], [1.0, 0.5, 2.0]
    tensors = [weights(n, t) for n, t in zip(sizes, (torch.float32, torch.float16, torch.bfloat16), strict=True)]
    before, again = [cells(x) for x in tensors], [x.clone() for x in tensors]
    place = Place(dist, factors, [0, 1, 2], starts)
    rounding = None if rounding_seeds is None else there(rounding_seeds)
    gpu.replay_(tensors, there(seeds), there(coefficients), place, rounding)
    gpu.replay_(again, seeds, coefficients, place, rounding_seeds)
    for stream, (x, old) in enumerate(zip(tensors, before, strict=True)):
        options = {"dist": dist, "factor": factors[stream], "stream": stream, "start": starts[stream]}
        own = rounding_seeds if x.dtype == torch.bfloat16 else None
        assert equal(x, spec.replay(old, seeds, coefficients, rounding_seeds=own, **options))
        assert torch.equal(x, again[stream])


def tables(seeds: Any, coefficients: Any, steps: Any) -> tuple[torch.Tensor, ...]:
    """The rounds of `update_` as they lie on the device: not in C order, which nobody promised."""
    return tuple(
        torch.stack([there(list(row)) for row in zip(*table, strict=True)]).t()
        for table in (seeds, coefficients, steps)
    )


def moved(x: torch.Tensor, kept: list[np.ndarray], rule: str, **options: object) -> tuple[np.ndarray, list[np.ndarray]]:
    """A tensor and its moments after the rounds of `update_`, by spec.py."""
    return spec.update(cells(x), kept, rule, CONSTANTS[rule], SEEDS, COEFFICIENTS, STEPS, **options)


CONSTANTS = {"sgd": [], "momentum": [0.875], "adamw": [0.875, 0.125, 0.96875, 0.03125, 1e-8]}
SEEDS, COEFFICIENTS = [[1, SEED, 3], [4, 5, 2**63]], [[1e-3, -2e-2, 5e-4], [1e-25, 0.3, -0.3]]
STEPS = [(0.0625, 0.99, 1.5), (0.125, 0.98, 1.25)]


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("rule", CONSTANTS)
def test_update(rule: str, stochastic: bool, dist: str) -> None:
    """A tensor of every dtype, weights on whole rows, across a block's end and beyond 2^32; subnormal moments."""
    rounding_seeds = [ROUNDING_SEED, 2**64 - 1] if stochastic else None
    tensors = [weights(n, t) for n, t in ((150, torch.float32), (60, torch.float16), (200, torch.bfloat16))]
    starts, factors = [2**33, 65536 - 10, 131072 - 100], [1.0, 0.5, 2.0]
    moments = [[weights(x.numel()).abs() for x in tensors] for _ in CONSTANTS[rule][:3:2]]
    for kept in moments:
        kept[0][:3] = torch.tensor([0.0, 1e-42, 1e-45])
    places = [
        {"stream": t, "start": starts[t], "factor": factors[t], "dist": dist, "rounding_seeds": rounding_seeds}
        for t in range(3)
    ]
    places[0]["rounding_seeds"] = places[1]["rounding_seeds"] = None
    want = [moved(x, [cells(k[t]) for k in moments], rule, **places[t]) for t, x in enumerate(tensors)]
    place = Place(dist, factors, [0, 1, 2], starts)
    host = ([*SEEDS[0], *SEEDS[1]], [*COEFFICIENTS[0], *COEFFICIENTS[1]], STEPS, place, rounding_seeds)
    device = (*tables(SEEDS, COEFFICIENTS, STEPS), place, rounding_seeds and there(rounding_seeds))
    again = [x.clone() for x in tensors], [[x.clone() for x in kept] for kept in moments]
    for (xs, kept), record in (((tensors, moments), host), (again, device)):
        gpu.update_(xs, kept, rule, CONSTANTS[rule], *record)
        for t, (x, wanted) in enumerate(want):
            assert equal(xs[t], x)
            assert all(equal(mine[t], k) for mine, k in zip(kept, wanted, strict=True))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("room", [1 << 23, 20])
def test_project(room: int, dist: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the sums of the tiles have room for some seeds only."""
    monkeypatch.setattr(gpu.module("projection"), "SUMS", room)
    seeds = [1, SEED, 3]
    tensors = [weights(n, dtype, 1.0) for dtype, n, _, _ in KINDS]
    storage = weights(3000, size=1.0)
    tensors.append(storage[3:-5])  # cells on both sides that are not its own
    starts, factors = [*(kind[2] for kind in KINDS), 77], [*(kind[3] for kind in KINDS), 1.0]
    place = Place(dist, factors, [STREAM - i for i in range(len(tensors))], starts)
    terms = sum(f * float(x.double().abs().sum()) for f, x in zip(factors, tensors, strict=True))
    want = reference.project([x.cpu() for x in tensors], seeds, place)
    assert abs(gpu.project(tensors, seeds, place).numpy() - want).max() < 1e-7 * terms


@pytest.mark.parametrize("dist", DISTS)
def test_cut_is_whole(dist: str) -> None:
    whole = weights(9000, torch.bfloat16)
    cut = whole.clone()
    perturb_(whole, dist=dist, start=2**34, rounding_seed=ROUNDING_SEED)
    for first, last in ((0, 1), (1, 4097), (4097, 9000)):
        perturb_(cut[first:last], dist=dist, start=2**34 + first, rounding_seed=ROUNDING_SEED)
    assert equal(cut, cells(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_that_are_not_aligned_to_16_bytes(dtype: torch.dtype) -> None:
    storage = weights(16384 + 8, dtype)
    old = cells(storage)
    perturb_(storage[3:-5])
    expected = spec.perturb(old[3:-5], SEED, 1e-3, stream=STREAM)
    assert equal(storage, np.concatenate([old[:3], expected, old[-5:]]))


def test_data_that_is_rebound_is_found_again() -> None:
    parameter = torch.nn.Parameter(weights(100))
    old = weights(100) + 1
    perturb_(parameter.data)
    parameter.data = old.clone()
    perturb_(parameter.data)
    assert equal(parameter.data, spec.perturb(cells(old), SEED, 1e-3, stream=STREAM))


@pytest.mark.parametrize("rounding_seed", [None, ROUNDING_SEED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_at_the_edges(dtype: torch.dtype, rounding_seed: int | None) -> None:
    largest = torch.finfo(dtype).max
    subnormal = torch.finfo(dtype).smallest_normal / 4
    values = [torch.inf, -torch.inf, largest, -largest, 0.0, -0.0, subnormal, -subnormal]
    for scale in (1e-40, 1e-7, largest / 512):
        x = torch.tensor(values * 16, dtype=torch.float64).to(dtype).to(DEVICE)
        old = cells(x)
        perturb_(x, scale, rounding_seed=rounding_seed)
        rounding = rounding_seed if dtype == torch.bfloat16 else None
        with np.errstate(over="ignore"):
            assert equal(x, spec.perturb(old, SEED, scale, stream=STREAM, rounding_seed=rounding))


@triton.jit
def divide(source, other, target, n, WIDTH: tl.constexpr):
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    a, b = tl.load(source + lane), tl.load(other + lane)
    tl.store(target + lane, quotient(a, b))
    tl.store(target + n + lane, quotient64(a, b))


def test_both_quotients_are_rounded_to_nearest() -> None:
    """Of any bits; with subnormal results; and with results at, just above and just below a tie of two of those."""
    random = np.random.default_rng(0)
    n = 1 << 14
    a, b = random.integers(0, 2**32, (2, n), dtype=np.uint32).view(np.float32)
    small = random.random(n) * 2.0 ** random.integers(-149, -100, n)
    large = random.random(n) * 2.0 ** random.integers(0, 40, n)
    ties = (random.integers(0, 2**10, n) * 2 + 1) * 2.0**-150 * 2.0**20
    near = [np.nextafter(ties.astype(np.float32), np.float32(to)) for to in (0, 1)]
    a = torch.from_numpy(np.concatenate([a, *(x.astype(np.float32) for x in (small, ties, *near))])).to(DEVICE)
    b = torch.from_numpy(np.concatenate([b, large.astype(np.float32), np.full(3 * n, 2.0**20, np.float32)])).to(DEVICE)
    found = torch.zeros(2, len(a), device=DEVICE)
    with np.errstate(all="ignore"):
        divide[(len(a) // 1024,)](a, b, found, len(a), WIDTH=1024)
        want = a.cpu().numpy() / b.cpu().numpy()
    subnormal = (np.abs(want) < 2.0**-126) & (want != 0)
    assert subnormal[n:].mean() > 0.5
    is_nan = np.isnan(want)
    for one in found.cpu().numpy():
        assert np.array_equal(np.isnan(one), is_nan)
        assert one[~is_nan].tobytes() == want[~is_nan].tobytes()


@triton.jit
def round_bits(source, target, seed, stream, WIDTH: tl.constexpr, STOCHASTIC: tl.constexpr):
    lane = tl.arange(0, WIDTH)[None, None, :]
    zero = lane * 0
    y = tl.load(source + lane).to(tl.float32, bitcast=True)
    row = tl.program_id(0).to(tl.uint64)
    cells = from_float32(
        y, tl.uint16, seed.to(tl.uint64), stream.to(tl.uint32), row, zero, zero, lane.to(tl.uint32), STOCHASTIC
    )
    tl.store(target + lane, cells.to(tl.int16, bitcast=True))


@pytest.mark.parametrize("stochastic", [False, True])
def test_bfloat16_rounding_of_any_bits(stochastic: bool) -> None:
    """Among them NaN with the whole fraction set, as GPUs make them: rounding those up would end at -0."""
    bits = np.random.default_rng(0).integers(0, 2**32, 1024, dtype=np.uint32)
    special = [
        0x7FFFFFFF,
        0xFFFFFFFF,
        0x7F800000,
        0xFF800000,
        0x7F7FFFFF,
        0x7F7F7FFF,
        0x7F7F8000,
        0x3F808000,
        0x3F818000,
    ]
    bits[: len(special)] = special
    source = torch.from_numpy(bits.view(np.int32)).to(DEVICE)
    target = torch.zeros(1024, dtype=torch.int16, device=DEVICE)
    round_bits[(1,)](source, target, ROUNDING_SEED, STREAM, WIDTH=1024, STOCHASTIC=stochastic)
    random = spec.rounding_bits(1024, ROUNDING_SEED, STREAM) if stochastic else None
    assert equal(target.view(torch.bfloat16), spec.from_float32(bits.view(np.float32), np.dtype(np.uint16), random))


NOWHERE = Place("rademacher", [], [], [])


def test_nothing_to_do() -> None:
    gpu.perturb_([], SEED, 1.0, NOWHERE, None)
    gpu.replay_([], [1], [1.0], NOWHERE, None)
    x = weights(10)
    old = cells(x)
    gpu.replay_([x], [], [], Place.single(), None)
    gpu.replay_([x[:0]], [1], [1.0], Place.single(), None)
    assert gpu.project([], [1], NOWHERE).tolist() == [0.0]
    assert gpu.project([x], [], Place.single()).tolist() == []
    assert gpu.project([x[:0]], [1], Place.single()).tolist() == [0.0]
    gpu.update_([], [], "sgd", [], [1], [1.0], [(1.0, 1.0, 1.0)], NOWHERE, None)
    gpu.update_([x[:0]], [], "sgd", [], [1], [1.0], [(1.0, 1.0, 1.0)], Place.single(), None)
    records = [torch.zeros(1, *kind, device=DEVICE) for kind in ((0,), (3,))]
    gpu.update_([x], [], "sgd", [], records[0].long()[:0], records[0][:0], records[1][:0], Place.single(), None)
    assert equal(x, old)
    records[1][0, 1] = 0.5
    gpu.update_([x], [], "sgd", [], records[0].long(), records[0], records[1], Place.single(), None)
    assert equal(x, old * np.float32(0.5))  # a round without directions


def test_a_tensor_out_of_reach_is_refused() -> None:
    with pytest.raises(RuntimeError, match="CPU tensors, not meta" if DEVICE == "cpu" else "CUDA tensors"):
        gpu.noise_(torch.empty(8, device="meta"), 0, Place.single())


def test_a_repeated_call_copies_nothing() -> None:
    launch = importlib.import_module("hosfl_kernels.gpu.launch")
    x = weights(10)
    perturb_(x)
    before = launch.cached_launches.cache_info()
    perturb_(x, seed=1)
    after = launch.cached_launches.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_hundreds_of_lists_are_remembered_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose parameters are moved one by one; and lists that lie elsewhere in every call fill no memory."""
    launch = importlib.import_module("hosfl_kernels.gpu.launch")
    kernel = importlib.import_module("hosfl_kernels.gpu.perturb").BY_VALUE
    lists = [[weights(10)] for _ in range(300)]

    def misses() -> int:
        before = launch.cached_launches.cache_info().misses
        for tensors in lists:
            launch.plan(kernel, tensors, Place.single())
        return launch.cached_launches.cache_info().misses - before

    launch.cached_launches.cache_clear()
    assert (misses(), misses()) == (300, 0)
    launch.cached_launches.cache_clear()
    tables = launch.plan(kernel, lists[0], Place.single())[0]
    monkeypatch.setattr(launch, "table_budget", lambda device: 10 * (tables.rows.nbytes + tables.row_of_program.nbytes))
    misses()
    assert launch.cached_launches.cache_info().currsize == 10


def test_nothing_is_changed_before_all_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("hosfl_kernels.gpu.launch")
    compiled = []

    def compile(variant: object, *arguments: object) -> None:
        compiled.append(variant.constants["CELL"])
        if len(compiled) == 2:
            raise RuntimeError("out of registers")

    monkeypatch.setattr(launch.Variant, "compile", compile)
    monkeypatch.setattr(launch, "_compiled", set())
    tensors = [weights(10), weights(10, torch.bfloat16)]
    before = [cells(x) for x in tensors]
    with pytest.raises(RuntimeError, match="registers"):
        gpu.perturb_(tensors, 1, 1.0, Place("rademacher", [1.0] * 2, [0, 1], [0, 0]), None)
    assert all(equal(x, old) for x, old in zip(tensors, before, strict=True))
    for _ in range(2):
        gpu.perturb_(tensors, 1, 1.0, Place("rademacher", [1.0] * 2, [0, 1], [0, 0]), None)
    assert len(compiled) == 3  # what was compiled is not compiled again


def test_what_a_graph_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the tables of a call before, and they live as long as the process; each once."""
    launch = importlib.import_module("hosfl_kernels.gpu.launch")
    monkeypatch.setattr(launch, "captured_launches", {})
    # Another test's tensor may have lain where x will: it would be cached, and yet in no new `live_launches`.
    monkeypatch.setattr(launch, "live_launches", type(launch.live_launches)())
    launch.cached_launches.cache_clear()
    x = weights(10)
    with monkeypatch.context() as capturing:
        capturing.setattr("hosfl_kernels.transfer.is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="make it once right before"):
            perturb_(x)
        with pytest.raises(RuntimeError, match="can't capture replay_ of records on the host"):
            gpu.replay_([x], [1], [1.0], Place.single(), None)
        with pytest.raises(RuntimeError, match="can't capture update_ of records on the host"):
            gpu.update_([x], [], "sgd", [], [1], [1.0], [(1.0, 1.0, 1.0)], Place.single(), None)
        with pytest.raises(RuntimeError, match="make it once right before"):
            gpu.update_([x], [], "sgd", [], *tables([[1]], [[1.0]], [(1.0, 1.0, 1.0)]), Place.single(), None)
    perturb_(x)
    gpu.replay_([x], there([1]), there([1.0]), Place.single(), None)
    with monkeypatch.context() as capturing:
        capturing.setattr("hosfl_kernels.transfer.is_capturing", lambda device: True)
        for _ in range(2):
            perturb_(x)
            gpu.replay_([x], there([2]), there([1.0]), Place.single(), None)
        launch.cached_launches.cache_clear()
        perturb_(x)
    assert len(launch.captured_launches) == 2
    assert len(launch.live_launches) == 2


def test_each_stream_has_tables_of_its_own() -> None:
    launch = importlib.import_module("hosfl_kernels.gpu.launch")
    kernel = importlib.import_module("hosfl_kernels.gpu.perturb").BY_VALUE
    x = weights(10)
    key = (kernel, Place("rademacher", (1.0,), (0,), (0,)), False, x.device)
    key += ((x.dtype,), (x.data_ptr(),), (x.numel(),), ())
    one, other = launch.cached_launches(1, *key), launch.cached_launches(2, *key)
    assert one[0].rows.data_ptr() != other[0].rows.data_ptr()
    assert one is launch.cached_launches(1, *key)


class Graph(TorchDispatchMode):
    """A stand-in for a CUDA graph, which the interpreter has none of: torch's ops and the launches, one after another.

    `replay` does the same again: numbers that the host gave are those of the capture, memory is read anew, and results
    come to lie where they lay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = self.launching = False
        self.calls: list[tuple[Any, Any]] = []

    def __enter__(self) -> Graph:
        self.open = True
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.open = False
        super().__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(op, *args, **(kwargs or {}))
        made = call()
        if not self.launching:  # the interpreter's own
            self.calls.append((call, made))
        return made

    def launch(self, call: Any) -> None:
        self.launching = True
        call()
        self.launching = False
        if self.open:
            self.calls.append((call, None))

    def replay(self) -> None:
        for call, made in self.calls:
            again = call()
            if isinstance(made, torch.Tensor) and made.data_ptr() != again.data_ptr():
                made.copy_(again)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty graph, and calls that believe in it."""
    if DEVICE == "cuda":
        return torch.cuda.CUDAGraph()
    launch = importlib.import_module("hosfl_kernels.gpu.launch")
    graph, original = Graph(), launch.Variant.launch
    monkeypatch.setattr("hosfl_kernels.transfer.is_capturing", lambda device: graph.open)
    monkeypatch.setattr(launch, "captured_launches", {})
    monkeypatch.setattr(launch.Variant, "launch", lambda *arguments: graph.launch(partial(original, *arguments)))
    return graph


@pytest.mark.parametrize(
    ("rule", "directions"),
    [
        pytest.param(SGD(weight_decay=0.125), 1, id="sgd"),
        pytest.param(SGD(0.875), 2, id="momentum"),
        pytest.param(AdamW(betas=(0.75, 0.875), weight_decay=0.5), 2, id="adamw"),
    ],
)
def test_a_captured_step_reads_seeds_rates_and_bias_corrections_anew(rule: Any, directions: int, graph: Any) -> None:
    """Two probes of each direction, then the update, whose numbers are those that the host would have made."""
    sizes, dtypes = (150, 200), (torch.float32, torch.bfloat16)
    place, mu, rates = Place("gaussian", [1.0, 0.5], [3, 9], [0, 2**33]), 2.0**-6, [0.5, 0.125, 1.0, 0.25]
    xs = [weights(n, dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    moments = [[torch.zeros(n, device=DEVICE) for n in sizes] for _ in range(rule.moments)]
    ys, others = [x.cpu().clone() for x in xs], [[torch.zeros(n) for n in sizes] for _ in moments]
    keys = np.random.default_rng(0).integers(0, 2**64, (len(rates), directions), np.uint64)
    seeds = torch.zeros(1, directions, dtype=torch.int64, device=DEVICE)
    size, steps = torch.zeros(directions, device=DEVICE), torch.zeros(1, 3, device=DEVICE)

    def loss(tensors: list[torch.Tensor]) -> torch.Tensor:
        # Exact, so that no order of a sum matters.
        return torch.stack([(x[:20].double() * 2**20).round().abs().sum() for x in tensors]).sum().float() * 2.0**-20

    def step() -> None:
        above_and_below = []
        for p in range(directions):
            for scale in (size, -2 * size, size):
                gpu.replay_(xs, seeds[0, p : p + 1], scale[p : p + 1], place, None)
                above_and_below.append(loss(xs))
        difference = torch.stack(above_and_below).view(1, directions, 3)
        coefficients = (difference[..., 0] - difference[..., 1]) / (2 * directions * size)
        record = (seeds, coefficients, steps, place, seeds[0, :1])
        gpu.update_(xs, moments, rule.name, rule.constants, *record)

    def on_the_host(t: int) -> None:
        differences = []
        for key in keys[t].tolist():
            reference.perturb_(ys, key, mu, place, None)
            differences.append(float(loss(ys)))
            reference.perturb_(ys, key, -2 * mu, place, None)
            differences[-1] = np.float32(differences[-1]) - np.float32(loss(ys))
            reference.perturb_(ys, key, mu, place, None)
        coefficients = [float(d / np.float32(2 * directions * mu)) for d in differences]
        own = rule.steps([t], rates[t : t + 1]).tolist()
        record = (keys[t].tolist(), coefficients, own, place, keys[t, :1].tolist())
        reference.update_(ys, others, rule.name, rule.constants, *record)

    for t in range(len(rates)):
        seeds.copy_(there(keys[t].tolist())[None])
        size.fill_(mu)
        steps.copy_(torch.from_numpy(rule.steps([t], rates[t : t + 1])))
        if t == 1:
            before = [x.clone() for x in (*xs, *(m for kept in moments for m in kept))]
            with graph if DEVICE == "cpu" else torch.cuda.graph(graph):
                step()
            for x, old in zip((*xs, *(m for kept in moments for m in kept)), before, strict=True):
                x.copy_(old)  # the stand-in has done what it captured
        step() if t == 0 else graph.replay()
        on_the_host(t)
        assert all(equal(x, cells(y)) for x, y in zip(xs, ys, strict=True))
        for kept, other in zip(moments, others, strict=True):
            assert all(equal(m, cells(n)) for m, n in zip(kept, other, strict=True))


if DEVICE == "cuda":  # the interpreter has no graphs

    def test_a_cuda_graph_reads_new_records() -> None:
        x = weights(5000)
        expected = cells(x)
        seed, scale = there([1]), there([1e-3])
        gpu.replay_([x], seed, scale, Place.single(), None)
        expected = spec.perturb(expected, 1, 1e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gpu.replay_([x], seed, scale, Place.single(), None)
        for number in (SEED, 7):
            seed.copy_(there([number]))
            scale.fill_(number % 5)
            graph.replay()
            expected = spec.perturb(expected, number, number % 5)
        assert equal(x, expected)

    def test_a_cuda_graph_replays_perturb() -> None:
        x = weights(5000)
        expected = cells(x)
        for _ in range(3):
            expected = spec.perturb(expected, SEED, 1e-3, stream=STREAM)
        perturb_(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            perturb_(x)
        graph.replay()
        graph.replay()
        assert equal(x, expected)

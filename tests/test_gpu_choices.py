"""Which shape of tile a launch takes, and that no bit depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.sweep import candidates
from hosfl_kernels import check, gpu, reference
from hosfl_kernels.gpu import choices, launch
from hosfl_kernels.gpu.choices import Shape
from hosfl_kernels.gpu.offline import variants
from hosfl_kernels.place import Place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = choices.kernels()


def shape_of(variant: launch.Variant) -> Shape:
    return Shape(variant.constants["BLOCKS"], variant.constants["WIDTH"], variant.num_warps)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[launch.Variant]:
    """What was launched since."""
    found: list[launch.Variant] = []
    original = launch.Variant.launch

    def recorded(variant: launch.Variant, programs: int, *arguments: object) -> None:
        found.append(variant)
        original(variant, programs, *arguments)

    monkeypatch.setattr(launch.Variant, "launch", recorded)
    return found


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Calls table(small={...}, large={...}): what choices.json names for this GPU, said to be an sm_90."""

    def put(**sizes: dict[str, Shape]) -> None:
        monkeypatch.setattr(choices, "_table", lambda: {(90, size): shapes for size, shapes in sizes.items()})

    monkeypatch.setattr(launch, "capability", lambda device: 90)
    launch.cached_launches.cache_clear()
    yield put
    launch.cached_launches.cache_clear()


# --- the choice ---------------------------------------------------------------------------------------------------

# blocks, columns and warps of every default, by op (and rule), distribution and bytes of an element.
DEFAULTS = {
    ("noise", "rademacher", 4): (2, 512, 4),
    ("noise", "gaussian", 4): (2, 512, 4),
    **{
        (op, dist, size): (2, 512, size)
        for op in ("perturb", "perturb-on-device")
        for dist in ("rademacher", "gaussian")
        for size in (2, 4)
    },
    **{(op, "rademacher", size): (8, 128, 4) for op in ("replay", "project") for size in (2, 4)},
    **{(op, "gaussian", size): (4, 128, 4) for op in ("replay", "project") for size in (2, 4)},
    **{
        (f"update-{rule}", dist, size): (4, 128, 4)
        for rule in ("sgd", "momentum", "adamw")
        for dist in ("rademacher", "gaussian")
        for size in (2, 4)
    },
    **{("update-adamw", "rademacher", size): (2, 128, 4) for size in (2, 4)},
}


def test_the_defaults() -> None:
    """Those that the budgets of test_gpu_compile.py are of."""
    for kernel, kind in KERNELS.values():
        assert kernel.default(kind) == DEFAULTS[kernel.name, kind.dist, kind.dtype.itemsize]
        assert kernel.impossible_reason(kind, kernel.default(kind)) is None


def test_the_total_size_of_a_dtype_decides(table: Any, launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "SMALL", 100)
    small, large = Shape(1, 256, 2), Shape(4, 512, 4)
    table(
        small={"perturb-gaussian-float32": small, "perturb-gaussian-bfloat16": Shape(1, 512, 2)},
        large={"perturb-gaussian-float32": large},
    )
    tensors = [torch.zeros(50, device=DEVICE) for _ in range(3)]
    narrow = torch.zeros(100, dtype=torch.bfloat16, device=DEVICE)

    def perturb(tensors: list[torch.Tensor], dist: str = "gaussian") -> list[Shape]:
        launched.clear()
        count = len(tensors)
        gpu.perturb_(tensors, 1, 1.0, Place(dist, [1.0] * count, [0] * count, [0] * count), None)
        return [shape_of(variant) for variant in launched]

    assert perturb(tensors[:2]) == [small]  # 100 elements
    assert perturb(tensors) == [large]
    assert perturb([narrow, *tensors]) == [large, Shape(1, 512, 2)]
    assert perturb(tensors, "rademacher") == [Shape(2, 512, 4)]
    assert perturb([torch.cat([narrow, narrow])]) == [Shape(2, 512, 2)]


def test_every_op_takes_the_shape_that_is_named_for_it(table: Any, launched: Any) -> None:
    """Every kernel has a shape of its own here; which of bfloat16 is taken depends on the rounding too."""
    ops = sorted({kernel.name for kernel, _ in KERNELS.values()})
    names = [f"{op}-rademacher-{'float32' if op == 'noise' else 'bfloat16'}" for op in ops]
    names += [f"{name}-stochastic" for name in names if "noise" not in name and "project" not in name]
    shapes = {}
    for i, name in enumerate(names):
        kernel, kind = KERNELS[name]
        shapes[name] = Shape(2 ** (i % 3), *((256, 2), (256, 1), (1024, 4), (1024, 2))[i % 4])
        if kernel.impossible_reason(kind, shapes[name]):
            shapes[name] = Shape(1, 256, 1)
        assert shapes[name] != kernel.default(kind)
    table(small=shapes)
    x, place = torch.zeros(10, dtype=torch.bfloat16, device=DEVICE), Place.single()
    gpu.noise_(x.float(), 1, place)
    for rounding in (None, 5):
        gpu.perturb_([x], 1, 1.0, place, rounding)
        gpu.replay_([x], [1], [1.0], place, rounding and [rounding])
        gpu.replay_([x], [1, 2], [1.0, 1.0], place, rounding and [rounding] * 2)
        for rule, constants in (("sgd", []), ("momentum", [0.5]), ("adamw", [0.5, 0.5, 0.5, 0.5, 1.0])):
            moments = [[x.float()] for _ in constants[:3:2]]
            gpu.update_([x], moments, rule, constants, [1], [1.0], [(1.0, 1.0, 1.0)], place, rounding and [rounding])
        if rounding is None:
            gpu.project([x], [1], place)
    by_name = {name: kernel.variant(kind, shapes[name]) for name, (kernel, kind) in KERNELS.items() if name in names}
    assert sorted(map(id, launched)) == sorted(map(id, by_name.values()))


def test_of_another_gpu_nothing_is_taken(table: Any, launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(small={"noise-rademacher-float32": Shape(1, 256, 2)})
    for capability in (80, None):
        monkeypatch.setattr(launch, "capability", lambda device, one=capability: one)
        gpu.noise_(torch.zeros(10, device=DEVICE), 1, Place.single())
        assert shape_of(launched[-1]) == (2, 512, 4)
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    gpu.noise_(torch.zeros(10, device=DEVICE), 1, Place.single())
    assert shape_of(launched[-1]) == (1, 256, 2)


def test_a_stand_in_for_the_table_ends_and_leaves_no_launch_behind(launched: Any) -> None:
    x, shape = torch.zeros(10, device=DEVICE), Shape(1, 256, 2)
    gpu.perturb_([x], 1, 1.0, Place.single(), None)
    with launch.override_shapes({"perturb-rademacher-float32": shape}):
        gpu.perturb_([x], 1, 1.0, Place.single(), None)
    gpu.perturb_([x], 1, 1.0, Place.single(), None)
    assert [shape_of(variant) for variant in launched] == [(2, 512, 4), shape, (2, 512, 4)]


def test_offline_has_what_the_table_names_for_a_capability(table: Any) -> None:
    shape = Shape(4, 128, 4)
    table(large={"replay-rademacher-float32": shape, "project-gaussian-float16": Shape(2, 128, 4)})
    found = variants(90)
    assert {*found} - {*variants()} == {"replay-rademacher-float32@large", "project-gaussian-float16@large"}
    assert shape_of(found["replay-rademacher-float32@large"]) == shape
    of_one_shape = {name for name in variants() if name.startswith("rows")}
    assert len(of_one_shape) == 6
    assert {*variants(80)} == {*variants()} == {*KERNELS} | of_one_shape


def test_the_self_check_runs_the_tiles_of_both_sizes(table: Any, launched: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(check, "CASES", [check.Case(n=50)])
    table()
    assert check.main(["--backend", "triton"]) == 0
    assert [shape_of(variant) for variant in launched] == [(2, 512, 4)]
    assert "tiles for all launches" in capsys.readouterr().out
    launched.clear()
    name = "perturb-rademacher-float32"
    table(small={name: Shape(1, 256, 2)}, large={name: Shape(4, 512, 4)})
    assert check.main(["--backend", "triton"]) == 0
    assert [shape_of(variant) for variant in launched] == [(1, 256, 2), (4, 512, 4)]
    said = capsys.readouterr().out
    assert said.index("tiles for small launches") < said.index("tiles for large launches")
    gpu.perturb_([torch.zeros(10, device=DEVICE)], 1, 1.0, Place.single(), None)
    assert shape_of(launched[-1]) == (1, 256, 2)


# --- the table ----------------------------------------------------------------------------------------------------

MEASURED = {"gpu": "NVIDIA H100", "torch": "2.13.0", "triton": "3.7.1"}
ENTRY = {"capability": 90, "kernel": "replay-rademacher-bfloat16-stochastic", "size": "large"}
ENTRY |= {"blocks": 4, "width": 64, "num_warps": 2, "measured": MEASURED}


def written(path: Path, *entries: object) -> Path:
    path.write_text(json.dumps({"choices": entries}))
    return path


def test_the_committed_table_can_be_read() -> None:
    choices.read(choices.PATH)


def test_a_table_is_read(tmp_path: Path) -> None:
    other = {**ENTRY, "capability": 80, "size": "small", "blocks": 16}
    path = written(tmp_path / "table.json", ENTRY, other)
    name = ENTRY["kernel"]
    assert choices.read(path) == {(90, "large"): {name: Shape(4, 64, 2)}, (80, "small"): {name: Shape(16, 64, 2)}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": "replay-rademacher-float8"}, "there is no kernel 'replay-rademacher-float8'"),
        ({"kernel": ["replay"]}, "unhashable"),
        ({"size": "huge"}, "the size is 'huge', and not one of small, large"),
        ({"capability": 0}, "0 is no compute capability"),
        ({"capability": "90"}, "'90' is no compute capability"),
        ({"measured": {"gpu": "NVIDIA H100"}}, "what measured it lacks torch, triton"),
        ({"blocks": 3}, "each number is a power of two"),
        ({"blocks": 0}, "each number is a power of two"),
        ({"width": 64.0}, "each number is a power of two"),
        ({"blocks": 32}, "256 rows"),
        ({"width": 2048}, "2048 columns"),
        ({"num_warps": 4}, "its threads want 1 columns each, 128 in all"),
        ({"kernel": "perturb-rademacher-bfloat16", "width": 256}, "its threads want 8 columns each, 512 in all"),
    ],
)
def test_a_wrong_entry_is_named(change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "table.json", {**ENTRY, "size": "small"}, {**ENTRY, **change})
    with pytest.raises(ValueError) as raised:
        choices.read(path)
    assert f"{path}: choices[1]: " in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize("missing", list(ENTRY))
def test_an_entry_that_lacks_something_is_named(missing: str, tmp_path: Path) -> None:
    path = written(tmp_path / "table.json", {k: v for k, v in ENTRY.items() if k != missing})
    with pytest.raises(ValueError, match=rf"choices\[0\]: '{missing}' is missing"):
        choices.read(path)


def test_two_entries_for_one_launch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choices\[1\]: there is another"):
        choices.read(written(tmp_path / "table.json", ENTRY, {**ENTRY, "blocks": 2}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": 3}'])
def test_a_file_that_is_no_table_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is no table of choices"):
        choices.read(path)


def test_a_broken_table_is_an_error_before_anything_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "PATH", written(tmp_path / "table.json", {**ENTRY, "size": "huge"}))
    choices._table.cache_clear()
    launch.cached_launches.cache_clear()
    x = torch.zeros(10, device=DEVICE)
    try:
        with pytest.raises(ValueError, match="huge"):
            gpu.perturb_([x], 1, 1.0, Place.single(), None)
    finally:
        choices._table.cache_clear()
    assert not x.any()


# --- the bits -----------------------------------------------------------------------------------------------------

# The smallest tile, the default, and the largest of the candidates of the sweep; and one that is high and narrow.
SHAPES = {
    name: sorted({min(all_), all_[0], max(all_), max(all_, key=lambda s: (s.blocks, -s.width))})
    for name, all_ in ((name, candidates(*kernel)) for name, kernel in KERNELS.items())
}
# Rows 30 to 34 of a block of signs, whose words are of 32 rows each; beyond 32 bits; odd, as the size is.
START, COUNT = 2**33 + 131_072 + 30 * 1024 + 5, 5_001
SEEDS, COEFFICIENTS, ROUNDING_SEEDS = [7, 2**64 - 5], [1e-3, -2e-2], [2**63 + 1, 9]
RULES = {"sgd": [], "momentum": [0.875], "adamw": [0.875, 0.125, 0.96875, 0.03125, 1e-8]}


def run(backend: Any, name: str, x: torch.Tensor, place: Place) -> list[torch.Tensor]:
    """What an op of a backend, whose kernel is `name`, leaves of x and of moments."""
    op, stochastic, moments = name.partition(f"-{place.dist}")[0], name.endswith("stochastic"), []
    if op == "noise":
        backend.noise_(x, SEEDS[0], place)
    elif op == "perturb":
        backend.perturb_([x], SEEDS[0], COEFFICIENTS[0], place, ROUNDING_SEEDS[0] if stochastic else None)
    elif op.startswith("update"):
        rule = op.partition("-")[2]
        moments = [torch.linspace(0, 1, x.numel(), device=x.device) for _ in RULES[rule][:3:2]]
        steps = [(0.0625, 0.99, 1.5)]
        rounding = ROUNDING_SEEDS[:1] if stochastic else None
        backend.update_([x], [[m] for m in moments], rule, RULES[rule], SEEDS, COEFFICIENTS, steps, place, rounding)
    else:
        count = 1 if op == "perturb-on-device" else 2
        rounding = ROUNDING_SEEDS[:count] if stochastic else None
        backend.replay_([x], SEEDS[:count], COEFFICIENTS[:count], place, rounding)
    return [x, *moments]


def is_slow(name: str, shape: Shape) -> bool:
    """Whether a test of a kernel in a shape is a slow one: others have its dtype, its rule or its noise."""
    other_signs = "rademacher" in name and shape != SHAPES[name][0]
    return other_signs or any(word in name for word in ("float16", "momentum", "on-device"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(
            name,
            shape,
            id=f"{name}-{'x'.join(map(str, shape))}",
            marks=[pytest.mark.slow] * is_slow(name, shape),
        )
        for name, shapes in SHAPES.items()
        for shape in shapes
        if not name.startswith("project")
    ],
)
def test_the_bits_do_not_depend_on_the_shape(name: str, shape: Shape, launched: Any) -> None:
    """Of wide kernels whole tiles too, which the sweep's tensors have aligned: 16-byte accesses are another branch."""
    kernel, kind = KERNELS[name]
    count = COUNT if not kernel.wide else 2 * shape.blocks * launch.inner(kind.dist) * 1024 + 1001
    skipped = START % 8 if kernel.wide else 0
    x = torch.linspace(-1, 1, count + skipped).to(kind.dtype)[skipped:]
    place = Place.single(kind.dist, factor=0.5 if kernel.name != "noise" else 1.0, stream=2**32 - 1, start=START)
    want = run(reference, name, x.clone(), place)
    on_gpu = torch.cat([torch.zeros(skipped, dtype=kind.dtype), x]).to(DEVICE)[skipped:]
    with launch.override_shapes({name: shape}):
        found = run(gpu, name, on_gpu, place)
    assert [shape_of(variant) for variant in launched] == [shape]
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * ("float16" in name))
        for name in SHAPES
        if name.startswith("project")
    ],
)
def test_projections_differ_by_the_order_of_a_sum(name: str, launched: Any) -> None:
    kind = KERNELS[name][1]
    x, place = torch.linspace(-1, 1, COUNT).to(kind.dtype), Place.single(kind.dist, start=START)
    want = reference.project([x], SEEDS, place)
    for shape in SHAPES[name]:
        with launch.override_shapes({name: shape}):
            found = gpu.project([x.to(DEVICE)], SEEDS, place).numpy()
        assert shape_of(launched[-1]) == shape
        assert np.abs(found - want).max() <= 1e-7 * float(x.double().abs().sum())

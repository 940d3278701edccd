"""`python -m benchmarks.gpu --sweep`, in Triton's interpreter: what is timed, chosen, refused and not swept."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, sweep
from hosfl_kernels.gpu import choices, launch
from hosfl_kernels.gpu.choices import Shape

KERNELS = choices.kernels()
FIRST = "perturb-rademacher-float32"
DEFAULT, OTHER, SLOW = Shape(2, 512, 4), Shape(1, 256, 2), Shape(4, 512, 4)
MACHINE = {"gpu": "NVIDIA H100", "torch": "2.13.0", "triton": "3.7.1"}
FACTS = {"machine": MACHINE, "driver": "570", "cuda": "12.8"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """As little work as there can be: each launch once, few records."""
    for name, value in {"SECONDS": 0, "LEAST": 1, "MOST": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    for name, value in {"RECORDS": 2, "ROUNDS": 1, "DIRECTIONS": 2}.items():
        monkeypatch.setattr(sweep, name, value)
    monkeypatch.setattr(gpu, "check", lambda: None)


def only(monkeypatch, *names):
    """Those kernels are all there are."""
    monkeypatch.setattr(sweep.choices, "kernels", lambda: {name: KERNELS[name] for name in names})


@pytest.fixture
def timed(monkeypatch):
    """Calls timed(times): milliseconds that launches of the first kernel are said to take, by shape, in this order."""

    def put(times):
        said = {shape: iter(several) for shape, several in times.items()}
        monkeypatch.setattr(sweep, "candidates", lambda kernel, kind: list(times))
        monkeypatch.setattr(sweep.Sweep, "time", lambda self, kernel, kind, shape, size: next(said[shape]))

    only(monkeypatch, FIRST)
    return put


def swept(tmp_path, seconds=600.0, elements=300):
    """Status, rows and table of a sweep."""
    out = tmp_path / "sweep.json"
    failed = sweep.main(out, dict(FACTS), elements, time.monotonic() + seconds)
    table = tmp_path / "sweep.choices.json"
    return failed, json.loads(out.read_text()), json.loads(table.read_text())["choices"] if table.exists() else None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    """A kernel of every op in two shapes. Its table is refused, since no GPU has measured it, and for that alone."""
    names = [name for name in KERNELS if name.endswith("rademacher-float32")]
    only(monkeypatch, *names)
    monkeypatch.setattr(sweep, "candidates", lambda *kernel: [kernel[0].default(kernel[1]), Shape(1, 256, 2)])
    monkeypatch.setattr(sweep, "FASTER", 1e9)
    out = tmp_path / "rows.json"
    assert gpu.main(["--sweep", "--elements", "300", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["complete"]
    assert found["not_swept"] == []
    rows = [row["name"].partition(" ")[0] for row in found["rows"] if row["group"] == "sweep"]
    assert sorted(rows) == sorted(2 * names)
    assert {name.partition("-rad")[0] for name in names} == {kernel.name for kernel, _ in KERNELS.values()}
    assert all(row["large_ms"] > 0 and row["small_ms"] > 0 for row in found["rows"] if row["group"] == "sweep")
    said = capsys.readouterr().out
    assert "no GPU here: Triton's interpreter is timed by a clock" in said
    assert "to commit" not in said
    path = tmp_path / "rows.choices.json"
    with pytest.raises(ValueError, match=r"choices\[0\]: 0 is no compute capability"):
        choices.read(path)
    table = json.loads(path.read_text())
    assert {entry["measured"]["triton"] for entry in table["choices"]} == {found["machine"]["triton"]}
    path.write_text(path.read_text().replace('"capability": 0', '"capability": 90'))
    monkeypatch.undo()
    assert {*choices.read(path)} == {(90, "large"), (90, "small")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--sweep"]
    done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU here: ")
    assert not done.stdout


# Large and small by turns; what comes third and fourth is the second timing.
@pytest.mark.parametrize(
    ("large", "again", "chosen"),
    [((10.0, 9.6), (10.0, 9.6), True), ((10.0, 9.8), (10.0, 5.0), False), ((10.0, 5.0), (10.0, 9.8), False)],
    ids=["twice", "only the second time", "only the first time"],
)
def test_what_is_faster_twice_is_chosen(large, again, chosen, tmp_path, timed):
    timed({DEFAULT: [large[0], 1.0, again[0]], SLOW: [20.0, 20.0], OTHER: [large[1], 1.0, again[1]]})
    failed, rows, table = swept(tmp_path)
    assert failed == 0
    assert len(rows["rows"]) == 3 + (large[1] < 9.7)
    key = {"capability": 0, "kernel": FIRST, "size": "large", **OTHER._asdict()}
    assert table == [{**key, "measured": {**MACHINE, "driver": "570", "cuda": "12.8"}}] * chosen


def test_other_entries_stay(tmp_path, timed, monkeypatch):
    """Those of other GPUs and of kernels that were not swept; what was swept is replaced, by nothing too."""
    entries = [
        {"capability": capability, "kernel": kernel, "size": "small", **OTHER._asdict(), "measured": MACHINE}
        for capability, kernel in ((80, FIRST), (90, "noise-gaussian-float32"), (90, FIRST))
    ]
    path = tmp_path / "committed.json"
    path.write_text(json.dumps({"choices": entries}))
    monkeypatch.setattr(choices, "PATH", path)
    monkeypatch.setattr(sweep, "capability", lambda device: 90)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    timed({DEFAULT: [1.0, 1.0], OTHER: [1.0, 1.0]})
    _, _, table = swept(tmp_path)
    assert table == entries[:2]
    timed({DEFAULT: [2.0, 2.0, 2.0, 2.0], OTHER: [1.0, 1.0, 1.0, 1.0]})
    _, _, table = swept(tmp_path)
    assert [(e["capability"], e["kernel"], e["size"]) for e in table] == [
        (80, FIRST, "small"),
        (90, "noise-gaussian-float32", "small"),
        (90, FIRST, "large"),
        (90, FIRST, "small"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * ("update-sgd" in name or "momentum" in name))
        for name in KERNELS
        if name.endswith("rademacher-float32")
    ],
)
def test_other_bits_are_a_failure_and_are_not_timed(name, tmp_path, monkeypatch):
    """One element that a shape leaves otherwise: of weights, a moment or a sum."""
    only(monkeypatch, name)
    kernel, kind = KERNELS[name]
    shapes = [kernel.default(kind), Shape(1, 256, 2), Shape(1, 128, 1)]
    shapes[2] = shapes[2] if kernel.impossible_reason(kind, shapes[2]) is None else Shape(1, 512, 4)
    monkeypatch.setattr(sweep, "candidates", lambda *kernel: shapes)
    original = sweep.Prepared.__call__

    def wrong(prepared):
        original(prepared)
        if prepared.variant.constants["WIDTH"] == 256:
            prepared.written[-1].view(-1)[-1] += 0.25

    monkeypatch.setattr(sweep.Prepared, "__call__", wrong)
    failed, rows, table = swept(tmp_path)
    assert failed == 1
    wrong_row = rows["rows"][1]
    assert wrong_row["failed"] == "AssertionError: the bits are not those of the default"
    assert "large_ms" not in wrong_row
    assert ["failed" in row for row in rows["rows"][:3]] == [False, True, False]
    assert not [entry for entry in table if entry["width"] == 256]


def test_the_bits_are_those_of_whole_and_of_cut_tiles(monkeypatch):
    """Where there are elements enough every candidate has both, the whole ones aligned to 16 bytes."""
    for name in ("perturb-rademacher-bfloat16", "replay-gaussian-float32"):
        kernel, kind = KERNELS[name]
        for shape in sweep.candidates(kernel, kind):
            prepared = sweep.prepare(kernel, kind, shape, sweep.ODD, sweep.START)
            span = shape.blocks * launch.inner(kind.dist) * 1024
            first = -sweep.START % span
            assert first
            assert first + span <= sweep.ODD
            assert (sweep.START + sweep.ODD) % span
            assert (prepared.weights.data_ptr() + first * kind.dtype.itemsize) % 16 == 0


def test_a_shape_that_spills_is_left_out(tmp_path, timed, monkeypatch):
    """More than the default does, which may need a few words with an old Triton."""
    words = {DEFAULT: 4, OTHER: 5, SLOW: 4}
    shape_of = lambda v: Shape(v.constants["BLOCKS"], v.constants["WIDTH"], v.num_warps)  # noqa: E731
    monkeypatch.setattr(launch.Variant, "spills", lambda variant, *arguments: words[shape_of(variant)])
    timed({DEFAULT: [10.0, 10.0, 10.0, 10.0], OTHER: [1.0, 1.0, 1.0, 1.0], SLOW: [9.0, 11.0, 9.0]})
    failed, rows, table = swept(tmp_path)
    assert failed == 0
    assert "5 words of a thread" in rows["rows"][1]["left_out"]
    assert [Shape(*(entry[field] for field in Shape._fields)) for entry in table] == [SLOW]


def test_a_default_that_fails_leaves_its_kernel_as_it_was(tmp_path, timed, monkeypatch):
    timed({DEFAULT: [], OTHER: [1.0, 1.0]})
    failed, rows, table = swept(tmp_path)
    assert failed == 1
    assert [row["name"] for row in rows["rows"]] == [f"{FIRST} blocks=2 width=512 num_warps=4"]
    assert rows["not_swept"] == [FIRST]


def test_what_there_was_no_time_for_is_named(tmp_path, monkeypatch, capsys):
    """A kernel whose candidates were not all timed has rows, and no choice."""
    only(monkeypatch, "noise-gaussian-float32", "replay-rademacher-float32", FIRST)
    monkeypatch.setattr(sweep, "candidates", lambda kernel, kind: [kernel.default(kind), Shape(1, 256, 2)])
    monkeypatch.setattr(sweep, "FASTER", 1e9)
    clock = iter([0.0, 0.0, 0.0, 2.0])  # two candidates of the first kernel, one of the second
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    failed = sweep.main(tmp_path / "sweep.json", dict(FACTS), 300, 1.0)
    rows = json.loads((tmp_path / "sweep.json").read_text())
    table = json.loads((tmp_path / "sweep.choices.json").read_text())["choices"]
    assert failed == 0
    timed = [row["name"].partition(" ")[0] for row in rows["rows"] if row["group"] == "sweep"]
    assert timed == [FIRST, FIRST, "replay-rademacher-float32"]
    assert rows["not_swept"] == ["replay-rademacher-float32", "noise-gaussian-float32"]
    assert {entry["kernel"] for entry in table} == {FIRST}
    assert "not swept: replay-rademacher-float32 noise-gaussian-float32" in capsys.readouterr().out


def test_the_kernels_of_most_use_come_first(tmp_path):
    assert set(sweep.LAUNCHES) == {kernel.name for kernel, _ in KERNELS.values()}
    _, found, table = swept(tmp_path, seconds=-1)
    left = found["not_swept"]
    assert sorted(left) == sorted(KERNELS)
    dtypes = ("float32", "bfloat16", "bfloat16-stochastic")
    assert left[:6] == [f"{op}-rademacher-{dtype}" for op in ("perturb", "replay") for dtype in dtypes]
    assert table is None
    assert found["rows"] == []


def test_rows_are_there_when_a_sweep_is_cut_short(tmp_path, timed, monkeypatch):
    def cut(self, *arguments):
        raise KeyboardInterrupt

    timed({DEFAULT: [1.0, 1.0], OTHER: [1.0, 1.0]})
    only(monkeypatch, FIRST, "noise-rademacher-float32")
    monkeypatch.setitem(sweep.LAUNCHES, "noise", cut)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert len(found["rows"]) == 2
    assert not found["complete"]
    assert (tmp_path / "sweep.choices.json").exists()


def test_the_candidates():
    """The default first, none twice, none that the kernel can't have; as many columns to a warp as the default has."""
    for kernel, kind in KERNELS.values():
        found = sweep.candidates(kernel, kind)
        default = kernel.default(kind)
        assert found[0] == default
        assert len({*found}) == len(found) == (12 if kernel.wide else 9)
        assert max(shape.blocks for shape in found) == default.blocks * (4 if kernel.wide else 2)
        assert not [shape for shape in found if kernel.impossible_reason(kind, shape)]
        assert {shape.width // shape.num_warps for shape in found} == {default.width // default.num_warps}

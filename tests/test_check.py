"""The self-check: passes here, and fails on one wrong bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hosfl_kernels import _cpp, check

VECTORS = Path(__file__).parent / "noise_vectors.json"


def run(*arguments):
    command = [sys.executable, "-m", "hosfl_kernels.check", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # cases have infinities
def test_all_backends_pass(monkeypatch, capsys):
    """Every vector, and a case of each op: all the cases are tests of test_ops.py, one each."""
    cases = {case.op: case for case in check.CASES if case.n <= 1100}
    monkeypatch.setattr(check, "CASES", list(cases.values()))
    assert check.main(["--vectors", str(VECTORS)]) == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said
    assert said.endswith("all bits are right\n")
    for backend in ("numpy", "cpp", "triton"):
        assert f"ok   {backend:6} perturb_ bfloat16 gaussian stochastic" in said
        assert f"ok   {backend:6} philox" in said
    assert {op.split()[0] for op in cases} == {"perturb_", "perturb_rows_", "replay_", "update_", "project"}
    for isa in _cpp.supported():
        assert f"     cpp    {isa} of" in said
    for backend in ("cpp", "triton"):
        assert all(f"ok   {backend:6} {op} " in said for op in cases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled")
@pytest.mark.parametrize("arguments", [[], ["--backend", "triton"]])
def test_without_a_gpu_it_starts_again_with_the_interpreter(arguments, monkeypatch):
    class StartedError(Exception):
        pass

    def execv(*command):
        raise StartedError(*command)

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(StartedError) as started:
        check.main(arguments)
    command = [sys.executable, "-m", "hosfl_kernels.check", *arguments]
    assert started.value.args == (sys.executable, command)
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("backend", ["numpy", "cpp"])
def test_one_wrong_bit_is_named(tmp_path, backend):
    vectors = json.loads(VECTORS.read_text())
    wrong = vectors["perturb"][1]["gaussian_stochastic_out_bits"]
    wrong[7] = f"{int(wrong[7], 16) ^ 1:04x}"
    vectors["derive"][1]["out"] = "5"
    vectors["noise"][3]["rademacher"][2] *= -1
    vectors["philox4x32_10"][2]["out"] = "00000000 94fdcceb 5001e420 24126ea1"
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps(vectors))
    done = run("--backend", backend, "--vectors", path)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 4 * (len(_cpp.supported()) if backend == "cpp" else 1)
    assert "1 of 24 elements differ, first element 7" in done.stdout


def test_unreadable_vectors(tmp_path):
    assert "cannot read the vectors" in run("--vectors", tmp_path / "none.json").stderr
    assert run("--backend", "fortran").returncode == 2

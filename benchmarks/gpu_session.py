"""All checks and measurements that need a GPU, in one command: `make gpu`, or on a bare machine

    python benchmarks/gpu_session.py [--out FOLDER] [--minutes N] [--quick] [--no-install]

which needs Python, numpy, torch, Triton, a C++ compiler and, to build, any setuptools and pybind11; its tests need
pytest. It needs no package index and no make. Its parts, one after another:

    install    the C++ kernels, built in place in this checkout, from which all parts import; nothing is downloaded
    nvcc       nvcc's kernels in addition, if there are nvcc and a GPU
    bits       the self-check of every backend against the vectors
    rows       python -m benchmarks.gpu: times of every op, lists, steps, a step in a CUDA graph
    tests      the tests whose kernels run on a GPU
    sanitizer  the self-check once more under compute-sanitizer, if it is installed
    sweep      python -m benchmarks.gpu --sweep, for the remaining time: which shapes of tiles are fastest

Every part has its own log in FOLDER, and gets its line in FOLDER/parts.json when it ends; the rows are saved one by
one. So an interrupted session keeps what was done. A part that fails or takes too long does not affect the others.
Exits with 1 if any failed. Without a GPU the same parts run in Triton's interpreter and by a clock, which only tries
this file out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("gpu_interpreter", "ops", "update", "register", "check")]
CHECK = [sys.executable, "-m", "hosfl_kernels.check", "--vectors", "tests/noise_vectors.json"]
# `setup.py build_ext --inplace` without pyproject.toml, whose license field setuptools before 77 refuses.
BUILD = """
import setuptools
from distutils.core import run_setup

package = run_setup("setup.py", stop_after="init")
package.get_command_obj("build_ext").inplace = True
package.run_command("build_ext")
"""


@dataclass(frozen=True)
class Part:
    """A command of the session.

    share: of the remaining time that it may take. missing: a requirement that this machine lacks. takes_seconds:
    whether the command has an option --seconds, and ends by then.
    """

    name: str
    command: Sequence[str]
    share: float = 1.0
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    takes_seconds: bool = False


def capability() -> str | None:
    """Return the GPU's compute capability, such as "90", or None without a GPU.

    torch is asked in a process of its own: in this one CUDA would take GPU memory from every part.
    """
    code = "import torch; print(*torch.cuda.get_device_capability() if torch.cuda.is_available() else (), sep='')"
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return completed.stdout.strip() or None


def parts(out: Path, quick: bool, install: bool) -> Iterator[Part]:
    """Yield the parts of the session in order."""
    nvcc, sanitizer = shutil.which("nvcc"), shutil.which("compute-sanitizer")
    gpu = capability()
    if install:
        build = [sys.executable, "-c", BUILD]
        yield Part("install", build, 0.3)
        # A part of its own, since nvcc may be too old or refuse the compiler, and nothing else needs its kernels.
        # HOSFL_CUDA=1 is set for the build only: the rows use Triton's kernels. Only for this GPU, since nvcc compiles
        # every architecture anew.
        missing = "" if nvcc and gpu else "there is no nvcc on the path" if gpu else "there is no GPU"
        environment = {"HOSFL_CUDA": "1", **({"HOSFL_CUDA_ARCHITECTURES": gpu} if gpu else {})}
        yield Part("nvcc", build, 0.3, missing, environment)
    yield Part("bits", CHECK, 0.2)
    rows = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out / "gpu.json"), *["--quick"] * quick]
    yield Part("rows", rows, 0.6)
    pytest = "" if find_spec("pytest") else "pytest is not installed"
    tests = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", *TESTS]
    yield Part("tests", tests, 0.8, pytest)
    missing = "" if sanitizer else "there is no compute-sanitizer on the path"
    yield Part("sanitizer", [sanitizer or "", "--error-exitcode", "9", *CHECK], 0.7, missing)
    sweep = [sys.executable, "-m", "benchmarks.gpu", "--sweep", "--out", str(out / "sweep.json"), *["--quick"] * quick]
    if gpu:
        yield Part("sweep", sweep, takes_seconds=True)
    else:
        small = ["--elements", "1000", "--seconds", "120"]
        yield Part("sweep", [*sweep, *small], environment={"TRITON_INTERPRET": "1"})


def run(part: Part, out: Path, seconds: float) -> dict[str, object]:
    """Run a part, and return its row: "passed", "failed", "too long", or why it was left out.

    A part that takes too long is killed with all its child processes, which would otherwise keep the GPU busy.
    """
    if part.missing:
        return {"part": part.name, "result": f"left out: {part.missing}"}
    begin, log = time.monotonic(), out / f"{part.name}.log"
    limit = ["--seconds", str(0.9 * seconds)] if part.takes_seconds else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **part.environment}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    try:
        with log.open("w") as file, subprocess.Popen([*part.command, *limit], stdout=file, **options) as process:
            try:
                status = process.wait(seconds)
            except BaseException:  # also KeyboardInterrupt: Ctrl-C reaches this process only
                os.killpg(process.pid, signal.SIGKILL)
                raise
        result = "failed" if status else "passed"
    except subprocess.TimeoutExpired:
        result = "too long"
    except OSError as error:
        result = f"failed: {error}"
    return {"part": part.name, "result": result, "seconds": round(time.monotonic() - begin, 1), "log": log.name}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_session.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="default: runs/gpu")
    parser.add_argument("--minutes", type=float, default=9.5, metavar="N", help="for all of it; default: 9.5")
    parser.add_argument("--quick", action="store_true", help="rows of small tensors and a small model")
    parser.add_argument("--no-install", action="store_true", help="take hosfl as it is here")
    options = parser.parse_args(arguments)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    ends, results = time.monotonic() + 60 * options.minutes, []
    for part in parts(out, options.quick, not options.no_install):
        result = run(part, out, max(1.0, part.share * (ends - time.monotonic())))
        results.append(result)
        (out / "parts.json").write_text(json.dumps(results, indent=1) + "\n")
        print(*(value for key, value in result.items() if key != "log"), sep="  ", flush=True)
        if result["result"] == "failed":
            print("    " + "\n    ".join((out / f"{part.name}.log").read_text().splitlines()[-15:]), flush=True)
    failed = [r for r in results if str(r["result"]).startswith(("failed", "too long"))]
    print(f"{len(failed)} of {len(results)} parts failed; {out}")
    return 1 if failed else 0


def exit_on_signals() -> None:
    """Make SIGTERM and a closed terminal end the session as Ctrl-C does, so that `run` kills the current part."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())

"""Everything that a new GPU is needed for, in one command: `make gpu`, or on a bare machine

    python benchmarks/gpu_session.py [--out FOLDER] [--minutes N] [--quick] [--no-install]

which needs Python, numpy, torch, Triton, a C++ compiler and, to build with it, setuptools of any age and pybind11; its
tests need pytest. It needs no index and no make. Its parts, one after another:

    install    the C++ kernels, built in place in this checkout, from which all parts import; nothing is fetched
    nvcc       nvcc's kernels beside them, where there are nvcc and a GPU
    bits       the self-check of every backend against the vectors
    rows       python -m benchmarks.gpu: what every op costs, lists, steps, a step in a CUDA graph
    tests      the tests whose kernels run on a GPU
    sanitizer  the self-check once more under compute-sanitizer, where it is there
    sweep      python -m benchmarks.gpu --sweep, for the time that is left: which shapes of tiles are fastest

Every part has a log of its own in FOLDER, and its line in FOLDER/parts.json as it ends; the rows are saved one by one.
So whatever cuts a session short, what was done is there. A part that fails or takes too long costs no other. Exits with
1 if any failed. Without a GPU the same parts run in Triton's interpreter and by a clock: that tries this file out.
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
# `setup.py build_ext --inplace`, but for pyproject.toml, which a setuptools of before 77 refuses for its license.
BUILD = """
import setuptools
from distutils.core import run_setup

package = run_setup("setup.py", stop_after="init")
package.get_command_obj("build_ext").inplace = True
package.run_command("build_ext")
"""


@dataclass(frozen=True)
class Part:
    """A command, and how much of the session's time it may take. missing: what it needs and is not here.

    ends: the command takes --seconds, and ends in order by then.
    """

    name: str
    command: Sequence[str]
    share: float = 1.0
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    ends: bool = False


def capability() -> str | None:
    """The GPU's compute capability, such as "90", or None where there is none. As torch sees it, in a process of its
    own: what CUDA takes of the GPU here would be gone for every part."""
    code = "import torch; print(*torch.cuda.get_device_capability() if torch.cuda.is_available() else (), sep='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def parts(out: Path, quick: bool, install: bool) -> Iterator[Part]:
    nvcc, sanitizer = shutil.which("nvcc"), shutil.which("compute-sanitizer")
    gpu = capability()
    if install:
        build = [sys.executable, "-c", BUILD]
        yield Part("install", build, 0.3)
        # Apart, since an nvcc may be too old, or refuse the compiler: all else can do without. HOSFL_CUDA=1 is for the
        # build alone, Triton's kernels serve the rows; for this GPU alone, since nvcc takes its time for each kind.
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
        yield Part("sweep", sweep, ends=True)
    else:
        tried_out = ["--elements", "1000", "--seconds", "120"]
        yield Part("sweep", [*sweep, *tried_out], environment={"TRITON_INTERPRET": "1"})


def run(part: Part, out: Path, seconds: float) -> dict[str, object]:
    """What became of a part: "passed", "failed", "too long" or why it was left out.

    What takes too long is killed with all that it started: a child that is left would hold the GPU beside the next.
    """
    if part.missing:
        return {"part": part.name, "result": f"left out: {part.missing}"}
    begin, log = time.monotonic(), out / f"{part.name}.log"
    in_order = ["--seconds", str(0.9 * seconds)] if part.ends else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **part.environment}
    kept: dict[str, Any] = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    try:
        with log.open("w") as file, subprocess.Popen([*part.command, *in_order], stdout=file, **kept) as process:
            try:
                status = process.wait(seconds)
            except BaseException:  # Ctrl-C reaches this process alone
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


def end_in_order() -> None:
    """SIGTERM and a closed terminal end the session as Ctrl-C does: through `run`, which ends the part."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())

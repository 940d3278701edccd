"""Check this machine's kernels: every backend against spec.py, and against a file of test vectors.

    python -m hosfl_kernels.check [--backend numpy|cpp|triton|cuda] [--vectors FILE]

Prints one line per backend and case, with the place of the first difference, and exits with 1 if there is any. `cpp`
runs with every instruction set of this processor. `triton` runs on the GPU, with the tiles of small and of large
launches if they differ; without a GPU it runs in Triton's interpreter. `cuda`, the kernels of a HOSFL_CUDA=1 build,
runs on a GPU only. Both need torch; the other backends run without it, on numpy arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hosfl_kernels import _cpp, cpu, ops, reference, spec
from hosfl_kernels.arrays import DTYPES, is_numpy, storage
from hosfl_kernels.place import DISTRIBUTIONS, Place
from hosfl_kernels.rules import SGD, AdamW, Rule

TOLERANCE = 1e-6  # relative to the sum of absolute terms, for backends that sum in another order
SEED, ROUNDING_SEED = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03


@dataclass(frozen=True)
class Case:
    """One call of an op: `replay_` with `records` records, or `perturb_` if that is 1."""

    dtype: str = "float32"
    dist: str = "rademacher"
    rounding: str = "nearest"
    n: int = 1000
    stream: int = 0
    start: int = 0
    factor: float = 1.0
    records: int = 1

    @property
    def place(self) -> Place:
        """The place of the case's one tensor."""
        return Place.single(self.dist, self.factor, self.stream, self.start)

    @property
    def op(self) -> str:
        """The op and its size, for the case's name."""
        return "perturb_" if self.records == 1 else f"replay_ of {self.records}"

    def __str__(self) -> str:
        place = f"n={self.n} start={self.start} stream={self.stream} factor={self.factor:g}"
        return f"{self.op} {self.dtype} {self.dist} {self.rounding} {place}"


@dataclass(frozen=True)
class UpdateCase(Case):
    """`records` rounds of an update rule with `directions` directions each."""

    rule: Rule = SGD()
    directions: int = 1

    @property
    def op(self) -> str:
        return f"update_ {self.rule.name} of {self.records} x {self.directions}"


@dataclass(frozen=True)
class ProjectCase(Case):
    """Inner products with `records` directions."""

    @property
    def op(self) -> str:
        return f"project of {self.records}"


@dataclass(frozen=True)
class RowsCase(Case):
    """Rows of `width` elements of a table, n elements in all. The first is the row in which element `start` lies."""

    width: int = 1

    @property
    def numbers(self) -> Any:
        """The rows' numbers in the table, int64: neighbours, one twice, and one that is far from the others."""
        k = np.arange(self.n // self.width)
        return self.start // self.width + np.where(k % 5 == 3, 0, k) + (k == 1) * 2**20

    @property
    def op(self) -> str:
        return f"perturb_rows_ of {self.width}"


# (dtype, rounding)
KINDS = [("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "stochastic"), ("float16", "nearest")]
RULES: list[Rule] = [SGD(weight_decay=0.1), SGD(momentum=0.9), AdamW(betas=(0.8, 0.99), weight_decay=0.1)]


def _update_cases() -> Iterator[UpdateCase]:
    """Cases of `update_`."""
    # Few and small cases: in Triton's interpreter a tile takes 20 ms per direction. The first one crosses a block's end
    # beyond 32 bits, the second one is wider than a row.
    for rule in RULES:
        for dtype, rounding in KINDS:
            for dist in DISTRIBUTIONS:
                kind: dict[str, Any] = {"dtype": dtype, "dist": dist, "rounding": rounding, "rule": rule}
                start = 2**44 - 100
                yield UpdateCase(**kind, n=150, stream=2**32 - 1, start=start, factor=0.25, records=2, directions=3)
                yield UpdateCase(**kind, n=1100, stream=6, start=131_000, records=2)


def _project_cases() -> Iterator[ProjectCase]:
    """Cases of `project`."""
    for dtype in DTYPES:
        for dist in DISTRIBUTIONS:
            yield ProjectCase(dtype, dist, n=1, stream=1, start=131_071, records=2)
            yield ProjectCase(dtype, dist, n=150, stream=2**32 - 1, start=2**44 - 100, factor=0.25, records=33)
            yield ProjectCase(dtype, dist, n=9001, stream=6, start=131_000, factor=2.0, records=2)
    yield ProjectCase(n=140_001, start=77, stream=3)
    yield ProjectCase(dist="gaussian", n=20_001, start=2**33 + 77, stream=3)


def _rows_cases() -> Iterator[RowsCase]:
    """Cases of `perturb_rows_`: rows of one element, across the ends of rows and blocks of the noise, and longer."""
    for dtype in DTYPES:
        for dist in DISTRIBUTIONS:
            yield RowsCase(dtype, dist, n=7, stream=1, start=1020, width=1)
            yield RowsCase(dtype, dist, n=1500, stream=2**32 - 1, start=131_000, factor=0.25, width=150)
            yield RowsCase(dtype, dist, n=2 * 1100, stream=6, start=2**44, factor=2.0, width=1100)


def _cases() -> Iterator[Case]:
    """Cases of `perturb_` and `replay_`."""
    # Sizes and starts around the edges of rows (1024), Gaussian blocks (4096), rounding blocks (8192) and
    # Rademacher blocks (131072), and beyond 32 bits.
    places = [(1, 0), (7, 1020), (1024, 0), (1025, 1023), (4099, 4093), (9001, 131_071), (3000, 2**32 - 1500)]
    for dtype, rounding in KINDS:
        for dist in DISTRIBUTIONS:
            for stream, (n, start) in enumerate(places):
                yield Case(dtype, dist, rounding, n, stream, start)
            yield Case(dtype, dist, rounding, 2100, 2**32 - 1, 2**44 - 1000, factor=0.25)
            yield Case(dtype, dist, rounding, 3001, 5, 8191, factor=2.0, records=3)
            yield Case(dtype, dist, rounding, 150, 6, 131_000, records=33)
    yield Case(n=140_001, start=77, stream=3)
    yield Case(dist="gaussian", n=20_001, start=2**33 + 77, stream=3)


CASES = [*_cases(), *_update_cases(), *_project_cases(), *_rows_cases()]


def weights(case: Case) -> spec.Storage:
    """Weights for a case: normal numbers with standard deviation 0.1, and edge cases of the arithmetic."""
    x = np.random.default_rng(case.n).standard_normal(case.n).astype(np.float32) * np.float32(0.1)
    special = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        65504.0,
        -6e-8,
        1e-40,
        3.3895e38,
        2.0**-14,
        65519.0,
        1.5,
        1.0009765625,
    ]
    if case.n > 100:
        x[3 : 3 + len(special)] = special
    return from_float32(x, case.dtype)


def from_float32(x: spec.F32, dtype: str) -> spec.Storage:
    """Round float32 values to the dtype of that name, in the format of spec.py."""
    return spec.from_float32(x, np.dtype("uint16" if dtype == "bfloat16" else dtype))


def to_device(x: spec.Storage, device: str) -> Any:
    """Copy storage into an array (device "numpy"), or into a tensor on one of torch's devices."""
    if device == "numpy":
        return x.copy()
    from hosfl_kernels import tensors

    return tensors.from_storage(x).to(device)


def to_storage(x: Any) -> spec.Storage:
    """Return an array or a tensor in the format of spec.py, on the host."""
    return storage(x if is_numpy(x) else x.cpu())


def replay_arguments(case: Case) -> dict[str, Any]:
    """Seeds, coefficients and rounding seeds of a case, by name."""
    seeds = [spec.derive(SEED, case.n, r) for r in range(case.records)]
    rounding = [spec.derive(ROUNDING_SEED, case.n, r) for r in range(case.records)]
    # The first moves bfloat16 weights in [1/8, 1/4) and float16 ones in [1, 2) exactly between two neighbours.
    coefficients = [2.0**-11] + [float(np.float32(1e-3 * (r + 1) * (-1) ** r)) for r in range(1, case.records)]
    return {
        "seeds": seeds,
        "coefficients": coefficients,
        "rounding_seeds": rounding if case.rounding == "stochastic" else None,
    }


def update_arguments(case: UpdateCase) -> tuple[tuple[str, list[float], list[int], list[float], Any], list[int] | None]:
    """((rule, constants, seeds, coefficients, steps), rounding seeds) of a case, as backends take them."""
    p = case.directions
    record = replay_arguments(replace(case, records=case.records * p))
    steps = case.rule.steps(range(case.records), [1e-2 / (1 + r) for r in range(case.records)]).tolist()
    rounding = None if record["rounding_seeds"] is None else record["rounding_seeds"][: case.records]
    return (case.rule.name, case.rule.constants, record["seeds"], record["coefficients"], steps), rounding


def moments(case: UpdateCase) -> list[spec.F32]:
    """Moments of a case: m of the weights' size, v with zeros, subnormal numbers and infinity among its values."""
    moments = []
    for k in range(case.rule.moments):
        x = weights(replace(case, dtype="float32")) * np.float32(0.5)
        with np.errstate(over="ignore"):
            moments.append(x if k == 0 else (x * x)[::-1].copy())
        if k and case.n > 100:
            moments[k][20:26] = [0.0, 1e-45, 7e-42, 1.1754944e-38, 3e38, float("inf")]
    return moments


def difference(got: Any, want: Any) -> str | None:
    """Describe where the bits of two arrays or tensors first differ; None if they are equal. NaN equals NaN."""
    a, b = to_storage(got), to_storage(want)
    view = np.uint32 if a.itemsize == 4 else np.uint16
    same = (a.view(view) == b.view(view)) | (np.isnan(spec.to_float32(a)) & np.isnan(spec.to_float32(b)))
    if same.all():
        return None
    i = int(np.flatnonzero(~same)[0])
    width = a.itemsize * 2
    got_bits, want_bits = (f"{int(v.view(view)[i]):0{width}x}" for v in (a, b))
    return f"{(~same).sum()} of {same.size} elements differ, first element {i}: {got_bits}, should be {want_bits}"


def run_case(backend: ModuleType, case: Case, device: str) -> str | None:
    """Run a case, and describe the difference between backend and spec.py; None if there is none.

    device: "numpy", or one of torch's.
    """
    if isinstance(case, UpdateCase):
        return _run_update(backend, case, device)
    if isinstance(case, ProjectCase):
        return _run_project(backend, case, device)
    if isinstance(case, RowsCase):
        return _run_rows(backend, case, device)
    want = weights(case)
    got = to_device(want, device)
    record = replay_arguments(case)
    rounding = record["rounding_seeds"]
    if case.records == 1:
        rounding_seed = None if rounding is None else rounding[0]
        backend.perturb_([got], record["seeds"][0], record["coefficients"][0], case.place, rounding_seed)
    else:
        backend.replay_([got], record["seeds"], record["coefficients"], case.place, rounding)
    reference.replay_([want], record["seeds"], record["coefficients"], case.place, rounding)
    return difference(got, want)


def _run_update(backend: ModuleType, case: UpdateCase, device: str) -> str | None:
    """`run_case` for `update_`."""
    want, want_moments = weights(case), moments(case)
    got, got_moments = to_device(want, device), [to_device(m, device) for m in want_moments]
    record, rounding = update_arguments(case)
    backend.update_([got], [[m] for m in got_moments], *record, case.place, rounding)
    reference.update_([want], [[m] for m in want_moments], *record, case.place, rounding)
    for k, (a, b) in enumerate(zip(got_moments, want_moments, strict=True)):
        if wrong := difference(a, b):
            return f"moment {k}: {wrong}"
    return difference(got, want)


def _run_project(backend: ModuleType, case: ProjectCase, device: str) -> str | None:
    """`run_case` for `project`."""
    x = from_float32(np.clip(spec.to_float32(weights(case)), -1, 1), case.dtype)
    seeds = replay_arguments(case)["seeds"]
    got, want = backend.project([to_device(x, device)], seeds, case.place), reference.project([x], seeds, case.place)
    for r, seed in enumerate(seeds):
        z = spec.noise(case.n, seed, stream=case.stream, start=case.start, dist=case.dist)
        terms = case.factor * float(np.abs(spec.to_float32(x).astype(float)) @ np.abs(z.astype(float)))
        if not abs(got[r] - want[r]) <= (0 if backend is cpu else TOLERANCE * terms):
            return f"scalar {r} is {got[r]:.17g}, should be {want[r]:.17g}"
    return None


def _run_rows(backend: ModuleType, case: RowsCase, device: str) -> str | None:
    """`run_case` for `perturb_rows_`."""
    want = weights(case).reshape(-1, case.width)
    got, numbers = to_device(want, device), to_device(case.numbers, device)
    record = replay_arguments(case)
    backend.perturb_rows_(got, numbers, record["seeds"][0], record["coefficients"][0], case.place)
    reference.perturb_rows_(want, case.numbers, record["seeds"][0], record["coefficients"][0], case.place)
    return difference(got, want)


# --- vectors --------------------------------------------------------------------------------------------------


def _from_bits(bits: Sequence[str], dtype: str) -> spec.Storage:
    """Storage from the bits of its elements in hexadecimal."""
    words = [int(b, 16) for b in bits]
    if dtype == "float32":
        return np.array(words, np.uint32).view(np.float32)
    return np.array(words, np.uint16).view(np.float16 if dtype == "float16" else np.uint16)


def vector_cases(vectors: dict[str, Any], backend: ModuleType, device: str) -> Iterator[tuple[str, str | None]]:
    """Check a backend on a file's vectors, and yield (name, difference or None) for each."""
    for v in vectors["philox4x32_10"]:
        (k0, k1), counter = ([int(w, 16) for w in v[name].split()] for name in ("key", "ctr"))
        got = " ".join(f"{word:08x}" for word in backend.philox_words(k0 | k1 << 32, tuple(counter)))
        yield f"philox {v['key']}", None if got == v["out"] else f"{got}, should be {v['out']}"
    for v in vectors["derive"]:
        derived = ops.derive(int(v["seed"]), int(v["a"]), int(v["b"]))
        yield (
            f"derive {v['seed']} {v['a']} {v['b']}",
            None if derived == int(v["out"]) else f"{derived}, not {v['out']}",
        )
    for v in vectors["noise"]:
        seed, stream, start = int(v["seed"]), int(v["stream"]), int(v["start"])
        name = f"seed={seed} stream={stream} start={start}"
        signs = np.array(v["rademacher"], np.float32)
        normals = _from_bits(v["gaussian_f32_bits"], "float32")
        for dist, want in (("rademacher", signs), ("gaussian", normals)):
            out = to_device(np.empty(len(want), np.float32), device)
            backend.noise_(out, seed, Place.single(dist, stream=stream, start=start))
            yield f"noise {dist} {name}", difference(out, want)
        if backend is reference:  # other backends have no function for rounding bits
            bits = spec.rounding_bits(len(v["rounding_bits"]), seed, stream, start).tolist()
            yield f"rounding bits {name}", None if bits == v["rounding_bits"] else f"{bits} differ"
    for v in vectors["perturb"]:
        seed, scale = int(v["seed"]), float(_from_bits([v["scale_f32_bits"]], "float32")[0])
        for dist in DISTRIBUTIONS:
            for rounding, suffix in (("nearest", "_out_bits"), ("stochastic", "_stochastic_out_bits")):
                if dist + suffix in v:
                    x = to_device(_from_bits(v["x_bits"], v["dtype"]), device)
                    place = Place.single(dist, stream=int(v["stream"]), start=int(v["start"]))
                    backend.perturb_([x], seed, scale, place, seed if rounding == "stochastic" else None)
                    yield (
                        f"perturb_ {v['dtype']} {dist} {rounding} seed={seed} scale={scale:g}",
                        difference(x, _from_bits(v[dist + suffix], v["dtype"])),
                    )


def modes(name: str, backend: ModuleType) -> Iterator[str]:
    """Switch a backend to each of its modes in turn, and yield the mode's name. The last is the normal one."""
    if name == "cpp":
        for isa in _cpp.supported():
            _cpp.use_isa(isa)
            yield f"{backend.describe()}"
    elif name == "triton":
        for size in backend.each_size():
            yield f"{backend.describe()}, tiles for {size} launches"
    else:
        yield f"{backend.describe()}"


# --- the command ----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. arguments: None: those of the process. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hosfl_kernels.check", description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=ops.NAMES, help="check this one only; default: all there are")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="also check the vectors of this JSON file")
    options = parser.parse_args(arguments)
    try:
        vectors = json.loads(options.vectors.read_text()) if options.vectors else None
    except (OSError, ValueError) as error:
        parser.error(f"cannot read the vectors in {options.vectors}: {error}")
    backends = ops.installed()
    has_torch = len(backends) > len(ops.BACKENDS)
    has_gpu = has_torch and sys.modules["torch"].cuda.is_available()
    interprets = has_torch and not has_gpu and options.backend in (None, "triton")
    if interprets and "TRITON_INTERPRET" not in os.environ:
        # Triton reads this once, when the kernels are imported: restart the process with it.
        os.environ["TRITON_INTERPRET"] = "1"
        sys.stdout.flush()
        argv = sys.argv[1:] if arguments is None else list(arguments)
        os.execv(sys.executable, [sys.executable, "-m", "hosfl_kernels.check", *argv])

    failed = 0
    for name in [options.backend] if options.backend else ops.NAMES:
        backend = backends.get(name)
        if backend is None or backend.describe() is None:
            print(f"{'FAIL' if options.backend else 'none':4} {name:6} cannot run on this machine")
            failed += options.backend is not None
            continue
        device = "numpy" if name in ops.BACKENDS else "cuda" if has_gpu else "cpu"
        for mode in modes(name, backend):
            print(f"     {name:6} {mode}")
            results = [(str(case), run_case(backend, case, device)) for case in CASES if backend is not reference]
            results += vector_cases(vectors, backend, device) if vectors else []
            for case_name, wrong in results:
                print(f"{'FAIL' if wrong else 'ok':4} {name:6} {case_name}{': ' + wrong if wrong else ''}")
                failed += wrong is not None
    print(f"{failed} differences" if failed else "all bits are right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Every op on numpy arrays. As a program it has no torch; test_numpy.py runs it, and `refused` on tensors.

    python tests/without_torch.py VECTORS

Compares what the ops make with spec.py, runs the self-check, and prints what was refused, as JSON.
"""

import contextlib
import io
import json
import sys

if __name__ == "__main__":
    sys.modules.update(torch=None, triton=None)  # an import of either raises ModuleNotFoundError

import numpy as np

import hosfl_kernels as hk
from hosfl_kernels import check, spec

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
try:
    from ml_dtypes import bfloat16
except ModuleNotFoundError:
    bfloat16 = None


def place_of(case):
    at = {"dist": case.dist, "factors": [case.factor], "streams": [case.stream], "starts": [case.start]}
    return at, {"dist": case.dist, "factor": case.factor, "stream": case.stream, "start": case.start}


def made_and_wanted(case, given):
    """What a public op makes of a case's array, and what spec.py does; `given` is the array's view."""
    x, record = check.weights(case), check.replay_arguments(case)
    place, one = place_of(case)
    rounding_seeds = record["rounding_seeds"]
    stochastic = {"rounding": case.rounding} if rounding_seeds else {}
    mine = given(x.copy())
    if isinstance(case, check.UpdateCase):
        moments = check.moments(case)
        kept = [[m.reshape(mine.shape).copy()] for m in moments]
        (rule, constants, seeds, coefficients, steps), rounding_seeds = check.update_arguments(case)
        by_round = (case.records, case.directions)
        seeds, coefficients = np.array(seeds, np.uint64).reshape(by_round), np.reshape(coefficients, by_round)
        rounding = {**stochastic, "rounding_seeds": rounding_seeds}
        hk.update_(
            mine, kept, case.rule, seeds, coefficients.astype(np.float32), np.float32(steps), **place, **rounding
        )
        record = (seeds.tolist(), coefficients.tolist(), steps)
        want, after = spec.update(x, moments, rule, constants, *record, **one, rounding_seeds=rounding_seeds)
        return [mine, *(k[0] for k in kept)], [want, *after]
    if isinstance(case, check.ProjectCase):
        finite = check.from_float32(np.clip(spec.to_float32(x), -1, 1), case.dtype)
        scalars = hk.project(given(finite), record["seeds"], **place)
        return [scalars], [spec.project(finite, record["seeds"], np.zeros(case.records), **one)]
    if case.records == 1:
        seed = rounding_seeds and rounding_seeds[0]
        hk.perturb_(mine, record["seeds"][0], record["coefficients"][0], **place, **stochastic, rounding_seed=seed)
    else:
        hk.replay_(mine, **record, **place, **stochastic)
    return [mine], [spec.replay(x, **record, **one)]


def same(a, b):
    view = {8: np.uint64, 4: np.uint32, 2: np.uint16}[b.itemsize]
    numbers = b if b.dtype == np.float64 else spec.to_float32(b)
    return ((a.view(view) == b.view(view)) | np.isnan(numbers)).all()


def compare():
    views = {"as it is": lambda x: x, "as a matrix": lambda x: x.reshape(1, -1)}
    if bfloat16 is not None:
        views["of ml_dtypes"] = lambda x: x.view(bfloat16) if x.dtype == np.uint16 else x
    for case in check.CASES:
        for name, given in views.items():
            for made, want in zip(*made_and_wanted(case, given), strict=True):
                assert same(made.reshape(-1), want), f"{case}, {name}"
    for dist in ("rademacher", "gaussian"):
        made = hk.noise(5001, 2**63 + 9, stream=4, start=1000, dist=dist, device="numpy")
        assert same(made, spec.noise(5001, 2**63 + 9, stream=4, start=1000, dist=dist)), dist
    x, y = np.float32([0.3, -1.7, 0.0, -0.0]), np.zeros(0, np.float32)
    wanted = spec.snap(x, spec.quantum([float(np.float32(1.7))], [1.0]))
    assert hk.snap_([x, y], factors=[1.0, 2.0]) == 2.0**-22
    assert same(x, wanted)
    assert hk.derive(5, 1, 2) == spec.derive(5, 1, 2)
    assert (hk.project([], [1, 2]) == np.zeros(2)).all()
    hk.perturb_([], 1, 1.0)


# --- what is refused: the same of arrays and of tensors -------------------------------------------------------------

ROUND = {"seeds": [[1, 2]], "coefficients": [[0.5, 0.5]], "steps": [[0.1, 1.0, 1.0]]}


def update(x, m, v, rule=None, **changes):
    hk.update_(x, [m, v], rule or hk.AdamW(), **{**ROUND, **changes})


BAD = {
    "dtype": lambda new, x, m, v: hk.perturb_([x[0], new(8, "float64")], 1, 1.0),
    "integers": lambda new, x, m, v: hk.perturb_([x[0], new(8, "int32")], 1, 1.0),
    "contiguity": lambda new, x, m, v: hk.perturb_([x[0], new(16)[::2]], 1, 1.0),
    "memory": lambda new, x, m, v: hk.perturb_([x[0], x[0]], 1, 1.0),
    "memory in part": lambda new, x, m, v: hk.perturb_([x[0], x[1], x[1][4:]], 1, 1.0),
    "no array": lambda new, x, m, v: hk.perturb_([x[0], 3], 1, 1.0),
    "factor": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, factors=[3.0, 1.0]),
    "factors": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, factors=[1.0]),
    "stream": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, streams=[0, 2**32]),
    "start": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, starts=[-1, 0]),
    "end": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, starts=[0, 2**63 - 1]),
    "end of numpy's int64": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, starts=[0, np.int64(2**63 - 1)]),
    "seed": lambda new, x, m, v: hk.perturb_(x, 2**64, 1.0),
    "seed of bool": lambda new, x, m, v: hk.perturb_(x, True, 1.0),
    "scale": lambda new, x, m, v: hk.perturb_(x, 1, float("nan")),
    "scale beyond float32": lambda new, x, m, v: hk.perturb_(x, 1, 1e39),
    "scale of a string": lambda new, x, m, v: hk.perturb_(x, 1, "1"),
    "scale times factor": lambda new, x, m, v: hk.perturb_(x, 1, 1e38, factors=[1.0, 1024.0]),
    "dist": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, dist="normal"),
    "rounding": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, rounding="up"),
    "rounding's seed": lambda new, x, m, v: hk.perturb_(x, 1, 1.0, rounding="stochastic"),
    "rounding of float16": lambda new, x, m, v: hk.perturb_(
        new(8, "float16"), 1, 1.0, rounding="stochastic", rounding_seed=1
    ),
    "records": lambda new, x, m, v: hk.replay_(x, [1, 2], [1.0]),
    "seeds": lambda new, x, m, v: hk.replay_(x, [1, 2**64], [1.0, 1.0]),
    "seeds of floats": lambda new, x, m, v: hk.replay_(x, new(1, "float32"), [1.0]),
    "seeds in rows": lambda new, x, m, v: hk.replay_(x, new(4, "int64").reshape(2, 2), [1.0, 1.0]),
    "coefficient": lambda new, x, m, v: hk.replay_(x, [1, 2], [1.0, float("nan")]),
    "coefficient of a string": lambda new, x, m, v: hk.replay_(x, [1], ["1"]),
    "coefficients of float64": lambda new, x, m, v: hk.replay_(x, [1], new(1, "float64")),
    "rule": lambda new, x, m, v: update(x, m, v, rule="adamw"),
    "moments": lambda new, x, m, v: update(x, m, v[:1]),
    "moment's dtype": lambda new, x, m, v: update(x, m, [v[0], new(8, "float64")]),
    "moment's shape": lambda new, x, m, v: update(x, [m[0][:4], m[1]], v),
    "moment's contiguity": lambda new, x, m, v: update(x, [m[0], new(16)[::2]], v),
    "moments' memory": lambda new, x, m, v: update(x, m, [m[0], v[1]]),
    "moment in weights": lambda new, x, m, v: update(x, m, [v[0], x[0]]),
    "rounds": lambda new, x, m, v: update(x, m, v, seeds=[[1, 2], [3]]),
    "table": lambda new, x, m, v: update(x, m, v, coefficients=[[0.5]]),
    "rows of a table": lambda new, x, m, v: update(x, m, v, coefficients=[[0.5, 0.5], [0.5]]),
    "steps": lambda new, x, m, v: update(x, m, v, steps=[[0.1, float("inf"), 1.0]]),
    "projection's dtype": lambda new, x, m, v: hk.project([x[0], new(8, "float64")], [1]),
    "projection's contiguity": lambda new, x, m, v: hk.project([x[0], new(16)[::2]], [1]),
    "snap_'s dtype": lambda new, x, m, v: hk.snap_([x[0], new(8, "float16")]),
    "snap_ of NaN": lambda new, x, m, v: hk.snap_([x[0], x[1] * float("nan")]),
    "snap_'s headroom": lambda new, x, m, v: hk.snap_(x, headroom=0.5),
}


def refused(new):
    """Of every bad call the error's type and text; new(n, dtype="float32") makes an array or a tensor of halves."""
    errors = {}
    for name, call in BAD.items():
        x, m, v = ([new(8), new(8)] for _ in range(3))
        try:
            call(new, x, m, v)
        except (ValueError, TypeError, RuntimeError) as error:
            errors[name] = [type(error).__name__, str(error)]
        assert all((one == 0.5).all() for one in (*x, *m, *v)), f"{name}: something changed"
    return errors


def main(vectors):
    assert sys.modules["torch"] is sys.modules["triton"] is None
    with np.errstate(all="ignore"):
        compare()
        check.CASES[:] = {case.op: case for case in check.CASES if case.n <= 1100}.values()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert check.main(["--vectors", vectors]) == 0, said.getvalue()
    assert "none triton" in said.getvalue()
    assert "ok   cpp    perturb_ bfloat16 gaussian stochastic" in said.getvalue()
    assert hk.backends()["cpp"] is not None
    assert hk.backends()["triton"] is hk.backends()["cuda"] is None
    print(json.dumps(refused(lambda n, dtype="float32": np.full(n, 0.5, dtype))))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The studies of the optimizers: the baseline is MeZO, the candidates follow their formulas, the parts run."""

import dataclasses
import json
from statistics import stdev

import pytest
import torch
from torch import nn

from benchmarks import curves, optim, sentences
from benchmarks.mezo import MeZO
from hosfl.optim import ZONormalizedSGD
from hosfl.protocol.seeds import direction_seeds
from hosfl_kernels import noise

# --- MeZO --------------------------------------------------------------------------------------------------------


def normals(seed, like):
    torch.manual_seed(seed)
    return [torch.normal(mean=0, std=1, size=p.size()) for p in like]


def quadratic(params):
    return sum((p * p).sum() + p.sum() for p in params)


def test_mezo_measures_v_and_comes_back():
    params = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)), nn.Parameter(torch.ones(4))]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    before = [p.detach().clone() for p in params]
    mezo = MeZO([frozen, *params], 0.1, 1e-2)
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in params])
        return quadratic(params).detach()

    loss, v = mezo.zo_step(closure, seed=5)
    z = normals(5, params)
    for sign, at in zip((1, -1), seen, strict=True):
        for a, b, n in zip(at, before, z, strict=True):
            torch.testing.assert_close(a, b + sign * 1e-2 * n)
    # Of a quadratic loss the central difference is the derivative, whatever eps.
    assert v == pytest.approx(sum(float(((2 * b + 1) * n).sum()) for b, n in zip(before, z, strict=True)), rel=1e-3)
    assert loss == pytest.approx(sum(float(quadratic(at)) for at in seen) / 2, rel=1e-5)
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b)
    mezo.zo_update(5, v)
    for p, b, n in zip(params, before, z, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * v * n)
    assert torch.equal(frozen, torch.ones(3))


def test_mezo_s_directions_are_averaged_and_new_in_every_step():
    params = [nn.Parameter(torch.zeros(5))]
    mezo = MeZO(params, 1.0, directions=2, seed=3)
    slope = torch.arange(5.0)
    drawn = torch.randint(10**9, (2, 2), generator=torch.Generator().manual_seed(3)).tolist()
    for seeds in drawn:
        before = params[0].detach().clone()
        mezo.step(lambda: (params[0] * slope).sum())
        z = [normals(seed, params)[0] for seed in seeds]
        expected = sum(-(n @ slope) * n / 2 for n in z)
        torch.testing.assert_close(params[0].detach() - before, expected, rtol=2e-3, atol=2e-3)


# --- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [curves.LossSpread, curves.SquareSum])
def test_a_rule_follows_its_formula(rule):
    slope, rate = torch.tensor([3.0, -1.0, 0.5]), 2.0**-6
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = rule(model.parameters(), rate, 2.0**-10, directions=4, two_sided=False, seed=0)
    squares = 0.0
    for step in range(2):
        before = model.weight.detach().clone()
        optimizer.step(lambda: (model.weight.detach()[0].double() * slope).sum())
        u = torch.stack([noise(3, seed=s) for s in direction_seeds(0, step, 4)])
        v = u @ slope
        squares += float(v.square().mean())
        length = stdev(v.tolist()) if rule is curves.LossSpread else squares**0.5
        expected = -rate / length * (v[:, None] * u).mean(0)
        torch.testing.assert_close(model.weight.detach() - before, expected[None], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", [curves.LossSpread, curves.SquareSum, ZONormalizedSGD])
def test_adaptive_rules_do_not_see_the_loss_s_scale(rule):
    ends = []
    for scale in (1, 1024):
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
        optimizer = rule(model.parameters(), 0.01, directions=3)
        for _ in range(5):
            optimizer.step(lambda: scale * (model.weight.double() - 0.1).square().sum())  # noqa: B023
        ends.append(model.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-4)


# --- the parts ---------------------------------------------------------------------------------------------------


def test_overhead_memory_and_bfloat16_run(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "run_child", lambda work, *given, threads: getattr(optim, work)(*given))
    extent = optim.Extent(vocabulary=32, width=64, layers=1, rounds=1, weights=2**17, steps=50)
    optim.main(["--out", str(tmp_path), "--threads", "1", "--only", "overhead"], extent)
    optim.main(["--out", str(tmp_path), "--threads", "1", "--only", "memory", "bfloat16"], extent)
    parts = json.loads((tmp_path / "optim-cpu.json").read_text())
    assert set(parts) == set(optim.PARTS)
    for part in ("overhead", "memory"):
        assert [r["name"] for r in parts[part]["rows"]] == [*optim.OPTIMIZERS]
    for r in parts["bfloat16"]["rows"]:
        if (r["name"], r["dtype"]) == (optim.MEZO, "bfloat16"):
            assert abs(r["share"]) < 0.01
        else:
            assert 0 < r["share_error"] < 0.15
            assert abs(r["share"] - 1) < 3 * r["share_error"] + 0.01


def test_a_part_runs_in_a_process_of_its_own():
    rows = optim.run_child("bfloat16", 64, 1, threads=1)
    assert [r["dtype"] for r in rows] == ["float32", "bfloat16"] * 2


def test_what_must_hold_is_checked():
    def parts(times=25.0, extra=999_999, coarse=0.98):
        overhead = [{"name": n, "threads": 1, "times_mezo": t} for n, t in ((optim.RADEMACHER, times), ("MeZO", 1.0))]
        memory = [{"name": optim.RADEMACHER, "peak_extra_bytes": extra}, {"name": "MeZO", "peak_extra_bytes": 10**8}]
        shares = [(optim.RADEMACHER, "float32", 1.0), (optim.RADEMACHER, "bfloat16", coarse), ("MeZO", "bfloat16", 0.0)]
        coarse_rows = [{"name": n, "dtype": d, "share": s} for n, d, s in shares]
        return {p: {"rows": r} for p, r in zip(optim.PARTS, (overhead, memory, coarse_rows), strict=True)}

    assert optim.violations(parts()) == []
    assert optim.violations({}) == []
    assert len(optim.violations(parts(times=19.9))) == 1
    assert len(optim.violations(parts(extra=1_000_000))) == 1
    assert len(optim.violations(parts(coarse=0.94))) == 1
    assert len(optim.violations(parts(coarse=float("nan")))) == 1


@pytest.mark.learning
@pytest.mark.parametrize("way", curves.OPTIMIZERS)
def test_every_way_learns_digits(way, monkeypatch, seed, below):
    it = curves.task("digits")
    monkeypatch.setattr(curves, "task", lambda name: dataclasses.replace(it, steps=20))
    result = curves.run(("digits", way, it.rates[way], seed, True))
    assert result["failure"] is None
    assert len(result["curve"]) == 21
    assert result["curve"][-1] == (20, result["validation_loss"])
    below(result["validation_loss"] / result["curve"][0][1], 0.98)
    assert 0 <= result["test_accuracy"] <= 1


@pytest.mark.parametrize("way", ["MeZO", "ZOSGD"])
def test_a_run_that_diverges_is_a_failure(way, monkeypatch):
    it = curves.task("digits")
    monkeypatch.setattr(curves, "task", lambda name: dataclasses.replace(it, steps=40))
    result = curves.run(("digits", way, 1e35, 0, True))
    assert result["failure"]
    assert "test_accuracy" not in result


def test_first_sentences(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        'class A:\n    """Draw a torch.Line in red on the\n    given axes. And more.\n\n    More still."""\n'
        'def b():\n    """Too short."""\n'
        "def c():\n    pass\n"
    )
    assert list(sentences.first_sentences(source)) == ["Draw a it.Line in red on the given axes"]
    source.write_text("def broken(:")
    assert list(sentences.first_sentences(source)) == []

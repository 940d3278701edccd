"""Compiled forward passes: the same numbers up to rounding; nothing is compiled anew for a probe, round or client."""

import re

import pytest
import torch
from test_blocks import BERT, answer, client_of
from torch import nn

from hosfl import Config, train
from hosfl.cli import main
from hosfl.halves.blocks import blocks_of
from hosfl.halves.families import example_inputs
from hosfl.halves.hub import random_trunk
from hosfl.halves.inputs import call
from hosfl.halves.split import split
from hosfl.halves.trains import select_trainable
from hosfl.probing.compiled import call_compiled

SMALL = {"rounds": 3, "clients": 4, "batch": 16, "directions": 2, "server_rate": 0.03, "client_rate": 0.05}


@pytest.fixture(autouse=True)
def graphs():
    """How many graphs were compiled so far."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


calls = []


@torch._dynamo.register_backend(name="hosfl_counts")
def counting(graph, inputs):
    """Runs a graph as it is, and says so."""

    def run(*values):
        calls.append(len(values))
        return graph.forward(*values)

    return run


@torch._dynamo.register_backend(name="hosfl_fails")
def failing(graph, inputs):
    raise RuntimeError("no compiler here")


@pytest.fixture(params=["whole", "kept"])
def half(request):
    """A client half of four layers, and inputs; "kept": the first two do not move, and run once a round."""
    torch.manual_seed(0)
    model = random_trunk("bert", **BERT).eval()
    trains = "*layer.[23].*bias" if request.param == "kept" else "*bias"
    return select_trainable(split(model, 4).client, trains, 0), example_inputs(model)


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided"])
def test_the_numbers_are_those_of_plain_passes(half, estimator, graphs):
    half, inputs = half
    begins = blocks_of(half, 1, inputs)
    multiplier = torch.randn(call(half, inputs).shape, generator=torch.Generator().manual_seed(1))
    plain = client_of(half, inputs, begins, estimator=estimator)
    compiled = [client_of(half, inputs, begins, estimator=estimator, compile="hosfl_counts") for _ in range(3)]
    before = compiled[0].digest()
    expected = [answer(plain, multiplier, round) for round in range(2)]
    for client in compiled:
        for round in range(2):
            calls.clear()
            found = answer(client, multiplier, round)
            probes = (1 if estimator == "one-sided" else 2) * client.run.directions
            assert len(calls) == (2 if begins[0].entry else 1) + probes
            assert float((found - expected[round]).abs().max() / expected[round].abs().max()) < 1e-2
        assert client.digest() == before
        if client is compiled[0]:
            once = graphs()
    assert 0 < graphs() == once


def test_batches_of_other_sizes_compile_a_few_times_and_no_more(half, graphs):
    half, _ = half
    for samples, tokens in ((4, 8), (4, 11), (3, 16), (2, 9), (5, 5)):
        inputs = {"input_ids": torch.randint(1, 40, (samples, tokens))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            torch.testing.assert_close(call_compiled("eager", half, inputs), call(half, inputs))
        if samples == 3:
            twice = graphs()
    assert graphs() == twice


def test_inductor():
    half = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(3, 5)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(call_compiled("inductor", half, x), half(x))
            half[0].weight += 1  # in place: what was compiled reads it


def test_a_run(tmp_path):
    plain = train(Config(**SMALL))
    compiled = train(Config(**SMALL, compile="eager"), out=tmp_path / "run")
    assert compiled.replicas.equal
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-3)
    assert "compile" not in Config(**SMALL).decisive()  # logs from before it are logs of the same runs
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"directions_from": "fresh", "rule": "adamw"}, "rule adamw (it may be normalized or sgd)"),
        ({"dist": "gaussian"}, "dist gaussian (it may be rademacher)"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 (it may be float32)"),
        ({"probes_at_once": 2}, "probes_at_once 2 (it may be 1)"),
        ({"directions_from": "fresh", "blocks": 2}, "blocks 2 (it may be 1)"),
    ],
    ids=str,
)
def test_it_is_for_probes_in_place_one_by_one(settings, wrong):
    with pytest.raises(
        ValueError, match=f"compile is for probes in place, one by one, and not with {re.escape(wrong)}"
    ):
        Config(compile="eager", **settings)


def test_what_is_no_backend_and_what_fails_are_told():
    with pytest.raises(ValueError, match=r"compile must be a backend .*inductor.*, got 'indctor'"):
        Config(compile="indctor")
    for estimator in ("forward", "backward"):
        with pytest.raises(ValueError, match="compile"):
            Config(compile="eager", estimator=estimator)
    with pytest.raises(ValueError, match=r"compile=hosfl_fails: cannot compile the client half: .*leave compile out"):
        call_compiled("hosfl_fails", nn.Linear(2, 2), torch.ones(1, 2))

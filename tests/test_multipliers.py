"""What the server sends back: multipliers without the common shift, and none at all while it learns alone."""

from dataclasses import replace

import pytest
import shifted
import torch
from safetensors.torch import load_file
from test_baselines import flat_gradient
from test_grouped import cut, equal, served
from torch import nn

from hosfl import Config, train
from hosfl.methods.server import centered
from hosfl.protocol.aggregate import AGGREGATIONS
from hosfl.protocol.log import Log
from hosfl.runs.assemble import assemble

SIZES = (12, 3, 7, 1)
SMALL = {
    "rounds": 5,
    "clients": 4,
    "sampled": 3,
    "batch": 16,
    "server_rate": 0.1,
    "client_rate": 0.1,
    "server_decay": 0.0,
}
QUICK = Config(**SMALL)


def head():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def slopes(half, cuts):
    """d (each cut's own mean loss) / d output, for all samples: by hand."""
    outputs = half(torch.cat([c.cut for c in cuts])).detach()
    labels = torch.cat([c.labels for c in cuts]).long()
    sizes = torch.tensor([len(c.labels) for c in cuts])
    return (outputs.softmax(1) - nn.functional.one_hot(labels, 2)) / sizes.repeat_interleave(sizes)[:, None]


def pulled_back(half, cuts, slopes):
    """To the cuts, by the half's derivative: one tensor for each client."""
    where = torch.cat([c.cut for c in cuts]).requires_grad_()
    (found,) = torch.autograd.grad(half(where), where, slopes)
    return found.split([len(c.labels) for c in cuts])


# --- centered -------------------------------------------------------------------------------------------------------


def test_a_multiplier_leaves_out_what_shifts_all_outputs_alike():
    cuts = [cut(m, samples, 6) for m, samples in enumerate(SIZES)]
    server = served(head(), (6,), 0, centered=True)
    answers, _ = server.step(0, cuts)
    mine = slopes(server.half, cuts).split(SIZES)
    without = torch.cat([g - g.mean(0) for g in mine])
    for client, expected in enumerate(pulled_back(server.half, cuts, without)):
        assert torch.allclose(answers[client].multiplier, expected, atol=1e-7)
    assert not answers[3].multiplier.any()  # nothing is left of a single sample
    assert answers[0].multiplier.abs().max() > 0.01


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
def test_a_shift_is_that_of_all_samples_in_a_pass(aggregation):
    """Each counts as it does in the round's loss: a client of few samples counts more for each with uniform weights."""
    cuts = [cut(m, samples, 6) for m, samples in enumerate(SIZES)]
    server = served(head(), (6,), 100, centered=True, aggregation=AGGREGATIONS[aggregation])
    answers, _ = server.step(0, cuts)
    counts = torch.tensor(SIZES)
    shares = counts / counts.sum() if aggregation == "weighted" else torch.full((4,), 0.25)
    mine = slopes(server.half, cuts)
    shift = sum(share * of.sum(0) for share, of in zip(shares, mine.split(SIZES), strict=True))
    without = mine - shift / counts.repeat_interleave(counts)[:, None]
    for client, expected in enumerate(pulled_back(server.half, cuts, without)):
        assert torch.allclose(answers[client].multiplier, expected, atol=1e-7)
    assert answers[3].multiplier.abs().max() > 0.01


@pytest.mark.parametrize("most", [0, 100])
def test_the_servers_own_step_is_exact(most):
    cuts = [cut(m, samples, 6) for m, samples in enumerate(SIZES)]
    exact, other = (served(head(), (6,), most, centered=c) for c in (False, True))
    (_, loss), (_, other_loss) = exact.step(0, cuts), other.step(0, cuts)
    assert loss == other_loss
    assert torch.allclose(flat_gradient(exact.half), flat_gradient(other.half), rtol=1e-5, atol=1e-8)
    assert exact.passes == other.passes


def test_centered_slopes_add_up_to_nothing():
    found = centered(torch.randn(9, 4, 3), torch.rand(9) + 0.1)
    assert found.shape == (9, 4, 3)
    assert found.sum(0).abs().max() < 1e-5


def test_labels_for_every_token_are_refused():
    with pytest.raises(ValueError, match=r"^multiplier = centered is for tasks with one label per sample"):
        served(head(), (9, 6), 0, centered=True, spec={"label_shape": (9,)})


# --- the server half learns alone at first --------------------------------------------------------------------------


WAYS = [{}, {"directions_from": "fresh", "rule": "adamw"}, {"method": "first-order"}]


@pytest.mark.parametrize("settings", WAYS)
def test_nobody_is_asked_anything_while_the_server_half_learns_alone(settings):
    run, _ = assemble(replace(QUICK, **settings, server_first=4))
    control, _ = assemble(replace(QUICK, method="frozen", client_rate=None))
    base = [p.clone() for p in run.base.parameters()]

    def moved():
        run.server.ledger.show(run.observed)
        return not all(map(torch.equal, run.observed.parameters(), base))

    losses = [(run.round(round), control.round(round)) for round in range(4)]
    assert "multiplier down" not in run.messenger.wire.bytes
    assert run.took_part == control.took_part
    assert not moved()
    if settings:  # without a lattice, on which a half's first weights are put
        assert all(one == other for one, other in losses)
        assert all(map(torch.equal, run.server.half.parameters(), control.server.half.parameters()))
    run.round(4)
    assert moved()
    assert run.messenger.wire.bytes["multiplier down"] > 0


@pytest.mark.parametrize("settings", WAYS)
def test_a_run_that_was_killed_while_the_server_learnt_alone(settings, tmp_path):
    config = {"snapshot_every": 1, "server_first": 3, **settings}

    def ended(folder, **more):
        summary = train(shifted.make(), folder, **SMALL, **config, **more)
        return summary.loss, load_file(folder / "server.safetensors")

    whole = ended(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        ended(tmp_path / "killed", progress=lambda done, *_: 1 // (2 - done))
    assert equal(whole, ended(tmp_path / "killed", resume=True))
    with pytest.raises(ValueError, match="server_first was 3, is 2"):
        config["server_first"] = 2
        ended(tmp_path / "killed", resume=True)


def test_the_log_says_that_nobody_took_part(tmp_path):
    train(shifted.make(), tmp_path, **SMALL, server_first=2)
    assert [bool(record.participants) for record in Log.read(tmp_path / "hosfl.log").rounds] == [False] * 2 + [True] * 3


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 4, 5])
def test_a_server_that_would_learn_alone_to_the_end_is_refused(rounds):
    with pytest.raises(ValueError, match=f"server_first=5 leaves none of {rounds} rounds"):
        Config(server_first=5, rounds=rounds)
    assert Config(server_first=5, rounds=6).server_first == 5


@pytest.mark.parametrize("setting", [{"multiplier": "centered"}, {"server_first": 2}])
@pytest.mark.parametrize("method", ["frozen", "hosl", "zo-both", "splitfed"])
def test_methods_that_do_not_read_them(method, setting):
    with pytest.raises(ValueError, match=f"would do nothing with method '{method}'"):
        assemble(Config(method=method, **setting))


@pytest.mark.parametrize("setting", [{"multiplier": "centered"}, {"server_first": 2}])
def test_a_run_without_them_is_described_as_before_there_were_any(setting):
    assert not setting.keys() & Config().decisive().keys()
    assert setting.items() <= Config(**setting).decisive().items()

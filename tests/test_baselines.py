"""The baselines: each learns, by the formula that its docstring gives, and sends no byte that the protocol does not."""

import copy
from dataclasses import replace

import pytest
import torch
from small import REPLAYED
from test_probe import peak_bytes
from torch import nn

from hosfl import Config, train
from hosfl.cli import main
from hosfl.methods import METHODS
from hosfl.methods.checkpointed import recomputing
from hosfl.methods.ledger import load_vector, make_optimizer
from hosfl.probing.probe import trainable
from hosfl.protocol.messages import Cut, Hello, Losses, MessageError, Trained, Wire, encode
from hosfl.protocol.seeds import Purpose, direction_seeds
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared
from hosfl.runs.evaluate import evaluate
from hosfl_kernels import derive, perturb_

NEW = ("checkpointed", "splitfed", "zo-both", "hosl", "mu-splitfed")
SMALL = {"rounds": 10, "batch": 4, "directions": 3, "clients": 4, "sampled": 4, "local_steps": 3, "evaluate_every": 10}
RATES = {"server_rate": 0.03, "client_rate": 0.05}


def config(method, shared=SMALL, **own):
    """Of `shared` what the method reads."""
    return Config(**with_shared({"method": method, **own}, RATES | shared))


def directions(parameters, streams, seeds, dist="rademacher"):
    """u_p as flat vectors, one per seed."""
    found = []
    for seed in seeds:
        pieces = [torch.zeros(p.shape) for p in parameters]
        perturb_(pieces, seed, 1.0, dist=dist, streams=streams)
        found.append(torch.cat([p.reshape(-1) for p in pieces]))
    return found


def flat(half):
    return nn.utils.parameters_to_vector(trainable(half)[0]).detach().clone()


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.learning
@pytest.mark.parametrize("half", ["client", "server"])
@pytest.mark.parametrize("method", NEW)
def test_each_half_learns_while_the_other_stands_still(method, half, seed, below):
    """The share of the test loss that 20 rounds leave: all of it, where nothing is learned."""
    quick = {"rounds": 20, "batch": 32, "clients": 2, "sampled": 2, "local_steps": 2, "schedule": "constant"}
    quick |= {"directions": 30 if method in REPLAYED else 15, "server_decay": 0.0}
    rates = {"server_rate": 1e-30, "client_rate": 1e-30}
    client = {"checkpointed": 1.0, "splitfed": 0.2, "hosl": 0.5}.get(method, 1.5)
    rates |= {"client": {"client_rate": client}, "server": {"server_rate": 0.03}}[half]
    federation, task = assemble(config(method, quick, seed=seed, **rates))

    def loss():
        return evaluate(federation.model(), task.test, task)[1]

    before = loss()
    for round in range(20):
        federation.round(round)
    below(loss() / before, 0.95)
    assert federation.server.refused == federation.messenger.complaints == []
    assert federation.compare_replicas().equal


@pytest.mark.parametrize("method", NEW)
def test_a_seed_is_a_run(method):
    one, two, other = (train(config(method, seed=seed)) for seed in (3, 3, 4))
    assert one.replicas.digest == two.replicas.digest != other.replicas.digest
    assert (one.loss, one.bytes, one.passes) == (two.loss, two.bytes, two.passes)


# --- what is moved, and what is computed ----------------------------------------------------------------------------


def test_bytes_are_those_of_the_protocol():
    base = assemble(config("ho"))[0].base
    d, visits = 4 * len(flat(base)), 10 * 4
    z = 4 * base(torch.zeros(4, 1, 8, 8)).numel()
    whole = {"weights down": (visits - 4) * d}  # in the first round everybody has them
    expected = {
        "checkpointed": {"cut up": z, "labels up": 16, "multiplier down": z, "gradient up": d},
        "splitfed": {"cut up": 3 * z, "labels up": 3 * 16, "multiplier down": 3 * z, "weights up": d},
        "zo-both": {"cut up": 4 * z, "labels up": 16},
        "hosl": {"cut up": 7 * z, "labels up": 16, "losses down": 4 * 6, "weights up": d},
        "mu-splitfed": {"cut up": 4 * z, "labels up": 16},
    }
    for method, each in expected.items():
        found = train(config(method)).bytes
        framing = {name: found.pop(name) for name in ("framing up", "framing down")}
        records = {"scalars down": (visits - 4) * 3 * 4}
        assert found == {k: v * visits for k, v in each.items()} | (records if method in NEW[2::2] else whole), method
        assert all(0 < size < 400 * visits for size in framing.values())
    two_sided = train(config("zo-both", estimator="two-sided")).bytes
    assert two_sided["cut up"] == 7 * z * visits


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "backward"])
@pytest.mark.parametrize("method", METHODS)
def test_passes_are_those_that_ran(method, estimator):
    if estimator == "backward" and method in ("zo-both", "hosl", "mu-splitfed"):
        return  # they see losses
    federation, _ = assemble(config(method, SMALL | {"estimator": estimator}))
    counted = {"client forward": 0, "client backward": 0, "server forward": 0, "server backward": 0}

    def watch(first_layer, side):
        def backward(gradient):
            counted[f"{side} backward"] += len(gradient)

        def forward(module, inputs, output):
            counted[f"{side} forward"] += len(output)
            if output.requires_grad:
                output.register_hook(backward)

        first_layer.register_forward_hook(forward)

    make = federation.make_client

    def watched(number):
        client = make(number)
        watch(client.half[0], "client")
        return client

    federation.make_client = watched
    watch(federation.server.half[0], "server")
    for round in range(3):
        federation.round(round)
    assert {k: federation.server.passes[k] for k in counted} == counted


# --- checkpointed ---------------------------------------------------------------------------------------------------


def test_checkpointed_is_first_order_to_the_bit():
    ours, theirs = (train(config(m)) for m in ("checkpointed", "first-order"))
    assert ours.replicas == theirs.replicas
    assert (ours.loss, ours.bytes) == (theirs.loss, theirs.bytes)
    assert ours.passes["client forward"] == 1.5 * theirs.passes["client forward"]


class Stack(nn.Module):
    """Blocks in an nn.ModuleList, as transformers have them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    ("make", "share"),
    [(Stack, 0.35), (lambda: nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(16))), 0.6)],
)
def test_recomputing_takes_less_memory_for_the_same_gradients(make, share):
    torch.manual_seed(0)
    half, x = make().eval(), torch.randn(512, 32)
    weights = list(half.parameters())

    def gradients():
        return torch.autograd.grad(half(x).square().mean(), weights)

    def recomputed():
        with recomputing(half):
            output = half(x)
        return torch.autograd.grad(output.square().mean(), weights)

    expected, found = gradients(), recomputed()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not [m for m in half.modules() if "forward" in vars(m)]
    assert peak_bytes(recomputed) < share * peak_bytes(gradients)


def test_recomputing_leaves_no_trace_after_an_error():
    half = Stack()
    own = half.layers[0].forward = half.layers[0].forward  # as some libraries put it there
    with pytest.raises(RuntimeError), recomputing(half):
        half(torch.randn(2, 3))
    assert vars(half.layers[0])["forward"] is own
    assert not [m for m in half.layers[1:] if "forward" in vars(m)]


# --- SplitFed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "normalized"])
def test_splitfed_of_one_client_and_one_step_is_split_learning(rule):
    """normalized: the first round only, as the running length of a SplitFed client starts anew in every round."""
    rounds = 5 if rule == "sgd" else 1
    same = {
        **SMALL,
        "clients": 1,
        "sampled": 1,
        "local_steps": 1,
        "rounds": rounds,
        "rule": rule,
        "server_decay": 0.0,
    }
    ours, theirs = (train(config(m, same)) for m in ("splitfed", "first-order"))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    if rule == "sgd":
        assert ours.replicas == theirs.replicas
        assert ours.loss == theirs.loss


def test_splitfed_is_local_sgd_and_a_mean_by_samples():
    federation, task = assemble(config("splitfed", rule="sgd", schedule="constant", batch=300))
    server = copy.deepcopy(federation.server.half)
    optimizer = task.optimizer(server, 0.0)
    for group in optimizer.param_groups:
        group.update(lr=0.03, weight_decay=federation.server.optimizer.param_groups[0]["weight_decay"])
    halves = [copy.deepcopy(federation.base) for _ in range(4)]
    batches = [federation.make_client(m).batch for m in range(4)]
    samples = torch.tensor([float(len(batch(0)[1])) for batch in batches])
    assert len(set(samples.tolist())) > 1
    for round in range(2):
        for step in range(3):
            optimizer.zero_grad()
            for half, batch, share in zip(halves, batches, samples / samples.sum(), strict=True):
                x, y = batch(3 * round + step)
                loss = task.loss(server(half(x)), y)
                weights = trainable(half)[0]
                own = torch.autograd.grad(loss, weights, retain_graph=True)
                (loss * share).backward(inputs=list(server.parameters()))
                with torch.no_grad():
                    for weight, gradient in zip(weights, own, strict=True):
                        weight -= 0.05 * gradient
            optimizer.step()
        mean = (samples[:, None] * torch.stack([flat(half) for half in halves])).sum(0) / samples.sum()
        for half in halves:
            load_vector(mean, trainable(half)[0])
        federation.round(round)
    assert torch.allclose(federation.server.ledger.weights, mean, atol=1e-6)
    for a, b in zip(federation.server.half.parameters(), server.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


class Lossy(Wire):
    """Loses a message of a client."""

    def __init__(self, client, after):
        super().__init__()
        self.client, self.left = client, after

    def carry(self, client, messages):
        return self._lost(client, super().carry(client, messages))

    def bring(self, client, data):
        return self._lost(client, data)

    def _lost(self, client, data):
        if client == self.client:
            self.left -= 1
            return None if self.left == 0 else data
        return data


@pytest.mark.parametrize("after", range(1, 10))
def test_a_splitfed_client_that_is_lost_on_the_way_costs_nobody_else_the_round(after):
    federation, _ = assemble(config("splitfed"))
    federation.round(0)
    before = federation.server.ledger.weights.clone()
    federation.messenger.wire = Lossy(1, after)
    federation.round(1)
    federation.messenger.wire = Wire()
    assert not torch.equal(federation.server.ledger.weights, before)
    federation.round(2)
    assert federation.server.refused == federation.messenger.complaints == []
    assert federation.compare_replicas().equal


@pytest.mark.parametrize(("rule", "moves"), [("sgd", (1.0, 1.0)), ("momentum", (1.0, 1.9)), ("adamw", (1.0, 1.0))])
def test_the_server_s_optimizer_is_that_of_its_name(rule, moves):
    weights = torch.zeros(2)
    optimizer = make_optimizer(rule, [weights])
    for move in moves:
        before, weights.grad = weights.clone(), torch.tensor([1.0, -1.0])
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer.step()
        assert (before - weights).tolist() == pytest.approx([move, -move], rel=1e-5)


def test_coarse_halves_learn_by_small_steps():
    """bfloat16 weights near 0.3 do not see a step of 1e-4; the average is kept in float32."""
    federation, _ = assemble(config("splitfed", dtype="bfloat16", server_rate=1e-30, client_rate=1e-3))
    before = federation.server.ledger.weights.clone()
    for round in range(10):
        federation.round(round)
    moved = (federation.server.ledger.weights - before).norm()
    assert 0.25 * 0.0165 < moved < 0.0165 * 1.01  # at most sum of rates = 3 x 1e-3 x 5.5


# --- zeroth order ---------------------------------------------------------------------------------------------------


def loss_of(federation, task, number, round):
    """A client's loss in float64 as a function of moves of its half and of the server's, flat."""
    x, y = federation.make_client(number).batch(round)
    halves = [copy.deepcopy(half).double().eval() for half in (federation.base, federation.server.half)]
    starts = [flat(half) for half in halves]

    def loss(*moves):
        for half, start, move in zip(halves, starts, moves, strict=True):
            load_vector(start + move, trainable(half)[0])
        with torch.no_grad():
            return float(task.loss(halves[1](halves[0](x.double())), y))

    return loss


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided"])
def test_zo_both_measures_both_halves_losses(estimator):
    federation, task = assemble(config("zo-both", estimator=estimator, clients=2, sampled=2, batch=32))
    server, mu, behind = federation.server, federation.server.ledger.mirror.mu, float(estimator == "two-sided")
    losses = [loss_of(federation, task, m, 0) for m in range(2)]
    client_place, server_place = trainable(federation.base), trainable(server.half)
    u = directions(*client_place, server.ledger.run.seeds(0))
    v = directions(*server_place, direction_seeds(0, 0, 3, Purpose.SERVER))
    found = []
    server.optimizer.step = lambda: found.append(flat_gradient(server.half))
    answers, loss = server.step(0, [federation.load_client(m).output(0) for m in range(2)])
    assert answers == {}
    assert loss == pytest.approx(sum(of(0, 0) for of in losses) / 2, rel=1e-5)
    own = torch.zeros(len(v[0]))
    for m, of in enumerate(losses):
        slopes = [(of(mu * u_p, 0) - of(-behind * mu * u_p, 0)) / (mu * (1 + behind)) for u_p in u]
        assert server._scalars[m].scalars.tolist() == pytest.approx(slopes, rel=0.01, abs=2e-3)
        assert max(map(abs, slopes)) > 0.1
        for v_q in v:
            own += (of(0, 1e-3 * v_q) - of(0, -behind * 1e-3 * v_q)) / (1e-3 * (1 + behind)) * v_q / 3 / 2
    assert torch.allclose(found[0], own, rtol=0.01, atol=2e-3)
    assert own.abs().max() > 0.1


def flat_gradient(half):
    return torch.cat([p.grad.reshape(-1) for p in trainable(half)[0]])


def test_mu_splitfed_takes_more_steps_of_the_server():
    steps = {}
    for method in ("zo-both", "mu-splitfed"):
        federation, _ = assemble(config(method))
        taken = []
        federation.server.optimizer.step = lambda taken=taken, s=federation.server: taken.append(flat_gradient(s.half))
        federation.round(0)
        steps[method] = torch.stack(taken)
    assert steps["zo-both"].shape[0] == 1
    assert steps["mu-splitfed"].shape[0] == 3
    assert len(steps["mu-splitfed"].unique(dim=0)) == 3  # other directions for every step


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
def test_hosl_steps_along_directions_of_its_own(dist):
    settings = config("hosl", rule="sgd", dist=dist, clients=2, sampled=2, batch=32)
    federation, task = assemble(settings)
    losses = [loss_of(federation, task, m, 0) for m in range(2)]
    cuts = [federation.load_client(m).output(0) for m in range(2)]
    answers, _ = federation.server.step(0, cuts)
    shared = direction_seeds(0, 0, 3, Purpose.OWN)
    for m, of in enumerate(losses):
        u = directions(*trainable(federation.base), [derive(seed, m, 0) for seed in shared], dist)
        moved = flat(federation.base) - federation.load_client(m).answer(answers[m]).weights
        expected = 0.05 * sum((of(1e-3 * u_p, 0) - of(-1e-3 * u_p, 0)) / 2e-3 * u_p for u_p in u) / 3
        assert torch.allclose(moved, expected, rtol=0.01, atol=1e-4)
        assert expected.abs().max() > 0.005
    with torch.no_grad():
        server = federation.server.half
        before = assemble(settings)[0].server.half
        assert not all(torch.equal(a, b) for a, b in zip(server.parameters(), before.parameters(), strict=True))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zo-both", "hosl"])
def test_servers_refuse_wrong_displaced_cuts(method):
    federation, _ = assemble(config(method))
    server, client = federation.server, federation.load_client(0)
    good = client.output(0)
    assert server.receive(encode(good)) is not None  # not too large to be read
    moved = good.displaced
    state = {k: v.clone() for k, v in server.half.state_dict().items()}
    wrong = [
        replace(good, displaced=moved[1:]),
        replace(good, displaced=moved[:, 1:]),
        replace(good, displaced=moved[..., :-1]),
        replace(good, displaced=moved.bfloat16()),
        replace(good, displaced=moved * torch.inf),
        replace(good, cut=good.cut * torch.nan),
        replace(good, client=4),
        replace(good, round=1),
        Cut(client=0, round=0, cut=good.cut, labels=good.labels),
        Trained(client=0, round=0, weights=torch.zeros(416)),
    ]
    answers, loss = server.step(0, wrong)
    assert (answers, len(server.refused)) == ({}, len(wrong))
    assert loss != loss
    assert "in the displaced cuts" in server.refused[4]
    measured, server.loss = server.loss, lambda output, labels: output.sum() * torch.nan
    assert server.step(0, [good])[0] == {}
    assert "whose losses are" in server.refused[-1]
    server.loss = measured
    assert all(torch.equal(v, state[k]) for k, v in server.half.state_dict().items())
    server.commit(0, [])
    assert federation.compare_replicas().digest == federation.make_client(0).digest()


@pytest.mark.parametrize("method", ["ho", "first-order", "splitfed"])
def test_servers_that_measure_no_losses_refuse_displaced_cuts(method):
    probed = assemble(config("hosl"))[0].load_client(0).output(0)
    server = assemble(config(method))[0].server
    assert server.step(0, [probed])[0] == {}
    assert "ProbedCut" in server.refused[0]


def test_an_average_refuses_wrong_weights_and_forgets_nobody():
    federation, _ = assemble(config("splitfed", local_steps=1))
    server, ledger = federation.server, federation.server.ledger
    cuts = [federation.load_client(m).output(0) for m in range(3)]
    answers, _ = server.step(0, cuts)
    good = federation.load_client(0).answer(answers[0])
    wrong = [
        replace(good, client=1, weights=good.weights[1:]),
        replace(good, client=1, weights=good.weights * torch.nan),
        replace(good, client=1, round=1),
        replace(good, client=1, epoch=1),
        replace(good, client=3),  # sent no cut
        good,  # a second one
        cuts[1],
    ]
    server.commit(0, [good, *wrong])
    assert len(server.refused) == len(wrong)
    assert torch.equal(ledger.weights, good.weights)
    assert torch.equal(ledger.since(Hello(client=1, round=0)).weights, good.weights)
    assert ledger.since(Hello(client=1, round=1)).weights.numel() == 0


def test_hosl_clients_refuse_wrong_losses():
    federation, _ = assemble(config("hosl"))
    client = federation.load_client(0)
    client.output(0)
    before = client.digest()
    good = Losses(client=0, round=0, losses=torch.rand(6))
    for wrong, message in [
        (replace(good, client=1), "for client 1"),
        (replace(good, round=1), "of round 1"),
        (replace(good, epoch=1), "epoch 1"),
        (replace(good, losses=torch.rand(5)), "5 losses"),
        (replace(good, losses=torch.full((6,), torch.nan)), "NaN"),
        (replace(good, losses=torch.tensor([3e38, -3e38, 0, 0, 0, 0])), "too far apart"),
        (Trained(client=0, round=0, weights=torch.zeros(416)), "expects losses"),
    ]:
        with pytest.raises(MessageError, match=message):
            client.answer(wrong)
        assert client.digest() == before
    client.answer(good)
    assert client.digest() != before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "zo-both", "estimator": "forward"}, "sees losses"),
        ({"method": "hosl", "estimator": "forward"}, "sees losses"),
        ({"method": "mu-splitfed", "estimator": "backward"}, "sees losses"),
        ({"microbatch": -1}, "microbatch must be at least 0"),
        ({"method": "splitfed", "local_steps": 0}, "local_steps must be at least 1"),
        ({"method": "splitfed", "rounds": 2**31, "local_steps": 2}, "can be numbered"),
        ({"method": "splitfed", "rule": "momentum"}, "no rates are tuned for splitfed momentum"),
    ],
)
def test_settings_that_cannot_work(settings, reason):
    with pytest.raises(ValueError, match=reason):
        assemble(Config(**settings))


def test_the_command_line_knows_them(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    helped = capsys.readouterr().out
    assert all(method in helped for method in METHODS)
    rates = ["--server-rate", "0.03", "--client-rate", "0.05"]
    small = ["--rounds", "2", "--batch", "4", "--seeds", "0", "--out", str(tmp_path / "c"), *rates]
    assert main(["compare", "--methods", "splitfed", "hosl", *small]) == 0
    shown = capsys.readouterr().out
    for line in ("bytes, losses down", "bytes, weights up", "samples, client forward", "samples, server backward"):
        assert line in shown

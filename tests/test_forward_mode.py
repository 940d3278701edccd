"""Forward mode and the estimators: the exact derivative, for every family, in one layer's memory, without a trace."""

import copy
import json

import pytest
import torch
from test_probe import peak_bytes
from test_split import IMAGES, TEXT, ResNet, differentiable, image_model, text, text_model
from torch import nn

from benchmarks.tables import RESULTS
from hosfl import Config, Task, train
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.split import split
from hosfl.methods.first_order import FirstOrderClient
from hosfl.probing import probe
from hosfl.probing.batched import probe_forward_batched
from hosfl.probing.forward_mode import Tangents, derivative
from hosfl.probing.probe import (
    PerturbedTensors,
    probe_backward,
    probe_forward,
    probe_in_place,
    probe_untouched,
    trainable,
)
from hosfl.protocol.lattice import Lattice
from hosfl.protocol.messages import Multiplier
from hosfl.protocol.replica import digest
from hosfl_kernels import noise

SEED = 7


def directions(half, dist="rademacher"):
    parameters, streams = trainable(half)
    z = [noise(p.numel(), SEED, stream=s, dist=dist) for p, s in zip(parameters, streams, strict=True)]
    return [u.to(p.dtype).view_as(p) for u, p in zip(z, parameters, strict=True)]


def tangents(half, dist="rademacher", factors=None):
    return Tangents(*trainable(half), SEED, dist, factors)


@torch.no_grad()
def difference(half, inputs, mu, dist="rademacher"):
    """(f(th + mu u) - f(th - mu u)) / (2 mu), on copies."""
    moved = [copy.deepcopy(half) for _ in range(2)]
    for sign, other in zip((1, -1), moved, strict=True):
        for p, u in zip(trainable(other)[0], directions(half, dist), strict=True):
            p.add_(u, alpha=sign * mu)
    return (call(moved[0], inputs) - call(moved[1], inputs)) / (2 * mu)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# Where a model computes in float64 throughout, a step of 1e-6 has an error of the order of 1e-9; where it casts its
# normalisations to float32 whatever its weights are, differences of float32 numbers are compared.
PURE = ("gpt2", "bert", "roberta", "xlm-roberta")


@pytest.mark.families
@pytest.mark.parametrize("family", TEXT)
def test_the_derivative_of_every_text_family(family):
    half = split(differentiable(family), 2).client.double()
    inputs = text("none")
    with evaluating(half):
        found = derivative(half, inputs, tangents(half))
        assert found.dtype == torch.float64
        if family == "opt":  # ReLU: its kinks need a small step
            assert relative(found, difference(half, inputs, 1e-9)) < 1e-5
        elif family in PURE:
            assert relative(found, difference(half, inputs, 1e-6)) < 1e-7
        else:
            assert relative(found, difference(half, inputs, 1e-4)) < 1e-3


@pytest.mark.families
@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("padding", ["left", "all"])
def test_padding_gives_no_nan(family, padding):
    half = split(differentiable(family), 2).client
    with evaluating(half):
        found = derivative(half, text(padding), tangents(half))
        assert torch.isfinite(found).all()
        assert relative(found[0], derivative(half, text("none"), tangents(half))[0]) < 1e-4  # nobody else's concern


@pytest.mark.parametrize("family", [*IMAGES, "torchvision"])
def test_the_derivative_of_every_image_family(family):
    torch.manual_seed(0)
    model = ResNet(False).eval() if family == "torchvision" else image_model(family)
    half = split(model, 5 if family == "torchvision" else 1).client.double()
    x = torch.randn(2, 3, 16, 16).double()
    with evaluating(half):
        assert relative(derivative(half, x, tangents(half)), difference(half, x, 1e-9)) < 1e-5


class Everything(nn.Module):
    """Layers that have weights, and ways to read them, each with its trap."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # in eval mode: a fused kernel
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.tied = nn.Linear(8, 50, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) * self.table.weight.shape[1]
        x = x + self.attention(x, x, x)[0]
        x = self.encoder(x)
        x = self.frozen(self.convolution(x.mT).mT)
        return self.tied(x)


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
def test_layers_with_traps(dist):
    torch.manual_seed(0)
    module = Everything().eval().double()
    ids = torch.tensor([[1, 2, 3, 49, 0], [5, 5, 48, 2, 1]])
    with evaluating(module):
        before = digest(list(module.parameters()))
        found = derivative(module, ids, tangents(module, dist))
        assert relative(found, difference(module, ids, 1e-8, dist)) < 1e-6
        assert torch.equal(found, derivative(module, ids, tangents(module, dist)))
        assert digest(list(module.parameters())) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_factors_scale_the_directions():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval(), torch.randn(5, 3)
    parts = []
    with evaluating(module):
        scaled = derivative(module, x, tangents(module, factors=[0.5, 2.0, 1.0, 0.25]))
        for moving in module.parameters():
            module.requires_grad_(False)
            moving.requires_grad_(True)
            parts.append(derivative(module, x, tangents(module)))
    expected = sum(f * part for f, part in zip((0.5, 2.0, 1.0, 0.25), parts, strict=True))
    assert torch.allclose(scaled, expected, atol=1e-6)


def test_a_module_whose_output_does_not_depend_on_what_moves():
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.ReLU())
    with evaluating(module):
        assert torch.equal(derivative(module, torch.ones(1, 2), tangents(module)), torch.zeros(1, 2))
        assert torch.equal(probe_backward(module, torch.ones(1, 2), torch.ones(1, 2), [1], "gaussian"), torch.zeros(1))
    idle = nn.Sequential(nn.ReLU())
    idle.idle = nn.Linear(2, 2)
    idle.forward = idle[0].forward
    with evaluating(idle):
        assert torch.equal(probe_backward(idle, torch.ones(1, 2), torch.ones(1, 2), [1, 2], "gaussian"), torch.zeros(2))


def test_what_cannot_be_differentiated_is_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    class Extension(nn.Linear):
        def forward(self, x):
            return Opaque.apply(super().forward(x))

    module = Extension(2, 2)
    before = digest(list(module.parameters()))
    with evaluating(module), pytest.raises(ValueError, match=r"another estimator than forward.*jvp"):
        derivative(module, torch.ones(1, 2), tangents(module))
    assert digest(list(module.parameters())) == before
    assert type(module.weight) is nn.Parameter
    for module, x in (
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), torch.ones(1, 2)),
        (nn.EmbeddingBag(5, 2), torch.ones(1, 2, dtype=torch.int64)),
    ):
        with evaluating(module), pytest.raises(ValueError, match="another estimator than forward"):
            derivative(module, x, tangents(module))
        with evaluating(module), pytest.raises(ValueError, match="another estimator than forward"):
            probe_forward_batched(module, x, torch.ones(1, 2), [1, 2], "rademacher", at_once=2)
    limited = nn.Embedding(5, 2, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        derivative(limited, torch.tensor([1]), tangents(limited))


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_is_one_layer():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(4096, 256), *(nn.Linear(256, 256) for _ in range(12))).eval()
    ids = torch.randint(0, 4096, (2, 4))
    layer = 4 * (256 * 256 + 256)
    with torch.no_grad():
        activations = peak_bytes(lambda: module(ids))
        found = peak_bytes(lambda: derivative(module, ids, tangents(module)))
    assert sum(p.nbytes for p in module.parameters()) > 20 * layer
    assert found < 2 * layer + 2 * activations + 100_000


# --- estimators ---------------------------------------------------------------------------------------------------


def small_half(dtype=torch.float32):
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x = torch.randn(8, 6).to(dtype)
    return half, x, torch.randn(8, 4).to(dtype)


def exact(half, x, multiplier, seeds):
    """<multiplier, J u> by backpropagation in float64."""
    half = copy.deepcopy(half).double()
    gradients = torch.autograd.grad(half(x.double()), list(half.parameters()), multiplier.double())
    found = []
    for seed in seeds:
        z = [noise(g.numel(), seed, stream=s).double().view_as(g) for s, g in enumerate(gradients)]
        found.append(sum(float((g * u).sum()) for g, u in zip(gradients, z, strict=True)))
    return torch.tensor(found)


def test_the_estimators_measure_the_same_number():
    half, x, multiplier = small_half()
    parameters = trainable(half)[0]
    mu = Lattice.snap(parameters, [1.0] * 4).nearest(2.0**-7)
    seeds = [1, 2, 3, 4]
    expected = exact(half, x, multiplier, seeds)
    before = digest(parameters)
    errors = {}
    with evaluating(half):
        cut = half(x)
        for two_sided in (False, True):
            place = probe_in_place(
                lambda: half(x), PerturbedTensors.of(half), multiplier, cut, seeds, mu, two_sided=two_sided
            )
            assert digest(parameters) == before
            untouched = probe_untouched(half, x, multiplier, cut, seeds, mu, "rademacher", two_sided=two_sided)
            assert torch.equal(place, untouched)
            errors[two_sided] = relative(place, expected)
        errors["forward"] = relative(probe_forward(half, x, multiplier, seeds, "rademacher"), expected)
        errors["backward"] = relative(probe_backward(half, x, multiplier, seeds, "rademacher"), expected)
    # The one-sided error is of the order of mu, the two-sided one of mu^2.
    assert max(errors["forward"], errors["backward"]) < 1e-6 < errors[True] < errors[False] / 20
    assert 1e-3 < errors[False] < 0.1


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_an_exception_at_either_side_leaves_no_trace(two_sided, passes):
    half, x, multiplier = small_half()
    parameters = trainable(half)[0]
    mu = Lattice.snap(parameters, [1.0] * 4).nearest(1e-3)
    before, done = digest(parameters), []

    def forward():
        if len(done) == passes:
            raise KeyboardInterrupt
        done.append(digest(parameters))
        assert done[-1] != before
        return half(x)

    with evaluating(half):
        cut = half(x)
        with pytest.raises(KeyboardInterrupt):
            probe_in_place(forward, PerturbedTensors.of(half), multiplier, cut, [1, 2, 3], mu, two_sided=two_sided)
    assert digest(parameters) == before
    assert len(set(done)) == passes


# --- backward -----------------------------------------------------------------------------------------------------


def both_ways(half, inputs, microbatch=0, dist="rademacher", factors=None):
    """Six derivatives by forward mode, and from one backward pass."""
    with torch.no_grad():
        multiplier = torch.randn_like(call(half, inputs))
    if isinstance(inputs, dict):
        multiplier *= inputs["attention_mask"].unsqueeze(-1)  # nobody asks what is made of padding
    seeds = list(range(6))
    with evaluating(half):
        moved = PerturbedTensors.of(half, factors)
        expected = probe_forward(half, inputs, multiplier, seeds, dist, moved)
        return probe_backward(half, inputs, multiplier, seeds, dist, moved, microbatch), expected


@pytest.mark.families
@pytest.mark.parametrize("family", TEXT)
def test_backward_of_every_text_family(family):
    half = split(differentiable(family), 2).client
    assert relative(*both_ways(half, text("left"), 1)) < 1e-4


@pytest.mark.parametrize("family", [*IMAGES, "torchvision"])
def test_backward_of_every_image_family(family):
    torch.manual_seed(0)
    model = ResNet(False).eval() if family == "torchvision" else image_model(family)
    half = split(model, 5 if family == "torchvision" else 1).client
    assert relative(*both_ways(half, torch.randn(3, 3, 16, 16), 2)) < 1e-4


@pytest.mark.parametrize("waiting", [0, 500, probe.MAX_PENDING])
@pytest.mark.parametrize("microbatch", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
def test_some_samples_at_a_time_and_some_gradients(microbatch, dist, waiting, monkeypatch):
    monkeypatch.setattr(probe, "MAX_PENDING", waiting)
    half, x, _ = small_half()
    half[0].weight.requires_grad_(False)  # streams are positions among all parameters
    assert relative(*both_ways(half, x, microbatch, dist, [0.5, 2.0, 4.0])) < 1e-5


def test_backward_through_layers_with_traps():
    torch.manual_seed(0)
    module = Everything().eval()
    before = digest(list(module.parameters()))
    assert relative(*both_ways(module, torch.tensor([[1, 2, 3, 49, 1], [5, 5, 48, 2, 1]]), 1)) < 1e-5
    assert digest(list(module.parameters())) == before
    with pytest.raises(ValueError, match="max_norm"):
        probe_backward(nn.Embedding(5, 2, max_norm=1.0), torch.tensor([1]), torch.ones(1, 2), [1], "rademacher")


def test_backward_of_a_table_makes_the_rows_that_were_looked_up():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(50_000, 64), nn.Flatten(), nn.Linear(192, 4)).eval()
    tokens = torch.tensor([[1, 2, 49_999], [0, 0, 0], [77, 2, 1]])
    for microbatch in (0, 1):
        assert relative(*both_ways(module, tokens, microbatch, factors=[0.5, 2.0, 1.0])) < 1e-5
    multiplier = torch.randn(3, 4)
    with evaluating(module):
        assert peak_bytes(lambda: probe_backward(module, tokens, multiplier, [1, 2], "rademacher")) < 200_000


class Scaled(nn.Embedding):
    """As some of transformers', with a forward pass of its own."""

    def forward(self, tokens):
        return 2 * super().forward(tokens)


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, tokens):
        again = nn.functional.embedding(tokens, self.table.tanh(), 1, None, 2.0, True)
        return nn.functional.embedding(tokens, self.table, 1) + again


LOOKUPS = {
    "padding": lambda: nn.Embedding(9, 4, padding_idx=1),
    "by frequency": lambda: nn.Embedding(9, 4, scale_grad_by_freq=True),
    "sparse": lambda: nn.Embedding(9, 4, padding_idx=1, sparse=True),
    "a forward pass of its own": lambda: Scaled(9, 4, padding_idx=-8),
    "a function": Direct,
    "parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Embedding(9, 4, padding_idx=1)),
}


@pytest.mark.parametrize("microbatch", [0, 1])
@pytest.mark.parametrize("kind", LOOKUPS)
def test_a_lookup_has_the_gradient_of_what_it_computes(kind, microbatch):
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 1, 2], [2, 8, 1]])
    module = nn.Sequential(LOOKUPS[kind](), nn.Flatten(), nn.Tanh()).eval()
    assert relative(*both_ways(module, tokens, microbatch)) < 1e-5


def test_bags_by_frequency():
    torch.manual_seed(0)
    module, multiplier, seeds = nn.EmbeddingBag(9, 4, scale_grad_by_freq=True), torch.randn(2, 4), list(range(6))
    tokens = torch.tensor([[1, 1, 2], [2, 8, 1]])
    with evaluating(module):
        sides = probe_untouched(module, tokens, multiplier, module(tokens), seeds, 1e-2, "rademacher", two_sided=True)
    assert relative(probe_backward(module, tokens, multiplier, seeds, "rademacher"), sides) < 1e-4


def test_backward_leaves_no_trace():
    half, x, multiplier = small_half()
    parameters, _ = trainable(half)
    before = digest(parameters)
    parameters[0].grad = mine = torch.ones_like(parameters[0])

    class Stop(Exception):
        pass

    def stop(module, inputs, output):
        if torch.equal(inputs[0], x[4:6]):
            raise Stop

    with evaluating(half):
        handle = half.register_forward_hook(stop)
        with pytest.raises(Stop):
            probe_backward(half, x, multiplier, [1], "rademacher", microbatch=2)
        handle.remove()
        probe_backward(half, x, multiplier, [1], "rademacher", microbatch=2)
    assert digest(parameters) == before
    assert parameters[0].grad is mine
    assert torch.equal(mine, torch.ones_like(mine))
    assert [p.grad for p in parameters[1:]] == [None] * 3
    half(x).sum().backward()  # no hook is left
    assert not torch.equal(parameters[0].grad, torch.ones_like(mine))


def test_backward_needs_one_layer_and_some_samples():
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh()))).eval()
    x, layer = torch.randn(512, 256), 4 * (256 * 256 + 256)
    multiplier = torch.randn(512, 256)

    def peak(microbatch):
        with evaluating(module):
            return peak_bytes(lambda: probe_backward(module, x, multiplier, [1], "rademacher", microbatch=microbatch))

    whole, parts = peak(0), peak(32)
    assert whole > 12 * x.nbytes  # of every layer's output
    assert parts < 12 * x.nbytes / 16 + probe.MAX_PENDING + 4 * layer


class Shifts(nn.Module):
    """Two parameters whose gradient for one sample is the multiplier itself, in its memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x + self.a.unsqueeze(0) + self.b.view(1, 6)


@pytest.mark.parametrize("microbatch", [0, 1, 2])
def test_gradients_that_share_memory(microbatch):
    half, x, multiplier = Shifts(), torch.randn(3, 6), torch.randn(3, 6)
    assert relative(*both_ways(half, x, microbatch)) < 1e-5
    before = multiplier.clone()
    client = FirstOrderClient(0, half, lambda round: (x, torch.zeros(3)), microbatch=microbatch)
    client.output(0)
    found = client.answer(Multiplier(client=0, round=0, multiplier=multiplier)).gradient
    assert torch.allclose(found, before.sum(0).repeat(2), atol=1e-6)
    assert torch.equal(multiplier, before)


class Compared(nn.Module):
    """A normalisation by the batch it is in, also in eval mode."""

    def __init__(self, kind=nn.BatchNorm1d):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), kind(6, affine=True, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.linear(x).unsqueeze(-1).expand(-1, -1, 3) * torch.arange(1.0, 4.0)).tanh().flatten(1)


@pytest.mark.parametrize("settings", [{"estimator": "backward"}, {"method": "first-order"}, {"method": "splitfed"}])
def test_statistics_of_a_batch_do_not_go_with_a_part_of_it(settings):
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    assert relative(*both_ways(Compared().eval(), x)) < 1e-4
    with pytest.raises(ValueError, match=r"norm is a BatchNorm1d without running statistics.*leave out microbatch"):
        both_ways(Compared().eval(), x, 2)
    assert relative(*both_ways(Compared(nn.InstanceNorm1d).eval(), x, 1)) < 1e-4  # of each sample's own
    data = x, torch.arange(20) % 2
    task = Task((Compared(), nn.Linear(18, 2)), data, data, nn.functional.cross_entropy)
    quick = {
        "rounds": 1,
        "clients": 2,
        "sampled": 2,
        "batch": 4,
        "server_rate": 0.1,
        "client_rate": 0.1,
        "partition": "iid",
    }
    assert not train(task, **quick, **settings).refused
    with pytest.raises(ValueError, match=r"norm is a BatchNorm1d"):
        train(task, **quick, **settings, microbatch=2)


@pytest.mark.parametrize("microbatch", [1, 3, 4])
@pytest.mark.parametrize("method", ["first-order", "checkpointed", "splitfed"])
def test_first_order_some_samples_at_a_time(method, microbatch):
    settings = {"rounds": 3, "clients": 3, "sampled": 2, "batch": 4, "server_rate": 0.1, "client_rate": 0.1}
    some, whole = (train(Config(method=method, microbatch=n, **settings)) for n in (microbatch, 0))
    assert some.loss == pytest.approx(whole.loss, rel=1e-5)
    assert (some.bytes, some.passes) == (whole.bytes, whole.passes)


# --- bfloat16 -----------------------------------------------------------------------------------------------------


def test_bfloat16_needs_forward_mode():
    half, x, multiplier = small_half(torch.bfloat16)
    seeds = list(range(20))
    expected = exact(half, x, multiplier, seeds)
    with evaluating(half):
        forward = relative(probe_forward(half, x, multiplier, seeds, "rademacher"), expected)
        one_sided = relative(probe_untouched(half, x, multiplier, half(x), seeds, 1e-3, "rademacher"), expected)
        backward = relative(probe_backward(half, x, multiplier, seeds, "rademacher"), expected)
    assert max(forward, backward) < 0.02
    assert one_sided > 0.2


def test_a_bfloat16_transformer_is_within_two_percent():
    """At the same rounded weights, in float64; the multiplier rounded as on the wire."""
    torch.manual_seed(1)
    half = split(text_model("bert"), 2).client.bfloat16()
    inputs, seeds = text("left"), list(range(12))
    multiplier = torch.randn(call(half, inputs).shape, dtype=torch.float64)
    exactly = copy.deepcopy(half).double()
    with evaluating(half), evaluating(exactly):
        expected = probe_forward(exactly, inputs, multiplier, seeds, "rademacher")
        multiplier = multiplier.bfloat16()
        forward = relative(probe_forward(half, inputs, multiplier, seeds, "rademacher"), expected)
        cut = call(half, inputs)
        one_sided = [
            relative(probe_untouched(half, inputs, multiplier, cut, seeds, mu, "rademacher"), expected)
            for mu in (1e-2, 1e-3, 1e-4)
        ]
    assert forward < 0.02
    assert min(one_sided) > 0.05


def test_the_results_are_within_two_percent():
    rows = json.loads((RESULTS / "estimators-cpu.json").read_text())["rows"]
    found = {(r["way"], r["mu"]): r["errors"] for r in rows if r["dtype"] == "bfloat16"}
    assert max(found["forward mode", None]) < 0.02
    assert all(min(errors) > 0.05 for (way, mu), errors in found.items() if mu is not None)

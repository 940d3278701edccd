"""Models through which one tensor goes: every cut of theirs is the model, and what has none is refused."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import packages
from test_split import ResNet, randomised
from torch import nn

from hosfl.halves.chain import trace_chain
from hosfl.halves.follow import CutError
from hosfl.halves.split import SplitModel, cut_points, split
from hosfl.halves.verify import verify_halves

TORCHVISION = {
    "mobilenet_v2": "features.10",
    "mobilenet_v3_small": "features.6",
    "efficientnet_b0": "features.4.1",
    "convnext_tiny": "features.5.2",
    "densenet121": "features.transition2",
    "swin_t": "features.3.1",
    "resnet18": "layer3.0",
    "vit_b_16": "encoder.layers.encoder_layer_2",
}
TIMM = {
    "mobilenetv2_100": "blocks.3.1",
    "mobilenetv3_small_100": "blocks.2.0",
    "efficientnet_b0": "blocks.4.0",
    "convnext_atto": "stages.2.blocks.1",
    "densenet121": "features.denseblock3",
    "swin_tiny_patch4_window7_224": "layers.1.blocks.1",
    "resnet18": "layer3.0",
    "vit_tiny_patch16_224": "blocks.5",
}


SLOW = ("mobilenetv2_100", "efficientnet_b0", "densenet121", "resnet18")  # torchvision's are alike


@pytest.mark.parametrize(
    "name",
    [f"torchvision.{n}" for n in TORCHVISION]
    + [pytest.param(f"timm.{n}", marks=[pytest.mark.slow] * (n in SLOW)) for n in TIMM],
)
def test_models_that_people_put_on_devices(name):
    """In the middle by name, verified; everywhere by structure."""
    torchvision, timm = packages()
    package, _, name = name.partition(".")
    torch.manual_seed(0)
    at = (TORCHVISION if package == "torchvision" else TIMM)[name]
    model = getattr(torchvision, name)() if package == "torchvision" else timm.create_model(name, drop_rate=0.1)
    points = cut_points(model)
    assert at in [p.name for p in points]
    assert len(points) > 9
    weights = sum(p.numel() for p in model.parameters())
    assert all(p.client_parameters + p.server_parameters == weights for p in points)
    halves = split(model, at)
    x = torch.randn(1, 3, 224, 224)
    model.eval()
    halves.client.eval()
    halves.server.eval()
    with torch.no_grad():
        assert torch.equal(halves(x), model(x))


def test_pooling_and_dropout_of_the_model_are_the_server_half_s():
    _, timm = packages()
    x = torch.randn(1, 3, 64, 64)
    maps = timm.create_model("resnet18", num_classes=0, global_pool="").eval()
    with torch.no_grad():
        assert split(maps, "layer3.0")(x).shape == maps(x).shape == (1, 512, 2, 2)
    halves = split(timm.create_model("resnet18", num_classes=5, drop_rate=0.9), "layer3.0")
    cut = torch.randn(4, 128, 8, 8)
    for module in halves.server.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    assert not torch.equal(halves.server(cut), halves.server(cut))
    halves.server.eval()
    assert torch.equal(halves.server(cut), halves.server(cut))


class Net(nn.Module):
    """Functions between modules, a module that runs twice, a weight of its own, and a head with dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.bend, self.shift = nn.Tanh(), nn.Parameter(torch.randn(6))

    def forward(self, x, scale=2.0, mask=None):
        x = self.bend(self.first(x)) + self.shift
        if mask is not None:
            x = x * mask
        x = F.gelu(self.bend(self.second(x)) * scale)
        return self.third(F.dropout(x, 0.5, training=self.training))


def test_functions_between_modules_are_cut_with_them():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 6)
    assert [p.name for p in cut_points(model)] == ["bend", "second", "third"]
    for at in ("bend", "second", "third", 1, 2, 3):
        halves = split(model, at, example=x)
        assert torch.equal(halves(x), model(x))
        assert {*halves.client.parameters(), *halves.server.parameters()} == {*model.parameters()}
    halves = split(model, "second", verify=False)
    assert [name for name, _ in halves.client.named_parameters()] == ["shift", "first.weight", "first.bias"]
    halves.server.train()
    assert not torch.equal(halves(x), halves(x))
    for again in (copy.deepcopy(halves), pickle.loads(pickle.dumps(halves))):
        again.server.eval()
        assert torch.equal(again(x), model(x))
        assert not {*again.client.parameters()} & {*halves.client.parameters()}


class Pixels(Net):
    def forward(self, pixel_values):
        return super().forward(pixel_values)


class OnlyNamed(Net):
    def forward(self, *, input=None, **more):
        return super().forward(input, **more)


class Passed(Net):
    def forward(self, *args, **named):
        return super().forward(*args, **named)


def test_the_client_half_s_argument_has_the_name_of_the_model_s():
    x = torch.randn(5, 6)
    for kind, name in ((Pixels, "pixel_values"), (OnlyNamed, "input"), (Passed, "x")):
        model = kind().eval()
        halves = split(model, "second", example={name: x})
        assert torch.equal(halves({name: x}), model(**{name: x}))
        assert torch.equal(halves(x), halves({name: x}))


def test_numbers_are_those_of_cut_points_and_names_may_lie_deeper():
    model = randomised(ResNet(False)).eval()
    x, points = torch.randn(2, 3, 32, 32), cut_points(model)
    assert [p.at for p in points] == [*range(1, len(points) + 1)]
    with torch.no_grad():
        for point in points:
            assert torch.equal(split(model, point.at)(x), model(x))
        assert torch.equal(split(model, "layer2")(x), model(x))
    with pytest.raises(
        CutError, match=r"before layer2\.0\.shortcut: one tensor must cross, and here it is layer1, relu"
    ):
        split(model, "layer2.0.shortcut")
    with pytest.raises(ValueError, match=r"cut points are 1 \(bn1\), 2 \(relu\)"):
        split(model, "layer9")
    with pytest.raises(ValueError, match="cut points are"):
        split(model, 0)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Named(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))


def test_sequences_with_a_forward_or_an_init_of_their_own():
    x = torch.randn(2, 4)
    with pytest.raises(CutError, match="cannot cut a Residual: there is no place"):
        split(Residual(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 1)
    model = Named(8)
    halves = split(model, 1)
    assert type(halves.client) is type(halves.server) is nn.Sequential
    assert torch.equal(halves(x), model(x))
    bend = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 4), bend, nn.Linear(4, 4), bend, nn.Sequential(nn.Linear(4, 4), bend))
    for at in (1, 2, 3, 4, "4.0"):
        assert torch.equal(split(model, at, example=x)(x), model(x))
    model.register_forward_hook(lambda module, given, output: output * 2)
    with pytest.raises(CutError, match="Sequential, which has forward_hooks"):
        split(model, 1)


SHIFT = torch.tensor([1.0, 2.0, 3.0, 4.0])


class Remembers(nn.Module):
    """Its forward pass changes itself and makes a tensor, without its input."""

    def __init__(self, refused=False):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm, self.cache, self.refused = nn.BatchNorm1d(4), None, refused
        for name in ("center", "behind"):
            self.register_buffer(name, torch.zeros(4))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.arange(4.0)
        self.passes += 1
        self.center.mul_(0.9)
        with torch.no_grad():
            self.center.add_(0.1 * x.mean(0))
        self.behind.data.mul_(0.9).add_(1)
        behind = self.behind
        behind[1] = 2.0
        behind -= 0.1
        self.seen = self.first(x) + self.cache - self.center
        assert not self.refused
        return self.third(self.second(self.norm(self.seen + SHIFT) * self.behind))


def test_a_cut_leaves_the_model_as_it_was():
    """Also where it is refused, and where its activations are measured."""
    for way in ("refused", "cut", "measured"):
        model = Remembers(way == "refused").train()
        model.third.eval()
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        names, modes = list(vars(model)), [m.training for m in model.modules()]
        if way == "cut":
            whole, halves = model, split(model, "second", verify=False)
        elif way == "measured":
            assert [p.cut for p in cut_points(model, torch.randn(3, 4, generator=torch.Generator()))] == [48] * 2
        else:
            with pytest.raises(CutError, match="cannot follow the forward pass of Remembers"):
                cut_points(model)
        assert torch.equal(torch.get_rng_state(), random)
        assert (list(vars(model)), [m.training for m in model.modules()], model.cache) == (names, modes, None)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        pickle.dumps(model)
    x = torch.randn(3, 4)
    again = copy.deepcopy(halves)  # the constant is the half's own
    assert torch.equal(again.eval()(x), whole.eval()(x))


def test_buffers_that_a_forward_pass_writes_in_place_go_on_in_the_halves():
    torch.manual_seed(0)
    model = Remembers()
    halves = split(copy.deepcopy(model), "second", example=torch.randn(3, 4))
    for again in (copy.deepcopy(halves), pickle.loads(pickle.dumps(halves)), halves):
        whole = copy.deepcopy(model)
        for _ in range(3):
            x = torch.randn(3, 4)
            assert torch.equal(again(x), whole(x))
        buffers = dict(again.client.named_buffers()) | dict(again.server.named_buffers())
        assert int(buffers["passes"]) == 3
        assert [name for name, value in whole.named_buffers() if not torch.equal(buffers[name], value)] == []


class Tied(nn.Module):
    """The model's own weight and buffer on both sides."""

    def __init__(self, written):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.randn(4))
        self.register_buffer("scale", torch.ones(4))
        self.written = written

    def forward(self, x):
        if self.written == "a buffer":
            self.scale[None].mul_(0.9)
        made = torch.ones(4)
        if self.written == "a constant":
            made[0] = x.mean()
        return self.third(self.second(self.first(x) * self.scale + self.shift) * self.scale + self.shift + made)


def test_the_model_s_own_weights_on_both_sides_become_two_unless_a_pass_writes_them():
    model, x = Tied(""), torch.randn(3, 4)
    halves = split(model, "second", example=x)
    assert halves.client.shift is model.shift
    assert halves.server.shift is not model.shift
    assert halves.server.scale is not model.scale
    assert [name for name, _ in halves.server.named_parameters()] == [
        "shift",
        "second.weight",
        "second.bias",
        "third.weight",
        "third.bias",
    ]
    for written, what in (("a buffer", "scale"), ("a constant", "a tensor that it makes")):
        with pytest.raises(CutError, match=f"before second: {what} is written into on one side and read on the other"):
            split(Tied(written), "second", verify=False)
        assert [p.name for p in cut_points(Tied(written))] == ["third"]


class Statistics(nn.Module):
    """Of one normalisation, used twice or read again."""

    def __init__(self, use):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm, self.use = nn.BatchNorm1d(4), use

    def forward(self, x):
        x = self.second(self.norm(self.first(x)))
        return self.third(self.norm(x) if self.use == "call" else x + self.norm.running_mean)


@pytest.mark.parametrize("use", ["call", "read"])
def test_running_statistics_are_not_cut_in_two(use):
    model, x = Statistics(use), torch.randn(3, 4)
    assert [p.name for p in cut_points(model)] == ["norm", "third"]
    with pytest.raises(CutError, match=r"before second: norm\.\S+ is written into on one side and read on the other"):
        split(model, "second", example=x)


class Leaves(nn.Module):
    """Something behind for the next pass, as the test says."""

    def __init__(self, leave):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.leave, self.calls, self.last, self.log, self.total = leave, 0, 0.0, [], torch.zeros(4)
        self.one, self.two, self.three = random.Random(), np.random.default_rng(), np.random.RandomState()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        x = self.first(x)
        more = self.leave(self, x)
        return self.third(self.second(x if more is None else x + more))


def counts(net, x):
    net.calls += 1


def appends(net, x):
    net.log.append(x)


def counts_and_uses(net, x):
    net.calls += 1
    return net.calls


def goes_on(net, x):
    net.last = x + net.last
    return net.last


def goes_on_beside(net, x):
    net.total.mul_(0.9)
    return net.total


def in_full_precision(net, x):
    with torch.autocast("cpu", enabled=False):
        return net.second(x.float())


def in_eval_mode_without(net, x):
    with torch.set_grad_enabled(net.training):
        return torch.sin(x)


def assigns(net, x):
    net.mean = 0.9 * net.mean + x.mean(0)


def assigns_anew(net, x):
    net.mean = torch.ones(4)
    return net.mean


@pytest.mark.parametrize(
    ("leave", "match"),
    [
        (counts, "changes calls, which is in no half: keep it in a buffer"),
        (appends, "changes log, which is in no half"),
        (counts_and_uses, "differs from pass to pass: it uses what the pass before left"),
        (goes_on, "differs from pass to pass: it uses what the pass before left"),
        (goes_on_beside, "it writes into total, which is no buffer"),
        (assigns, r"it assigns mean, where a half would keep the old one: write into it, mean.copy_"),
        (assigns_anew, r"it assigns mean, where a half would keep the old one: write into it, mean.copy_"),
        (lambda net, x: net._buffers["mean"] * 2, "it computes with mean without reading it as an attribute"),
        (
            lambda net, x: net._parameters.get("none") or net.second._parameters["bias"] * 2,
            "it computes with second.bias",
        ),
        (lambda net, x: torch.rand(4), "differs from pass to pass: it draws random numbers apart"),
        (lambda net, x: x if torch.rand(()) < 2 else None, "it draws random numbers apart"),
        (lambda net, x: x if random.random() < 2 else None, "it draws random numbers apart"),
        (lambda net, x: x if np.random.rand() < 2 else None, "it draws random numbers apart"),
        (lambda net, x: x if net.training and random.random() < 2 else None, "it draws random numbers apart"),
        (lambda net, x: x if net.training and net.one.random() < 2 else None, "it draws random numbers apart"),
        (lambda net, x: x if net.two.random() < 2 else None, "it draws random numbers apart"),
        (lambda net, x: x if net.three.random() < 2 else None, "it draws random numbers apart"),
        (in_full_precision, "it enters autocast, which is in no step: do that in the forward pass of a layer"),
        (lambda net, x: torch.ones(4) * net.training, "differs between train mode and eval mode"),
        (in_eval_mode_without, "differs between train mode and eval mode"),
        (lambda net, x: x * 2 if torch.is_grad_enabled() else None, "differs where gradients are off"),
        (lambda net, x: None if torch.is_autocast_enabled() else x * 2, "or under autocast: ask for these in"),
        (lambda net, x: x * 2 if torch.is_autocast_enabled("cpu") else None, "or under autocast: ask for these in"),
    ],
)
def test_what_a_forward_pass_leaves_behind_otherwise_is_refused(leave, match):
    model = Leaves(leave)
    with pytest.raises(CutError, match=match):
        split(model, "second", example=torch.randn(3, 4))
    assert not model.total.any()
    assert (model.calls, model.last, model.log) == (0, 0.0, [])


def shows(net, x):
    """What it does with its input, for whoever looks."""
    net.last, net.log = x, [x]


TAKEN = {
    "if": lambda x: x if x.shape[0] > 3 else -x,
    "int": lambda x: x[: int(x.shape[0] * 0.5)],
    "float": lambda x: x * float(x.sum()),
    "len": lambda x: x[: len(x)],
    "range": lambda x: torch.stack([x[n] for n in range(x.shape[0])]),
    "for": lambda x: torch.stack([2 * row for row in x]),
    "star": lambda x: x.reshape(*x.shape),
}


@pytest.mark.parametrize("what", TAKEN)
def test_where_a_forward_pass_cannot_be_followed_is_said(what):
    take = TAKEN[what]
    where = rf"test_chain\.py, line {take.__code__.co_firstlineno}: \"{what}\": lambda"
    with pytest.raises(CutError, match=rf"Leaves: it takes its input's numbers or shape for Python's, .* \({where}"):
        split(Leaves(lambda net, x: take(x)), "second")
    with pytest.raises(CutError, match=r"Leaves: 'a' \(test_chain\.py, line \d+: .*; build a SplitModel"):
        split(Leaves(lambda net, x: {}["a"]), 1)


def without(net, x):
    with torch.no_grad():
        y = net.mean.lerp_(x.mean(0), 0.5) * x
        z = (y + net.first(x)).chunk(2, 1)
    return (y + torch.cat(z, 1)) * x


def keeps_a_mean(net, x):
    """It is read before, so that only a second pass would see what is behind it."""
    y = x - net.mean
    with torch.no_grad():
        net.mean *= 0.9
        net.mean.add_(0.1 * x.mean(0))
    return y


def writes_past_it(net, x):
    with torch.no_grad():
        x = x.clone().mul_(2)
    y = torch.sin(x + net.second.bias)
    with torch.no_grad():
        net.mean.copy_(y[0])
    return y + net.mean


@torch.no_grad()
def decorated(net, x):
    return x * torch.sigmoid(net.second(x)).shape[1]


def written_without(net, x):
    with torch.no_grad():
        x = x.mul_(0.5)  # has its gradient still
    return x


WITHOUT = [without, keeps_a_mean, writes_past_it, decorated, written_without]


@pytest.mark.parametrize("step", WITHOUT)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_off_where_a_forward_pass_turns_them_off(step, context):
    """In whatever context it is cut. Several passes: what a buffer would keep of one is a fault in the next only."""
    torch.manual_seed(0)
    model, x = Leaves(step), torch.randn(3, 4)
    with context():
        halves = split(model, "third", example=x)
    for again in (copy.deepcopy(halves), pickle.loads(pickle.dumps(halves))):
        whole = copy.deepcopy(model)
        names = {name: p for half in (again.client, again.server) for name, p in half.named_parameters()}
        for _ in range(3):
            outputs = [forward(x) for forward in (whole, again)]
            assert torch.equal(*outputs)
            for output in outputs:
                output.square().sum().backward()
            for name, parameter in whole.named_parameters():
                assert name not in names or torch.allclose(parameter.grad, names[name].grad), name


@pytest.mark.parametrize("name", ["zeros", "ones", "empty", "rand", "randn"])
def test_tensors_of_as_many_samples_as_there_are(name):
    """Their sizes are several arguments, of which some are known when the forward pass is followed."""
    made = getattr(torch, name)
    model = Leaves(lambda net, x: getattr(torch, name)(x.shape[0], 4).fill_(2) + getattr(torch, name)(x.size(1)).sign())
    halves = split(model, "second", verify=False)
    assert halves(torch.randn(5, 4)).shape == (5, 2)
    assert getattr(torch, name) is made
    x = torch.randn(3, 4)
    if name != "empty":
        torch.manual_seed(0)
        whole = model(x)
        torch.manual_seed(0)
        assert torch.equal(halves(x), whole)


def written_and_read(net, x):
    made = torch.zeros(4)
    made += x.mean(0).detach()
    sums = torch.ones(4)
    sums.add_(x.mean(0))
    return made + sums


CONSTANTS = {
    "for whoever looks": shows,
    "a default": lambda net, x: net.third.weight.new_zeros(4) if net.total is None else net.total,
    "a range": lambda net, x: torch.arange(net.mean.shape[0] + len(net.mean) - net.mean.size(0)),
    "NaN": lambda net, x: x.masked_fill(x < 0, float("nan")).nan_to_num(1.0),
    "of NaN": lambda net, x: (torch.tensor([float("nan"), 1, 1, 1]) + x.detach()).nan_to_num(),
    "a buffer's view": lambda net, x: net.mean[None] + torch.ones(4),
    "written into": lambda net, x: torch.zeros(4).add_(x.mean(0)),
    "written into, and read": written_and_read,
    "not saved": lambda net, x: net.table * x,
}


@pytest.mark.parametrize("make", CONSTANTS)
def test_constants_that_a_forward_pass_makes(make):
    """Anew in every pass: what is written into one is gone in the next."""
    model, x = Leaves(CONSTANTS[make]).eval(), torch.randn(3, 4)
    model.register_buffer("table", torch.rand(4), persistent=False)
    model.total = torch.rand(4)
    halves = split(model, "second", example=x)
    assert torch.equal(halves(x), model(x))
    assert torch.equal(halves(x), model(x))
    for again in (copy.deepcopy(halves), pickle.loads(pickle.dumps(halves))):
        assert torch.equal(again(x), model(x))
    for half in (*halves, *copy.deepcopy(halves)):
        assert {*half.state_dict()} <= {*model.state_dict()}
        assert "table" not in half.state_dict()
    if make != "not saved":
        halves.double()  # shares what it has with the model
        model.double()
        assert torch.equal(halves(x.double()), model(x.double()))
    assert all(t.device.type == "meta" for half in copy.deepcopy(halves).to("meta") for t in half.buffers())


class Masked(nn.Module):
    """A buffer that is not saved, and that others read."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.rand(4), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.mask


def test_a_layer_s_buffer_that_is_not_saved_stays_so():
    model, x = Leaves(lambda net, x: net.first.mask + x), torch.randn(3, 4)
    model.first = Masked()
    names = {*model.state_dict()}
    halves = split(model, "second", example=x)
    assert {*model.state_dict()} == names
    assert {*halves.client.state_dict(), *halves.server.state_dict()} == names - {"mean"}  # which nobody reads
    assert torch.equal(halves(x), model(x))


class Positions(nn.Module):
    """A constant on the client, another in the server half; cut again there."""

    def __init__(self):
        super().__init__()
        self.first, self.positions, self.head = nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        x = self.first(x) + self.positions(torch.arange(5))
        for layer in self.layers:
            x = layer(x) + torch.linspace(0, 1, 4)
        return self.head(x.mean(1))


def test_halves_with_constants_are_cut_again():
    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(2, 5, 4)
    names = [p.name for p in cut_points(model)]
    assert names == ["positions", *(f"layers.{n}.{m}" for n in range(3) for m in range(2)), "head"]
    halves = pickle.loads(pickle.dumps(split(model, "layers.2.0", example=x)))
    assert [p.name for p in cut_points(halves.client)] == names[:5]
    again = split(halves.client, "layers.1.0", example=x)
    assert torch.equal(halves.server(again(x)), model(x))


class Frozen(nn.Module):
    """Its normalisation stays in eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.third = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.third(self.second(self.norm(self.first(x))))


class Tripled(Frozen):
    train = nn.Module.train

    def __call__(self, x):
        return super().__call__(x) * 3


class Inside(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


def test_a_train_of_a_module_s_own_is_kept_in_layers_and_refused_of_what_is_followed():
    x = torch.randn(3, 4)
    for kind, name in ((Frozen, "train"), (Tripled, "__call__")):
        with pytest.raises(CutError, match=f"cannot cut through {kind.__name__}, whose class has its own {name}"):
            split(kind(), "second", example=x)
    model = nn.Sequential(nn.Linear(4, 4), Frozen(), nn.Linear(4, 3))
    for outer, at in ((model, 2), (Inside(model), "body.2")):
        halves = split(outer, at, example=x)
        outer.train()
        halves.train()
        modes = {m: m.training for m in outer.modules()}
        assert all(m.training == modes[m] for m in halves.modules() if m in modes)
        assert not model[1].norm.training
        assert torch.equal(halves(x), outer(x))


def test_modes_that_differ_are_refused_where_a_forward_pass_reads_them():
    model, x = Inside(Net()).train(), torch.randn(5, 6)
    model.body.eval()
    with pytest.raises(CutError, match="some modules of Inside are in train mode and others are not: call its train"):
        split(model, "body.second", example=x)
    split(model.eval(), "body.second", example=x)
    plain = Inside(nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3))).train()
    plain.body.eval()
    halves = split(plain, "body.2", example=x)
    assert torch.equal(halves(x), plain(x))


class OfOthers(nn.Module):
    """Asks a layer that it does not call for its mode."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = F.dropout(self.second(self.first(x)), self.dropout.p, training=self.dropout.training)
        return self.third(F.dropout(x, 0.1, self.training))


def test_the_mode_of_a_layer_is_the_half_s_as_well():
    torch.manual_seed(0)
    model, x = OfOthers(), torch.randn(3, 4)
    for mode in (True, False):
        halves = split(model.train(mode), "second", example=x)
        for later in (True, False):
            for module in (model, halves):
                module.train(later)
            torch.manual_seed(0)
            whole = model(x)
            torch.manual_seed(0)
            assert torch.equal(halves(x), whole)
    model.train().dropout.eval()
    with pytest.raises(CutError, match="some modules of OfOthers are in train mode and others are not"):
        split(model, "second", example=x)


def test_modules_made_in_a_forward_pass_are_followed():
    torch.manual_seed(0)
    model, x = Leaves(lambda net, x: nn.Sequential(nn.ReLU(), nn.Softmax(1))(x)), torch.randn(3, 4)
    halves = split(model, "second", example=x)
    assert torch.equal(halves(x), model(x))
    with pytest.raises(CutError, match=r"cannot follow .*parameter is not a member of this module \(test_chain"):
        split(Leaves(lambda net, x: nn.LayerNorm(4)(x)), "second", example=x)


class Decides(Net):
    """By a tensor's values, which nobody knows beforehand."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else self.third(x)


class Auxiliary(Net):
    """Two outputs in train mode."""

    def forward(self, x):
        y = self.bend(self.first(x))
        return (self.third(y), self.third(self.second(y))) if self.training else self.third(y)


class Skips(Net):
    """What goes in comes up again at the end."""

    def forward(self, x):
        return self.second(self.bend(self.first(x))) + x


def test_what_is_no_chain_is_refused():
    for model, match in (
        (
            Decides(),
            r"forward pass of Decides: it takes its input's numbers or shape .*\(test_chain\.py, line \d+: return",
        ),
        (Auxiliary(), "Auxiliary differs between train mode"),
        (Skips(), "there is no place in its forward pass where a single tensor"),
        (nn.ModuleList([nn.Linear(2, 2)]), "cannot follow the forward pass of ModuleList"),
    ):
        with pytest.raises(CutError, match=match):
            split(model, 1)
    with pytest.raises(ValueError, match="a few samples are needed"):
        split(Net(), "second")
    torch.manual_seed(0)
    wrong = SplitModel(*trace_chain(Net()).cut("second"))
    with pytest.raises(CutError, match="it has no parameter like the client half's shift"):
        verify_halves(Net(), wrong, torch.randn(2, 6))


class Turned(nn.Module):
    """A complex weight that turns what it gets. stopped: its imaginary part has no gradient."""

    def __init__(self, stopped=False):
        super().__init__()
        self.stopped, self.weight = stopped, nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        parts = torch.view_as_real(self.weight)
        imaginary = parts[..., 1].detach() if self.stopped else parts[..., 1]
        return x * parts[..., 0] + imaginary


def test_a_gradient_is_compared_with_its_imaginary_part():
    model = nn.Sequential(nn.Linear(4, 4), Turned(), nn.Linear(4, 2))
    same, stopped = (nn.Sequential(model[0], turned) for turned in (model[1], Turned(stopped=True)))
    stopped[1].weight = model[1].weight
    verify_halves(model, SplitModel(same, model[2]), torch.randn(3, 4))
    with pytest.raises(CutError, match=r"the gradient of 1\.weight differs"):
        verify_halves(model, SplitModel(stopped, model[2]), torch.randn(3, 4))

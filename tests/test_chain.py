"""Models through which one tensor goes: every cut of theirs is the model, and what has none is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from pictures import packages
from test_split import ResNet, randomised
from torch import nn

from hosfl.halves.chain import CutError, chain
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


@pytest.mark.parametrize("name", [f"torchvision.{n}" for n in TORCHVISION] + [f"timm.{n}" for n in TIMM])
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
    with pytest.raises(CutError, match="cannot cut a Residual: nowhere"):
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
    """Its forward pass changes itself and draws a random number, without its input."""

    def __init__(self, refused=False):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm, self.calls, self.refused = nn.BatchNorm1d(4), 0, refused
        for name in ("center", "behind", "replaced"):
            self.register_buffer(name, torch.ones(4))

    def forward(self, x):
        self.calls += 1
        self.center.mul_(0.9)
        self.behind.data.mul_(0.9)
        self.replaced = self.replaced * 0.9
        self.drawn, self.seen = torch.rand(1), self.first(x)
        assert not self.refused
        return self.third(self.second(self.norm(self.seen + SHIFT)))


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
            assert [p.cut for p in cut_points(model, torch.randn(3, 4, generator=torch.Generator()))] == [48] * 3
        else:
            with pytest.raises(CutError, match="cannot follow the forward pass of Remembers"):
                cut_points(model)
        assert torch.equal(torch.get_rng_state(), random)
        assert (list(vars(model)), [m.training for m in model.modules()], model.calls) == (names, modes, 0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        pickle.dumps(model)
    x = torch.randn(3, 4)
    assert torch.equal(halves.eval()(x), whole.eval()(x))  # the constant is the half's own


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
        (Decides(), "cannot follow the forward pass of Decides: symbolically traced"),
        (Auxiliary(), "Auxiliary is another one in train mode"),
        (Skips(), "nowhere in its forward pass one tensor alone"),
        (nn.ModuleList([nn.Linear(2, 2)]), "cannot follow the forward pass of ModuleList"),
    ):
        with pytest.raises(CutError, match=match):
            split(model, 1)
    with pytest.raises(ValueError, match="a few samples are needed"):
        split(Net(), "second")
    torch.manual_seed(0)
    wrong = SplitModel(*chain(Net()).cut("second"))
    with pytest.raises(CutError, match="it has no parameter like the client half's shift"):
        verify_halves(Net(), wrong, torch.randn(2, 6))

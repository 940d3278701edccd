"""The gradient of a half as a graph: torch's gradients, wherever the weights are moved."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import hosfl
from hosfl.edge.backward import export_gradient
from hosfl.edge.gradient import GRADIENT, Gradient
from hosfl.edge.half import HalfError
from hosfl.edge.source import ExportError
from hosfl.halves.inputs import call
from hosfl.halves.narrow import narrow_weights
from hosfl.halves.trains import select_trainable
from hosfl.probing.probe import EmbeddingGradients
from hosfl.runs.checkpoint import save_module
from hosfl.tasks.vision import CifarResNet
from hosfl_kernels import replay_

TEXT = {"input_ids": torch.tensor([[5, 6, 7, 5, 9], [8, 5, 0, 0, 0], [7, 7, 7, 7, 0]])}
TEXT["attention_mask"] = (TEXT["input_ids"] > 0).long()
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}


def pictures(*layers):
    return nn.Sequential(*layers), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def bert(trains="all"):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=2, **SIZES))
    return select_trainable(hosfl.split(model, 1).client, trains, 0), TEXT


def llama():
    config = transformers.LlamaConfig(num_hidden_layers=2, max_position_embeddings=16, **SIZES)
    return hosfl.split(transformers.LlamaForCausalLM(config), 1).client, TEXT


class Partly(nn.Module):
    """A weight that is used twice, one that nothing reads, and one that does not move."""

    def __init__(self):
        super().__init__()
        self.one, self.fixed = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)
        self.unread = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.one(torch.tanh(self.fixed(self.one(x))))


class Tied(nn.Module):
    """An embedding that is a projection as well, whose first name is used last."""

    def __init__(self):
        super().__init__()
        self.back, self.table = nn.Linear(6, 20), nn.Embedding(20, 6)
        self.table.weight = self.back.weight

    def forward(self, x):
        return self.back(torch.tanh(self.table(x)))


def twice():
    """A module in two places, and a normalisation with it."""
    layer, norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
    return nn.Sequential(layer, norm, nn.Tanh(), layer, norm, nn.Linear(6, 3)), torch.randn(3, 6)


def resnet():
    half = hosfl.split(CifarResNet(10, n=2), "layer3", verify=False).client  # over a shortcut that pads channels
    return half, torch.randn(3, 3, 8, 8)


HALVES = {
    "resnet": resnet,
    "padding": lambda: pictures(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 3, 2), nn.ConstantPad2d(1, 0.5), nn.Tanh()),
    "tied": lambda: (Tied(), torch.tensor([[5, 6, 5], [7, 8, 0], [1, 1, 1]])),
    "a module in two places": twice,
    "batch norm, strides, padding": lambda: pictures(
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten()
    ),
    "groups, dilation, averages": lambda: pictures(
        nn.Conv2d(4, 8, 3, stride=3, groups=2),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, dilation=2, padding=3, groups=8),
        nn.AvgPool2d(2),
        nn.MaxPool2d(2),
    ),
    "padding by name": lambda: pictures(
        nn.Conv2d(4, 3, (3, 1), padding="same"), nn.Tanh(), nn.Conv2d(3, 2, 2, padding="valid")
    ),
    "of one dimension": lambda: (nn.Sequential(nn.Conv1d(4, 3, 3, stride=2), nn.GELU()), torch.randn(3, 4, 9)),
    "layer norm": lambda: (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Softmax(-1)), torch.randn(3, 6)),
    "twice, unread, fixed": lambda: (Partly(), torch.randn(3, 6)),
    "bert": bert,
    "bert, lora": lambda: bert("lora:1"),
    "llama": llama,
    "bert, lora, int8": lambda: (narrow_weights(bert("lora:1")[0], "int8"), TEXT),
    "bert, lora, int4": lambda: (narrow_weights(bert("lora:1")[0], "int4"), TEXT),
    "bert, lora, bfloat16": lambda: (narrow_weights(bert("lora:1")[0], "bfloat16"), TEXT),
}


# Exports of half a minute, alike to others.
LONG = ("bert", "llama", "bert, lora", "bert, lora, int4", "bert, lora, bfloat16")


@pytest.fixture(
    scope="module", params=[pytest.param(half, marks=[pytest.mark.slow] * (half in LONG)) for half in HALVES]
)
def made(request, tmp_path_factory):
    torch.manual_seed(1)
    half, sample = HALVES[request.param]()
    folder = tmp_path_factory.mktemp("gradient")
    (folder / GRADIENT).write_bytes(export_gradient(half.train(), sample))
    assert half.training
    save_module(half, folder / "base.safetensors")
    return half.eval(), sample, folder


def moving(half):
    return {name: p for name, p in half.named_parameters() if p.requires_grad}


def arrays(half):
    return [p.detach().numpy().copy() for p in moving(half).values()]


def of_torch(half, sample, multiplier):
    weights = list(moving(half).values())
    with EmbeddingGradients():
        found = torch.autograd.grad(call(half, sample), weights, multiplier, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]


def close(found, wanted):
    wanted = [g.numpy() for g in wanted]
    least = 1e-3 * max(np.abs(g).max() for g in wanted)
    return all(
        np.abs(one - other).max() <= 1e-4 * max(least, np.abs(other).max())
        for one, other in zip(found, wanted, strict=True)
    )


def named(sample):
    return {name: x.numpy() for name, x in (sample if isinstance(sample, dict) else {"input": sample}).items()}


def test_gradients_are_torch_s_wherever_weights_are(made):
    half, sample, folder = made
    tensors = arrays(half)
    gradient = Gradient(folder, list(moving(half)), tensors, threads=1)
    multiplier = torch.randn(call(half, sample).shape)
    before = gradient(named(sample), multiplier.numpy())
    assert close(before, of_torch(half, sample, multiplier))
    move = {"streams": list(range(len(tensors)))}
    replay_(tensors, [7], [0.125], **move)
    kept = [p.detach().clone() for p in moving(half).values()]
    replay_([p.detach() for p in moving(half).values()], [7], [0.125], **move)
    found = gradient(named(sample), multiplier.numpy())
    assert close(found, of_torch(half, sample, multiplier))
    assert not close(before, of_torch(half, sample, multiplier))
    with torch.no_grad():
        for p, values in zip(moving(half).values(), kept, strict=True):
            p.copy_(values)
    for tensor, values in zip(tensors, kept, strict=True):
        tensor[...] = values.numpy()
    again = gradient(named(sample), multiplier.numpy())
    assert all(np.array_equal(a, b) for a, b in zip(again, before, strict=True))


def test_some_samples_at_a_time(made):
    half, sample, folder = made
    gradient = Gradient(folder, list(moving(half)), arrays(half))
    multiplier = torch.randn(call(half, sample).shape)
    whole = gradient(named(sample), multiplier.numpy())
    parts = [slice(0, 2), slice(2, 3)]
    found = [gradient({n: x[at] for n, x in named(sample).items()}, multiplier[at].numpy()) for at in parts]
    assert close([a + b for a, b in zip(*found, strict=True)], [torch.from_numpy(g) for g in whole])


def test_what_is_no_gradient(tmp_path):
    half, sample = HALVES["layer norm"]()
    graph, names = export_gradient(half, sample), list(moving(half))
    save_module(half, tmp_path / "base.safetensors")
    with pytest.raises(HalfError, match="there is no"):
        Gradient(tmp_path, names, arrays(half))
    (tmp_path / GRADIENT).write_bytes(graph)
    gradient = Gradient(tmp_path, names, arrays(half))
    with pytest.raises(HalfError, match="does not take these inputs"):
        gradient({"input": np.zeros((3, 7), np.float32)}, np.zeros((3, 5), np.float32))
    save_module(nn.Linear(3, 3), tmp_path / "base.safetensors")
    with pytest.raises(HalfError, match=r"was not made for|cannot open"):
        Gradient(tmp_path, names, arrays(half))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Straight(nn.Module):
    """Its derivative is another than that of what it computes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return Rounded.apply(self.linear(x))


def test_what_cannot_be_exported():
    with pytest.raises(ExportError, match=r"torch cannot export .*, or take an estimator without a gradient"):
        export_gradient(*pictures(nn.ConvTranspose2d(4, 2, 3)))
    with pytest.raises(ExportError, match="float16"):
        export_gradient(nn.Linear(3, 3).half(), torch.randn(3, 3))
    with pytest.raises(ExportError):  # the exporter sees through the function, or refuses it
        export_gradient(Straight(), torch.randn(3, 6))

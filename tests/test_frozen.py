"""Weights stored narrow: their bits and bytes, every family and estimator over them, runs that come back to the bit."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save
from test_forward_mode import Everything, relative, tangents
from test_probe import peak_bytes
from test_split import IMAGES, TEXT, differentiable, image_model, text
from test_tasks import config, folder  # noqa: F401
from torch import nn

from hosfl import Config, rebuild, train
from hosfl.cli import main
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.narrow import BITS, GROUP, _recorded_reads, narrow_weights, recompute_wide_weights
from hosfl.halves.split import dtype_of, split
from hosfl.halves.trains import select_trainable
from hosfl.probing.forward_mode import derivative
from hosfl.probing.probe import (
    PerturbedTensors,
    probe_backward,
    probe_forward,
    probe_in_place,
    probe_untouched,
    trainable,
)
from hosfl.protocol.header import LogError
from hosfl.protocol.lattice import Lattice
from hosfl.runs.assemble import assemble
from hosfl_kernels import noise

NARROW = tuple(BITS)


def frozen_linear(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def bytes_of(half):
    return sum(t.nbytes for t in (*half.parameters(), *half.buffers()))


def wide_copy(half, narrow):
    """A plain half whose weights are what the narrow one computes with."""
    plain = copy.deepcopy(half)
    for path, module in narrow.named_modules():
        for name in getattr(module, "narrow", ()):
            with torch.no_grad():
                plain.get_submodule(path)._parameters[name].copy_(getattr(module, name))
    return plain


# --- bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [2, 5, 63, 64, 65, 97, 384])
@pytest.mark.parametrize("frozen", ["int8", "int4", "int2"])
def test_a_weight_is_a_scale_times_the_nearest_integer(frozen, columns):
    linear = frozen_linear(columns, 3)
    linear.weight.data[1] = 0
    before = linear.weight.double()
    read = narrow_weights(linear, frozen).weight
    assert (read.dtype, read.shape) == (torch.float32, (3, columns))
    assert not read.requires_grad
    top, groups = 2 ** (BITS[frozen] - 1) - 1, -(-columns // GROUP)
    assert linear.weight_scale.shape == (3, groups, 1)
    size = -(-columns // groups)
    size += -size % (8 // BITS[frozen])
    for row in range(3):
        for g in range(groups):
            group, found = (w[row, g * size : (g + 1) * size].double() for w in (before, read))
            scale = linear.weight_scale[row, g, 0]
            assert scale == group.abs().max().float() / top
            integers = found / scale.double() if scale > 0 else found
            assert (integers - integers.round()).abs().max() < 1e-4
            assert torch.equal(found.float(), integers.round().float() * scale)
            assert integers.abs().max() < top + 0.5
            assert (found - group).abs().max() <= scale.double() * (0.5 + 1e-5)


def test_bfloat16_is_bfloat16():
    linear = frozen_linear(97, 3)
    before = linear.weight.clone()
    assert torch.equal(narrow_weights(linear, "bfloat16").weight, before.bfloat16().float())


@pytest.mark.parametrize(("frozen", "bits"), [("bfloat16", 16), ("int8", 8.5), ("int4", 4.5), ("int2", 2.5)])
def test_bytes(frozen, bits):
    """A float32 scale for 64 weights is half a bit more for each."""
    half = nn.Sequential(nn.Embedding(1000, 384), nn.Linear(384, 1536), nn.Conv1d(128, 64, 3), nn.LayerNorm(384))
    half.requires_grad_(False)
    matrices = 1000 * 384 + 384 * 1536 + 64 * 3 * 128
    vectors = 1536 + 64 + 2 * 384
    assert bytes_of(half) == 4 * (matrices + vectors)
    state = narrow_weights(half, frozen).state_dict()
    ones = 3 * 4 if frozen == "bfloat16" else 0
    assert bytes_of(half) == sum(t.nbytes for t in state.values()) == matrices * bits / 8 + 4 * vectors + ones


@pytest.mark.parametrize("frozen", NARROW)
def test_names_places_and_copies(frozen):
    half = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6))
    select_trainable(half, "norms", 0)
    names, streams = [name for name, _ in half.named_parameters()], trainable(half)[1]
    narrow_weights(half, frozen)
    assert [name for name, _ in half.named_parameters()] == names
    assert trainable(half)[1] == streams == [4, 5]
    assert isinstance(half[0], nn.Linear)
    assert type(half[0]).__name__ == "Linear"
    x = torch.randn(3, 6)
    other = copy.deepcopy(half)
    assert torch.equal(other(x), half(x))
    with torch.no_grad():
        half[0]._parameters["weight"].zero_()
    assert not torch.equal(other(x), half(x))
    half.load_state_dict(other.state_dict())
    assert torch.equal(other(x), half(x))
    with pytest.raises(RuntimeError, match="size mismatch"):  # wide weights are not taken for narrow ones
        half.load_state_dict(other.state_dict() | {"0.weight": torch.randn(8, 6)})
    assert dtype_of(half) == torch.float32
    assert torch.equal(half.double()[0].weight.float(), other[0].weight)
    assert dtype_of(half.bfloat16()) == half[0].weight.dtype == torch.bfloat16


def test_an_embedding_looks_up_rows_only():
    table = nn.Embedding(50_000, 70).requires_grad_(False)
    ids = torch.tensor([[3, 49_999], [0, 3]])
    narrow_weights(table, "int4")
    assert torch.equal(table(ids), table.weight[ids])
    made = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            new = isinstance(found, torch.Tensor) and not found._is_view()
            made.append(found.numel() if new else 0)
            return found

    with Sizes():
        table(ids)
    assert 4 * 70 <= max(made) <= 4 * 72
    with Sizes():
        assert table.weight.shape == (50_000, 70)
    assert max(made) > 50_000 * 70


@pytest.mark.parametrize("stored", ["bfloat16", "int8", "int4", "int2"])
def test_a_token_that_is_none_is_an_error(stored):
    """As in a wide table: an index would count a negative one from the end."""
    table = narrow_weights(nn.Embedding(20, 6).requires_grad_(False), stored)
    for token in (-1, 20):
        with pytest.raises(IndexError):
            table(torch.tensor([[3, token]]))


def test_tied_weights_stay_one():
    module = Everything().requires_grad_(False)
    module.convolution.bias.requires_grad_(True)
    ids = torch.tensor([[1, 2, 3, 49, 0], [5, 5, 48, 2, 1]])
    plain = copy.deepcopy(module).eval()
    narrow_weights(module, "int8").eval()
    assert module.tied._parameters["weight"] is module.table._parameters["weight"]
    assert torch.equal(module.tied.weight, module.table.weight)
    assert torch.equal(copy.deepcopy(module)(ids), module(ids))
    with torch.no_grad():  # the fused kernels of attention and encoder
        assert torch.equal(module(ids), wide_copy(plain, module)(ids))
        assert 0 < relative(module(ids), plain(ids)) < 0.05


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.families
@pytest.mark.parametrize("frozen", ["bfloat16", "int4"])
@pytest.mark.parametrize("family", [*TEXT, *IMAGES])
def test_every_family(family, frozen):
    torch.manual_seed(0)
    if family in TEXT:
        plain, inputs = split(differentiable(family), 2).client, text("left")
    else:
        plain, inputs = split(image_model(family), 2).client, torch.randn(2, 3, 16, 16)
    select_trainable(plain, "norms", 0)
    half = narrow_weights(copy.deepcopy(plain), frozen)
    assert not [name for name, p in half.named_parameters() if p.is_floating_point() and p.squeeze().dim() > 1]
    wide = wide_copy(plain, half)
    with evaluating(half), evaluating(wide):
        assert torch.equal(call(half, inputs), call(wide, inputs))
        assert not torch.equal(call(half, inputs), call(plain, inputs))
        wide = wide_copy(plain.double(), half.double())  # whose products of scale and integer are not rounded
        inputs = inputs.double() if family in IMAGES else text("none")
        expected = derivative(wide, inputs, tangents(wide))
        assert relative(derivative(half, inputs, tangents(half)), expected) < 1e-12


@pytest.mark.parametrize("frozen", NARROW)
@pytest.mark.parametrize("trains", ["lora", "biases", "norms", "4.*"])
def test_every_estimator_agrees_with_backpropagation(trains, frozen):
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(70, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 70), nn.Linear(70, 4))
    narrow_weights(select_trainable(half, trains, 0), frozen)
    x, multiplier, seeds = torch.randn(8, 70), torch.randn(8, 4), [1, 2, 3, 4, 5]
    parameters, streams = trainable(half)
    with torch.no_grad():  # adapters start as zero: half of the derivatives would be
        torch._foreach_add_(parameters, [0.1 * torch.randn_like(p) for p in parameters])
    mu = Lattice.snap(parameters, [1.0] * len(parameters)).nearest(2.0**-9)
    gradients = torch.autograd.grad(half(x), parameters, multiplier)
    assert all(g.abs().sum() > 0 for g in gradients)
    with evaluating(half):
        cut = half(x)
        expected = torch.tensor(
            [sum(_along(g, seed, s) for g, s in zip(gradients, streams, strict=True)) for seed in seeds]
        )
        forward = probe_forward(half, x, multiplier, seeds, "rademacher")
        assert relative(forward, expected) < 1e-5
        assert relative(probe_backward(half, x, multiplier, seeds, "rademacher", microbatch=3), expected) < 1e-5
        for two_sided, bound in ((False, 0.1), (True, 0.01)):
            found = probe_untouched(half, x, multiplier, cut, seeds, mu, "rademacher", two_sided=two_sided)
            assert relative(found, expected) < bound
            place = probe_in_place(
                lambda: half(x), PerturbedTensors.of(half), multiplier, cut, seeds, mu, two_sided=two_sided
            )
            assert torch.equal(found, place)


@pytest.mark.parametrize("frozen", NARROW)
def test_backpropagation_makes_wide_weights_again(frozen):
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(300, 300), nn.Tanh())]
    half = nn.Sequential(nn.Linear(8, 300), *layers, nn.Unflatten(1, (3, 10, 10)), nn.Conv2d(3, 4, 3))
    half[1:].requires_grad_(False)
    narrow_weights(half, frozen)
    x, parameters = torch.randn(2, 8), trainable(half)[0]

    def gradients():
        return torch.autograd.grad(half(x).square().sum(), parameters)

    def again():
        with recompute_wide_weights():
            return gradients()

    for found, expected in zip(again(), gradients(), strict=True):
        assert torch.equal(found, expected)
    wide = 4 * 300 * 300
    assert peak_bytes(gradients) > 8 * wide
    assert peak_bytes(again) < 4 * wide
    multiplier, seeds = torch.randn(2, 4, 8, 8), [1, 2]
    with evaluating(half):
        assert peak_bytes(lambda: probe_backward(half, x, multiplier, seeds, "rademacher")) < 4 * wide
    with pytest.raises(ZeroDivisionError), recompute_wide_weights():
        1 / 0  # noqa: B018
    assert not _recorded_reads


def _along(gradient, seed, stream):
    return float((gradient.reshape(-1) * noise(gradient.numel(), seed, stream=stream)).sum())


def test_adapters_on_top():
    """peft takes narrow layers for what they are, so that either can come first."""
    half = nn.Sequential(frozen_linear(70, 16), nn.Tanh(), frozen_linear(16, 4))
    narrow_weights(half, "int4")
    x = torch.randn(3, 70)
    before = half(x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), half)
    assert torch.equal(half(x), before)
    moving = trainable(half)[0]
    assert [p.dtype for p in moving] == [torch.float32] * 4
    assert half[0].base_layer._parameters["weight"].dtype == torch.uint8


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trains", "frozen", "estimator"),
    [
        ("lora", "int4", "one-sided"),
        ("norms", "int4", "two-sided"),
        ("biases", "int8", "forward"),
        ("lora", "int8", "backward"),
    ],
)
def test_runs_resume_and_rebuild_to_the_bit(folder, tmp_path, trains, frozen, estimator):  # noqa: F811
    settings = config(folder, trains=trains, frozen=frozen, estimator=estimator, snapshot_every=4, digest_every=2)
    whole = train(settings, tmp_path / "whole")
    assert whole.replicas.equal
    base = load_file(tmp_path / "whole" / "base.safetensors")
    assert any(t.dtype in (torch.uint8, torch.int8, torch.int16) for t in base.values())

    class Killed(Exception):
        pass

    def kill(done, *rest):
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        train(settings, tmp_path / "killed", kill)
    resumed = train(settings, tmp_path / "killed", resume=True)
    assert resumed.replicas.digest == whole.replicas.digest
    for name in ("base", "client"):
        files = [(tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "killed")]
        assert files[0] == files[1]
    tensors, _ = rebuild(tmp_path / "killed" / "hosfl.log", tmp_path / "killed" / "base.safetensors")
    assert save(tensors) == files[1]
    moving = {name for name, p in assemble(settings)[0].base.named_parameters() if p.requires_grad}
    assert {name for name, t in tensors.items() if not torch.equal(t, base[name])} <= moving
    other = copy.deepcopy(base)
    narrow = next(name for name, t in base.items() if not t.is_floating_point() and t.dim() == 3)
    other[narrow][0, 0, 0] ^= 1
    (tmp_path / "other").write_bytes(save(other))
    with pytest.raises(LogError, match="not the base model"):
        rebuild(tmp_path / "killed" / "hosfl.log", tmp_path / "other")


@pytest.mark.parametrize("method", ["first-order", "splitfed", "frozen", "zo-both"])
def test_other_methods(folder, method):  # noqa: F811
    summary = train(config(folder, method=method, trains="lora", frozen="bfloat16", rounds=4))
    assert summary.replicas.equal


def test_the_digits_half_has_one_such_layer():
    summary = train(Config(frozen="int4", rounds=2, evaluate_every=2))
    assert summary.replicas.equal
    base = assemble(Config(frozen="int4"))[0].base
    assert [name for name, p in base.named_parameters() if not p.is_floating_point()] == ["2.weight"]
    assert base[2]._parameters["weight"].shape == (7, 1, 8)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_nothing_to_narrow(folder, capsys):  # noqa: F811
    with pytest.raises(ValueError, match="'int8' finds nothing to store: every weight of the client half is trainable"):
        train(config(folder, frozen="int8"))
    with pytest.raises(ValueError, match="finds nothing"):
        narrow_weights(nn.LSTM(3, 4).requires_grad_(False), "int8")
    with pytest.raises(ValueError, match="finds nothing"):
        narrow_weights(nn.Embedding(3, 4, max_norm=1.0).requires_grad_(False), "int8")
    with pytest.raises(SystemExit):
        main(["train", "--frozen", "int5"])
    assert "invalid choice: 'int5'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="frozen must be one of float32, bfloat16, int8, int4, int2, got 'int5'"):
        Config(frozen="int5")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(value):
    linear = frozen_linear(3, 4)
    linear.weight.data[1, 2] = value
    with pytest.raises(ValueError, match=r"^weight has infinite or NaN weights, which cannot be stored as int4"):
        narrow_weights(linear, "int4")


def test_float32_leaves_all_as_it_is():
    linear = frozen_linear(3, 4)
    weight = linear.weight
    assert narrow_weights(linear, "float32") is linear
    assert linear.weight is weight

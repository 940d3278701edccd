"""Adapters for forward passes: W + B R A, A from weights or from inputs, peft's others; their bits in files."""

import copy
import json
import shutil
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_tasks import config, folder  # noqa: F401  # of a model and data in the formats that real ones have
from torch import nn
from transformers.pytorch_utils import Conv1D

from hosfl import Task, rebuild, train
from hosfl.halves import adapters
from hosfl.halves.adapters import LoraXS, fixed_factors, input_rows, refuse_idle_adapters, second_moments
from hosfl.halves.inputs import call
from hosfl.halves.narrow import narrow_weights
from hosfl.halves.split import split
from hosfl.halves.trains import select_trainable
from hosfl.probing.displaced import Displacement, evaluate_displaced
from hosfl.probing.forward_mode import Tangents, derivative
from hosfl.probing.probe import trainable
from hosfl.protocol.header import LogError
from hosfl.protocol.provenance import ProvenanceError
from hosfl.protocol.rebuild import base_digest
from hosfl.runs.assemble import assemble
from hosfl.runs.config import Config
from hosfl.tasks import make_task
from hosfl_kernels import perturb_


def transposed():
    layer = Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "transformers' Conv1D": (transposed, (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), (4, 3, 9, 8)),
    "conv2d, same": (lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="circular"), (4, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, stride=2), (2, 2, 4, 4, 4)),
}


@pytest.fixture(params=LAYERS)
def pair(request):
    """A layer, a half with it, and inputs."""
    torch.manual_seed(1)
    make, shape = LAYERS[request.param]
    layer = make()
    return layer, nn.Sequential(copy.deepcopy(layer), nn.Tanh()), torch.randn(shape)


@pytest.mark.parametrize("trains", ["xs:2", "act:2"])
def test_an_adapter_is_nothing_at_first_and_then_b_r_a(pair, trains):
    layer, half, x = pair
    whole = nn.Sequential(layer, nn.Tanh())
    assert select_trainable(half, trains, 0, x) is half
    assert torch.equal(half(x), whole(x))
    assert [(name, tuple(p.shape)) for name, p in half.named_parameters() if p.requires_grad] == [("0.R", (2, 2))]
    adapter = half[0]
    with torch.no_grad():
        adapter.R.normal_()
        moved = adapter.B @ adapter.R @ adapter.A
        layer.weight += moved.T if isinstance(layer, Conv1D) else moved.view(layer.weight.shape)
    assert float((half(x) - whole(x)).detach().abs().max()) < 1e-5
    assert torch.allclose(adapter.weight, layer.weight, atol=1e-6)  # for those who read it
    assert torch.equal(adapter.bias, layer.bias) if layer.bias is not None else adapter.bias is None
    again = copy.deepcopy(half)
    assert torch.equal(again(x), half(x))
    again[0].load_state_dict({name: torch.zeros_like(t) for name, t in again[0].state_dict().items()})
    assert not torch.equal(again(x), half(x))
    # The gradient of R is that of the weight, seen through both factors.
    (grad,) = torch.autograd.grad(half(x).square().sum(), adapter.R)
    (of_weight,) = torch.autograd.grad(whole(x).square().sum(), layer.weight)
    of_weight = of_weight.T if isinstance(layer, Conv1D) else of_weight.flatten(1)
    assert torch.allclose(grad, adapter.B.T @ of_weight @ adapter.A.T, rtol=1e-3, atol=1e-4)


def test_factors_are_the_weight_s_singular_vectors():
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(7, 9))
    weight = half[0].weight.detach().double().numpy()
    select_trainable(half, "xs:3", 0)
    left, values, right = np.linalg.svd(weight)
    A, B = half[0].A.double().numpy(), half[0].B.double().numpy()
    assert np.allclose(np.abs(A @ right[:3].T), np.eye(3), atol=1e-5)
    assert np.allclose(np.abs(B.T @ left[:, :3]), np.eye(3) * values[:3].mean(), atol=1e-5)
    for rows in (A, B.T):
        assert all(row[np.abs(row).argmax()] > 0 for row in rows)


def test_factors_are_the_inputs_largest_directions():
    """Against numpy, for tokens with padding, and for patches that are cut out by hand."""
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(6, 9))
    weight = half[0].weight.detach().double().numpy()
    x = torch.randn(70, 5, 6) * torch.tensor([3.0, 0.1, 0.2, 2.0, 0.1, 0.3]) + 0.5
    mask = (torch.arange(5) < torch.randint(1, 6, (70, 1))).long()
    x[mask == 0] = 100.0  # padding

    class Masked(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, attention_mask):
            return self.inner(x)

    masked = select_trainable(Masked(half).train(), "act:2:*0", 0, {"x": x, "attention_mask": mask})
    assert masked.training
    rows = x[mask.bool()].double().numpy()
    moment = rows.T @ rows
    _, vectors = np.linalg.eigh(moment)
    A, B = half[0].A.double().numpy(), half[0].B.double().numpy()
    assert np.allclose(np.abs(A @ vectors[:, ::-1][:, :2]), np.eye(2), atol=1e-4)
    root = np.linalg.cholesky(moment)
    left = np.linalg.svd(weight @ root)[0][:, :2]
    assert np.allclose(np.abs(B.T @ left), np.eye(2) * np.linalg.norm(weight @ A.T, axis=0).mean(), atol=1e-4)
    layer = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    pictures = torch.randn(4, 2, 7, 6)
    patches = nn.functional.unfold(pictures, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1))
    assert torch.equal(input_rows(layer, pictures, None), patches.transpose(1, 2).flatten(0, 1))
    found = second_moments(nn.Sequential(layer), {"0": layer}, pictures.repeat(20, 1, 1, 1))["0"]
    patches = patches.transpose(1, 2).flatten(0, 1)
    assert torch.allclose(found, 20 * patches.T @ patches, rtol=1e-4)


def test_a_layer_at_two_places_has_one_adapter():
    layer = nn.Linear(4, 4)
    half = select_trainable(nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer)), "xs:1", 0)
    assert half[0] is half[2][0]
    assert isinstance(half[0], LoraXS)
    assert half[0].base_layer is layer


def test_modules_that_read_weights_see_the_adapter():
    torch.manual_seed(0)
    half = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    before = half(x)
    select_trainable(half, "xs:2", 0)
    adapted = {name: m for name, m in half.named_modules() if isinstance(m, LoraXS)}
    assert set(adapted) == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}
    with torch.no_grad():
        fast = half(x)  # which calls none of them
        assert torch.allclose(fast, before, atol=1e-6)
        for adapter in adapted.values():
            adapter.R.normal_()
        fast = half(x)
    assert not torch.allclose(fast, before, atol=1e-2)
    assert torch.allclose(half(x), fast, atol=1e-5)  # the slow way, which records a graph
    assert all(g is not None for g in torch.autograd.grad(half(x).sum(), [a.R for a in adapted.values()]))


# --- what goes on around them -------------------------------------------------------------------------------------


def bert(layers=2):
    torch.manual_seed(0)
    settings = hf.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=2,
    )
    return hf.BertForSequenceClassification(settings).eval()


def tokens(count=12, length=9):
    mask = (torch.arange(length) < torch.randint(3, length + 1, (count, 1))).long()
    return {"input_ids": torch.randint(5, 50, (count, length)) * mask, "attention_mask": mask}


@pytest.mark.parametrize(("frozen", "dtype"), [("float32", "float32"), ("int4", "float32"), ("int8", "bfloat16")])
def test_narrow_weights_probes_and_dtypes(frozen, dtype):
    """A and B are never narrow; moved weights are read as they are written; forward mode is the gradient."""
    x = tokens()
    half = split(bert(), 1).client
    narrow_weights(select_trainable(half, "act:2", 0, x).to(getattr(torch, dtype)), frozen)
    assert {str(t.dtype) for t in fixed_factors(half).values()} == {f"torch.{dtype}"}
    parameters, streams = trainable(half)
    assert sum(p.numel() for p in parameters) == 4 * 6
    with torch.no_grad():
        for p in parameters:
            p.normal_()
        found = evaluate_displaced(half, x, Displacement(parameters, streams, 7, 0.5))
        moved = copy.deepcopy(half)
        perturb_(trainable(moved)[0], 7, 0.5, streams=streams)
        assert torch.equal(found, call(moved, x))
        assert not torch.equal(found, call(half, x))
    assert found.dtype == getattr(torch, dtype)
    if dtype == "float32":
        slope = derivative(half, x, Tangents(parameters, streams, 7)).sum()
        direction = [torch.zeros_like(p) for p in parameters]
        perturb_(direction, 7, 1.0, streams=streams)
        gradients = torch.autograd.grad(call(half, x).sum(), parameters)
        exact = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        assert torch.allclose(slope, exact, rtol=1e-3, atol=1e-4)


def test_a_model_with_adapters_is_cut_and_compared():
    model = select_trainable(bert(), "xs:2:*.layer.*", 0)
    halves = split(model, 1)  # compares outputs and gradients with the model's
    assert len(trainable(halves.client)[0]) == 6
    assert len(fixed_factors(halves.server)) == 12


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_layers_of_other_kinds(family):
    """GPT-2's are transposed; T5 reads a layer's weight for its dtype."""
    torch.manual_seed(0)
    if family == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    else:
        model = hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    half = split(model.eval(), 1).client
    x = tokens()
    before = call(half.requires_grad_(False), x)  # torch multiplies otherwise where weights require grad
    select_trainable(half, "act:2", 0, x)
    assert torch.equal(call(half, x), before)
    layers = [m for m in half.modules() if isinstance(m, LoraXS)]
    assert len(layers) == {"gpt2": 4, "t5": 6}[family]
    gradients = torch.autograd.grad(call(half, x).sum(), [a.R for a in layers])
    assert all(float(g.abs().max()) > 0 for g in gradients)


# --- peft's -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "moving", "fixed"),
    [
        ("peft:vera", 2 * (256 + 16), 2 * 2 * 256 * 16),
        ("peft:TinyLora", 2 * 64, 2 * (64 * 2 * 2 + 2 * 2 * 16)),
        ("peft:ia3", 2 * 16 + 32 + 16, 0),
        ("peft:LORA", 2 * 2 * 8 * 16, 0),
        ("peft:unilora", 256, 2 * 4 * (4 * 16)),
    ],
)
def test_peft_s_by_name(told, moving, fixed):
    x, halves = tokens(), []
    for seed in (1, 1, 2):
        half = split(bert(), 1).client
        before = call(half, x)
        torch.manual_seed(len(halves))  # of the run alone
        select_trainable(half, told, seed)
        assert torch.allclose(call(half, x), before, atol=1e-2)
        halves.append(half)
    assert sum(p.numel() for p in trainable(halves[0])[0]) == moving
    assert all("base_layer" not in n for n, p in halves[0].named_parameters() if p.requires_grad)
    assert sum(t.numel() for t in fixed_factors(halves[0]).values()) == fixed
    first, same, other = (base_digest(half.state_dict()) for half in halves)
    assert first == same
    assert (first != other) == (told in ("peft:LORA", "peft:unilora"))


@pytest.mark.parametrize("kind", ["lora", "eva", "lora with exclude_modules"])
def test_peft_s_by_file(tmp_path, kind):
    """As peft writes it: with inference_mode, in which nothing would move."""
    file, x = tmp_path / "mine.json", tokens()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query", "dense"], "inference_mode": True}
    if kind == "eva":
        told |= {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}
    if kind.endswith("exclude_modules"):
        told["exclude_modules"] = ".*intermediate.*"
    file.write_text(json.dumps(told))
    half = split(bert(), 1).client
    before = call(half, x)
    select_trainable(half, f"peft:{file}", 0, x)
    assert torch.equal(call(half, x), before) or torch.allclose(call(half, x), before, atol=1e-6)
    moving = {name for name, p in half.named_parameters() if p.requires_grad}
    assert len(moving) == {"lora": 8, "eva": 4, "lora with exclude_modules": 6}[kind]
    fixed = fixed_factors(half)
    if kind != "eva":
        assert not fixed
        return
    assert all("lora_B" in name for name in moving)
    assert all("lora_A" in name for name in fixed)
    plain, other = split(bert(), 1).client, split(bert(), 1).client
    layer = dict(plain.named_modules())["trunk.encoder.layer.0.attention.self.query"]
    inputs = []
    hook = layer.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    call(plain, x), hook.remove()
    rows = inputs[0][x["attention_mask"].bool()].detach()
    top = torch.linalg.svd(rows - rows.mean(0))[2][:2]  # peft centres them
    A = fixed["trunk.encoder.layer.0.attention.self.query.lora_A.default.weight"]
    assert torch.allclose(torch.linalg.svdvals(A @ top.T), torch.ones(2), atol=1e-3)
    select_trainable(other, f"peft:{file}", 1, x)
    assert base_digest(fixed_factors(other)) == base_digest(fixed)  # nothing of it is random
    narrow_weights(half, "int8")
    assert base_digest(fixed_factors(half)) == base_digest(fixed)


# --- runs ---------------------------------------------------------------------------------------------------------


def stop(at):
    def progress(done, *rest):
        if done == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("trains", ["act:2", "xs:1:*.query,*.value", "peft:tinylora"])
def test_a_run_trains_resumes_and_is_rebuilt(folder, tmp_path, trains):  # noqa: F811
    settings = config(folder, trains=trains, rounds=4, snapshot_every=2)
    whole = train(settings, tmp_path / "whole")
    base = load_file(tmp_path / "whole" / "base.safetensors")
    fixed = fixed_factors(assemble(settings)[0].base)
    assert fixed
    assert all(torch.equal(base[name], tensor) for name, tensor in fixed.items())
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "stopped", stop(3))
    again = train(settings, tmp_path / "stopped", resume=True)
    assert again.replicas.digest == whole.replicas.digest
    assert (again.loss, again.accuracy) == (whole.loss, whole.accuracy)
    tensors, replica = rebuild(tmp_path / "whole" / "hosfl.log", tmp_path / "whole" / "base.safetensors")
    client = load_file(tmp_path / "whole" / "client.safetensors")
    assert all(torch.equal(tensors[name], client[name]) for name in client)
    changed = [name for name in client if not torch.equal(client[name], base[name])]
    assert changed
    assert not set(changed) & set(fixed)


def turned(monkeypatch):
    """Another machine: its decompositions have other bits."""
    signed = adapters.fix_signs
    monkeypatch.setattr(adapters, "fix_signs", lambda rows: signed(rows) * (1 + 1e-6))


@pytest.mark.parametrize("method", ["ho", "first-order"])
def test_another_machine_takes_the_factors_from_the_base_file(folder, tmp_path, monkeypatch, method):  # noqa: F811
    settings = config(folder, trains="act:2", rounds=4, snapshot_every=2, method=method)
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "there", stop(3))
    for name in ("here", "swapped"):
        shutil.copytree(tmp_path / "there", tmp_path / name)
    turned(monkeypatch)
    again = train(settings, tmp_path / "there", resume=True)
    assert again.loss == whole.loss
    assert again.replicas.digest == whole.replicas.digest
    files = [(tmp_path / name / "base.safetensors").read_bytes() for name in ("whole", "there")]
    assert files[0] == files[1]
    # Without the file, and with another run's, it is another model.
    (tmp_path / "here" / "base.safetensors").unlink()
    with pytest.raises((ProvenanceError, LogError), match="first weights were others"):
        train(settings, tmp_path / "here", resume=True)
    file = tmp_path / "swapped" / "base.safetensors"
    held = load_file(file)
    name = next(name for name in held if name.endswith(".A"))
    save_file(held | {name: held[name] * 1.5}, file)
    with pytest.raises((ProvenanceError, LogError), match="first weights were others"):
        train(settings, tmp_path / "swapped", resume=True)
    save_file({n: t for n, t in held.items() if n != name}, file)
    with pytest.raises(ProvenanceError, match=f"has no {name} as this run has it"):
        train(settings, tmp_path / "swapped", resume=True)
    file.write_bytes(b"nothing")
    with pytest.raises(ProvenanceError, match="cannot be read"):
        train(settings, tmp_path / "swapped", resume=True)


def test_factors_are_in_the_base_s_hash(folder, tmp_path, monkeypatch):  # noqa: F811
    settings = config(folder, trains="act:2")
    before, same = (assemble(settings)[0] for _ in range(2))
    turned(monkeypatch)
    after = assemble(settings)[0]
    assert before.header.base == same.header.base != after.header.base
    assert before.provenance == same.provenance
    assert before.provenance.model != after.provenance.model


# --- public samples -----------------------------------------------------------------------------------------------


def test_the_package_s_texts(folder):  # noqa: F811
    lines = (files("hosfl.tasks") / "public.txt").read_text("utf-8").splitlines()
    assert len(lines) > 90
    assert len(set(lines)) == len(lines)
    assert all(100 <= len(line) <= 300 for line in lines)
    public = make_task(config(folder)).public
    assert public["input_ids"].shape == public["attention_mask"].shape
    assert len(public["input_ids"]) == len(lines)
    assert public["input_ids"].shape[1] <= 32  # the model's own limit


def own(**more):
    x, y = torch.randn(60, 6), torch.arange(60) % 2
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    return Task(net, train=(x, y), test=(x, y), loss=nn.functional.cross_entropy, at=2, **more)


SMALL = {
    "rounds": 2,
    "clients": 2,
    "sampled": 2,
    "batch": 4,
    "partition": "iid",
    "server_rate": 0.1,
    "client_rate": 0.1,
}


def test_a_task_of_one_s_own_brings_its_samples():
    public = np.random.default_rng(0).standard_normal((50, 6))
    assert train(own(public=public.astype(np.float32)), trains="act:3", **SMALL).replicas.equal
    assert train(own(public=public), trains="act:3", **SMALL).replicas.equal  # of the half's dtype
    with pytest.raises(ValueError, match=r"by --public 200, .* Task\(public=...\), or take xs:3, which needs none"):
        train(own(), trains="act:3", **SMALL)
    with pytest.raises(ValueError, match="the client half does not take the public samples"):
        train(own(public=torch.randn(9, 5)), trains="act:3", **SMALL)
    with pytest.raises(ValueError, match="0: rank 3 is too large for the public samples: its inputs have 2 directions"):
        train(own(public=torch.randn(2, 6)), trains="act:3", **SMALL)
    for wrong in ({"a": torch.ones(2, 3), "b": torch.ones(3)}, torch.ones(0, 6)):
        with pytest.raises(ValueError, match="public has inputs of"):
            own(public=wrong)
    with pytest.raises(ValueError, match="public has no inputs: give the arguments"):
        own(public={})
    with pytest.raises(ValueError, match="public: no array of numbers"):
        own(public="texts")
    assert replace(own(public=public), rates={"ho": (1.0, 1.0)}).public.shape == (50, 6)


# --- what is refused ----------------------------------------------------------------------------------------------


def untouched(half, trains, match, public=None):
    before = {name: (id(p), p.requires_grad) for name, p in half.named_parameters()}
    with pytest.raises(ValueError, match=match) as caught:
        select_trainable(half, trains, 0, public)
    assert f"{trains!r}" in str(caught.value)
    assert {name: (id(p), p.requires_grad) for name, p in half.named_parameters()} == before


@pytest.mark.parametrize("kind", ["xs", "act"])
@pytest.mark.parametrize("rank", ["", "0", "-1", "two", "1.5", ":*"])
def test_ranks_that_are_none(kind, rank):
    half = nn.Sequential(nn.Linear(3, 4))
    untouched(half, f"{kind}:{rank}", f"must be a whole number from 1 on, as in {kind}:4", torch.ones(2, 3))
    untouched(half, kind, f"as in {kind}:4", torch.ones(2, 3))


def test_layers_that_cannot_have_adapters():
    half = nn.Sequential(nn.Linear(8, 9), nn.Conv1d(4, 4, 3, groups=4), nn.Linear(9, 5))
    untouched(half, "xs:6", "rank 6 is too large for 2: 5 at most, or leave that layer out")
    untouched(half, "xs:1:1", "matches no linear layer or convolution; the client half has 0, 2")
    untouched(nn.Sequential(nn.ReLU(), half[1]), "xs:1", "and the client half has none")
    untouched(nn.Linear(3, 4), "xs:1", "is itself a Linear: put it into an nn.Sequential")
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    untouched(attention, "act:2", "out_proj is never called", torch.randn(9, 3, 8))
    assert not any(module._forward_pre_hooks for module in attention.modules())
    assert attention.training


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ("nothing", "peft has no 'nothing': it has .*ia3, .*lora,.* vera.*, or give a FILE.json"),
        ("", "peft has no ''"),
        ("prompt_tuning", "prompt_tuning cannot be used: it learns virtual tokens, which do not cross a cut"),
        ("adaption_prompt", "cannot be used"),
        ("xlora", "cannot be used"),
        ("adalora", "peft refuses the configuration: .*total_step"),
        ("vblora", "peft refuses: .*divisible"),
        ("trainable_tokens", "these adapters have no trainable parameters"),
        ("missing.json", "missing.json cannot be read: No such file"),
        ("folder.json", "folder.json cannot be read"),
        ("torn.json", "torn.json is no JSON"),
        ("list.json", "list.json is no configuration of peft: it has no peft_type"),
        ("other.json", "other.json is no configuration of peft"),
        ("unknown.json", "peft has no 'NEW'"),
        ("knob.json", "peft refuses the configuration: .*knob"),
        ("nowhere.json", "peft refuses: .*not found"),
        ("eva.json", "EVA needs public samples"),
    ],
)
def test_peft_refuses(tmp_path, monkeypatch, told, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    texts = {
        "torn": "{",
        "list": "[1]",
        "other": '{"model_type": "bert"}',
        "unknown": '{"peft_type": "NEW"}',
        "knob": '{"peft_type": "LORA", "knob": 1}',
        "nowhere": '{"peft_type": "LORA", "target_modules": ["nowhere"]}',
        "eva": '{"peft_type": "LORA", "init_lora_weights": "eva"}',
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    untouched(split(bert(), 1).client, f"peft:{told}", match)


def test_eva_needs_as_many_tokens_as_directions(tmp_path):
    file = tmp_path / "eva.json"
    file.write_text('{"peft_type": "LORA", "r": 8, "init_lora_weights": "eva"}')
    few = {name: value[:1] for name, value in tokens().items()}
    untouched(split(bert(), 1).client, f"peft:{file}", "EVA with this rank needs 16 public tokens", few)


# --- layers whose weight is read ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Texts of which two tokens are padding go through nested tensors, where torch may take its fused operation."""

    def __init__(self, masked):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, activation="gelu")
        self.inner, self.masked = nn.TransformerEncoder(layer, 2) if masked else nn.Sequential(layer), masked

    def forward(self, x):
        if not self.masked:
            return self.inner(x)
        padding = torch.arange(5).expand(len(x), 5) > 2
        return self.inner(x, src_key_padding_mask=padding)[:, :3]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("told", ["lora:2:*.linear?", "peft"])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_s_encoder_layers_call_layers_with_adapters(masked, told, tmp_path):
    torch.manual_seed(0)
    if told == "peft":
        (tmp_path / "a.json").write_text('{"peft_type": "LORA", "target_modules": ["linear1", "linear2"]}')
        told = f"peft:{tmp_path / 'a.json'}"
    half, x = Encoder(masked), torch.randn(4, 5, 16)
    base = copy.deepcopy(half)
    select_trainable(half, told, 0)
    for p in trainable(half)[0]:
        nn.init.normal_(p, std=0.4)
    refuse_idle_adapters(half, x)
    half = copy.deepcopy(half)
    with torch.no_grad():
        wanted = half.train()(x)
        assert torch.allclose(half.eval()(x), wanted, atol=1e-5)
        assert not torch.allclose(base.eval()(x), wanted, atol=0.1)
        parameters, streams = trainable(half)
        there, back = (evaluate_displaced(half, x, Displacement(parameters, streams, 7, mu)) for mu in (1e-3, -1e-3))
        exact = derivative(half, x, Tangents(parameters, streams, 7))
    assert float(exact.abs().max()) > 0.1
    assert torch.allclose((there - back) / 2e-3, exact, atol=0.02 * float(exact.abs().max()))
    if not masked:
        pytest.importorskip("hosfl.edge.export").export_half(half, x)  # which compares


@pytest.mark.parametrize("frozen", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("told", ["lora:2", "peft:ia3", "lora:2:*.out_proj"])
def test_an_adapter_whose_layer_is_never_called_is_refused(told, frozen):
    half, x = Encoder(False), torch.randn(4, 5, 16)
    narrow_weights(select_trainable(half, told, 0), frozen)
    before = {name: t.clone() for name, t in half.state_dict().items()}
    grads = [p.requires_grad for p in half.parameters()]
    with pytest.raises(ValueError, match=r"out_proj.*would do nothing: the client half reads the weight of"):
        refuse_idle_adapters(half, x)
    assert grads == [p.requires_grad for p in half.parameters()]
    assert all(torch.equal(t, before[name]) for name, t in half.state_dict().items())
    model = nn.Sequential(Encoder(False), nn.Flatten(), nn.Linear(80, 2))
    data = (torch.randn(20, 5, 16), torch.arange(20) % 2)
    task = Task(model, data, data, nn.functional.cross_entropy, at=1)
    with pytest.raises(ValueError, match="would do nothing"):
        train(task, trains=told, frozen=frozen, partition="iid", server_rate=0.1, client_rate=0.1)


@pytest.mark.parametrize("all_move", [False, True])
def test_adapters_that_a_fused_operation_passes_by_are_found_out(all_move):
    """As of a model that came with its adapters."""
    half, x = select_trainable(Encoder(False), "lora:2:*.linear?", 0), torch.randn(4, 5, 16)
    half.inner[0].activation_relu_or_gelu = 2
    if all_move:
        half.requires_grad_(True)
    with pytest.raises(ValueError, match=r"linear1\.lora_A\.\S+ would do nothing"):
        refuse_idle_adapters(half, x)


def test_adapters_that_samples_do_not_reach_are_taken():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return self.experts[0](x) if x.sum() > 0 else self.experts[1](x)

    half = select_trainable(Routed(), "lora:2", 0)
    refuse_idle_adapters(half, torch.ones(2, 4))

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.q.weight)

    refuse_idle_adapters(select_trainable(Reads(), "xs:2", 0), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"q\.lora_A"):
        refuse_idle_adapters(select_trainable(Reads(), "lora:2", 0), torch.ones(2, 4))


# --- public samples of the training part ----------------------------------------------------------------------------


def test_public_samples_are_set_aside(folder):  # noqa: F811
    _, task = assemble(config(folder))
    wanted = task.with_public(5)
    total = len(task.train)
    chosen = [number * total // 5 for number in range(5)]
    rest = [number for number in range(total) if number not in chosen]
    assert all(torch.equal(wanted.train.inputs[n], task.train.inputs[n][rest]) for n in task.train.inputs)
    assert torch.equal(wanted.train.labels, task.train.labels[rest])
    longest = int(task.train[torch.tensor(chosen)].lengths.max())
    for name, value in wanted.public.items():
        assert torch.equal(value, task.train.inputs[name][chosen][:, :longest])
    assert wanted.digest() != task.digest()
    federation, assembled = assemble(config(folder, public=5, trains="act:2"))
    assert len(assembled.train) == total - 5
    other, _ = assemble(config(folder, trains="act:2"))
    assert base_digest(fixed_factors(federation.base)) != base_digest(fixed_factors(other.base))


def test_pictures_have_adapters_from_their_inputs_so():
    half = assemble(Config(task="digits", trains="act:2", public=50))[0].base
    assert fixed_factors(half)
    with pytest.raises(ValueError, match="public samples"):
        assemble(Config(task="digits", trains="act:2"))


def test_public_samples_that_cannot_be_set_aside(folder):  # noqa: F811
    _, task = assemble(config(folder))
    with pytest.raises(ValueError, match=f"public = {len(task.train)} leaves none"):
        task.with_public(len(task.train))
    divided = replace(task, train=[task.train, task.train])
    with pytest.raises(ValueError, match="clients' own data"):
        divided.with_public(3)
    grouped = replace(task, groups=torch.arange(len(task.train)))
    assert 0 not in grouped.with_public(3).groups


def test_a_task_of_one_s_own_has_its_public_samples_set_aside(folder):  # noqa: F811
    _, task = assemble(config(folder))
    settings = {"rounds": 1, "clients": 2, "sampled": 2, "partition": "iid", "server_rate": 0.01, "client_rate": 0.01}
    one = train(task, trains="act:2", public=6, **settings)
    other = train(replace(task.with_public(6)), trains="act:2", **settings)
    assert one.provenance["data"] == other.provenance["data"] != task.digest()
    assert one.replicas.digest == other.replicas.digest

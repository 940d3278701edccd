"""Halves that are not the model are found out, and what cannot be cut is refused."""

import copy
import pickle
import random
from importlib import import_module

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate import dispatch_model
from test_split import IMAGES, TEXT, ResNet, image_model, output, text, text_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hosfl.halves.families import FAMILIES, example_inputs
from hosfl.halves.follow import CutError
from hosfl.halves.split import SplitModel, cut_points, split
from hosfl.halves.transformer_halves import output_tensor
from hosfl.halves.verify import verify_halves

SPLIT = import_module("hosfl.halves.split")  # `hosfl.split` is the function


def model_of(family, head="classifier"):
    return text_model(family, head) if family in TEXT else image_model(family)


def adapted(model):
    """LoRA beside every linear layer of the trunk, its weights not zero."""
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, settings).eval()


@pytest.mark.families
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", TEXT)
def test_every_family_is_verified_at_every_cut(family, attention):
    model = text_model(family, "classifier")
    if attention == "sdpa" and not model._supports_sdpa:
        assert family in ("deberta-v2", "gemma2")
        return
    model.set_attn_implementation(attention)
    model = adapted(model)
    pad = model.config.pad_token_id or 0
    for point in cut_points(model):
        halves = split(model, point.at)
        with torch.no_grad():
            for padding in ("left", "right"):
                assert torch.equal(halves(text(padding, pad)), output(model, text(padding, pad)))


@pytest.mark.parametrize("family", IMAGES)
def test_every_image_family_is_verified_at_every_cut(family):
    model = image_model(family)
    for point in cut_points(model):
        halves = split(model, point.at)
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(halves(x), model(x).logits)


def test_an_output_of_one_tensor_may_have_any_name():
    model, x = hf.ViTForMaskedImageModeling(IMAGES["vit"]).eval(), torch.randn(2, 3, 16, 16)
    halves = split(model, 2)
    with torch.no_grad():
        assert torch.equal(halves(x), model(x).reconstruction)


# --- faults ------------------------------------------------------------------------------------------------------


def other_weight(half):
    """One element of one weight, 1.0001 times as large."""
    own = copy.deepcopy(half)
    with torch.no_grad():
        values = next(p for p in own.parameters() if p.dim() > 1 and p.any()).view(-1)
        values[values.nonzero()[0]] *= 1.0001
    return own


class Scaled(nn.Module):
    """One element of every sample is scaled: a normalisation after the cut would undo the scale of all."""

    def __init__(self, half):
        super().__init__()
        self.inner = half

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return torch.cat([output[..., :1] * 1.001, output[..., 1:]], -1)


class Forgets(Scaled):
    """Runs without the mask."""

    def forward(self, *args, attention_mask=None, **kwargs):
        return self.inner(*args, **kwargs)


class Detached(Scaled):
    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs).detach()


class Drops(Scaled):
    """In train mode only."""

    def forward(self, *args, **kwargs):
        return F.dropout(self.inner(*args, **kwargs), 0.5, self.training)


FAULTS = {
    "a weight of the client": lambda h: SplitModel(other_weight(h.client), h.server),
    "a weight of the server": lambda h: SplitModel(h.client, other_weight(h.server)),
    "the cut is scaled": lambda h: SplitModel(Scaled(h.client), h.server),
    "the output is scaled": lambda h: SplitModel(h.client, Scaled(h.server)),
    "no gradient for the client": lambda h: SplitModel(Detached(h.client), h.server),
    "dropout": lambda h: SplitModel(Drops(h.client), h.server),
}
ON_TEXT = {
    "no mask at the client": lambda h: SplitModel(Forgets(h.client), h.server),
    "no mask at the server": lambda h: SplitModel(h.client, Forgets(h.server)),
}


CASES = [(family, fault) for family in FAMILIES for fault in (*FAULTS, *(ON_TEXT if family in TEXT else ()))]


@pytest.mark.families
@pytest.mark.parametrize(("family", "fault"), CASES)
def test_a_fault_is_found(family, fault, monkeypatch):
    model, damage, cut = model_of(family), {**FAULTS, **ON_TEXT}[fault], SPLIT._make_halves
    monkeypatch.setattr(SPLIT, "_make_halves", lambda *halves: damage(cut(*halves)))
    with pytest.raises((CutError, ValueError), match=r"the halves are not|\(there is none\)"):
        split(model, 2)
    split(model, 2, verify=False)


@pytest.mark.families
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_left_out_is_found_and_named(family, side):
    model = model_of(family)
    path = cut_points(model)[0].name.rpartition(".")[0]
    halves = split(model, 2)
    half = halves.client.trunk if side == "client" else halves.server.model
    names = [name for name, m in half.named_modules() if isinstance(m, nn.ModuleList) and path.endswith(name) and name]
    layers = half.get_submodule(names[0])
    del layers[1 if side == "client" else 0]
    gone = 1 if side == "client" else 2
    with pytest.raises(CutError, match=f"begins (at|before|in) {path}.{gone}|do not run"):
        verify_halves(model, halves, example_inputs(model))


def test_faults_in_a_chain_are_found():
    torch.manual_seed(0)
    model = ResNet(False)
    for damage in FAULTS.values():
        halves = damage(split(model, "layer2.0"))
        with pytest.raises(CutError, match="the halves are not"):
            verify_halves(model, halves, torch.randn(2, 3, 32, 32))
    halves = split(model, "layer1.1")
    halves.server.layer1.add_module("1", nn.Identity())
    with pytest.raises(CutError, match=r"begins at layer1\.1, which neither half has"):
        verify_halves(model, halves, torch.randn(2, 3, 32, 32))


# --- what it costs, and leaves --------------------------------------------------------------------------------------


class Passes(nn.Module):
    """Counts what goes through, in a place of which nothing is put back."""

    def __init__(self):
        super().__init__()
        self.weight, self.passes = nn.Parameter(torch.ones(1)), {"forward": 0, "backward": 0}

    def forward(self, x):
        self.passes["forward"] += 1
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(lambda gradient: self.passes.update(backward=self.passes["backward"] + 1))
        return y


def test_two_forward_and_two_backward_passes():
    stages = [Passes() for _ in range(4)]
    halves = split(nn.Sequential(*stages), 2, example=torch.randn(3, 4))
    assert [s.passes for s in stages] == [{"forward": 2, "backward": 2}] * 4
    assert split(nn.Sequential(*stages), 2, verify=False).client[0] is halves.client[0]
    assert stages[0].passes["forward"] == 2


class Nothing(TorchDispatchMode):
    """Fails for every operation but copies, which have no numbers here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.clone.default
        assert args[0].device.type == "meta"
        return func(*args, **(kwargs or {}))


def test_nothing_is_computed_on_the_meta_device():
    with torch.device("meta"):
        models = [hf.AutoModel.from_config(TEXT["llama"]), ResNet(False)]
    with Nothing():
        for model, at in zip(models, (1, "layer2.0"), strict=True):
            split(model, at)


def test_verification_leaves_no_trace():
    torch.manual_seed(0)
    model = ResNet(False).train()
    model.conv1.eval()
    model.bn1.weight.grad = torch.ones(8)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    halves = split(model, "layer2.0")
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.bn1.weight.grad, torch.ones(8))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "bn1.weight")
    assert halves.client.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Writes(nn.Module):
    """Past autograd into a buffer, and into an attribute."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), None
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.data.add_(1)
        self.last = self.layer(x + self.mean)
        return self.last


@pytest.mark.parametrize("old", [True, False])
def test_what_a_pass_changes_is_put_back_before_the_next(old):
    spectral = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(Writes(), spectral(nn.Linear(4, 4)), nn.Linear(4, 2))
    before, names = copy.deepcopy(model.state_dict()), [list(vars(m)) for m in model.modules()]
    for at in (1, 2):
        split(model, at, example=torch.ones(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [list(vars(m)) for m in model.modules()] == names
    assert model[0].last is None


class Skips(nn.Module):
    """Stochastic depth, as a layer draws it from Python's and numpy's generators."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return random.random() * self.layer(x) + float(np.random.rand())


def test_generators_of_python_and_numpy_are_put_back_as_well():
    states = random.getstate(), np.random.get_state()[1].tolist()
    split(nn.Sequential(Skips(), nn.Linear(4, 2)), 1, example=torch.ones(3, 4))
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


class Centers(nn.Module):
    """Keeps a mean that begins at zero, of its own outputs; and counts."""

    def __init__(self, keeps=True, counts=True, fades=True, scale=1.0):
        super().__init__()
        self.layer, self.keeps, self.counts, self.fades, self.scale = nn.Linear(4, 4), keeps, counts, fades, scale
        for name in ("center", "faded"):
            self.register_buffer(name, torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        x = self.layer(x) - self.scale * self.center
        if self.keeps:
            self.center.mul_(0.9)
            self.center.data.add_(x.detach().mean(0))
        if self.counts:
            self.count.add_(1)
        if self.fades:
            self.faded.mul_(0.9)
        return x


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"keeps": False}, "a pass leaves something else in the buffer 0.center"),
        ({"counts": False}, "a pass leaves something else in the buffer 0.count"),
        ({"fades": False}, "a pass leaves something else in the buffer 0.faded"),
        ({"scale": 0.5}, "in a second pass, with the buffers that the first one left, outputs differ"),
        ({}, None),
    ],
)
def test_what_a_pass_writes_into_buffers_is_compared(other, what):
    """Also where outputs of one pass are the model's, from buffers of zeros on."""
    model = nn.Sequential(Centers(), nn.Linear(4, 4), nn.Linear(4, 2))
    client = Centers(**other)
    client._parameters, client._modules, client._buffers = {}, dict(model[0]._modules), dict(model[0]._buffers)
    halves, x = SplitModel(nn.Sequential(client, model[1]), nn.Sequential(model[2])), torch.randn(3, 4)
    if what is None:
        verify_halves(model, halves, x)
    else:
        with pytest.raises(CutError, match=f"the halves are not Sequential: .*{what}"):
            verify_halves(model, halves, x)
    assert not any(b.any() for b in model.buffers())


class First(nn.Linear):
    """Remembers the mean of what it got first."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("first", torch.zeros(4))

    def forward(self, x):
        if not self.first.any():
            self.first.copy_(x.detach().mean(0))
        return super().forward(x)


def test_each_of_the_two_that_a_buffer_became_is_compared_with_it():
    """The server half remembers what it got first, and the model what the client half got."""
    twice = First()
    model = nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(4, 2))
    with pytest.raises(CutError, match=r"a pass leaves something else in the buffer 0\.first"):
        split(model, 2, example=torch.randn(3, 4))


class InPlace(nn.Linear):
    def forward(self, x):
        x -= 0.5
        return super().forward(x)


def test_every_pass_has_an_example_of_its_own():
    x = torch.ones(3, 4)
    split(nn.Sequential(InPlace(4, 4), nn.Tanh(), nn.Linear(4, 2)), 2, example=x)
    assert torch.equal(x, torch.ones(3, 4))


def test_gradients_are_compared_also_where_they_are_off(monkeypatch):
    model, cut = text_model("bert", "classifier"), SPLIT._make_halves
    monkeypatch.setattr(SPLIT, "_make_halves", lambda *halves: FAULTS["no gradient for the client"](cut(*halves)))
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(CutError, match=r"the gradient of bert\.\S+ is lost"):
            split(model, 1)


# --- what structure shows -------------------------------------------------------------------------------------------


def dispatched():
    return dispatch_model(text_model("llama"), {"": "cpu"}, force_hooks=True)


def with_prompt(settings):
    return peft.get_peft_model(text_model("llama", "words"), settings(task_type="CAUSAL_LM", num_virtual_tokens=4))


def hooked(kind="register_forward_hook", path=""):
    model = text_model("bert")
    getattr(model.get_submodule(path), kind)(lambda *args: None)
    return model


def in_mixed_precision():
    model = text_model("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def compiled_in_place():
    model = text_model("llama")
    model.compile(backend="eager")
    return model


class KeepsEval(hf.BertForSequenceClassification):
    def train(self, mode=True):
        super().train(mode)
        self.bert.embeddings.eval()
        return self


def mixed_adapters():
    return peft.get_peft_model(text_model("llama", "words"), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)


class OfTwo(nn.Module):
    """A user's own head over a known trunk."""

    def __init__(self):
        super().__init__()
        self.bert, self.head = text_model("bert"), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        return self.head(self.bert(input_ids, attention_mask).pooler_output)


def skips_layers():
    model = hf.OPTForCausalLM(TEXT["opt"])
    model.model.decoder.layerdrop = 0.1
    return model


def reads_embeddings_behind():
    config = copy.deepcopy(TEXT["deberta-v2"])
    config.legacy = False
    return hf.DebertaV2ForMaskedLM(config)


REFUSED = {
    "device map": (dispatched, "LlamaModel was replaced on the object.*remove_hook_from_module"),
    "mixed precision": (in_mixed_precision, "was replaced on the object"),
    "prompt tuning": (lambda: with_prompt(peft.PromptTuningConfig), "virtual tokens do not cross a cut"),
    "prefix tuning": (lambda: with_prompt(peft.PrefixTuningConfig), "virtual tokens do not cross a cut"),
    "p-tuning": (lambda: with_prompt(peft.PromptEncoderConfig), "virtual tokens do not cross a cut"),
    "forward hook": (hooked, "BertModel, which has forward_hooks"),
    "pre-hook inside": (lambda: hooked("register_forward_pre_hook", "encoder"), "encoder, which has forward_pre_hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "BertModel, which has backward_hooks"),
    "compiled": (lambda: torch.compile(text_model("llama"), backend="eager"), "through OptimizedModule: cut the model"),
    "compiled in place": (compiled_in_place, "LlamaModel, which is compiled"),
    "data parallel": (lambda: nn.DataParallel(text_model("llama")), "through DataParallel: .* its module"),
    "mixed adapters": (mixed_adapters, "PeftMixedModel: cut the model inside, its base_model.model"),
    "its own train": (lambda: KeepsEval(TEXT["bert"]), "through KeepsEval, whose class has its own train"),
    "layers left out": (skips_layers, "leaves out layers at random .* set its model.decoder.layerdrop to 0"),
    "weights of the other's": (
        reads_embeddings_behind,
        "server half reads word_embeddings of embeddings, which only the client half has",
    ),
    "two outputs": (lambda: hf.BertForPreTraining(TEXT["bert"]), "prediction_logits, seq_relationship_logits"),
    "encoder and decoder": (lambda: hf.T5Model(TEXT["t5"]), "has a decoder"),
    "unknown family": (
        lambda: hf.BloomModel(hf.BloomConfig(hidden_size=16, n_head=2, n_layer=2)),
        "families known are",
    ),
    "two inputs": (OfTwo, "cannot cut a OfTwo: cannot follow .*; its bert, a BertModel, can be cut by itself"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_cut_is_refused(what):
    make, match = REFUSED[what]
    model = make()
    with pytest.raises(CutError, match=match):
        split(model, 1)


def test_the_model_inside_mixed_adapters_is_cut_with_them():
    model, inputs = mixed_adapters().eval(), text("left")
    halves = split(model.base_model.model, 1)
    assert any("lora_A" in name for name, _ in halves.client.named_parameters())
    with torch.no_grad():
        assert torch.equal(halves(inputs), model(**inputs).logits)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_halves_that_were_pickled_are_the_halves(family):
    halves, inputs = split(text_model(family, "classifier"), 1), text("left")
    again = pickle.loads(pickle.dumps(halves))
    with torch.no_grad():
        assert torch.equal(again(inputs), halves(inputs))
    assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in halves.modules()]


def test_a_forward_bound_to_its_own_layer_is_no_trouble():
    """As fused kernels set it, which copies of the layer keep."""
    model = text_model("llama")
    norm = model.layers[0].input_layernorm
    norm.forward = type(norm).forward.__get__(norm)
    halves = split(model, 1)
    assert torch.equal(copy.deepcopy(halves.client)(**text("left")), halves.client(**text("left")))


class OfFive(nn.Module):
    def forward(self, x):
        if x.shape[1] != 5:
            raise AssertionError
        return x


def test_an_example_of_the_user_s():
    """Where the library has none, where its own does not fit, and one that does not fit."""
    model = ResNet(False)
    split(model, "layer2.0", example=torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"ResNet does not take the example, float32 \[2, 1, 32, 32\]: .*channels"):
        split(model, "layer2.0", example=torch.randn(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"a few samples are needed .*example="):
        split(hf.BertForMultipleChoice(TEXT["bert"]), 1)
    with pytest.raises(ValueError, match=r"must be \[batch, length\], got \[2, 1, 7\]"):
        split(hf.BertForMultipleChoice(TEXT["bert"]), 1, example={"input_ids": torch.ones(2, 1, 7, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"take the example, float32 \[3, 4\]: AssertionError"):
        split(nn.Sequential(OfFive(), nn.Linear(4, 4)), 1, example=torch.randn(3, 4))
    lstm = nn.Sequential(nn.LSTM(4, 8), nn.Identity())
    with pytest.raises(CutError, match="the client half makes a tuple"):
        split(lstm, 1)(torch.randn(2, 3, 4))


# --- what the call shows --------------------------------------------------------------------------------------------


def test_a_classifier_that_looks_at_tokens_gets_the_mask_it_needs():
    model, inputs = text_model("llama", "classifier"), text("right")
    halves = split(model, 1)
    with torch.no_grad():
        assert torch.equal(halves(inputs), output(model, inputs))
        alone = {"input_ids": inputs["input_ids"][:1]}
        assert torch.equal(halves(alone), output(model, alone))
        with pytest.raises(
            ValueError, match=r"sample 1 ends at token 4 .* and at 6 by its attention mask \(there is none"
        ):
            halves({"input_ids": inputs["input_ids"]})
        looks = {
            "input_ids": torch.where(inputs["input_ids"] == 0, 5, inputs["input_ids"]).index_fill(1, torch.tensor(6), 0)
        }
        with pytest.raises(ValueError, match="sample 0 ends at token 5"):
            halves({**looks, "attention_mask": torch.ones(3, 7, dtype=torch.int64)})
    words = text_model("llama", "words")  # looks at no token
    with torch.no_grad():
        assert torch.equal(split(words, 1)(looks), output(words, looks))


def test_masks_that_do_not_cross_are_refused():
    model, inputs = text_model("llama"), text("none")
    square = torch.ones(3, 1, 7, 7).tril().bool()
    halves = split(model, 1)
    with pytest.raises(ValueError, match=r"must be \[batch, length\], got \[3, 1, 7, 7\]"):
        halves({**inputs, "attention_mask": square})
    with pytest.raises(ValueError, match=r"must be \[batch, length\], got \[3, 1, 7, 7\]"):
        halves.server(torch.randn(3, 7, 16), attention_mask=square)


def test_a_model_that_returns_tuples():
    model = text_model("llama", "words")
    model.config.return_dict = False
    halves, inputs = split(model, 1), text("left")
    with torch.no_grad():
        assert torch.equal(halves(inputs), text_model("llama", "words")(**inputs).logits)
    assert model.config.return_dict is False


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.second(self.first(x))
        return x, -x


def test_a_model_of_two_outputs_is_told_so():
    with pytest.raises(CutError, match="the model makes a tuple, and a server half makes one tensor"):
        split(Pair(), "second", example=torch.randn(3, 4))
    with pytest.raises(CutError, match="the model makes a NoneType"):
        output_tensor(None)
    with pytest.raises(CutError, match="the model makes a, b, and a server half"):
        output_tensor({"a": 1, "b": 2})


def test_the_model_is_compared_without_a_cache():
    """With one it is another computation: keys and values lie elsewhere, and on some processors sums differ."""
    model, seen = text_model("gpt2", "words"), []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: seen.append(model.config.use_cache))
    split(model, 1)
    assert seen[0] is False  # the whole runs first
    assert model.config.use_cache is True


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_checkpointed_activations_on_the_server(family):
    model, inputs = text_model(family, "classifier"), text("left")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    halves = split(model, 1)
    halves(inputs).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in halves.server.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    halves = split(model, 1)
    halves.server.train()
    halves(inputs).square().sum().backward()
    for name, parameter in halves.server.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name

"""Models cut in two: the halves' composition is the whole model, to the bit, for every family at every cut."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from hosfl.cli import main
from hosfl.halves.families import FAMILIES
from hosfl.halves.follow import CutError
from hosfl.halves.inputs import evaluating
from hosfl.halves.split import CutPoint, cut_points, split
from hosfl.halves.verify import original_parameters
from hosfl.probing.probe import probe_untouched

LAYERS, LENGTH, WIDTH = 3, 7, 16
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
DECODER = {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0}
WINDOW = {"sliding_window": 3}  # shorter than the sequence: layers of two kinds
TEXT = {
    "opt": hf.OPTConfig(
        hidden_size=WIDTH,
        ffn_dim=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=97,
        max_position_embeddings=64,
        word_embed_proj_dim=8,  # projections in front of the layers and behind them
    ),
    "gpt2": hf.GPT2Config(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        vocab_size=97,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "llama": hf.LlamaConfig(**DECODER),
    "mistral": hf.MistralConfig(**DECODER, **WINDOW),
    "qwen2": hf.Qwen2Config(
        **DECODER, **WINDOW, use_sliding_window=True, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": hf.Qwen3Config(**DECODER, head_dim=8),
    "gemma": hf.GemmaConfig(**DECODER, head_dim=8),
    "gemma2": hf.Gemma2Config(**DECODER, **WINDOW, head_dim=8),
    "gemma3_text": hf.Gemma3TextConfig(**DECODER, **WINDOW, head_dim=8),
    "qwen3_moe": hf.Qwen3MoeConfig(
        **DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1]
    ),
    "mixtral": hf.MixtralConfig(**DECODER, num_local_experts=4),
    "phi3": hf.Phi3Config(**DECODER, **WINDOW),
    "smollm3": hf.SmolLM3Config(**DECODER, no_rope_layer_interval=2),
    "olmo2": hf.Olmo2Config(**DECODER),
    "granite": hf.GraniteConfig(**DECODER, embedding_multiplier=3.0, residual_multiplier=0.5),
    "starcoder2": hf.Starcoder2Config(**DECODER, **WINDOW),
    "stablelm": hf.StableLmConfig(**DECODER),
    "gpt_neox": hf.GPTNeoXConfig(**SHAPE, pad_token_id=0),
    "bert": hf.BertConfig(**SHAPE),
    "camembert": hf.CamembertConfig(**SHAPE, pad_token_id=1),
    "electra": hf.ElectraConfig(**SHAPE, embedding_size=8),
    "distilbert": hf.DistilBertConfig(
        dim=WIDTH, hidden_dim=24, n_layers=LAYERS, n_heads=4, vocab_size=97, max_position_embeddings=64
    ),
    "modernbert": hf.ModernBertConfig(
        **SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=4
    ),
    "deberta-v2": hf.DebertaV2Config(
        **SHAPE,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        conv_kernel_size=3,  # behind the first layer, as in the published large ones
    ),
    "t5": hf.T5Config(d_model=WIDTH, d_ff=24, d_kv=4, num_layers=LAYERS, num_heads=4, vocab_size=97),
    "roberta": hf.RobertaConfig(**SHAPE, pad_token_id=1),
    "xlm-roberta": hf.XLMRobertaConfig(**SHAPE, pad_token_id=1),
}
COPIED = {"t5": ["relative_attention_bias"], "deberta-v2": ["encoder.rel_embeddings", "encoder.LayerNorm"]}
HEADS = {
    "none": hf.AutoModel,
    "classifier": hf.AutoModelForSequenceClassification,
    "words": hf.AutoModelForCausalLM,
}
IMAGES = {
    "vit": hf.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
    ),
    "resnet": hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 2, 1], layer_type="basic"),
}


def text_model(family, head="none"):
    """Small, with random weights, in eval mode. Where transformers has no such head, under another one."""
    torch.manual_seed(0)
    config = copy.deepcopy(TEXT[family])
    if family == "t5":
        return {"none": hf.T5EncoderModel, **dict.fromkeys(HEADS, hf.T5ForTokenClassification)}[head](config).eval()
    if family in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
        config.is_decoder = head == "words"
    make = hf.AutoModel if head == "none" else HEADS[head]
    if type(config) not in make._model_mapping:
        make = hf.AutoModelForMaskedLM if head == "words" else hf.AutoModelForTokenClassification
    if type(config) not in make._model_mapping:
        make = hf.AutoModelForCausalLM
    return make.from_config(config).eval()


def differentiable(family):
    """Experts one after another: torch's grouped product has no forward-mode derivative."""
    model = text_model(family, "words")
    if "moe" in family or family == "mixtral":
        model.set_experts_implementation("eager")
    return model


def image_model(family):
    torch.manual_seed(0)
    model = hf.AutoModelForImageClassification.from_config(IMAGES[family]).eval()
    return randomised(model)


def randomised(model):
    """Normalisations that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def text(padding, pad=0):
    """Three samples; one is padded on one side, or is nothing but padding."""
    ids = torch.randint(2, 97, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :3] = 0
    elif padding == "right":
        mask[1, 5:] = 0
    elif padding == "all":
        mask[1] = 0
    ids = torch.where(mask == 1, ids, pad)
    return {"input_ids": ids} if padding == "none" else {"input_ids": ids, "attention_mask": mask}


def output(model, inputs):
    found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def test_every_family_is_tested():
    assert set(FAMILIES) == {*TEXT, *IMAGES}


@pytest.mark.parametrize("padding", ["none", "left", "right", "all"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_the_halves_are_the_text_model(family, head, padding):
    model = text_model(family, head)
    pad = model.config.pad_token_id
    inputs = text(padding, 0 if pad is None else pad)
    whole = output(model, inputs)
    assert torch.isfinite(whole).all()
    for point in cut_points(model):  # the last: nothing but a head, or a normalisation, on the server
        at = point.at
        halves = split(model, at, verify=False)
        cut = halves.client(**inputs)
        assert cut.shape == (3, LENGTH, WIDTH)
        assert torch.equal(halves(inputs), whole), at
        assert torch.isfinite(cut).all()
    assert torch.equal(output(model, inputs), whole)  # which has been left as it was


@pytest.mark.parametrize("family", IMAGES)
@torch.no_grad()
def test_the_halves_are_the_image_model(family):
    model = image_model(family)
    x = torch.randn(2, 3, 16, 16)
    whole = model(x).logits
    points = cut_points(model)
    assert points[-1].name == {"vit": "vit.layernorm", "resnet": "resnet.pooler"}[family]
    for point in points:
        assert torch.equal(split(model, point.at)({"pixel_values": x}), whole)
        assert torch.equal(split(model, point.name)(x), whole)


class Block(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width // stride, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width // stride, width, 1, stride, bias=False)

    def forward(self, x):
        return self.bn1(self.conv1(x)).relu() + self.shortcut(x)


class ResNet(nn.Module):
    """The stages of torchvision's, or of timm's, by their names; the order of the forward pass is written out."""

    def __init__(self, timm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        if timm:
            self.act1, self.global_pool = nn.ReLU(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        else:
            self.relu, self.avgpool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1, self.layer2 = nn.Sequential(Block(8, 1), Block(8, 1)), nn.Sequential(Block(16, 2))
        self.layer3, self.layer4 = nn.Sequential(Block(32, 2)), nn.Sequential(Block(64, 2))
        self.fc, self.timm = nn.Linear(64, 5), timm

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.maxpool(self.act1(x) if self.timm else self.relu(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.global_pool(x) if self.timm else self.avgpool(x).flatten(1))


@pytest.mark.parametrize("timm", [False, True])
@torch.no_grad()
def test_the_halves_are_the_residual_network(timm):
    torch.manual_seed(0)
    model = randomised(ResNet(timm)).eval()
    x = torch.randn(2, 3, 32, 32)
    points = cut_points(model)
    head = "global_pool" if timm else "avgpool"
    assert [p.name for p in points][-7:] == ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0", head, "fc"]
    for point in points:
        assert torch.equal(split(model, point.name)(x), model(x))
        assert point.client_parameters + point.server_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "head", "name"),
    [
        ("bert", "none", "pooler"),
        ("bert", "classifier", "bert.pooler"),
        ("roberta", "classifier", "classifier"),
        ("bert", "words", "cls"),
        ("opt", "words", "model.decoder.final_layer_norm"),
        ("gpt2", "classifier", "transformer.ln_f"),
        ("gemma3_text", "words", "model.norm"),
    ],
)
def test_the_last_cut_is_before_the_head(family, head, name):
    assert [p.name for p in cut_points(text_model(family, head))][LAYERS:] == [name]


@torch.no_grad()
def test_where_nothing_follows_the_layers_no_cut_is_behind_them():
    config = copy.deepcopy(TEXT["bert"])
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    assert [p.at for p in cut_points(model)] == [0, 1, 2]
    questions = hf.BertForQuestionAnswering(config).eval()
    assert cut_points(questions)[-1].name == "qa_outputs"
    whole = questions(**text("left"))
    found = split(questions, "qa_outputs")(text("left"))
    assert torch.equal(found, torch.stack([whole.start_logits, whole.end_logits], -1))
    without = copy.deepcopy(TEXT["opt"])
    without._remove_final_layer_norm = True  # as in one of the published sizes: then a projection follows the layers
    model = hf.OPTForCausalLM(without).eval()
    assert cut_points(model)[-1].name == "model.decoder.project_out"
    assert torch.equal(split(model, LAYERS)(text("left")), model(**text("left")).logits)


@pytest.mark.parametrize("family", TEXT)
def test_every_weight_is_on_its_side(family):
    model = text_model(family, "words")
    head = model.get_output_embeddings()
    names = {p: name for name, p in model.named_parameters()}
    embedding = model.get_input_embeddings().weight
    tied = {names[embedding]} if head is not None and head.weight is embedding else set()
    for point in cut_points(model):
        halves = split(model, point.at)
        client, server = ([*half.parameters()] for half in (halves.client, halves.server))
        owner = original_parameters(model, halves)
        assert all(owner[p] is p for p in client)
        assert not {*client} & {*server}
        assert {*owner.values()} == {*model.parameters()}
        assert embedding in {*client}
        copies = {names[owner[p]] for p in server if owner[p] is not p}
        between = 0 < point.at < LAYERS
        expected = {*tied, *(COPIED.get(family, ()) if between or family == "deberta-v2" else ())}
        assert {next((e for e in expected if e in name), name) for name in copies} == expected
        assert head is None or (head.weight is embedding) == bool(tied)


def test_tied_embeddings_become_two():
    model = text_model("qwen2", "words")
    halves = split(model, 1)
    with torch.no_grad():
        halves.server.model.lm_head.weight.zero_()
    assert model.lm_head.weight.any()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not halves(text("left")).any()


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
def test_parametrized_modules_on_both_sides_become_two(norm):
    inner = getattr(nn.utils.parametrizations, norm)(nn.Linear(4, 4))
    model, x = nn.Sequential(inner, nn.Tanh(), inner, nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    halves = split(model, 2)
    assert torch.equal(halves(x), model(x))
    assert {*halves.client.parameters(), *halves.client.buffers()} == {*inner.parameters(), *inner.buffers()}
    assert not {*halves.client.parameters()} & {*halves.server.parameters()}
    before = halves.server[0].weight.clone()
    with torch.no_grad():
        for parameter in halves.client.parameters():
            parameter.add_(1)
    assert torch.equal(halves.server[0].weight, before)
    assert not torch.equal(halves.client[0].weight, before)


def test_running_statistics_of_a_sequence_do_not_become_two():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm, nn.Linear(4, 2))
    assert [p.at for p in cut_points(model)] == [1, 4]
    for at in (2, "3"):
        with pytest.raises(CutError, match="3 runs on both sides, and its running statistics would become two"):
            split(model, at)


@torch.no_grad()
def test_frequencies_that_follow_from_the_length_may_become_two():
    """Both halves write those of rotary embeddings in every pass."""
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    model = hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER, rope_parameters={**scaling, **factors})).eval()
    for at in (1, LAYERS):
        halves = split(model, at)
        for length in (5, 20, 6):
            inputs = {"input_ids": torch.arange(2 * length).view(2, -1) + 1}
            assert torch.equal(halves(inputs), model(**inputs).logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_model_that_tells_of_its_experts(family):
    """For a loss of its own, also where the server half has no layer."""
    model, inputs = text_model(family, "words"), text("left")
    model.config.output_router_logits = True
    for at in (1, LAYERS):
        with torch.no_grad():
            assert torch.equal(split(model, at)(inputs), model(**inputs).logits)
    assert model.config.output_router_logits


@pytest.mark.parametrize("at", [2, LAYERS])
@pytest.mark.parametrize("family", TEXT)
def test_the_multiplier_is_the_whole_model_s_gradient(family, at):
    """Backward through the server half from the cut, then through the client half: the model's own gradients."""
    model, inputs = text_model(family, "words"), text("left", 1)
    output(model, inputs).square().mean().backward()
    expected = {p: p.grad for p in model.parameters() if p.grad is not None}
    model.zero_grad()
    halves = split(model, at)
    server = copy.deepcopy(halves.server)  # has a holder of its own
    cut = halves.client(**inputs)
    leaf = cut.detach().requires_grad_()
    server(leaf, attention_mask=inputs["attention_mask"]).square().mean().backward()
    assert halves.server.holder.cut is None
    cut.backward(leaf.grad)
    owner, copies = (
        original_parameters(model, halves),
        zip(halves.server.parameters(), server.parameters(), strict=True),
    )
    found = {p: p.grad for p in halves.client.parameters() if p.grad is not None}
    for parameter, same in copies:  # of what both halves have, the model's gradient is the sum
        if same.grad is not None:
            found[owner[parameter]] = found.get(owner[parameter], 0) + same.grad
    assert found.keys() == expected.keys()
    assert len(found) > 5
    for parameter, gradient in found.items():
        assert torch.allclose(gradient, expected[parameter], rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_a_client_half_can_be_probed():
    halves = split(text_model("llama", "words"), 1)
    inputs = text("left")
    multiplier = torch.randn(3, LENGTH, WIDTH)
    with evaluating(halves.client):
        cut = halves.client(**inputs)
        (scalar,) = probe_untouched(halves.client, inputs, multiplier, cut, [7], 1e-3, "rademacher").tolist()
    with torch.enable_grad():
        gradient = torch.autograd.grad(halves.client(**inputs), list(halves.client.parameters()), multiplier)
    length = sum(g.square().sum() for g in gradient).sqrt()
    assert 0 < abs(scalar) < 5 * length


@torch.no_grad()
def test_adapters_of_peft_are_cut_with_their_layers():
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(text_model("llama", "words"), adapters).eval()
    inputs = text("left")
    halves = split(model, 1)
    assert torch.equal(halves(inputs), output(model, inputs))
    moving = [name for name, p in halves.client.named_parameters() if p.requires_grad]
    assert len(moving) == 4
    assert all("lora" in name and ".layers.0." in name for name in moving)


def test_sequential_cuts_by_name_and_number():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert cut_points(model) == [CutPoint(1, "1", 9, 4), CutPoint(2, "2", 9, 4)]
    assert cut_points(model, torch.zeros(5, 2))[0] == CutPoint(
        1, "1", 9, 4, cut=60, client_activations=60, server_activations=80
    )
    x = torch.randn(4, 2)
    assert torch.equal(split(model, "2")(x), split(model, 2)(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("layer", [torch.jit.script, lambda layer: torch.compile(layer, backend="eager")])
def test_layers_that_are_scripted_or_compiled_are_named(layer):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), layer(nn.Linear(8, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    x, said = torch.randn(2, 8), r"cannot cut a model with a (scripted|compiled) module, {}: put the module"
    for model, name, at in ((Three(), "b", "c"), (nn.Sequential(*Three().children()), "1", 2)):
        with pytest.raises(CutError, match=said.format(name)):
            split(model, at, example=x)
        with pytest.raises(CutError, match=said.format(name)):
            cut_points(model, x)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8).bfloat16()

    def forward(self, x):
        return x + self.linear(x.bfloat16()).float()


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CROSSING = {
    "complex numbers": [Applied(torch.fft.fft), Applied(torch.abs), nn.Linear(8, 3)],
    "integers": [Applied(lambda x: x.argmax(-1)), nn.Embedding(8, 3)],
    "a wider dtype": [nn.Linear(8, 8), Mixed(), nn.Linear(8, 3)],
}


@pytest.mark.parametrize("kind", CROSSING)
def test_what_crosses_a_cut_crosses_as_it_is(kind):
    model, x = nn.Sequential(*CROSSING[kind]), torch.randn(4, 8)
    assert torch.equal(split(model, 1)(x), model(x))
    assert torch.equal(split(model, 1, example=x)(x), model(x))


def test_a_sequence_that_is_called_otherwise_is_no_plain_one():
    class Tripled(nn.Sequential):
        def __call__(self, x):
            return 3 * super().__call__(x)

    with pytest.raises((CutError, ValueError)):
        split(Tripled(nn.Linear(8, 8), nn.Linear(8, 8)), 1)


def test_cuts_that_are_none_name_those_that_are():
    model = text_model("llama")
    places = r"cut points are 0 \(layers.0\), 1 \(layers.1\), 2 \(layers.2\), 3 \(norm\)"
    for wrong in (4, -1, "layers.3", "embed_tokens", True):
        with pytest.raises(ValueError, match=places):
            split(model, wrong)
    with pytest.raises(TypeError, match="cannot cut a Linear: there is no place"):
        split(nn.Linear(2, 2), 1)
    with pytest.raises(TypeError, match="cannot cut a T5"):
        cut_points(hf.T5Model(hf.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, vocab_size=9)))
    for name in ("position_ids", "labels", "inputs_embeds", "past_key_values"):
        with pytest.raises(ValueError, match=f"{name}: only inputs and an attention mask"):
            split(model, 1).client(**text("none"), **{name: torch.zeros(3, LENGTH)})


@pytest.mark.parametrize("family", [*TEXT, *IMAGES])
def test_the_command_knows_every_family_s_activations(family, tmp_path, capsys):
    config = copy.deepcopy({**TEXT, **IMAGES}[family])
    if family == "t5":
        config.architectures = ["T5EncoderModel"]
    config.save_pretrained(tmp_path)
    assert main(["split", "--model", str(tmp_path)]) == 0
    assert "?" not in capsys.readouterr().out


def test_the_command_lists_cut_points(tmp_path, capsys):
    for config, architecture in ((TEXT["llama"], "LlamaForCausalLM"), (IMAGES["vit"], None)):
        config = copy.deepcopy(config)
        config.architectures = [architecture] if architecture else None
        config.save_pretrained(tmp_path / config.model_type)
    assert main(["split", "--model", str(tmp_path / "llama"), "--list", "--batch", "200", "--length", "60"]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    model = text_model("llama", "words")
    point = cut_points(model)[1]
    (row,) = (line for line in shown.splitlines() if "model.layers.1" in line)
    assert f"{point.client_parameters:,}" in row
    assert f"{point.server_parameters:,}" in row
    assert row.split()[-2] == f"{200 * 60 * WIDTH * 4 / 1e6:.2f}"
    assert main(["split", "--model", str(tmp_path / "llama"), "--batch", "200", "--length", "1000"]) == 0
    assert "input_ids [200, 64]" in capsys.readouterr().out  # no more than the model takes
    assert main(["split", "--model", str(tmp_path / "vit")]) == 0
    assert "layers.2" in capsys.readouterr().out
    hf.T5Config(architectures=["T5Model"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(SystemExit):
        main(["split", "--model", str(tmp_path / "t5")])
    assert "cannot cut a T5" in capsys.readouterr().err
    assert main(["split", "--model", str(tmp_path / "none")]) == 2
    for wrong in (["--batch", "-1"], ["--batch", "1.5"], ["--length", "0"], ["--length=-5"]):
        with pytest.raises(SystemExit, match="2"):
            main(["split", "--model", str(tmp_path / "llama"), *wrong])
        assert f"argument {wrong[0][:7].rstrip('=')}" in capsys.readouterr().err


def test_a_sequence_with_a_train_of_its_own_is_refused():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    with pytest.raises(TypeError, match="its own train"):
        split(Frozen(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2)), 1)

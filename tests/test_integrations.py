"""hosfl.optim with Hugging Face's Trainer, PEFT, quantised backbones, Lightning; what CUDA graphs rely on."""

import copy
import os
import warnings

import group
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hosfl.optim import ZOSGD, ZONormalizedSGD, rebuild
from hosfl.protocol.header import LogError


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- Hugging Face ------------------------------------------------------------------------------------------------


def classifier():
    """With dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=8, **sizes))


def language_model():
    """Takes num_items_in_batch: losses of micro-batches add up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def sentences(causal):
    """14 of them: with 4 in a batch the last is short, with 2 batches in a step the last step is."""
    tokens = torch.randint(0, 32, (14, 8), generator=torch.Generator().manual_seed(0))
    if not causal:
        return [{"input_ids": t, "labels": int(t[0]) % 2} for t in tokens]
    return [{"input_ids": t, "labels": torch.where(torch.arange(8) < 3 + i % 5, t, -100)} for i, t in enumerate(tokens)]


def trainer_of(model, folder, optimizer=None, causal=False, **settings):
    from transformers import TrainingArguments

    from hosfl.optim.hf import ZOTrainer

    class Recorder(ZOTrainer):
        """Keeps what each step was measured on, and the state of the random numbers."""

        batches = items = states = ()
        contexts = 0

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.items = (*self.items, num_items_in_batch)
            self.states = (*self.states, torch.get_rng_state())
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss_context_manager(self):
            self.contexts += 1
            return super().compute_loss_context_manager()

        def _prepare_inputs(self, inputs):
            self.batches = (*self.batches, super()._prepare_inputs(inputs))
            return self.batches[-1]

    arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1, "report_to": "none"}
    arguments |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **settings}
    optimizer = optimizer or ZOSGD(model.named_parameters(), 0.01, seed=5)
    return Recorder(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=sentences(causal),
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_takes_the_steps_of_a_plain_loop(tmp_path, causal, accumulated):
    model = language_model() if causal else classifier()
    plain = copy.deepcopy(model).train()  # with dropout, where it is no Llama
    trainer = trainer_of(model, tmp_path, causal=causal, gradient_accumulation_steps=accumulated)
    if not causal:
        # This model takes num_items_in_batch and ignores it, and the Trainer must be told that its losses are means.
        trainer.loss_is_scaled_for_ga = False
    trainer.train()
    optimizer = ZOSGD(plain.parameters(), 0.01, seed=5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (8 // accumulated))
    losses = []
    for first in range(0, 8, accumulated):
        batches = trainer.batches[first : first + accumulated]
        items = trainer.items[first]
        assert not causal or 0 < items <= sum(b["labels"].ne(-100).sum() for b in batches)

        def loss(batches=batches, items=items):
            if causal:
                return torch.stack([plain(**b, num_items_in_batch=items).loss.double() for b in batches]).sum()
            return torch.stack([plain(**b).loss.double() for b in batches]).mean()

        torch.set_rng_state(trainer.states[first + accumulated - 1])
        losses.append(float(optimizer.step(loss).float()))
        schedule.step()
    assert len(trainer.batches) == 8
    assert trainer.contexts == 2 * len(losses)
    assert same(model.parameters(), plain.parameters())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-4)  # older Trainers log four digits
    assert len({len(b["input_ids"]) for b in trainer.batches}) == 2


def test_a_model_that_the_trainer_compiles_is_the_optimizer_s(tmp_path):
    """Given the one within, a graph would be compiled for every evaluation that reads moved weights of it."""
    model = language_model()
    optimizer = ZOSGD(model.named_parameters(), 0.01, seed=5, model=model, momentum=0.5)
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}
    trainer = trainer_of(model, tmp_path, optimizer, causal=True, **settings)
    with torch.compiler.set_stance("force_eager"):  # compiling takes seconds
        trainer.train()
    assert optimizer.model is trainer.model_wrapped is not model
    assert optimizer.log.parameters[0][0] == "model.embed_tokens.weight"


def test_an_interrupted_trainer_begins_anew_with_the_next_step_s_batches(tmp_path):
    trainer = trainer_of(classifier(), tmp_path, gradient_accumulation_steps=2)
    prepare, seen = trainer._prepare_inputs, []

    def interrupted(inputs):
        if trainer.batches:
            raise KeyboardInterrupt
        return prepare(inputs)

    trainer._prepare_inputs = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer._prepare_inputs = prepare
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **more: seen.append(inputs) or compute(model, inputs, **more)
    trainer.batches = ()
    trainer.train()
    first, second = (batch["input_ids"] for batch in trainer.batches[:2])
    assert [b["input_ids"].tolist() for b in seen[:4]] == 2 * [first.tolist(), second.tolist()]


def test_a_resumed_trainer_holds_the_bits_of_one_that_went_through(tmp_path):
    def go(folder, resume=None, **settings):
        model = classifier()
        optimizer = ZONormalizedSGD(model.named_parameters(), 0.01, seed=5)
        trainer = trainer_of(model, folder, optimizer, save_strategy="steps", save_steps=3, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer, trainer

    float32, _, _ = go(tmp_path / "float32")  # first: older Trainers leave bf16 in the environment
    whole, optimizer, _ = go(tmp_path / "whole", bf16=True)
    assert optimizer.steps == 8
    resumed, optimizer, trainer = go(tmp_path / "other", str(tmp_path / "whole" / "checkpoint-3"), bf16=True)
    assert optimizer.steps == 8
    assert len(trainer.batches) == 5
    assert same(whole.parameters(), resumed.parameters())
    assert not same(whole.parameters(), float32.parameters())  # bf16 is autocast


def train_distributed(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    model = language_model()
    trainer = trainer_of(model, folder, causal=True, gradient_accumulation_steps=2, ddp_backend="gloo")
    trainer.train()
    torch.save((trainer.batches, trainer.items, [*model.state_dict().values()]), f"{folder}/{rank}")


def test_two_trainers_equal_one_plain_loop(tmp_path):
    group.start(train_distributed, str(tmp_path))()
    batches, items, weights = zip(*(torch.load(tmp_path / str(rank)) for rank in (0, 1)), strict=True)
    assert len(items[0]) == 4
    assert torch.equal(torch.stack(items[0]), torch.stack(items[1]))  # tokens are counted over both
    assert not torch.equal(batches[0][0]["input_ids"], batches[1][0]["input_ids"])
    plain = language_model().eval()
    optimizer = ZOSGD(plain.parameters(), 0.01, seed=5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 2)
    for first in (0, 2):

        def loss(first=first):
            def of(rank):
                mine = batches[rank][first : first + 2]
                # Losses are per token of both; the mean over processes takes half of it away again.
                losses = [plain(**b, num_items_in_batch=items[rank][first]).loss * 2 for b in mine]
                return torch.stack([value.double() for value in losses]).sum()

            return (of(0) + of(1)) / 2

        optimizer.step(loss)
        schedule.step()
    assert same(weights[0], weights[1])
    assert same(weights[0], plain.state_dict().values())


def test_the_trainer_refuses_what_cannot_work(tmp_path):
    model = classifier()
    with pytest.raises(TypeError, match=r"optimizers=\(ZOSGD\(...\), None\), got SGD"):
        trainer_of(model, tmp_path, torch.optim.SGD(model.parameters(), 0.1)).train()
    trainer = trainer_of(model, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.optimizer = ZOSGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="fp16=True scales gradients"):
        trainer.training_step(model, {})


# --- PEFT, and quantised backbones -------------------------------------------------------------------------------


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_lora_adapters_move_and_are_rebuilt_and_the_base_stays(tmp_path):
    model, base = with_adapters(language_model()), with_adapters(language_model())
    assert same(model.parameters(), base.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert 0 < len(trainable) < len(list(model.parameters()))
    optimizer = ZOSGD(model.named_parameters(), 0.05, seed=5)
    before = [p.clone() for p in model.parameters()]
    trainer_of(model, tmp_path / "run", optimizer, causal=True).train()
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was) != p.requires_grad
    optimizer.log.save(tmp_path / "log")
    other = with_adapters(language_model())
    nn.init.zeros_(other.base_model.model.lm_head.weight)
    with pytest.raises(LogError, match="digest"):
        rebuild(other, tmp_path / "log")
    rebuild(base, tmp_path / "log")
    assert same(base.parameters(), model.parameters())
    alone = with_adapters(language_model())
    optimizer = ZOSGD([p for p in alone.parameters() if p.requires_grad], 0.05)
    optimizer.step(lambda: alone(**sentence()).loss)
    assert optimizer.lattice is not None


def sentence():
    row = sentences(True)[0]
    return {name: value[None] for name, value in row.items()}


class Int8Linear(nn.Module):
    """A frozen int8 backbone, made by hand, with a float32 adapter beside it."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return x @ (self.weight * self.scale).T + self.up(self.down(x))


def quantised(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    if how == "by hand":
        model[0] = Int8Linear(model[0])
    elif how == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
    else:
        bnb = pytest.importorskip("bitsandbytes").nn
        layer = bnb.Linear8bitLt(16, 16, has_fp16_weights=False)
        layer.load_state_dict(model[0].state_dict())
        model[0] = layer.to("cpu")
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.learning
@pytest.mark.parametrize("settings", [{}, {"dist": "gaussian", "momentum": 0.5}])
@pytest.mark.parametrize("how", ["by hand", "torchao", "bitsandbytes"])
@pytest.mark.filterwarnings("ignore")
def test_quantised_backbones_stay_and_the_rest_learns(how, settings, tmp_path, seed, below):
    model, base, other = quantised(how), quantised(how), quantised(how)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    optimizer = ZOSGD(model.named_parameters(), 0.02, model=model, seed=seed, **settings)
    with torch.no_grad():
        was, before = model[0](x), model(x).square().mean()
    if how == "by hand":
        assert model[0].weight.dtype == torch.int8
        nn.init.zeros_(model[0].up.weight)
        nn.init.zeros_(base[0].up.weight)
        model[0].up.requires_grad_(False)
        with torch.no_grad():
            was = model[0](x)
    else:
        model[0].bias.requires_grad_(False)
    for _ in range(60):
        loss = optimizer.step(lambda: model(x).square().mean())
    below(loss / before, 0.7)
    assert torch.equal(model[0](x), was)
    optimizer.log.save(tmp_path / "log")
    rebuild(base, tmp_path / "log")
    assert same(base[2].parameters(), model[2].parameters())
    with torch.no_grad():  # another backbone is another base
        inner = other[0].weight
        if how == "torchao":
            inner = inner.qdata
        elif how == "by hand":
            nn.init.zeros_(other[0].up.weight)
        inner[0, 0] += 1
    with pytest.raises(LogError, match="digest"):
        rebuild(other, tmp_path / "log")


def test_a_quantised_parameter_that_requires_grad_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    inner = torch.ones(4)
    weight = nn.Parameter(TwoTensor(inner, inner.clone()))
    with pytest.raises(TypeError, match="a TwoTensor, which cannot move: freeze it"):
        ZOSGD([weight], 0.1).step(lambda: 0.0)
    assert torch.equal(inner, torch.ones(4))


# --- Lightning ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_the_steps_of_a_plain_loop_and_resumes_to_the_same_bits(tmp_path):
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, _):
            self.log("loss", self.optimizers().step(lambda: self.net(batch[0]).square().mean()))

        def configure_optimizers(self):
            return ZONormalizedSGD(self.named_parameters(), 0.01, momentum=0.5, model=self)

    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)

    def fit(epochs, path=None):
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **settings
        )
        task = Task()
        trainer.fit(task, batches, ckpt_path=path)
        return task.net, trainer

    half, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = fit(2, tmp_path / "half.ckpt")
    plain = Task().net
    optimizer = ZONormalizedSGD(plain.parameters(), 0.01, momentum=0.5, model=plain)
    for _ in range(2):
        for batch in x.split(8):
            loss = optimizer.step(lambda batch=batch: plain(batch).square().mean())
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(float(loss))
    for net in (resumed, fit(2)[0]):
        assert same(net.parameters(), plain.parameters())
    assert not same(half.parameters(), plain.parameters())


# --- accelerate --------------------------------------------------------------------------------------------------


def test_accelerate_s_accumulation_drops_closures_and_the_user_is_told():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        model, data = nn.Linear(4, 1), torch.utils.data.DataLoader(torch.arange(64.0).reshape(16, 4), batch_size=2)
        model, optimizer, data = accelerator.prepare(model, ZOSGD(model.parameters(), 1e-6, seed=0), data)
        seen = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in data:
                with accelerator.accumulate(model):
                    optimizer.step(lambda batch=batch: seen.append(float(batch[0, 0])) or model(batch).square().mean())
        told = [str(w.message) for w in caught if "micro-batches" in str(w.message)]
        assert len(told) == 1
        assert "accumulates 4 micro-batches, and calls step(closure) for the last of them only" in told[0]
        assert seen == [24.0, 24.0, 56.0, 56.0]
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


# --- CUDA graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ZOSGD, ZONormalizedSGD])
@pytest.mark.parametrize("settings", [{}, {"two_sided": False, "directions": 3}, {"dist": "gaussian"}])
def test_a_closure_may_know_the_weights_by_their_addresses_alone(cls, settings):
    """What a captured graph of the forward pass does: reads where the weights were, writes to the same output."""

    def run(captured):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        x, loss = torch.randn(8, 5), torch.zeros(())
        weight, bias = (torch.from_numpy(p.detach().numpy()) for p in model.parameters())

        def replayed():
            return loss.copy_(torch.nn.functional.linear(x, weight, bias).square().mean())

        optimizer = cls(model.parameters(), 0.01, **settings)
        for _ in range(5):
            optimizer.step(replayed if captured else lambda: model(x).square().mean())
        return model

    assert same(run(True).parameters(), run(False).parameters())


@pytest.mark.parametrize("settings", [{}, {"directions": 3}, {"two_sided": False}, {"dist": "gaussian"}])
def test_nothing_waits_for_the_device_between_two_evaluations(settings):
    events = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            events.append(op)
            return op(*args, **(kwargs or {}))

    weight = nn.Parameter(torch.randn(50))
    optimizer = ZONormalizedSGD([weight], 0.01, **settings)
    for _ in range(3):
        events.clear()
        with Watch():
            optimizer.step(lambda: events.append("evaluation") or weight.square().sum())
    first, last = events.index("evaluation"), len(events) - events[::-1].index("evaluation")
    waits = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
    assert not waits & {*events[first:last]}
    assert waits & {*events[last:]}
    # The look at the weights, on the lattice, is over before the first of them.
    assert sum(event in waits for event in events[:first]) == (0 if settings.get("dist") else 1)

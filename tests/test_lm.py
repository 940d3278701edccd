"""Language modelling: files, tokens and labels, loss and perplexity by hand, labels on the wire, memory, runs."""

import json
import math
import re
import weakref
from dataclasses import replace

import datasets
import pytest
import tokenizers
import torch
import torchmetrics
import transformers as hf
from safetensors.torch import load_file
from test_grouped import same_rounds
from test_split import TEXT, text_model
from torch import nn

from hosfl import Config, Task, train
from hosfl.cli import main
from hosfl.halves.families import FAMILIES
from hosfl.halves.hub import stop_tokens
from hosfl.halves.split import split
from hosfl.protocol.messages import Cut, encode
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared
from hosfl.runs.evaluate import evaluate
from hosfl.runs.faults import Faults
from hosfl.runs.simulate import simulate
from hosfl.studies import table as tables
from hosfl.tasks import data as tasks_data
from hosfl.tasks import make_task
from hosfl.tasks.data import Dataset
from hosfl.tasks.generation import generate
from hosfl.tasks.lm import (
    IGNORED,
    Decoder,
    Perplexity,
    as_text,
    completion_loss,
    encode_texts,
    generation_scores,
    last_completions,
    load_parts,
)
from hosfl.tasks.reading import DataError

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl")
FOODS = ("fish", "bones", "grass", "corn", "mice", "snails")
TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('there is no role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SETTINGS = {
    "task": "lm",
    "at": "1",
    "rounds": 4,
    "clients": 3,
    "sampled": 2,
    "batch": 8,
    "directions": 2,
    "partition": "iid",
    "evaluate_every": 4,
    "server_rate": 0.01,
    "client_rate": 0.01,
}


def sample(number):
    """Of several lengths: what an animal likes, at times in a longer prompt."""
    animal, food = ANIMALS[number % 6], FOODS[number % 6]
    return {"prompt": f"{'now ' * (number % 4)}the {animal} likes", "completion": f" {food}{' too' * (number % 3)}"}


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer_in(path, template=TEMPLATE, **settings):
    """Byte-level BPE, as many decoders have."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    texts = [" ".join(sample(n).values()) for n in range(60)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    own.train_from_iterator(texts, trainer)
    own.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    made = hf.PreTrainedTokenizerFast(tokenizer_object=own, **{"bos_token": "<s>", "eos_token": "</s>"} | settings)
    made.chat_template = template
    made.save_pretrained(path)
    return len(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and data as a user has them."""
    path = tmp_path_factory.mktemp("lm")
    size = tokenizer_in(path / "model")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=size + 3,  # padded, as some are
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=300,
        bos_token_id=0,
        eos_token_id=1,
    )
    hf.LlamaForCausalLM(config).save_pretrained(path / "model")
    write(path / "train.jsonl", map(sample, range(90)))
    write(path / "validation.jsonl", map(sample, range(90, 102)))
    write(path / "test.jsonl", map(sample, range(102, 132)))
    return path


@pytest.fixture(scope="module")
def decoder(folder):
    return Decoder.of(str(folder / "model"))


def config(folder, **settings):
    return Config(**with_shared(settings, {**SETTINGS, "data": str(folder), "model": str(folder / "model")}))


def whole_model(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def told(decoder, *rows, longest=64):
    """What is shown, and what is learnt, of every row."""
    data = encode_texts([as_text(row, f"row {n}", decoder.tokenizer) for n, row in enumerate(rows)], decoder, longest)
    mask = data.inputs["attention_mask"].bool()
    shown = [decoder.tokenizer.decode(ids[m]) for ids, m in zip(data.inputs["input_ids"], mask, strict=True)]
    learnt = [decoder.tokenizer.decode(labels[labels != IGNORED]) for labels in data.labels]
    for tokens, labels in zip(data.inputs["input_ids"], data.labels, strict=True):  # each label is the next token
        assert all(int(labels[t]) in (IGNORED, int(tokens[t + 1])) for t in range(len(tokens) - 1) if labels[t] != 1)
    assert not ((data.labels != IGNORED) & ~mask).any()
    return shown, learnt


# --- texts and tokens -----------------------------------------------------------------------------------------------


def test_the_completion_and_its_end_are_learnt(decoder):
    rows = [{"prompt": "the cat likes", "completion": " fish"}, {"prompt": "now", "completion": " the owl 🦉 "}]
    shown, learnt = told(decoder, *rows)
    assert shown == ["<s>the cat likes fish", "<s>now the owl 🦉 "]  # the last token is only predicted
    assert learnt == [" fish</s>", " the owl 🦉 </s>"]
    assert told(decoder, {"prompt": "", "completion": "the cat"}) == (["<s>the cat"], ["the cat</s>"])
    assert told(decoder, {"prompt": "the ca", "completion": "t likes"})[1] == [" cat likes</s>"]  # a token of both
    assert told(decoder, {"prompt": "now ", "completion": "🦉"})[1] == ["🦉</s>"]
    assert told(decoder, {"prompt": "now", "completion": " fish</s>"})[1] == [" fish</s>"]  # the end is there already


def test_without_a_token_for_the_beginning(tmp_path, folder):
    """What has no prompt begins with the token for the end, as these models were trained."""
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "e": 2}, unk_token="e"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="e").save_pretrained(tmp_path)
    hf.AutoConfig.from_pretrained(folder / "model").save_pretrained(tmp_path)
    made = Decoder.of(str(tmp_path))
    data = encode_texts([as_text({"prompt": p, "completion": "b a"}, "", made.tokenizer) for p in ("", "a ")], made, 9)
    assert data.inputs["input_ids"].tolist() == [[2, 1, 0], [0, 1, 0]]
    assert data.labels.tolist() == [[1, 0, 2], [1, 0, 2]]


def test_all_turns_of_the_assistant_are_learnt(decoder):
    row = chat(("user", "now"), ("assistant", "the cat"), ("user", "too"), ("assistant", "fish"), ("user", "left"))
    shown, learnt = told(decoder, row)
    assert shown[0] == "<s><|user|>now</s>\n<|assistant|>the cat</s>\n<|user|>too</s>\n<|assistant|>fish"
    assert learnt[0] == "the cat</s>fish</s>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template, which says how messages become a text: choose a model that was trained for conv"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses the messages: roles must alternate",
        ),
        # As some do that leave earlier thoughts out.
        (
            "{% for m in messages %}{{ m.content if not loop.last else m.content ~ ' (thought)' }}|{% endfor %}",
            "make a",
        ),
    ],
)
def test_templates_that_cannot_serve(folder, template, reason):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = template
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(DataError, match=f"^row 7.*{reason}"):
        as_text(row, "row 7", tokenizer)


def test_prompts_lose_their_beginning_and_completions_nothing(decoder):
    row = {"prompt": "the dog " * 20 + "the cat likes", "completion": " fish too"}
    for longest in (12, 7):
        shown, learnt = told(decoder, row, longest=longest)
        assert learnt == [" fish too</s>"]
        assert shown[0].startswith("<s>")
        assert shown[0].endswith(" likes fish too")
        assert len(decoder.tokenizer(shown[0], add_special_tokens=False)["input_ids"]) == longest - 1
    needed = 1 + 3  # <s>; " fish", " too", </s>
    assert told(decoder, row, longest=needed)[0] == ["<s> fish too"]
    with pytest.raises(DataError, match=r"^row 0: 3 tokens from its first completion on, and a sample may have 3, one"):
        told(decoder, row, longest=needed - 1)
    turns = chat(("user", "now " * 30), ("assistant", "fish"), ("user", "the dog"), ("assistant", "bones"))
    assert told(decoder, turns, longest=16)[1] == ["fish</s>bones</s>"]
    with pytest.raises(DataError, match="from its first completion on"):
        told(decoder, turns, longest=8)  # though the last turn would fit


def test_tokens_that_the_model_does_not_know(decoder):
    with pytest.raises(ValueError, match=r"row 0: token \d+ of the tokenizer, and the model knows 9: take"):
        told(decoder._replace(vocabulary=9), sample(0))


def test_where_texts_end_is_read_from_all_files(tmp_path, folder):
    assert stop_tokens(str(folder / "model")) == [1]
    tokenizer_in(tmp_path, eos_token="<|user|>")
    assert stop_tokens(str(tmp_path)) == [3]
    hf.GenerationConfig(eos_token_id=[1, 4]).save_pretrained(tmp_path)
    assert stop_tokens(str(tmp_path)) == [3, 1, 4]
    tokenizer_in(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="has no token for the end of a text: set its eos_token"):
        stop_tokens(str(tmp_path))


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out(folder, tmp_path):
    found = load_parts(folder)
    assert [len(part) for part in found] == [90, 12, 30]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text((folder / f"{name}.jsonl").read_text())
    kept, held, test = load_parts(tmp_path)
    assert [len(part) for part in (kept, held, test)] == [81, 9, 30]
    assert sorted(where for where, _ in kept + held) == sorted(
        str(tmp_path) + w[len(str(folder)) :] for w, _ in found[0]
    )
    assert load_parts(tmp_path) == (kept, held, test)
    (tmp_path / "validation.jsonl").symlink_to(tmp_path / "none")
    with pytest.raises(OSError, match="validation"):
        load_parts(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 5, column 2: not JSON"),
        ("[]", "line 5: an object is needed, not a list"),
        ('{"prompt": "a"}', "line 5: no field 'completion'; there are prompt"),
        ('{"completion": "a"}', "line 5: no field 'prompt'"),
        ('{"prompt": "a", "completion": 3}', "line 5: field 'completion': text is needed, not a whole number"),
        ('{"prompt": null, "completion": "a"}', "line 5: field 'prompt': text is needed, not null"),
        ('{"prompt": "a", "completion": " "}', "line 5: field 'completion' is empty"),
        ('{"prompt": "a", "messages": []}', "line 5: messages beside prompt or completion"),
        ('{"messages": {}}', "line 5: field 'messages': a list is needed, not an object"),
        ('{"messages": []}', "line 5: no message has the role assistant"),
        ('{"messages": ["a"]}', r"line 5, messages\[0\]: an object is needed, not text"),
        ('{"messages": [{"role": "user"}]}', r"line 5, messages\[0\]: no field 'content'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', r"messages\[0\]: field 'content': text is needed"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', r"messages\[0\]: the assistant's content is empty"),
        (json.dumps(chat(("assistant", "b"))), r"line 5, messages\[0\]: the assistant speaks first"),
        (json.dumps(chat(("cook", "a"), ("assistant", "b"))), "line 5: the chat template refuses .* no role cook"),
        (json.dumps({"prompt": "", "completion": "🦉" * 80}), "line 5: 321 tokens from its first completion on"),
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl", "test.jsonl"])
def test_rows_that_are_none(folder, tmp_path, name, line, reason):
    for file in folder.glob("*.jsonl"):
        (tmp_path / file.name).write_text(file.read_text())
    write(tmp_path / name, map(sample, range(4)))
    with (tmp_path / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=f"{name}, .*{reason}"):
        make_task(config(folder, data=str(tmp_path)))


def test_the_task_says_what_it_needs(folder, tmp_path, capsys):
    def refused(match, error=ValueError, **settings):
        with pytest.raises(error, match=match):
            make_task(config(folder, **settings))

    refused("needs data", data="")
    refused("needs a model", model="")
    refused("a decoder is needed", model=str(encoder(tmp_path / "encoder")))
    refused(r"no folder runs/no/model with a model, and no model on the hub", OSError, model="runs/no/model")
    refused(r"no folder \./model with a model", OSError, model="./model")
    refused("reads 300 tokens: 301 are too many; lower longest", options={"longest": 301})
    refused(
        "reads 300 tokens: 290 and 11 that are generated are too many", options={"longest": "290", "generate": "11"}
    )
    refused("longest must be at least 2", options={"longest": 1})
    refused("has no option long; it has longest, generate, by", options={"long": 1})
    refused("use partition iid, or name a field of the rows with the option by", partition="dirichlet")
    refused("line 1: no field 'writer'", options={"by": "writer"})
    refused("train.jsonl", OSError, data=str(tmp_path / "none"))
    small = ["--model", str(folder / "model"), "--partition", "iid", "--server-rate", "1", "--client-rate", "1"]
    assert main(["train", "--task", "lm", "--data", str(tmp_path / "none"), *small]) == 2
    assert "train.jsonl" in capsys.readouterr().err


def encoder(path):
    hf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(path)
    return path


def test_clients_can_differ_by_a_field(folder, tmp_path):
    for file in folder.glob("*.jsonl"):
        (tmp_path / file.name).write_text(file.read_text())
    write(tmp_path / "train.jsonl", [{**sample(n), "writer": "abc"[n % 3]} for n in range(90)])
    settings = config(folder, data=str(tmp_path), partition="dirichlet", alpha=0.3, options={"by": "writer"})
    federation, task = assemble(settings)
    assert task.groups.tolist() == [0, 1, 2] * 30
    sizes = [len(federation.load_client(n).batch.data) for n in range(3)]
    assert sum(sizes) == 90
    assert len(set(sizes)) > 1


# --- loss and scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in TEXT if FAMILIES[name].decoder])
@torch.no_grad()
def test_the_loss_is_transformers_own(family):
    """Theirs takes labels where they stand, ours one place before; over texts that are padded, in two halves."""
    model = text_model(family, "words")
    ids = torch.randint(5, 97, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(8) < torch.tensor([[8], [5], [6]])
    labels = torch.where(mask & (torch.arange(8) > torch.tensor([[3], [1], [4]])), ids, IGNORED)
    expected = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    inputs = {"input_ids": ids[:, :-1], "attention_mask": mask[:, 1:].long()}
    found = completion_loss(split(model, 1, verify=False)(inputs), labels[:, 1:])
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def by_hand(model, decoder, rows):
    """(the sum of -log p over the completions' tokens and ends, their number), one text and one token at a time."""
    total, count = 0.0, 0
    for row in rows:
        prompt = decoder.tokenizer(row["prompt"])["input_ids"]
        completion = [*decoder.tokenizer(row["completion"], add_special_tokens=False)["input_ids"], 1]
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
        for n, token in enumerate(completion):
            total -= float(logits[len(prompt) + n - 1].log_softmax(-1)[token])
        count += len(completion)
    return total, count


def test_the_loss_of_a_batch_by_hand(folder, decoder):
    rows = [sample(n) for n in range(7)]
    data = encode_texts([as_text(row, "", decoder.tokenizer) for row in rows], decoder, 64)
    model = whole_model(folder)
    total, count = by_hand(model, decoder, rows)
    assert len({len(row["completion"].split()) for row in rows}) == 3  # of unequal numbers of tokens
    with torch.no_grad():
        loss = completion_loss(split(model, 1)(data.inputs), data.labels)
    assert float(loss) == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("together", [1, 4, 512])
def test_the_perplexity_is_of_all_tokens_whatever_the_batches(folder, decoder, monkeypatch, together):
    task = make_task(config(folder))
    model = whole_model(folder)
    total, count = by_hand(model, decoder, [sample(n) for n in range(102, 132)])
    monkeypatch.setattr(tasks_data, "MAX_OUTPUTS", together * task.test.length * task.classes)
    halves, seen = split(model, 1), []
    halves.server.register_forward_hook(lambda module, given, output: seen.append(output.shape[:2]))
    other, _ = evaluate(halves, task.validation, task)
    seen.clear()
    scores, loss = evaluate(halves, task.test, task)  # which begins anew
    assert scores == {"perplexity": pytest.approx(math.exp(total / count), rel=1e-5)}
    assert loss == pytest.approx(total / count, rel=1e-6)
    assert other["perplexity"] != pytest.approx(scores["perplexity"], rel=1e-4)
    assert seen[0][0] == min(together, 30)
    if together == 4:
        assert seen[0][1] < seen[-1][1] == task.test.length  # short ones with short ones, and nothing for padding


def test_perplexity_stays_a_number():
    metric = Perplexity()
    metric.update(torch.tensor([[[0.0, 1e30]]]), torch.tensor([[0]]))
    metric.update(torch.zeros(1, 1, 2), torch.tensor([[IGNORED]]))
    assert math.isfinite(metric.compute())


def test_evaluation_never_holds_all_outputs(folder, monkeypatch):
    """With metrics that see a batch at a time; one that needs all of them gets all."""
    task = make_task(config(folder))
    monkeypatch.setattr(tasks_data, "MAX_OUTPUTS", 2 * task.test.length * task.classes)
    halves, alive, most = split(whole_model(folder), 1), [], []

    def watch(module, given, output):
        alive.append(weakref.ref(output))
        most.append(sum(one() is not None for one in alive))

    halves.server.register_forward_hook(watch)
    evaluate(halves, task.test, task)
    assert len(most) == 15
    assert max(most) <= 2  # the one before, until it is replaced
    alive.clear(), most.clear()
    seen = replace(task, metrics={"shape": lambda outputs, labels: outputs.shape[0] * outputs.shape[1]})
    assert evaluate(halves, task.test, seen)[0] == {"shape": 30 * task.test.length}
    assert max(most) == 15
    evaluate(halves, task.test, replace(task, metrics=None))
    assert evaluate(halves, task.test, replace(task, metrics=None))[0].keys() == {"score"}


@torch.no_grad()
def test_generated_answers_are_scored_by_the_last_completion(folder, decoder):
    rows = [sample(n) for n in range(5)] + [
        chat(("user", "now"), ("assistant", "a"), ("user", "b"), ("assistant", "c d"))
    ]
    data = encode_texts([as_text(row, "", decoder.tokenizer) for row in rows], decoder, 64)
    prompts, completions = last_completions(data)
    assert (
        decoder.tokenizer.decode(prompts[5]) == "<s><|user|>now</s>\n<|assistant|>a</s>\n<|user|>b</s>\n<|assistant|>"
    )
    assert decoder.tokenizer.decode(completions[5]) == "c d</s>"
    for prompt, completion, row in zip(prompts[:5], completions[:5], rows[:5], strict=True):
        assert prompt == decoder.tokenizer(row["prompt"])["input_ids"]
        assert decoder.tokenizer.decode(completion) == row["completion"] + "</s>"

    class Oracle(nn.Module):
        """Knows how each prompt goes on, but for the first, which it ends at once; and one which it ends too early."""

        def __init__(self):
            super().__init__()
            self.client, self.server = nn.Identity(), nn.Linear(1, 1)

        def forward(self, inputs):
            logits = torch.zeros(*inputs["input_ids"].shape, decoder.vocabulary)
            for row, ids in enumerate(inputs["input_ids"].tolist()):
                ids = ids[: int(inputs["attention_mask"][row].sum())]
                (n,) = (n for n, p in enumerate(prompts) if ids[: len(p)] == p and wholly(ids, n))
                goal = {0: [1], 2: [*completions[2][:1], 1]}.get(n, completions[n])
                logits[row, len(ids) - 1, goal[len(ids) - len(prompts[n])]] = 1.0
            return logits

    def wholly(ids, n):
        return (prompts[n] + completions[n])[: len(ids)] == ids

    scores = generation_scores(Oracle(), data, decoder, 5)
    # " fish" is missed; of " grass too too" " grass" alone is written
    assert scores == {"exact match": pytest.approx(4 / 6), "F1": pytest.approx((4 + 2 * 1 / (1 + 3)) / 6)}
    assert list(scores) == ["exact match", "F1"]
    assert generate(Oracle(), prompts, 5, decoder.stops, decoder.vocabulary)[3] == completions[3][:-1]


def test_metrics_that_see_a_batch_at_a_time():
    """torchmetrics' are such; beside functions of all outputs they give the same."""
    torch.manual_seed(0)
    x, w = torch.randn(1200, 5), torch.randn(5, 3)
    y = (x @ w).argmax(1)
    metric = torchmetrics.classification.MulticlassF1Score(3)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    task = Task(net, train=(x, y), test=(x, y), loss=nn.functional.cross_entropy, at=2, metrics={"F1": metric})
    halves, outputs = task.halves(0), []
    with torch.no_grad():
        expected = torchmetrics.functional.classification.multiclass_f1_score(halves(x), y, 3)
    for metrics in ({"F1": metric, "seen": lambda outputs, labels: len(outputs)}, {"F1": metric}):
        scores, _ = evaluate(halves, task.test, replace(task, metrics=metrics))
        assert scores["F1"] == pytest.approx(float(expected), abs=1e-6)
        outputs.append(scores.get("seen"))
    assert outputs == [1200, None]


def test_studies_choose_the_lower_perplexity(monkeypatch):
    rows = [
        {"method": "ho", "trial": n, "accuracies": [value], "losses": [1.0], "failures": []}
        for n, value in enumerate((3.0, 2.0, 9.0, 11.0))
    ]
    monkeypatch.setattr(tables, "trial_rows", lambda study, folder: rows)
    for name, lower, expected in (("perplexity", True, 1), ("accuracy", False, 3)):
        monkeypatch.setattr(tables, "_metric", lambda study, folder, found=(name, lower): found)
        assert tables.best_trials(None, None) == {"ho": expected}


# --- labels on the wire -----------------------------------------------------------------------------------------------


def test_labels_end_with_their_texts(folder):
    federation, task = assemble(config(folder, batch=2))
    lengths = set()
    for n in range(3):
        for round in range(4):
            cut = federation.load_client(n).output(round)
            assert cut.labels.shape == cut.mask.shape == cut.cut.shape[:2]
            assert (cut.labels[:, -1] != IGNORED).any()
            assert len(encode(cut)) <= federation.server.largest_message
            lengths.add(cut.cut.shape[1])
    assert len(lengths) > 1
    assert max(lengths) <= task.train.length


def test_several_clients_completions_in_one_pass_of_the_server_half(folder):
    assert same_rounds(config(folder, batch=2)) > 1


def test_the_server_refuses_other_labels(folder):
    federation, task = assemble(config(folder))
    server, good = federation.server, federation.load_client(0).output(0)
    assert isinstance(good, Cut)

    def changed(value, where=None):
        labels = good.labels.clone()
        labels[good.labels != IGNORED if where is None else where] = value
        return replace(good, labels=labels)

    reasons = {
        "labels are all -100": changed(IGNORED),
        f"labels from .* to {task.classes} for {task.classes} classes": changed(task.classes, (0, 0)),
        "labels from -1 to ": changed(-1, (0, 0)),
        "labels from -99 to ": changed(-99, (0, 0)),
        "a cut of shape": replace(good, labels=good.labels[:, :-1].contiguous()),
        "samples are": replace(good, labels=good.labels[:, 0].contiguous()),
        "torch.float32": replace(good, labels=good.labels.float()),
    }
    before = {name: value.clone() for name, value in server.half.state_dict().items()}
    assert server.step(0, [*reasons.values()])[0] == {}
    assert server.refused.total == len(reasons)
    for (reason, _), refused in zip(reasons.items(), server.refused, strict=True):
        assert re.search(reason, refused), (reason, refused)
    assert all(torch.equal(value, before[name]) for name, value in server.half.state_dict().items())
    few = changed(IGNORED, (slice(1, None),))  # a sample without labels beside one that has some
    assert set(server.step(0, [few, replace(good, client=1)])[0]) == {0, 1}


def test_other_tasks_still_refuse_labels_of_no_class():
    federation, _ = assemble(Config(rounds=1))
    good = federation.load_client(0).output(0)
    labels = good.labels.clone()
    labels[0] = IGNORED
    assert federation.server.step(0, [replace(good, labels=labels)])[0] == {}
    assert "labels from -100" in federation.server.refused[0]


def test_labels_that_are_not_of_tokens_stay_whole():
    """As many for each sample as the longest text has tokens, by chance."""
    inputs = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])}
    data = Dataset(inputs, torch.zeros(2, 4))
    assert data.trimmed().labels.shape == (2, 4)
    assert data.trimmed(per_token=True).labels.shape == data.trimmed().inputs["input_ids"].shape == (2, 2)


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
def test_both_halves_descend_the_clients_mean_per_token(folder, aggregation):
    """Whose batches are of unequal size, by samples or not at all; tokens weigh within a client only."""
    settings = config(folder, method="first-order", aggregation=aggregation, clients=3, sampled=3, batch=25, rule="sgd")
    settings = replace(settings, partition="iid", schedule="constant", client_rate=1.0)
    federation, task = assemble(settings)
    batches = [federation.make_client(n).batch(0) for n in range(3)]
    batches[0] = ({k: v[:5] for k, v in batches[0][0].items()}, batches[0][1][:5])
    halves = federation.model()
    halves.eval()
    losses = [task.loss(halves(inputs), labels) for inputs, labels in batches]
    weights = [5, 25, 25] if aggregation == "weighted" else [1, 1, 1]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    of_server = torch.autograd.grad(expected, [p for p in halves.server.parameters() if p.requires_grad])
    make = federation.make_client

    def with_fewer(number):
        client = make(number)
        client.batch = lambda round: batches[number]
        return client

    federation.make_client = with_fewer
    seen = []
    federation.server.optimizer.step = lambda: seen.extend(p.grad.clone() for p in federation.server._trained())
    loss = federation.round(0)
    assert federation.server.refused == federation.messenger.complaints == []
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for found, right in zip(seen, of_server, strict=True):
        assert torch.allclose(found, right, rtol=1e-3, atol=1e-6)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ho", {}),
        ("ho", {"trains": "lora", "dtype": "bfloat16"}),
        ("ho", {"trains": "lora:2", "frozen": "int8", "estimator": "forward"}),
        ("ho", {"estimator": "backward", "microbatch": 3}),
        ("first-order", {"trains": "lora"}),
        ("checkpointed", {}),
        ("splitfed", {"local_steps": 2}),
        ("hosl", {}),
        ("zo-both", {}),
        ("mu-splitfed", {"local_steps": 2}),
        ("frozen", {}),
    ],
)
def test_methods_train_it(folder, tmp_path, method, settings):
    found = train(config(folder, method=method, options={"generate": 3}, **settings), tmp_path / "run")
    assert found.replicas.equal
    assert found.refused == []
    assert list(found.scores) == ["perplexity", "exact match", "F1"]
    assert found.lower_is_better == ["perplexity"]
    assert found.accuracy == found.scores["perplexity"] == pytest.approx(math.exp(found.loss), rel=1e-6)
    assert found.bytes["labels up"] == found.bytes["mask up"] * 4


@pytest.mark.parametrize("kind", ["arrays", "items"])
def test_a_task_of_one_s_own_with_labels_of_tokens(folder, kind):
    """Which are trimmed with their texts, refused where none counts, and scored as the library's own are."""
    known = make_task(config(folder))

    def given(data):
        arrays = {**data.inputs, "labels": data.labels}
        return arrays if kind == "arrays" else datasets.Dataset.from_dict(arrays).with_format("torch")

    sets = {name: given(part) for name, part in known.sets()}
    own = Task(
        lambda: whole_model(folder), **sets, at=1, loss=completion_loss, metrics={"perplexity": Perplexity()},
        classes=known.classes, ignore_index=IGNORED,
    )  # fmt: skip
    settings = {name: SETTINGS[name] for name in ("rounds", "clients", "sampled", "batch", "partition", "directions")}
    found = train(own, **settings, at="1", server_rate=0.01, client_rate=0.01)
    expected = train(config(folder))
    assert found.refused == []
    assert found.bytes == expected.bytes
    assert found.scores["perplexity"] == pytest.approx(expected.scores["perplexity"], rel=1e-4)


def first_and_last(folder, run, **settings):
    train(config(folder, evaluate_every=1000, **settings), run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines[0], lines[-1]


@pytest.mark.learning
@pytest.mark.parametrize("method", ["ho", "first-order"])
def test_it_is_learned(folder, tmp_path, method, seed, below):
    """The foods of six animals; nearly all of a completion's tokens follow from its prompt."""
    settings = {"rounds": 60, "batch": 16, "server_rate": 0.02, "client_rate": 0.02, "seed": seed}
    before, after = first_and_last(folder, tmp_path / "run", method=method, **settings)
    assert before["loss"] > 5
    below(after["loss"] / before["loss"], 0.5)
    client, base = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("client", "base"))
    assert any(not torch.equal(client[name], base[name]) for name in base)


@pytest.mark.learning
def test_what_is_learned_is_written(folder, tmp_path, seed, below):
    settings = {"rounds": 150, "batch": 24, "server_rate": 0.02, "client_rate": 0.5, "method": "first-order"}
    _, after = first_and_last(folder, tmp_path / "run", options={"generate": 4}, seed=seed, **settings)
    below(1 - after["scores"]["F1"], 0.5)


def test_liars_about_tokens_are_believed_and_not_refused(folder, tmp_path):
    settings = config(folder, batch=4, clients=6, rounds=3)
    for lie in ("labels", "random-labels"):
        outcome = simulate(settings, Faults(byzantine=0.9, lies=lie), tmp_path / lie)
        assert outcome.refusals == 0

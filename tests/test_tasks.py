"""Tasks beyond digits: sentences with a pretrained model, attention masks on the wire, which parameters move."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from test_grouped import same_rounds
from torch import nn

from hosfl import Config, rebuild, train
from hosfl.cli import main
from hosfl.edge.data import Samples
from hosfl.halves.inputs import call
from hosfl.halves.trains import select_trainable
from hosfl.probing.probe import trainable
from hosfl.protocol.messages import Cut, encode
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared
from hosfl.runs.evaluate import evaluate
from hosfl.tasks import make_task
from hosfl.tasks.data import Dataset
from hosfl.tasks.sentences import sentences

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
WORDS = ("the", "film", "was", "a", "plot", "very", *GOOD, *BAD)
SETTINGS = {
    "task": "sentences",
    "at": "1",
    "rounds": 8,
    "clients": 3,
    "sampled": 2,
    "batch": 8,
    "directions": 2,
    "alpha": 100.0,
    "evaluate_every": 4,
    "server_rate": 0.01,
    "client_rate": 0.01,
}


def sentence(label, number):
    words = [WORDS[number % 6], "film", (BAD, GOOD)[label][number % 4], *WORDS[: number % 4]]
    return " ".join(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and data in the formats that real ones have."""
    path = tmp_path_factory.mktemp("sentences")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    hf.BertTokenizerFast(vocab={word: n for n, word in enumerate(vocabulary)}).save_pretrained(path / "model")
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    hf.BertModel(config).save_pretrained(path / "model")
    for name, count in (("train", 90), ("dev", 20), ("test", 30)):
        rows = [f"{sentence(n % 2, n // 2)}\t{n % 2}\n" for n in range(count)]
        (path / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return path


def config(folder, **settings):
    return Config(**with_shared(settings, {**SETTINGS, "data": str(folder), "model": str(folder / "model")}))


# --- data ---------------------------------------------------------------------------------------------------------


def test_sentences_are_read_and_padded(folder):
    splits = sentences(folder, str(folder / "model"))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [90, 20, 30]
    inputs = splits.train.inputs
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (90, 8)  # [CLS], at most six words, [SEP]
    assert inputs["attention_mask"].sum(1).min() == 5
    assert torch.equal(inputs["input_ids"] == 0, inputs["attention_mask"] == 0)
    assert splits.train.labels.tolist() == [0, 1] * 45
    assert sentences(folder, str(folder / "model"), longest=6).test.inputs["input_ids"].shape == (30, 6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("text\tlabel\na\t1\n", "line 1: no column 'sentence'"),
        ("", "line 1: no column 'sentence'"),
        ("sentence\tlabel\n", "no samples"),
        ("sentence\tlabel\na film\n", "line 2: 1 field, the first line names 2"),
        ("sentence\tlabel\na film\t1\na film\t-1\n", "line 3"),
        ("sentence\tlabel\na film\tgood\n", "line 2"),
        ("sentence\tlabel\n\t1\n", "line 2"),
    ],
)
def test_data_that_is_none(folder, tmp_path, text, reason):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text(text if name == "dev" else (folder / f"{name}.tsv").read_text())
    with pytest.raises(ValueError, match=rf"dev.tsv.*({reason})"):
        sentences(tmp_path, str(folder / "model"))


def test_nothing_is_computed_or_sent_for_padding(folder):
    """Batches end with their longest text; evaluation, which sorts texts by length, gives what all at once gives."""
    splits = sentences(folder, str(folder / "model"))
    short = splits.test[splits.test.lengths < 8]
    assert len(short) > 5
    assert short.lengths.tolist() == short.inputs["attention_mask"].sum(1).tolist()
    assert short.trimmed().length == short.lengths.max() < 8
    assert short.length == 8
    assert torch.equal(short.trimmed().inputs["input_ids"], short.inputs["input_ids"][:, : short.lengths.max()])
    federation, task = assemble(config(folder, batch=2))
    lengths = {federation.load_client(n).output(0).cut.shape[1] for n in range(4)}
    assert min(lengths) < 8
    halves = federation.model()
    halves.client.eval(), halves.server.eval()
    with torch.no_grad():
        outputs = halves(splits.test.inputs)
    scores, loss = evaluate(halves, splits.test, task)
    assert scores == task.score(outputs, splits.test, loss)
    assert loss == pytest.approx(float(task.loss(outputs, splits.test.labels)), abs=1e-6)
    # In the order of the data: each sample's own.
    seen = replace(task, scores=lambda outputs, data: {"far": float((outputs - all_outputs).abs().max())})
    all_outputs = outputs
    assert evaluate(halves, splits.test, seen)[0]["far"] < 1e-5


def test_a_data_set_of_named_inputs():
    data = Dataset({"x": torch.arange(6.0).reshape(3, 2), "mask": torch.ones(3, 2).long()}, torch.tensor([0, 1, 2]))
    part = data[torch.tensor([2, 0])].to("cpu", torch.bfloat16)
    assert part.labels.tolist() == [2, 0]
    assert part.inputs["x"].tolist() == [[4, 5], [0, 1]]
    assert (part.inputs["x"].dtype, part.inputs["mask"].dtype) == (torch.bfloat16, torch.int64)


def test_tasks_say_what_they_need(folder, capsys):
    with pytest.raises(ValueError, match="needs data"):
        train(Config(task="sentences", server_rate=0.1, client_rate=0.1))
    with pytest.raises(ValueError, match="its own data"):
        train(Config(data=str(folder)))
    with pytest.raises(ValueError, match="no rates are tuned"):
        train(config(folder, server_rate=None))
    with pytest.raises(ValueError, match=r"no rates are tuned for frozen: give server_rate$"):
        train(config(folder, method="frozen", server_rate=None))
    assert train(config(folder, method="frozen", rounds=1, client_rate=None)).replicas.equal
    with pytest.raises(ValueError, match=r"cut points are 0 \(bert.encoder.layer.0\)"):
        train(config(folder, at="7"))
    assert main(["train", "--task", "sentences", "--data", str(folder / "none"), "--model", str(folder / "model")]) == 2
    assert "train.tsv" in capsys.readouterr().err


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trains", ["all", "lora", "biases", "norms", "*.query.*"])
def test_sentences_train_replay_and_rebuild(folder, tmp_path, trains, dtype):
    settings = config(folder, trains=trains, dtype=dtype, estimator="forward")
    summary = train(settings, tmp_path)
    assert summary.replicas.equal
    assert summary.bytes["mask up"] > 0
    tensors, _ = rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors")
    before = assemble(settings)[0].base
    names = {name for name, p in before.named_parameters() if p.requires_grad}
    base = before.state_dict()
    moved = {name for name, value in tensors.items() if not torch.equal(value, base[name])}
    assert moved
    assert moved <= names
    assert len(moved) > len(names) / 2


@pytest.mark.learning
@pytest.mark.parametrize("method", ["first-order", "frozen"])
def test_the_baselines_learn_sentences_too(folder, method, seed, below):
    summary = train(config(folder, method=method, rounds=80, evaluate_every=80, batch=16, seed=seed))
    assert summary.replicas.equal
    below(1 - summary.accuracy, 0.1)


@pytest.mark.parametrize("method", ["first-order", "frozen"])
def test_dropout_goes_by_the_seed_of_the_run(folder, method):
    settings = config(folder, method=method)
    once = train(settings)
    torch.manual_seed(1)
    assert train(settings).loss == once.loss


@pytest.mark.parametrize("method", ["checkpointed", "splitfed", "zo-both", "hosl"])
def test_other_methods_take_masks_and_adapters(folder, method):
    """With adapters SplitFed is SplitLoRA; only they travel."""
    steps = {"local_steps": 2} if method == "splitfed" else {}
    found = train(config(folder, method=method, trains="lora", rounds=4, **steps))
    assert found.replicas.equal
    assert found.refused == []
    visits, exchanges = 4 * 2, 2 if method == "splitfed" else 1
    assert visits * exchanges * 8 * 5 < found.bytes["mask up"] <= visits * exchanges * 8 * 8
    assert found.bytes["labels up"] == visits * exchanges * 8 * 4
    half = assemble(config(folder, trains="lora"))[0].base
    adapters = sum(p.numel() for p in trainable(half)[0])
    assert found.bytes.get("weights up", 0) == (4 * adapters * visits if method in ("splitfed", "hosl") else 0)
    assert adapters < 0.5 * sum(p.numel() for p in half.parameters())


def test_the_split_model_is_the_whole_one_in_training(folder):
    federation, task = assemble(config(folder))
    batch = task.test[:5]
    whole = hf.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2).eval()
    halves = federation.model()
    halves.client.eval(), halves.server.eval()
    whole.classifier.load_state_dict(halves.server.model.classifier.state_dict())
    if whole.bert.pooler is not None:
        whole.bert.pooler.load_state_dict(halves.server.model.bert.pooler.state_dict())
    with torch.no_grad():
        assert torch.allclose(halves(batch.inputs), whole(**batch.inputs).logits, atol=1e-5)  # on its lattice


def test_inverted_digits_are_a_pretrained_network_s_undoing():
    settings = Config(task="digits-inverted", rounds=1)
    task = make_task(settings)
    clean, changed = make_task(Config()).test, task.test
    halves = task.halves(3)
    again = task.halves(3)
    with torch.no_grad():
        before, after = (
            float((halves(data.inputs).argmax(1) == data.labels).double().mean()) for data in (clean, changed)
        )
        assert torch.equal(halves(changed.inputs), again(changed.inputs))
    assert before > 0.95
    assert after < 0.5
    assert torch.corrcoef(torch.stack([clean.inputs.flatten(), changed.inputs.flatten()]))[0, 1] < -0.7
    assert torch.equal(changed.inputs, make_task(settings).test.inputs)


# --- masks on the wire --------------------------------------------------------------------------------------------


def test_only_tokens_are_cut():
    """Of inputs by other names nobody knows whether they are of tokens: as wide as the texts, they stay whole."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    tokens = {"input_ids": 5 * mask, "attention_mask": mask, "inputs_embeds": torch.randn(2, 4, 3)}
    others = {
        "features": torch.randn(2, 4),
        "categories": torch.arange(8).reshape(2, 4),
        "boxes": torch.zeros(2, 4, 4).long(),
    }
    labels = torch.zeros(2, 4).long()
    few = Dataset(tokens | {"picture": torch.randn(2, 3, 4)}, labels).trimmed(per_token=True)
    shapes = {name: tuple(x.shape) for name, x in few.inputs.items()}
    assert shapes == {"input_ids": (2, 2), "attention_mask": (2, 2), "inputs_embeds": (2, 2, 3), "picture": (2, 3, 4)}
    assert few.labels.shape == (2, 2)
    for name, value in others.items():
        whole = Dataset(tokens | {name: value}, labels)
        assert whole.trimmed(per_token=True) is whole
        arrays = {k: v.numpy() for k, v in whole.inputs.items()}
        assert {x.shape[1] for x in Samples(arrays, labels.numpy()).trimmed(True).named().values()} == {4}


def test_hostile_masks_are_refused(folder):
    federation, _ = assemble(config(folder))
    server = federation.server
    client = federation.load_client(0)
    good = client.output(0)
    assert good.mask.shape == good.cut.shape[:2]
    assert len(encode(good)) <= server.largest_message
    two = good.mask.clone()
    two[0, 0] = 2
    wrong = [
        replace(good, mask=good.mask[:, :3]),
        replace(good, mask=good.mask[:2]),
        replace(good, mask=torch.empty(0, 0, dtype=torch.uint8)),
        replace(good, mask=two),
    ]
    before = {name: value.clone() for name, value in server.half.state_dict().items()}
    assert server.step(0, wrong)[0] == {}
    assert server.refused.total == 4
    assert all("mask" in reason for reason in server.refused)
    assert all(torch.equal(value, before[name]) for name, value in server.half.state_dict().items())
    nothing = replace(good, mask=torch.zeros_like(good.mask))  # strange, and harmless
    multipliers, loss = server.step(0, [nothing, replace(good, client=1)])
    assert set(multipliers) == {0, 1}
    assert loss == loss


def test_several_clients_sentences_in_one_pass_of_the_server_half(folder):
    assert same_rounds(config(folder, batch=2)) > 1


def test_a_server_half_that_takes_no_mask_is_sent_none():
    federation, _ = assemble(Config(rounds=1))
    good = federation.load_client(0).output(0)
    assert good.mask.shape == (0, 0)
    masked = Cut(
        client=0, round=0, cut=good.cut, labels=good.labels, mask=torch.ones(good.cut.shape[:2], dtype=torch.uint8)
    )
    assert federation.server.step(0, [masked])[0] == {}
    assert "mask" in federation.server.refused[0]


# --- what moves ---------------------------------------------------------------------------------------------------


def a_half():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("trains", "expected"),
    [
        ("all", ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ("biases", ["0.bias", "1.bias"]),
        ("norms", ["1.weight", "1.bias"]),
        ("0.*, 1.bias", ["0.weight", "0.bias", "1.bias"]),
    ],
)
def test_patterns_choose_what_moves(trains, expected):
    half = select_trainable(a_half(), trains, 0)
    assert [name for name, p in half.named_parameters() if p.requires_grad] == expected


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_biases_of_recurrent_layers_are_biases(kind):
    more = {} if kind is nn.LSTMCell else {"bidirectional": True, "num_layers": 2}
    half = select_trainable(nn.Sequential(kind(3, 4, **more)), "biases", 0)
    assert all(p.requires_grad == ("bias_" in name) for name, p in half.named_parameters())


def test_adapters_start_as_nothing_and_follow_the_seed():
    x = torch.randn(5, 3)
    plain = a_half()
    state = plain.state_dict()
    halves = []
    for seed in (1, 1, 2):
        half = a_half()
        half.load_state_dict(state)
        halves.append(select_trainable(half, "lora", seed))
        assert torch.equal(call(halves[-1], x), call(plain, x))
    first, same, other = ([p.detach() for p in trainable(half)[0]] for half in halves)
    assert len(first) == 4  # two matrices beside each of two layers
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("trains", "rank"), [("lora", 8), ("lora:1", 1), ("lora:12", 12)])
def test_adapters_have_their_rank(trains, rank):
    torch.manual_seed(0)
    plain, x = a_half(), torch.randn(5, 3)
    state = plain.state_dict()
    half = a_half()
    half.load_state_dict(state)
    select_trainable(half, trains, 0)
    moving = trainable(half)[0]
    assert [tuple(p.shape) for p in moving] == [(rank, 3), (4, rank), (rank, 4), (2, rank)]
    with torch.no_grad():
        for p in moving[:2]:
            p.fill_(1.0)
        plain[0].weight += rank  # the adapter's product, as it is: not scaled with the rank
    assert torch.allclose(call(half, x), call(plain, x), atol=1e-4)


def test_adapters_go_beside_layers_that_match():
    half = select_trainable(a_half(), "lora:2:1.*, 2", 0)
    assert [name.partition(".lora_")[0] for name, p in half.named_parameters() if p.requires_grad] == ["2", "2"]
    inside = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    select_trainable(inside, "lora:1:0", 0)
    assert {name.partition(".lora_")[0] for name, p in inside.named_parameters() if p.requires_grad} == {"0"}
    half = a_half()
    moving = len(trainable(half)[0])
    with pytest.raises(ValueError, match=r"'lora:2:\*.query' matches no linear layer; the client half has 0, 2"):
        select_trainable(half, "lora:2:*.query", 0)
    assert len(trainable(half)[0]) == moving


@pytest.mark.parametrize("rank", ["", "0", "-1", "two", "1.5", ":2"])
def test_a_rank_that_is_none_is_an_error(rank):
    half = a_half()
    before = trainable(half)[0]
    with pytest.raises(ValueError, match=f"'lora:{rank}': the rank must be a whole number from 1 on"):
        select_trainable(half, f"lora:{rank}", 0)
    assert len(trainable(half)[0]) == len(before)  # nothing half-applied


def test_nothing_that_moves_is_an_error():
    with pytest.raises(ValueError, match=r"leaves nothing that moves; the client half has 0\.weight, 0\.bias"):
        select_trainable(a_half(), "decoder.*", 0)
    with pytest.raises(ValueError, match="leaves nothing"):
        select_trainable(nn.Linear(2, 2), "norms", 0)
    with pytest.raises(ValueError, match="has none"):
        select_trainable(nn.Conv2d(1, 1, 1), "lora", 0)

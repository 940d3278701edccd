"""SST-2, RTE and WSC: as published, from the hub, under a classifier and in a decoder's words; partitions."""

import json
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from test_split import TEXT, output, text, text_model

from hosfl import Config, train
from hosfl.cli import main
from hosfl.halves.families import FAMILIES
from hosfl.halves.hub import is_decoder, pretrained_model
from hosfl.halves.split import split
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared
from hosfl.studies.compare import method_row, print_table
from hosfl.studies.run import run_study
from hosfl.studies.study import read_study
from hosfl.tasks import TUNED, make_task
from hosfl.tasks.data import dirichlet_split, iid_split, tokenized_splits
from hosfl.tasks.text import TEXTS, Row, load_parts
from hosfl.tasks.verbalizer import SelectedRows, first_tokens, select_tokens, split_with_selected_tokens

WORDS = [
    *("terrible", "great", "Yes", "No", "It", "was", "Does", "the", "pronoun", "here", "refer", "to", "or", "follow"),
    *("that", "it", "film", "good", "bad", "he", "dog", "cat", "ate"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", '"', "."]
COUNTS = {"train": 90, "validation": 20, "test": 12}
# As the hub has them: the columns, and the names of the classes.
PUBLISHED = {
    "sst2": (["idx", "sentence", "label"], ["negative", "positive"]),
    "rte": (["premise", "hypothesis", "idx", "label"], ["entailment", "not_entailment"]),
    "wsc": (["text", "span1_index", "span2_index", "span1_text", "span2_text", "idx", "label"], ["False", "True"]),
}
SETTINGS = {
    "at": "1",
    "rounds": 4,
    "clients": 3,
    "sampled": 2,
    "batch": 8,
    "directions": 2,
    "alpha": 100.0,
    "evaluate_every": 4,
    "server_rate": 0.01,
    "client_rate": 0.01,
}


def sample(task, label, number):
    """What is learnt here: whether the first text is a good film, and whether "he" is the dog."""
    good = ("bad", "good")[label]
    return {
        "sst2": {"sentence": f"{good} film {'.' * (number % 2)} "},
        "rte": {"premise": f"{('good', 'bad')[label]} film .", "hypothesis": "it was good"},
        "wsc": {
            "text": f"the dog ate and {good} he was .",
            "span1_index": 1,
            "span1_text": "the dog",
            "span2_index": 5,
            "span2_text": "he",
        },
    }[task] | {"idx": number}


def rows(task, part):
    return [sample(task, n % 3 % 2, n) | {"label": n % 3 % 2} for n in range(COUNTS[part])]


def write(task, folder, labelled=()):
    """The files of a task, as published: the test part without labels, or not at all."""
    folder.mkdir(exist_ok=True)
    for part, name in zip(COUNTS, TEXTS[task].files, strict=True):
        hidden = part == "test" and part not in labelled
        lines = []
        for r in rows(task, part):
            label = r.pop("label")
            if task == "sst2":
                lines.append(f"{r['idx']}\t{r['sentence']}" if hidden else f"{r['sentence']}\t{label}")
                continue
            if task == "wsc":
                r["target"] = {key: r.pop(key) for key in list(r) if key.startswith("span")}
            told = bool(label) if task == "wsc" else ("entailment", "not_entailment")[label]
            lines.append(json.dumps(r if hidden else {**r, "label": told}))
        if task == "sst2":
            lines.insert(0, "index\tsentence" if hidden else "sentence\tlabel")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def hub_of(task):
    """What load_dataset gives, with the hidden labels as -1."""
    columns, names = PUBLISHED[task]
    found = {}
    for part in COUNTS:
        made = [r | ({"label": -1} if part == "test" else {}) for r in rows(task, part)]
        found[part] = datasets.Dataset.from_dict({c: [r[c] for r in made] for c in columns})
        found[part] = found[part].cast_column("label", datasets.ClassLabel(names=names))
    return datasets.DatasetDict(found)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoder and a decoder whose tokenizer makes every word a token."""
    path = tmp_path_factory.mktemp("models")
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *WORDS, "and"])}
    hf.BertTokenizerFast(vocab=vocabulary, do_lower_case=False).save_pretrained(path / "encoder")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Like many decoders': no token of its own for padding, and told to pad on the left.
    made = hf.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="[SEP]", unk_token="[UNK]", padding_side="left")
    made.save_pretrained(path / "decoder")
    small = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**small, intermediate_size=32)).save_pretrained(path / "encoder")
    config = hf.LlamaConfig(**small, intermediate_size=32, num_key_value_heads=1)
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(path / "decoder")
    return path


# --- data ---------------------------------------------------------------------------------------------------------


def texts_of(part, task):
    return [tuple(r[c].strip() for c in TEXTS[task].columns) for r in part]


@pytest.mark.parametrize("task", TEXTS)
def test_hidden_labels_make_validation_the_test_part(task, tmp_path, monkeypatch):
    """From files, without the test file, and from the hub: the same rows."""
    folder = write(task, tmp_path / "data")
    found = load_parts(TEXTS[task], str(folder))
    assert [len(part) for part in found] == [81, 9, 20]
    assert texts_of(found[2], task) == texts_of(rows(task, "validation"), task)
    assert found[2][0].get("sentence") == {"sst2": "bad film"}.get(task)  # no blank at the end
    assert [r["label"] for r in found[2]] == [n % 3 % 2 for n in range(20)]
    assert [sum(r["label"] for r in part) for part in found[:2]] == [27, 3]  # a third of each
    (folder / TEXTS[task].files[2]).unlink()
    assert load_parts(TEXTS[task], str(folder)) == found
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or hub_of(task))
    assert load_parts(TEXTS[task], "") == found
    assert asked == [TEXTS[task].hub]


@pytest.mark.parametrize("task", TEXTS)
def test_with_labels_the_parts_are_the_published_ones(task, tmp_path):
    found = load_parts(TEXTS[task], str(write(task, tmp_path / "data", labelled=("test",))))
    assert [len(part) for part in found] == [90, 20, 12]


def test_held_out_rows_are_no_training_rows(tmp_path):
    lines = [f"film {n}\t{n % 2}" for n in range(100)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *lines, "one\u2028film\x0cmore\t1"]) + "\n")
    train_rows, held, test = (texts_of(part, "sst2") for part in load_parts(TEXTS["sst2"], str(tmp_path)))
    assert len(test) == 101
    assert test[-1] == ("one\u2028film\x0cmore",)
    assert sorted(train_rows + held) == sorted(test)
    assert len(held) == 10
    with pytest.raises(ValueError, match="too few"):
        (tmp_path / "train.tsv").write_text("sentence\tlabel\na\t0\nb\t1\n")
        load_parts(TEXTS["sst2"], str(tmp_path))


@pytest.mark.parametrize(
    ("task", "line", "reason"),
    [
        ("sst2", "film\t2", "line 92: label 2: the classes are 0, 1"),
        ("rte", "{", "line 91, column 2: not JSON"),
        ("rte", "[]", "line 91: an object is needed, not a list"),
        ("rte", '{"premise": "a", "label": "entailment"}', "line 91: no field 'hypothesis'; there are premise, label"),
        ("rte", '{"premise": "a", "hypothesis": "b"}', "line 91: no field 'label'"),
        (
            "rte",
            '{"premise": "a", "hypothesis": "b", "label": "neutral"}',
            "line 91: label 'neutral': the classes are entailment, not",
        ),
        ("wsc", '{"text": "a", "target": {"span1_text": "a"}, "label": true}', "line 91: no field 'span2_text'"),
        (
            "wsc",
            '{"text": "a", "target": 3, "label": true}',
            "line 91: field 'target': an object is needed, not a whole number",
        ),
    ],
)
def test_rows_that_are_none(task, line, reason, tmp_path):
    folder = write(task, tmp_path / "data")
    with (folder / TEXTS[task].files[0]).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=f"train.*{reason}"):
        load_parts(TEXTS[task], str(folder))


def test_without_data_and_datasets_the_way_to_get_them(monkeypatch, models, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'hosfl\[hf\]'"):
        load_parts(TEXTS["rte"], "")
    options = ["--task", "rte", "--model", str(models / "encoder"), "--server-rate", "1", "--client-rate", "1"]
    with pytest.raises(SystemExit):
        main(["train", *options])
    assert "Hugging Face hub" in capsys.readouterr().err
    assert main(["train", *options, "--data", str(models / "none")]) == 2
    assert "train.jsonl" in capsys.readouterr().err


def test_what_the_hub_refuses_is_told(monkeypatch):
    def refuse(*name):
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"cannot load aps/super_glue rte from .* hub: Dataset scripts"):
        load_parts(TEXTS["rte"], "")


def test_missing_rates_are_told_before_the_hub_is_asked(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name))
    for task in TEXTS:
        with pytest.raises(ValueError, match="no rates are tuned for ho pool normalized: give server_rate and client"):
            train(Config(task=task))
    study = "{base: {task: sst2}, rounds: 2, tuning_seeds: [0], seeds: [1], methods: {ho: {}}}"
    with pytest.raises(ValueError, match="no rates are tuned for ho pool normalized"):
        run_study(read_study(study), tmp_path)
    assert not asked
    for name in TUNED:
        assert make_task(Config(task=name)).rates


# --- tokens -------------------------------------------------------------------------------------------------------


def test_two_texts_have_types(models):
    found = tokenized_splits(
        [[{"label": 0}, {"label": 1}]] * 3, lambda r: ("good film", "bad"), str(models / "encoder"), 20
    ).train
    assert found.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]] * 2
    found = tokenized_splits(
        [[{"label": 0}, {"label": 1}]] * 3, lambda r: ("good film",), str(models / "encoder"), 20
    ).train
    assert "token_type_ids" not in found.inputs


@pytest.mark.parametrize("task", TEXTS)
def test_prompts_end_alike_and_lose_their_beginning(task, models, tmp_path, monkeypatch):
    name = str(models / "decoder")
    it = TEXTS[task]
    settings = Config(task=task, data=str(write(task, tmp_path / "data")), model=name, **SETTINGS)
    tokenizer = hf.AutoTokenizer.from_pretrained(name)
    end = tokenizer(it.prompt_end)["input_ids"]

    def check():
        inputs = make_task(settings).train.inputs
        for tokens, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
            assert mask == sorted(mask, reverse=True)  # padded on the right
            assert tokens[: sum(mask)][-len(end) :] == end
        return inputs["input_ids"].shape[1]

    assert check() > len(end) + 2
    monkeypatch.setitem(TEXTS, task, replace(it, longest=len(end) + 1))
    assert check() == len(end) + 1


# --- words --------------------------------------------------------------------------------------------------------


def tokenizer_in(path, vocabulary, splits):
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: n for n, t in enumerate(vocabulary)}, unk_token="?"))
    own.pre_tokenizer = splits
    hf.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="?").save_pretrained(path)
    return str(path)


def test_words_are_told_by_their_first_tokens(tmp_path, models):
    found = first_tokens(str(models / "decoder"), " It was", (" great", " bad it"))
    assert [WORDS[token - len(SPECIAL)] for token in found] == ["great", "bad"]
    letters = tokenizers.pre_tokenizers.Split("", "isolated")
    name = tokenizer_in(tmp_path / "letters", ["?", *" abc:"], letters)
    assert first_tokens(name, "a:", ("ba", "ca")) == [3, 4]
    with pytest.raises(ValueError, match=r"' ba' and ' ca' begin with the same token of .*letters, ' '"):
        first_tokens(name, "a:", (" ba", " ca"))
    joins = tokenizer_in(tmp_path / "joins", ["?", "a", ":", ":b", ":c"], tokenizers.pre_tokenizers.WhitespaceSplit())
    assert first_tokens(joins, "a :", ("b", "c")) == [3, 4]


def test_rows_have_their_biases():
    layer, hidden = torch.nn.Linear(4, 9), torch.randn(2, 3, 4)
    assert torch.allclose(SelectedRows(layer, [7, 2])(hidden), layer(hidden)[..., [7, 2]], atol=1e-6)


@pytest.mark.families
@pytest.mark.parametrize("padding", ["none", "left", "right", "all"])
@pytest.mark.parametrize("family", [name for name in TEXT if FAMILIES[name].decoder])
@torch.no_grad()
def test_the_halves_say_the_whole_model_s_words(family, padding):
    model = text_model(family, "words")
    pad = model.config.pad_token_id
    inputs = text(padding, 0 if pad is None else pad)
    tokens = [11, 5, 60]
    last = {"right": [6, 4, 6], "all": [6, 0, 6]}.get(padding, [6, 6, 6])
    expected = output(model, inputs)[[0, 1, 2], last][:, tokens]
    picked = output(select_tokens(model, tokens), inputs)[[0, 1, 2], last]
    assert torch.allclose(picked, expected, rtol=1e-5, atol=1e-6)
    for at in range(3):
        assert torch.equal(split_with_selected_tokens(model, tokens, at)(inputs), picked), at
    assert output(model, inputs).shape[-1] == 97  # which has been left as it was


# --- tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("task", TEXTS)
def test_tasks_train_and_replay(task, kind, models, tmp_path):
    settings = Config(task=task, data=str(write(task, tmp_path / "data")), model=str(models / kind), **SETTINGS)
    summary = train(settings)
    assert summary.replicas.equal
    assert summary.refused == []
    assert list(summary.scores) == ["accuracy"]
    federation, found = assemble(settings)
    assert found.classes == 2
    assert {p.dtype for p in federation.server.half.parameters()} == {torch.float32}  # the decoder's file has bfloat16
    halves = found.halves(5)
    assert halves(found.test[:3].inputs).shape == (3, 2)
    first, again = (dict(made.server.state_dict()) for made in (halves, found.halves(5)))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.learning
@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_a_decoder_learns_its_words(task, models, tmp_path, seed, below):
    own = {"method": "first-order", "partition": "iid", "rounds": 40, "evaluate_every": 40, "batch": 16, "seed": seed}
    own |= {"task": task, "data": str(write(task, tmp_path / "data")), "model": str(models / "decoder")}
    below(1 - train(Config(**with_shared(own, SETTINGS))).accuracy, 0.1)


def test_the_classifier_gets_the_whole_model_s_texts(models, tmp_path):
    """Both texts and their types reach the halves: the output is the uncut model's."""
    settings = Config(task="rte", data=str(write("rte", tmp_path / "d")), model=str(models / "encoder"), **SETTINGS)
    it = make_task(settings)
    inputs = it.test[:4].inputs
    assert inputs["token_type_ids"].any()
    torch.manual_seed(1)
    whole = pretrained_model(settings.model, "SequenceClassification", num_labels=2).eval()
    with torch.no_grad():
        assert torch.equal(split(whole, 1)(inputs), whole(**inputs).logits)
        other = {**inputs, "token_type_ids": 1 - inputs["token_type_ids"]}
        assert not torch.equal(split(whole, 1)(other), whole(**inputs).logits)


def test_models_that_do_not_fit(models, tmp_path, capsys):
    hf.ViTConfig().save_pretrained(tmp_path / "vit")
    hf.T5Config().save_pretrained(tmp_path / "t5")
    assert (is_decoder(str(models / "decoder")), is_decoder(str(models / "encoder"))) == (True, False)
    for name in ("vit", "t5"):
        with pytest.raises(ValueError, match=f"is a {name}; text models that can be cut are opt, gpt2"):
            make_task(Config(task="sst2", model=str(tmp_path / name)))


# --- partitions ---------------------------------------------------------------------------------------------------


def test_iid_parts_are_equal_and_random():
    labels = torch.arange(1000) // 100
    found = iid_split(1000, 7, seed=3)
    assert sorted(torch.cat(found).tolist()) == list(range(1000))
    assert {len(part) for part in found} == {142, 143}
    assert max(int(labels[part].bincount(minlength=10).max()) for part in found) < 30  # of 14 expected
    assert not torch.equal(found[0], iid_split(1000, 7, seed=4)[0])
    assert torch.equal(found[0], iid_split(1000, 7, seed=3)[0])
    unlike = dirichlet_split(labels, 7, 0.1, seed=3)
    assert max(int(labels[part].bincount(minlength=10).max()) for part in unlike) > 60
    with pytest.raises(ValueError, match="3 samples for 4 clients"):
        iid_split(3, 4, 0)


def test_a_run_can_be_iid(tmp_path):
    sizes = {}
    for partition in ("iid", "dirichlet"):
        federation, _ = assemble(Config(partition=partition, rounds=1))
        sizes[partition] = [len(federation.load_client(n).batch.data) for n in range(10)]
        federation.close()
    assert np.ptp(sizes["iid"]) <= 1
    assert np.ptp(sizes["dirichlet"]) > 10
    assert main(["train", "--partition", "iid", "--rounds", "1", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["partition"] == "iid"
    with pytest.raises(ValueError, match="partition must be one of dirichlet, iid"):
        Config(partition="even")


def test_tables_name_the_score(capsys):
    summary = train(Config(rounds=1))
    assert summary.scores == {"accuracy": summary.accuracy}
    other = replace(summary, scores={"F1": 0.25, "exact match": 0.125}, accuracy=0.25)
    table = {"config": summary.config, "methods": {"ho": method_row([other])}}
    print_table(table)
    shown = capsys.readouterr().out
    assert "test F1" in shown
    assert "test exact match" in shown
    assert "F1 gap recovered" in shown
    assert "accuracy" not in shown


def test_rows_have_their_columns():
    for task, (columns, _) in PUBLISHED.items():
        assert set(TEXTS[task].columns) <= set(columns)
        made: Row = dict.fromkeys(TEXTS[task].columns, "x")
        assert all(template.format_map(made) for template in (*TEXTS[task].texts, TEXTS[task].prompt))

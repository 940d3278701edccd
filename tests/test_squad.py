"""SQuAD: files and the hub, windows and their labels, the official scores, and runs with a small encoder."""

import json
from dataclasses import replace
from itertools import pairwise

import datasets
import pytest
import tokenizers
import torch
import transformers as hf
from torch import nn

from hosfl import Config, train
from hosfl.halves.hub import pretrained_model
from hosfl.halves.split import split
from hosfl.protocol.messages import Cut
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared
from hosfl.runs.evaluate import evaluate
from hosfl.tasks import lm, make_task, squad
from hosfl.tasks.answers import exact_match, f1
from hosfl.tasks.data import dirichlet_split
from hosfl.tasks.lm import IGNORED, Decoder
from hosfl.tasks.reading import DataError
from hosfl.tasks.squad import (
    HUB,
    Question,
    encode_prompts,
    load_parts,
    make_windows,
    predictions,
    span_scores,
    split_by_article,
)

NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Flo")
WORDS = ["?", ".", ",", "Who", "saw", "the", "cat", "dog", "in", "a", "red", "house", "then", "went", "home", *NAMES]
LENGTH = 24  # tokens of a window: a question of at most 4, at least 17 of the context, 8 of them shared
SETTINGS = {
    "task": "squad",
    "at": "1",
    "rounds": 4,
    "clients": 3,
    "sampled": 2,
    "batch": 8,
    "directions": 2,
    "evaluate_every": 4,
    "server_rate": 0.01,
    "client_rate": 0.01,
}


def question(number):
    """One about a name that occurs once, somewhere in a context that is longer than a window."""
    name = NAMES[number % 6]
    before, after = "then the dog went home . " * (number % 7), " , then the cat went home in a red house ." * 2
    context = f"{before}{name} saw the red cat{after}"
    return Question(f"{number // 10}", context, "Who saw the cat ?", [name, f"{name} saw"], len(before))


def as_json(questions):
    """SQuAD's format."""
    articles = {}
    for number, q in enumerate(questions):
        answers = [{"text": text, "answer_start": q.start} for text in q.answers]
        asked = {"id": f"q{number}", "question": q.question, "answers": answers}
        articles.setdefault(q.article, []).append({"context": q.context, "qas": [asked]})
    return {"version": "1.1", "data": [{"title": t, "paragraphs": p} for t, p in articles.items()]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten articles to train on and two to test on, and a model that reads 24 tokens."""
    path = tmp_path_factory.mktemp("squad")
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = hf.BertTokenizerFast(vocab=vocabulary, do_lower_case=False, model_max_length=LENGTH)
    tokenizer.save_pretrained(path / "model")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    hf.BertModel(hf.BertConfig(vocab_size=len(vocabulary), **small)).save_pretrained(path / "model")
    (path / "train-v1.1.json").write_text(json.dumps(as_json(map(question, range(100)))))
    (path / "dev-v1.1.json").write_text(json.dumps(as_json(map(question, range(100, 120)))))
    return path


def cut(questions, folder):
    """Windows of these questions, as the test part."""
    splits, _ = make_windows([questions[:1], questions[:1], questions], str(folder / "model"))
    return splits.test


# --- questions ----------------------------------------------------------------------------------------------------


def test_a_folder_s_parts(folder):
    train_part, validation, test = load_parts(str(folder))
    assert [len(part) for part in (train_part, validation, test)] == [90, 10, 20]
    assert test == [question(n) for n in range(100, 120)]
    assert not {q.article for q in train_part} & {q.article for q in validation}
    assert sorted(train_part + validation) == sorted(question(n) for n in range(100))
    assert load_parts(str(folder)) == (train_part, validation, test)


def test_one_file_is_split_by_article(folder):
    found = load_parts(str(folder / "train-v1.1.json"))
    assert [len(part) for part in found] == [60, 10, 30]  # a quarter is 25: three articles
    articles = [{q.article for q in part} for part in found]
    assert sum(map(len, articles)) == len(set.union(*articles)) == 10


def test_an_article_that_comes_again_is_one(folder, tmp_path):
    """As where paragraphs are listed one by one. Without titles an entry is an article."""
    document = json.loads((folder / "train-v1.1.json").read_text())
    pieces = [{"title": a["title"], "paragraphs": [p]} for a in document["data"] for p in a["paragraphs"]]
    (tmp_path / "all.json").write_text(json.dumps({"data": pieces}))
    assert load_parts(str(tmp_path / "all.json")) == load_parts(str(folder / "train-v1.1.json"))
    untitled = [{**piece, "title": title} for piece, title in zip(pieces, [None, "", 3, *[None] * 97], strict=True)]
    (tmp_path / "all.json").write_text(json.dumps({"data": untitled}))
    articles = {q.article for part in load_parts(str(tmp_path / "all.json")) for q in part}
    assert articles == {f"data[{n}]" for n in range(100)}


def test_the_hub_has_the_same(folder, monkeypatch):
    def columns(questions):
        made = {
            "id": [str(n) for n in range(len(questions))],
            "title": [q.article for q in questions],
            "context": [q.context for q in questions],
            "question": [q.question for q in questions],
            "answers": [{"text": q.answers, "answer_start": [q.start] * len(q.answers)} for q in questions],
        }
        return datasets.Dataset.from_dict(made)

    published = {
        "train": columns([question(n) for n in range(100)]),
        "validation": columns([question(n) for n in range(100, 120)]),
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or datasets.DatasetDict(published))
    assert load_parts("") == load_parts(str(folder))
    assert asked == [(HUB,)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "line 1, column 2: not JSON"),
        ("[]", "an object is needed, not a list"),
        (
            '{"data": [{"paragraphs": [{"context": "a"}]}]}',
            r"data\[0\].paragraphs\[0\]: no field 'qas'; there are context",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "7", "question": "?", "answers": []}]}]}]}',
            "question 7 has no answer",
        ),
        (json.dumps(as_json([question(0)])), "too few articles"),
    ],
)
def test_files_that_are_none(content, reason, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=rf"file.json.*{reason}"):
        load_parts(str(tmp_path / "file.json"))


def test_articles_are_set_apart_whole():
    questions = [Question("abc"[n // 5], "", "", [], 0) for n in range(15)]
    for count, apart in ((0, 0), (1, 5), (5, 5), (6, 10), (15, 15)):
        assert [len(part) for part in split_by_article(questions, count)] == [15 - apart, apart]


# --- windows ------------------------------------------------------------------------------------------------------


def test_windows_cover_the_context_and_know_the_answer(folder):
    questions = [question(n) for n in range(14)]
    found = cut(questions, folder)
    assert found.labels.shape == (len(found), 2)
    assert found.spans.shape == (len(found), LENGTH, 2)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model")
    for number, asked in enumerate(questions):
        mine = [i for i, q in enumerate(found.question.tolist()) if q == number]
        assert len(mine) > 1
        places = [[tuple(s) for s in found.spans[i].tolist() if s[0] >= 0] for i in mine]
        whole = tokenizer(asked.context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert sorted({place for own in places for place in own}) == whole
        assert all(one[-8:] == other[:8] for one, other in pairwise(places))
        for i, own in zip(mine, places, strict=True):
            first, last = found.labels[i].tolist()
            holds = own[0][0] <= asked.start and asked.start + 3 <= own[-1][1]
            assert holds == (first > 0) == (last > 0)
            if holds:
                assert asked.context[found.spans[i, first, 0] : found.spans[i, last, 1]] == asked.answers[0]
            outside = found.spans[i, :, 0] < 0
            assert outside[:6].all()  # [CLS], the question without its mark, [SEP]
            assert not outside[6]
            ids = found.inputs["input_ids"][i]
            assert tokenizer.decode(ids[1:5]) == "Who saw the cat"
    assert any(len(asked.context) != len(found.questions[0].context) for asked in questions)


def test_many_questions_are_read_in_portions(folder, monkeypatch):
    questions = [question(n) for n in range(14)]
    whole = cut(questions, folder)
    monkeypatch.setattr(squad, "TOKENIZER_BATCH", 3)
    found = cut(questions, folder)
    for one, other in ((found.labels, whole.labels), (found.spans, whole.spans), (found.question, whole.question)):
        assert torch.equal(one, other)
    assert all(torch.equal(found.inputs[name], value) for name, value in whole.inputs.items())


def test_answers_of_several_words_and_blanks(folder):
    context = "Ann saw the red cat ."
    for answer, start, expected in (("the red", 8, "the red"), (" red cat ", 11, "red cat"), ("lost", 500, None)):
        found = cut([Question("0", context, "Who ?", [answer], start)], folder)
        first, last = found.labels[0].tolist()
        if expected is None:
            assert (first, last) == (0, 0)
        else:
            assert context[found.spans[0, first, 0] : found.spans[0, last, 1]] == expected


def test_all_parts_are_as_long_as_the_longest(folder):
    short = Question("0", "Ann saw .", "Who ?", ["Ann"], 0)
    long = Question("1", "Ann saw the cat .", "Who ?", ["Ann"], 0)
    splits, articles = make_windows([[short, long], [short], [short]], str(folder / "model"))
    assert {part.length for part in (splits.train, splits.validation, splits.test)} == {3 + 2 + 5}
    assert splits.test.spans.shape == (1, 10, 2)
    assert articles.tolist() == [0, 1]


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "given", "expected"),
    [
        ("The  Red, cat!", "red cat", (1.0, 1.0)),
        ("a red cat", "the red cat in an house", (2 * 1 * 0.5 / 1.5, 0.0)),
        ("red red cat", "red cat cat", (2 / 3, 0.0)),
        ("theatre", "atre", (0.0, 0.0)),
        ("U.S.", "us", (1.0, 1.0)),
        ("dog", "cat", (0.0, 0.0)),
        ("", "cat", (0.0, 0.0)),
        ("the", "a", (0.0, 1.0)),
    ],
)
def test_scores_are_the_official_ones(predicted, given, expected):
    assert (f1(predicted, given), exact_match(predicted, given)) == pytest.approx(expected)


def logits_of(found, spots):
    """Where start and end point: (window, start, end, height)."""
    outputs = torch.zeros(len(found), found.length, 2)
    for window, start, end, height in spots:
        outputs[window, start, 0] += height
        outputs[window, end, 1] += height
    return outputs


def test_the_best_span_of_all_windows_wins(folder):
    questions = [question(n) for n in (3, 4)]
    found = cut(questions, folder)
    holds = [(i, *found.labels[i].tolist()) for i in range(len(found)) if found.labels[i, 0] > 0]
    right = logits_of(found, [(*window, 5.0) for window in holds])
    assert predictions(right, found) == [NAMES[3], NAMES[4]]
    assert span_scores(right, found) == {"F1": 1.0, "exact match": 1.0}
    mine, other = holds[0], next(i for i in range(len(found)) if found.question[i] == 0 and i != holds[0][0])
    wrong = right + logits_of(found, [(other, 7, 9, 6.0)])
    begin, end = found.spans[other, 7, 0], found.spans[other, 9, 1]
    assert predictions(wrong, found) == [questions[0].context[begin:end], NAMES[4]]
    assert 0.5 <= span_scores(wrong, found)["F1"] < 1
    # Neither the question, nor padding, nor an end before its start, however high.
    i, first, last = mine
    tricked = right + logits_of(found, [(i, 2, 3, 50.0), (i, 0, 0, 50.0)])
    assert predictions(tricked, found)[0] == NAMES[3]
    backwards = logits_of(found, [(i, first + 3, first + 1, 1.0), (i, first, first, 0.75)])
    assert predictions(backwards, found)[0].startswith(NAMES[3])
    assert predictions(torch.full_like(right, float("nan")), found) == ["", ""]


def test_answers_are_not_longer_than_thirty_tokens(folder):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model", model_max_length=60)
    tokenizer.save_pretrained(folder / "longer")
    context = " ".join(["cat"] * 50)
    splits, _ = make_windows([[Question("0", context, "Who ?", ["cat"], 0)]] * 3, str(folder / "longer"))
    found = splits.test
    assert len(found) == 1
    for more, tokens in ((5, 6), (29, 30)):
        assert predictions(logits_of(found, [(0, 4, 4 + more, 5.0)]), found) == [" ".join(["cat"] * tokens)]
    (text,) = predictions(logits_of(found, [(0, 4, 4 + 30, 5.0)]), found)
    assert len(text.split()) <= 30


def test_of_several_answers_the_nearest_counts(folder):
    asked = question(0)._replace(answers=["Bob", "Ann", "the dog"])
    found = cut([asked], folder)
    spots = [(i, int(place), int(place), 1.0) for i in range(1) for place in (found.spans[i, :, 0] == 0).nonzero()[0]]
    assert span_scores(logits_of(found, spots), found) == {"F1": 1.0, "exact match": 1.0}


# --- runs ---------------------------------------------------------------------------------------------------------


def config(folder, **settings):
    return Config(**with_shared(settings, {**SETTINGS, "data": str(folder), "model": str(folder / "model")}))


@torch.no_grad()
def test_the_halves_are_the_whole_model(folder):
    task = make_task(config(folder))
    inputs = task.test[:5].inputs
    whole = pretrained_model(str(folder / "model"), "QuestionAnswering").eval()
    found = whole(**inputs)
    for at in (0, 1):
        halves = split(whole, at)
        assert torch.equal(halves(inputs), torch.stack([found.start_logits, found.end_logits], -1))
    labels = task.test[:5].labels
    start = nn.functional.cross_entropy(found.start_logits, labels[:, 0])
    end = nn.functional.cross_entropy(found.end_logits, labels[:, 1])
    assert torch.allclose(task.loss(halves(inputs), labels), (start + end) / 2)


@pytest.mark.parametrize("method", ["ho", "zo-both", "first-order"])
def test_squad_trains(folder, method, tmp_path):
    settings = config(folder, method=method, rounds=4, batch=16)
    summary = train(settings, tmp_path / "run")
    assert summary.replicas.equal
    assert summary.refused == []
    assert list(summary.scores) == ["F1", "exact match"]
    assert summary.accuracy == summary.scores["F1"] >= summary.scores["exact match"]
    visits = settings.rounds * 2
    assert summary.bytes["labels up"] == visits * 16 * 2 * 4
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["scores"] == summary.scores


@pytest.mark.learning
def test_squad_is_learned(folder, seed, below):
    settings = config(folder, method="first-order", rounds=80, evaluate_every=80, batch=16, seed=seed)
    below(1 - train(settings).accuracy, 0.4)


# --- decoders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(folder):
    """A decoder that knows the same words."""
    path = folder / "writer"
    vocabulary = {
        word: n for n, word in enumerate(["[UNK]", "<s>", "</s>", ":", "Context", "Question", "Answer", *WORDS])
    }
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(path)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"vocab_size": len(vocabulary), "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    hf.LlamaForCausalLM(hf.LlamaConfig(**small, max_position_embeddings=90)).save_pretrained(path)
    return str(path)


def short(number):
    """One whose answer is the first word of a short context; it has two answers, and articles of ten questions."""
    name = NAMES[number % 6]
    return Question(f"{number // 10}", f"{name} saw the cat .", "Who saw the cat ?", [name, f"{name} saw"], 0)


def test_a_decoder_is_shown_the_question_and_learns_the_first_answer(writer):
    decoder = Decoder.of(writer)
    long = short(1)._replace(context="the dog went home . " * 30 + "Bob saw the cat .")
    asking = short(2)._replace(question="Who saw the cat " * 10)
    found = encode_prompts([short(0), long, asking], decoder, 60)
    assert found.questions == [short(0), long, asking]
    shown = [decoder.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*found.inputs.values(), strict=True)]
    assert shown[0] == "<s> Context : Ann saw the cat . Question : Who saw the cat ? Answer : Ann"
    tail = "home . Bob saw the cat . Question : Who saw the cat ? Answer : Bob"  # of the context the beginning is lost
    assert shown[1].startswith("<s> ")
    assert shown[1].endswith(tail)
    assert found.inputs["attention_mask"].sum(1).tolist() == [18, 59, 23]
    assert shown[2].endswith("Question : Who saw the cat Who saw the cat Who saw Answer : Cid")  # a sixth of 60
    assert [labels[labels != IGNORED].tolist()[-1] for labels in found.labels] == [2, 2, 2]
    learnt = [decoder.tokenizer.decode(labels[labels != IGNORED]) for labels in found.labels]
    assert learnt == ["Ann </s>", "Bob </s>", "Cid </s>"]
    with pytest.raises(DataError, match="question 'Who saw the cat \\?': 41 tokens from its first completion on"):
        encode_prompts([short(0)._replace(answers=["cat " * 40])], decoder, 30)


def test_a_decoder_s_task(folder, writer):
    task = make_task(config(folder, model=writer))
    train_part, _, test = load_parts(str(folder))
    assert [len(task.train), len(task.test)] == [90, 20]
    assert task.test.questions == test
    assert task.train.length <= 90 - 30  # so that an answer of 30 tokens has room
    assert task.groups.tolist() == [
        sorted({q.article for q in train_part}, key=int).index(q.article) for q in train_part
    ]
    halves = task.halves(0)
    written = ["Dan"] * 20

    def told(halves, prompts, most, stops, vocabulary):
        assert (most, stops, vocabulary) == (30, [2], task.classes)
        tokenizer = hf.AutoTokenizer.from_pretrained(writer)
        assert all(tokenizer.decode(prompt).endswith("Who saw the cat ? Answer :") for prompt in prompts)
        return [tokenizer(f"the {text}", add_special_tokens=False)["input_ids"] for text in written]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "generate", told)
        scores, _ = evaluate(halves, task.test, task)
        right = sum(q.answers[0] == "Dan" for q in test)
        assert scores == {"F1": right / 20, "exact match": right / 20}
        written[:] = [q.answers[1] for q in test]  # of the answers the nearest counts
        assert evaluate(halves, task.test, task)[0] == {"F1": 1.0, "exact match": 1.0}


@pytest.mark.parametrize("method", ["ho", "zo-both"])
def test_a_decoder_trains(folder, writer, method, tmp_path):
    summary = train(config(folder, model=writer, method=method, rounds=3, trains="lora"), tmp_path / "run")
    assert summary.replicas.equal
    assert summary.refused == []
    assert list(summary.scores) == ["F1", "exact match"]


@pytest.mark.learning
def test_a_decoder_learns_to_answer(writer, tmp_path, seed, below):
    (tmp_path / "train-v1.1.json").write_text(json.dumps(as_json(map(short, range(200)))))
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(as_json(map(short, range(200, 220)))))
    settings = {"method": "first-order", "rounds": 240, "evaluate_every": 240, "batch": 16, "seed": seed}
    found = train(config(tmp_path, model=writer, client_rate=0.15, **settings))
    below(1 - found.accuracy, 0.5)


# --- labels that others send --------------------------------------------------------------------------------------


def test_the_server_refuses_other_labels(folder):
    federation, task = assemble(config(folder))
    good = federation.load_client(0).output(0)
    assert isinstance(good, Cut)
    assert good.labels.shape == (8, 2)
    far = good.labels.clone()
    far[0, 1] = task.train.length
    wrong = [replace(good, labels=good.labels[:, 0].contiguous()), replace(good, labels=far)]
    assert federation.server.step(0, wrong)[0] == {}
    assert federation.server.refused.total == 2
    assert "for 24 classes" in federation.server.refused[1]
    end = int(good.labels.max())  # a text that ends before its answer, one of no length, and a longer one
    for length, reason in ((end, f"for {end} classes"), (0, "a cut of shape"), (25, "a cut of shape")):
        of = {"cut": good.cut[:, :1].expand(-1, length, -1), "mask": good.mask[:, :1].expand(-1, length)}
        assert federation.server.step(0, [replace(good, **{k: v.contiguous() for k, v in of.items()})])[0] == {}
        assert reason in federation.server.refused[-1]
    assert set(federation.server.step(0, [good])[0]) == {0}


def test_clients_differ_by_article(folder):
    splits, articles = make_windows(load_parts(str(folder)), str(folder / "model"))
    assert len(articles) == len(splits.train)
    assert articles.unique().tolist() == list(range(9))

    def owned(**settings):
        federation, _ = assemble(config(folder, **settings))
        return [federation.load_client(n).batch.data for n in range(3)]

    alike = [len(part) for part in owned(partition="iid")]
    assert sum(alike) == len(articles)
    assert max(alike) - min(alike) <= 1
    expected = dirichlet_split(articles, 3, 0.3, seed=0)
    for part, mine in zip(expected, owned(alpha=0.3), strict=True):
        assert torch.equal(mine.inputs["input_ids"], splits.train[part].inputs["input_ids"])

"""Every reader against every damage: the right rows, or an error that names the file and the place. A new reader is a
line of READERS, a new damage a line of a table."""

import io
import json
import os
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hosfl import Config
from hosfl.tasks import make_task, squad, text
from hosfl.tasks.data import (
    Dataset,
    Splits,
    dirichlet_split,
    iid_split,
    label_published_parts,
    shard_count,
    split_held_out,
)
from hosfl.tasks.picture_files import class_folders, picture_file
from hosfl.tasks.reading import (
    Answer,
    DataError,
    check_answer_offsets,
    class_numbers,
    load_from_hub,
    read_json_lines,
    read_table,
)
from hosfl.tasks.squad import Question, Windows
from hosfl.tasks.text import TEXTS
from hosfl.tasks.vision import CifarResNet, load_pictures, pretrained_resnet

SIZE = (32, 32)


# --- readers ------------------------------------------------------------------------------------------------------


def as_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def some_weights():
    file = io.BytesIO()
    torch.manual_seed(0)
    torch.save(CifarResNet(10, 1).state_dict(), file)
    return file.getvalue()


TSV = "sentence\tlabel\na café\t0\none\u2028film\t1\n".encode()
RTE = as_lines(
    {"premise": "a café", "hypothesis": "b", "label": "entailment"},
    {"premise": "one\u2028film", "hypothesis": "b", "label": "not_entailment"},
)
WSC = as_lines(
    {"text": "a café", "target": {"span1_text": "a", "span2_text": "b"}, "label": True},
    {"text": "one\u2028film", "target": {"span1_text": "a", "span2_text": "b"}, "label": False},
)
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "paragraphs": [
                {
                    "context": "in a café Ann saw Bob",
                    "qas": [{"id": "q1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 10}]}],
                }
            ]
        }
    ],
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))

# name: (kind, a valid file, what reads it)
READERS = {
    "tsv": ("tsv", TSV, lambda path: read_table(path, ("sentence", "label"))),
    "sst2": ("tsv", TSV, lambda path: text.read(path, TEXTS["sst2"], False)),
    "jsonl": ("jsonl", RTE, lambda path: [row.get("premise") for _, row in read_json_lines(path)]),
    "rte": ("jsonl", RTE, lambda path: text.read(path, TEXTS["rte"], False)),
    "wsc": ("jsonl", WSC, lambda path: text.read(path, TEXTS["wsc"], False)),
    "squad": ("json", json.dumps(SQUAD, ensure_ascii=False).encode(), squad.read),
    "png": ("picture", saved(NOISE, "PNG"), lambda path: picture_file(path, SIZE).tolist()),
    "jpeg": ("picture", saved(NOISE, "JPEG"), lambda path: picture_file(path, SIZE).tolist()),
    "weights": ("weights", some_weights(), lambda path: pretrained_resnet(path, 10).fc.bias.tolist()),
}
TEXT = ("tsv", "jsonl", "json")
JSON = ("jsonl", "json")
EVERY = (*TEXT, "picture", "weights")
SAME = None  # instead of a reason: the rows are those of the valid file


def inserted(what, before=b"caf"):
    return lambda raw: raw.replace(before, what + before, 1)


# name: (kinds of readers, what is done to the bytes, the reason that the error gives)
DAMAGES = {
    "empty": (EVERY, lambda raw: b"", r"no samples|line 1|it is empty|no state dictionary"),
    "cut in half": (("jsonl", "json"), lambda raw: raw[: len(raw) // 2], r"line [12], column \d+: not JSON"),
    "a picture cut in half": (("picture",), lambda raw: raw[: len(raw) // 2], "truncated"),
    "a picture's first bytes": (("picture",), lambda raw: raw[:60], "truncated"),
    "weights cut in half": (("weights",), lambda raw: raw[: len(raw) // 2], "no state dictionary"),
    "zeros": (EVERY, lambda raw: bytes(len(raw)), r"line 1, byte 1 \(0x00\) is a NUL|its content is|no state dict"),
    "text": (("picture", "weights"), lambda raw: b"version https://git-lfs.github.com/spec/v1", "content is|no state"),
    "a mark": (TEXT, lambda raw: b"\xef\xbb\xbf" + raw, SAME),
    "latin-1": (TEXT, lambda raw: raw.decode().replace("\u2028", " ").encode("latin-1"), r"byte \d+ \(0xe9\) is not"),
    "UTF-16": (TEXT, lambda raw: raw.decode().encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    "UTF-32": (TEXT, lambda raw: raw.decode().encode("utf-32"), "is in UTF-32"),
    "UTF-16 without a mark": (TEXT, lambda raw: raw.decode().encode("utf-16-le"), r"byte 2 \(0x00\) is a NUL"),
    "a NUL": (TEXT, inserted(b"\0"), r"\(0x00\) is a NUL"),
    "an encoded surrogate": (TEXT, inserted(b"\xed\xa0\x80"), r"\(0xed\) is not UTF-8"),
    "\\r\\n": (TEXT, lambda raw: raw.replace(b"\n", b"\r\n"), SAME),
    "\\r": (TEXT, lambda raw: raw.replace(b"\n", b"\r"), SAME),
    "no end of line": (TEXT, lambda raw: raw.removesuffix(b"\n"), SAME),
    "empty lines at the end": (TEXT, lambda raw: raw + b"\n\n", SAME),
    "an empty line between": (("tsv", "jsonl"), lambda raw: raw.replace(b"\n", b"\n\n", 1), "line 2"),
    "a header alone": (("tsv",), lambda raw: raw.split(b"\n")[0], "no samples"),
    "no header": (("tsv",), lambda raw: raw.split(b"\n", 1)[1], "line 1: no column 'sentence'"),
    "a column twice": (("tsv",), lambda raw: raw.replace(b"label", b"label\tlabel", 1), "column 'label' twice"),
    "a field more": (("tsv",), inserted(b"a\t"), "line 2: 3 fields, the first line names 2"),
    "a field less": (("tsv",), lambda raw: raw.replace(b"\t1", b""), "line 3: 1 field, the first line names 2"),
    "a field that nobody asked for": (JSON, lambda raw: raw.replace(b'{"', b'{"more": null, "a b": [{}], "'), SAME),
    "a list": (JSON, lambda raw: b"[" + raw.strip().replace(b"\n", b"]\n[") + b"]", "an object is needed, not a list"),
    "null": (JSON, lambda raw: b"null", "an object is needed, not null"),
    "a text": (JSON, lambda raw: b'"text"', "an object is needed, not text"),
    "two documents": (JSON, lambda raw: raw.strip() + b" " + raw, "not JSON: Extra data"),
    "a field twice": (JSON, lambda raw: raw.replace(b'": "', b'": "x", "id": 1, "id": "', 1), "field 'id' twice"),
    "NaN": (JSON, lambda raw: raw.replace(b'{"', b'{"odd": [0, NaN], "', 1), r"odd\[1\]: nan is no number"),
    "1e999": (JSON, lambda raw: raw.replace(b'{"', b'{"odd": -1e999, "', 1), "odd: -inf is no number"),
    "a huge number": (
        JSON,
        lambda raw: raw.replace(b'{"', b'{"odd": ' + b"9" * 5000 + b', "', 1),
        "5000 digits|4300 digits",
    ),
    "deep": (JSON, lambda raw: raw.replace(b'{"', b'{"odd": ' + b"[" * 99999 + b"]" * 99999 + b', "', 1), "recursion"),
    "half a pair": (JSON, inserted(rb"\ud83d"), "half a surrogate pair"),
    "half a pair in a name": (JSON, lambda raw: raw.replace(b'{"', rb'{"\udc00": 1, "', 1), "half a surrogate pair"),
    "a whole pair": (("jsonl",), lambda raw: raw.replace("é".encode(), rb"\u00e9"), SAME),
}


def cases():
    """Every damage of every reader that it is for."""
    for name, (kinds, change, reason) in DAMAGES.items():
        for reader, (kind, valid, read) in READERS.items():
            if kind in kinds:
                yield pytest.param(f"some.{kind}", valid, change, read, reason, id=f"{reader}, {name}")


def rows_of(read, path):
    """The rows, without the places where they stand."""
    found = read(path)
    return [row[1] for row in found] if found and isinstance(found[0], tuple) and len(found[0]) == 2 else found


@pytest.mark.parametrize(("name", "valid", "change", "read", "reason"), list(cases()))
def test_damaged_files(name, valid, change, read, reason, tmp_path):
    path = tmp_path / name
    path.write_bytes(valid)
    expected = rows_of(read, path)
    damaged = change(valid)
    assert damaged != valid or reason is SAME
    path.write_bytes(damaged)
    if reason is SAME:
        assert rows_of(read, path) == expected
        return
    with pytest.raises(DataError, match=reason) as error:
        read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", READERS)
def test_paths_that_are_none(name, tmp_path):
    kind, valid, read = READERS[name]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    (tmp_path / "a folder").mkdir()
    with pytest.raises((OSError, DataError), match="a folder"):
        read(tmp_path / "a folder")
    with pytest.raises(DataError, match="is no path"):
        read(tmp_path / "a\0b")
    os.mkfifo(tmp_path / f"pipe.{kind}")  # it would be waited for
    with pytest.raises((OSError, DataError), match="pipe"):
        read(tmp_path / f"pipe.{kind}")
    path = tmp_path / f"mine.{kind}"
    path.write_bytes(valid)
    path.chmod(0)
    if not os.access(path, os.R_OK):  # which root may
        with pytest.raises(PermissionError, match="mine"):
            read(path)


def test_lines_and_bytes_are_counted_as_an_editor_does(tmp_path):
    path = tmp_path / "dev.tsv"
    for end in (b"\n", b"\r\n", b"\r"):
        path.write_bytes(b"sentence\tlabel" + end + b"a\t0" + end + b"caf\xe9\t1" + end)
        with pytest.raises(DataError, match=r"dev.tsv, line 3, byte 4 \(0xe9\) is not UTF-8"):
            read_table(path, ("sentence", "label"))


# --- fields -------------------------------------------------------------------------------------------------------

ROW = {"premise": "a", "hypothesis": "b", "label": "entailment"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"premise": None}, "field 'premise': text is needed, not null"),
        ({"premise": 3}, "field 'premise': text is needed, not a whole number"),
        ({"premise": ["a"]}, "field 'premise': text is needed, not a list"),
        ({"premise": {}}, "field 'premise': text is needed, not an object"),
        ({"premise": True}, "field 'premise': text is needed, not true or false"),
        ({"premise": " \u3000"}, "field 'premise' is empty"),
        ({"label": None}, "label null: the classes are entailment, not_entailment"),
        ({"label": True}, "label True: the classes are"),
        ({"label": 1.0}, r"label 1.0: the classes are"),
        ({"label": 2}, "label 2: the classes are"),
        ({"label": -1}, "label -1: the classes are"),
        ({"label": "Entailment"}, "label 'Entailment'"),
        ({"label": "٣"}, "label '٣'"),
        ({"label": [1]}, r"label \[1\]"),
        ({"target": "yes"}, SAME),
        ({"label": 0}, SAME),
        ({"label": "0"}, SAME),
    ],
)
def test_fields(change, reason, tmp_path):
    for name in ("train.jsonl", "val.jsonl"):
        rows = [{**ROW, "label": n % 2} for n in range(40)]
        rows[6] = {**ROW, **(change if name == "train.jsonl" else {})}
        (tmp_path / name).write_bytes(as_lines(*rows))
    if reason is SAME:
        assert len(text.load_parts(TEXTS["rte"], str(tmp_path))[2]) == 40
        return
    with pytest.raises(DataError, match=rf"train.jsonl, line 7: {reason}"):
        text.load_parts(TEXTS["rte"], str(tmp_path))


def labelled(*labels):
    return [(f"file, line {n}", {"label": label} if label != "none" else {}) for n, label in enumerate(labels, 2)]


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        (("0", "1", "0"), {}, [0, 1, 0]),
        ((0, 2, 1), {}, [0, 2, 1]),
        (("0", "1", "1000"), {}, "line 4: label '1000', but there is no 2: classes are numbered from 0 without gaps"),
        (("1", "2"), {}, "line 2: label '1', but there is no 0"),
        (("0", "01"), {}, "line 3: label '01': a class is a number from 0 on, in plain digits"),
        (("0", "9" * 5000), {}, "line 3: label '999"),
        (("0", "²"), {}, "line 3: label '²'"),
        (("0", "1 "), {}, "line 3: label '1 '"),
        (("0", "-1"), {}, "line 3: label -1"),
        (("1", "1"), {"names": ("bad", "good")}, "line 2: label '1', and so in all of the training part: it has one"),
        (("0",), {}, "one class only"),
        (("0", "2"), {"training": {0, 1}}, "line 3: label '2' is none of the training part's: 0, 1"),
        (("good", "bad"), {"names": ("good", "bad", "none"), "training": {0}}, "is none of the training part's: good$"),
        (("0", "0"), {"training": {0, 1}}, [0, 0]),
        (("-1", -1), {"training": {0, 1}, "may_hide": True}, []),
        (("none", "none"), {"training": {0, 1}, "may_hide": True}, []),
        (("-1", "1"), {"training": {0, 1}, "may_hide": True}, "line 2: label '-1', as where labels are hidden, but"),
        (("1", "none"), {"training": {0, 1}, "may_hide": True}, "line 3: .* as where labels are hidden"),
        (("-1", "-1"), {"training": {0, 1}}, "line 2: label -1"),
        (("none",), {"training": {0, 1}}, "line 2: no field 'label'"),
        ((), {"training": {0, 1}, "may_hide": True}, []),
    ],
)
def test_classes(labels, settings, expected):
    if isinstance(expected, list):
        assert class_numbers(labelled(*labels), **settings) == expected
    else:
        with pytest.raises(DataError, match=f"file, {expected}" if "line" in expected else expected):
            class_numbers(labelled(*labels), **settings)


def test_hidden_labels_are_the_same_from_files_and_from_the_hub(tmp_path):
    """A test part of -1, or without labels, or without a file: validation data are the test part."""
    lines = ["sentence\tlabel", *(f"film {n}\t{n % 2}" for n in range(40))]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(lines))
    expected = text.load_parts(TEXTS["sst2"], str(tmp_path))
    for hidden in (["sentence\tlabel", "a\t-1", "b\t-1"], ["index\tsentence", "0\ta"], ["sentence", "a"]):
        (tmp_path / "test.tsv").write_text("\n".join(hidden))
        assert text.load_parts(TEXTS["sst2"], str(tmp_path)) == expected
    (tmp_path / "test.tsv").write_text("sentence\tlabel\na\t-1\nb\t0\n")
    with pytest.raises(DataError, match=r"test.tsv, line 2: label '-1', as where labels are hidden"):
        text.load_parts(TEXTS["sst2"], str(tmp_path))
    (tmp_path / "test.tsv").unlink()
    (tmp_path / "test.tsv").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"test.tsv"):
        text.load_parts(TEXTS["sst2"], str(tmp_path))


def test_a_hub_s_parts(monkeypatch):
    import sys

    found = {"train": [], "odd": []}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *name: found))
    with pytest.raises(DataError, match="some/name has no part 'test'; there are train, odd"):
        load_from_hub("some/name", parts=("train", "test"))


# --- answers ------------------------------------------------------------------------------------------------------

CONTEXT = "é 🎈 Ann saw Bob"  # Ann at 4; at 5 in UTF-16 units, at 8 in UTF-8 bytes


@pytest.mark.parametrize(
    ("context", "answer", "start", "reason"),
    [
        (CONTEXT, "Ann", 4, SAME),
        (CONTEXT, " Ann", 3, SAME),
        (CONTEXT, "Ann", 8, r"at 8, where 'saw' stands; it begins at 4: offsets are counted in UTF-8 bytes; count"),
        (CONTEXT, "Ann", 6, r"at 6, where 'n s' stands; it begins at 4$"),
        (CONTEXT, "Ann", -1, r"at -1, outside of its text of 15 characters; it begins at 4$"),
        (CONTEXT, "Ann", 10**30, r"outside of its text"),
        (CONTEXT, "Eve", 4, r"where 'Ann' stands; the text does not have it$"),
        (CONTEXT, "", 4, "the answer is empty"),
        (CONTEXT, " ", 3, "the answer is empty"),
        ("Ann saw Bob", "Bob", 9, "where 'ob' stands; it begins at 8: offsets are counted from 1"),
        ("🎈 Ann saw Ann", "Ann", 11, r"it begins at 2, 10: offsets are counted in UTF-16 units, .* or from 1"),
    ],
)
def test_answers_stand_where_they_say(context, answer, start, reason):
    claims = [Answer("file, question 7", context, answer, start)]
    if reason is SAME:
        check_answer_offsets(claims)
        return
    with pytest.raises(DataError, match=f"file, question 7: .*{reason}"):
        check_answer_offsets(claims)


@pytest.mark.parametrize(
    ("unit", "count"),
    [
        ("in UTF-16 units, as in JavaScript and Java;", lambda before: len(before.encode("utf-16-le")) // 2),
        ("in UTF-8 bytes;", lambda before: len(before.encode())),
        ("from 1;", lambda before: len(before) + 1),
    ],
)
def test_all_answers_together_tell_how_offsets_are_counted(unit, count):
    """Of the first wrong one alone it cannot be told: one character before it takes one more in every unit."""
    contexts = ["Ann saw", "🎈 Ann saw", "é Ann saw", "🎈🎈 Ann saw"]
    claims = [Answer("file", c, "Ann", count(c[: c.index("Ann")])) for c in contexts]
    with pytest.raises(DataError, match=f"offsets are counted {unit} count them in characters, from 0$"):
        check_answer_offsets(claims)
    with pytest.raises(DataError, match="it begins at 8: as if counted from 1;"):  # which the others are not
        check_answer_offsets([Answer("file", "Ann saw Bob", "Ann", 0), Answer("file", "Ann saw Bob", "Bob", 9)])


def changed(document, place, value):
    found = json.loads(json.dumps(document))
    inner = found
    for step in place[:-1]:
        inner = inner[step]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return found


ASKED = ("data", 0, "paragraphs", 0, "qas", 0)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("version",), "v2.0", "is SQuAD 2.0, with questions that have no answer; this task reads 1.1"),
        (("version",), 2, "is SQuAD 2.0"),
        (("version",), KeyError, SAME),
        ((*ASKED, "is_impossible"), True, "is SQuAD 2.0"),
        ((*ASKED, "is_impossible"), False, SAME),
        (("data",), {}, "field 'data': a list is needed, not an object"),
        (("data",), [], "has no questions"),
        (("data", 0), [], r"data\[0\]: an object is needed, not a list"),
        (("data", 0, "paragraphs"), None, r"data\[0\]: field 'paragraphs': a list is needed, not null"),
        (("data", 0, "paragraphs", 0, "context"), 3, r"data\[0\].paragraphs\[0\]: field 'context': text is needed"),
        (("data", 0, "paragraphs", 0, "context"), "\udc00", r"data\[0\].paragraphs\[0\].context: half a surrogate"),
        (ASKED, "Who?", r"data\[0\].paragraphs\[0\].qas\[0\]: an object is needed, not text"),
        ((*ASKED, "id"), KeyError, SAME),
        ((*ASKED, "question"), KeyError, "question q1: no field 'question'; there are id, answers"),
        ((*ASKED, "answers"), [], "question q1 has no answer, as none has in SQuAD 1.1"),
        ((*ASKED, "answers", 0), "Ann", r"question q1, answers\[0\]: an object is needed, not text"),
        ((*ASKED, "answers", 0, "text"), ["Ann"], r"question q1, answers\[0\]: field 'text': text is needed"),
        ((*ASKED, "answers", 0, "answer_start"), "10", r"field 'answer_start': a whole number is needed, not text"),
        ((*ASKED, "answers", 0, "answer_start"), True, r"field 'answer_start': a whole number .*, not true or false"),
        ((*ASKED, "answers", 0, "answer_start"), 10.0, r"field 'answer_start': a whole number is needed, not a number"),
        ((*ASKED, "answers", 0, "answer_start"), 12, "question q1: the answer 'Ann' is said to begin at 12"),
    ],
)
def test_questions(place, value, reason, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(changed(SQUAD, place, value)))
    if reason is SAME:
        assert [asked.start for asked in squad.read(path)] == [10]
        return
    with pytest.raises(DataError, match=rf"train.json.* {reason}"):
        squad.read(path)


def test_questions_from_the_hub_are_checked_alike():
    row = {
        "title": "t",
        "context": "Ann saw Bob",
        "question": "Who?",
        "answers": {"text": ["Bob"], "answer_start": [8]},
    }
    assert squad._check_offsets([squad._question_of_row(row, "hub, row 0")])[0].start == 8
    for change, reason in (
        ({"text": ["Bob"], "answer_start": [9]}, "is said to begin at 9"),
        ({"text": [], "answer_start": []}, "has no answer"),
        ({"text": ["Bob"], "answer_start": []}, "1 answers with 0 offsets"),
        ({"text": [None], "answer_start": [8]}, r"answers\[0\]: field 'text': text is needed, not null"),
    ):
        with pytest.raises(DataError, match=f"hub, row 0.*{reason}"):
            squad._check_offsets([squad._question_of_row({**row, "answers": change}, "hub, row 0")])


def test_articles_are_enough_or_the_number_is_told(tmp_path):
    def articles(count, each):
        one = json.loads(json.dumps(SQUAD["data"][0]["paragraphs"][0]))
        return {"data": [{"paragraphs": [one] * each} for _ in range(count)]}

    path = tmp_path / "all.json"
    path.write_text(json.dumps(articles(2, 50)))
    with pytest.raises(DataError, match=r"all.json: too few articles, 2: at least 3 are needed, to train, to choose"):
        squad.load_parts(str(path))
    for each in (1, 7):
        path.write_text(json.dumps(articles(3, each)))
        assert [len(part) for part in squad.load_parts(str(path))] == [each] * 3
    for large in range(3):  # whichever is drawn first, one article is left for each part
        document = articles(3, 1)
        document["data"][large]["paragraphs"] *= 50
        path.write_text(json.dumps(document))
        assert sorted(len(part) for part in squad.load_parts(str(path))) == [1, 1, 50]


# --- pictures -----------------------------------------------------------------------------------------------------


def folders(path, **parts):
    for part, names in parts.items():
        for name in names:
            (path / part / name).mkdir(parents=True)
            NOISE.save(path / part / name / "1.png")
    return path


def test_classes_are_numbered_by_the_training_part_s_folders(tmp_path):
    folders(tmp_path, train=("b", "a", "c"), test=("c", "b"))
    names, _ = class_folders(tmp_path / "train")
    assert names == ["a", "b", "c"]
    found = class_folders(tmp_path / "test", names)[1]
    assert [(path.parent.name, label) for path, label in found] == [("b", 1), ("c", 2)]
    (tmp_path / "test" / "d").mkdir()
    with pytest.raises(DataError, match=r"test/d: no class of the training part, whose folders are a, b, c"):
        class_folders(tmp_path / "test", names)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"train/empty: a class without pictures"):
        class_folders(tmp_path / "train")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: no pictures"):
        class_folders(tmp_path / "none", names)


def test_names_are_compared_in_composed_form(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folders(tmp_path, train=(composed, "tea"), test=(decomposed,))
    names, _ = class_folders(tmp_path / "train")
    assert [label for _, label in class_folders(tmp_path / "test", names)[1]] == [names.index(composed)]
    folders(tmp_path, train=(decomposed,))
    with pytest.raises(DataError, match="are one name, written in two ways"):
        class_folders(tmp_path / "train")


def test_what_is_no_picture_is_passed_over_with_one_warning(tmp_path):
    folders(tmp_path, train=("a", "b", ".ipynb_checkpoints"))
    (tmp_path / "train" / ".DS_Store").touch()
    (tmp_path / "train" / "a" / "._1.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "train" / "a" / "more" / "inside").mkdir(parents=True)
    NOISE.save(tmp_path / "train" / "a" / "more" / "inside" / "2.JPG", "JPEG")
    (tmp_path / "train" / "a" / "more" / "again").symlink_to(tmp_path / "train" / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [path.name for path, _ in class_folders(tmp_path / "train")[1]] == ["1.png", "2.JPG", "1.png"]
    (tmp_path / "train" / "b" / "Thumbs.db").touch()
    (tmp_path / "train" / "b" / "list.txt").touch()
    with pytest.warns(UserWarning, match=r"train: 2 files are passed over, .* the first is .*Thumbs.db") as told:
        class_folders(tmp_path / "train")
    assert len(told) == 1


GREY16 = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
SCALED = np.round(GREY16 / 257).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "image", "expected"),
    [
        ("PNG", Image.fromarray(GREY16), SCALED),
        ("TIFF", Image.fromarray(GREY16), SCALED),
        ("TIFF", Image.frombytes("I;16B", SIZE, GREY16.astype(">u2").tobytes()), SCALED),
        ("TIFF", Image.fromarray(GREY16.astype(np.int32)), SCALED),
        ("TIFF", Image.fromarray(GREY16.astype(np.int32) * 2), "its mode is I, with values from 0 to 130944"),
        ("TIFF", Image.fromarray(GREY16.astype(np.int32) - 1), "its mode is I, with values from -1 to"),
        ("TIFF", Image.fromarray(GREY16.astype(np.float32)), "its mode is F, numbers of no known range"),
        ("PNG", NOISE.convert("L"), np.asarray(NOISE.convert("L"))),
        ("PNG", NOISE.convert("LA"), np.asarray(NOISE.convert("L"))),
        ("PNG", NOISE.convert("1"), np.asarray(NOISE.convert("1").convert("L"))),
        ("PNG", NOISE.quantize(16), NOISE.quantize(16)),
        ("PNG", NOISE.convert("RGBA"), NOISE),
        ("TIFF", NOISE.convert("CMYK"), NOISE),
        ("GIF", NOISE.quantize(16), NOISE.quantize(16)),
        ("EPS", NOISE, "its content is none of JPEG, PNG"),
        ("PNG", Image.new("RGB", (32, 33)), r"a picture of 32 x 32 is needed, it has \(32, 33\)"),
    ],
)
def test_modes_and_depths(kind, image, expected, tmp_path):
    path = tmp_path / "one.png"
    path.write_bytes(saved(image, kind))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f"one.png.*{expected}"):
            picture_file(path, SIZE)
        return
    found = picture_file(path, SIZE)
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    if isinstance(expected, np.ndarray):
        expected = Image.fromarray(expected)
    assert np.array_equal(found, np.asarray(expected.convert("RGB")))


def test_a_size_is_seen_before_a_picture_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    raw = bytearray(saved(NOISE, "PNG"))
    raw[16:24] = (10**5).to_bytes(4, "big") * 2
    raw[29:33] = __import__("zlib").crc32(bytes(raw[12:29])).to_bytes(4, "big")
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"bomb.png.*DecompressionBombError"):
        picture_file(path, SIZE)


@pytest.mark.timeout(30)  # it would be waited for
def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png is no file"):
        picture_file(tmp_path / "pipe.png", SIZE)


def test_a_picture_that_changes_is_read_again(tmp_path):
    names = [f"class {n}" for n in range(10)]
    for part, many in (("train", 12), ("test", 1)):
        for n, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(many):
                Image.new("RGB", SIZE, (20 * n, number, 0)).save(tmp_path / part / name / f"{number}.png")
    before = load_pictures("cifar10", tmp_path)
    assert load_pictures("cifar10", tmp_path) is before
    Image.new("RGB", SIZE, (0, 0, 99)).save(tmp_path / "train" / names[0] / "0.png")
    assert load_pictures("cifar10", tmp_path).digest() != before.digest()


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"state_dict": [1, 2]},
        {"conv1.weight": 3},
        {1: torch.ones(2)},
        [torch.ones(2)],
        torch.ones(2),
        {"conv1.weight": torch.full((16, 3, 3, 3), float("nan"))},
        {"fc.bias": torch.tensor(1.0)},
    ],
    ids=str,
)
def test_files_that_hold_no_weights(wrong, tmp_path):
    torch.save(wrong, tmp_path / "wrong.th")
    with pytest.raises(DataError, match=r"wrong.th"):
        pretrained_resnet(tmp_path / "wrong.th", 10)


def test_weights_are_finite(tmp_path):
    state = CifarResNet(10, 1).state_dict()
    state["layer2.0.bn1.running_var"][3] = float("inf")
    torch.save(state, tmp_path / "wrong.th")
    with pytest.raises(DataError, match=r"wrong.th: layer2.0.bn1.running_var has values that are not finite"):
        pretrained_resnet(tmp_path / "wrong.th", 10)


# --- parts --------------------------------------------------------------------------------------------------------


def data(*labels, dtype=torch.int64):
    return Dataset(torch.zeros(len(labels), 2), torch.tensor(labels, dtype=dtype))


GOOD = data(0, 1)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((data(), GOOD, GOOD), "the training part has no samples"),
        ((GOOD, data(), GOOD), "the validation part has no samples"),
        ((GOOD, GOOD, data()), "the test part has no samples"),
        ((GOOD, data(0.0, 1.0, dtype=torch.float32), GOOD), "the validation part's labels are torch.float32"),
        ((data(0, -1), GOOD, GOOD), "the training part has the label -1"),
        ((GOOD, GOOD, data(0, 2)), r"the test part has class 2, which the training part has not: \[0, 1\]"),
        ((data(1, 1), data(1), data(1)), "the training part has one class only, 1: there is nothing to learn"),
        ((replace(GOOD, inputs={"x": torch.zeros(3)}), GOOD, GOOD), "the training part has 3 inputs and 2 labels"),
    ],
)
def test_parts_that_are_none(parts, reason):
    with pytest.raises(DataError, match=reason):
        Splits(*parts)


def test_one_class_only_to_test_on_is_a_warning():
    with pytest.warns(UserWarning, match="the test part has one class only, 1") as told:
        Splits(GOOD, GOOD, data(1, 1))
    assert len(told) == 1
    places = Dataset(torch.zeros(2, 3), torch.tensor([[1, 2], [0, 0]]))  # of answers, not classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Splits(places, places[:1], replace(places, labels=places.labels + 2))
    with pytest.warns(UserWarning, match=r"all labels of the training part are \[0, 0\]"):
        Splits(replace(places, labels=places.labels * 0), places, places)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: iid_split(3, 4, 0), "3 samples for 4 clients: at least 4 are needed"),
        (lambda: iid_split(3, 0, 0), "one client at least"),
        (lambda: dirichlet_split(torch.arange(20) % 2, 3, 1.0, 0), "20 samples for 3 clients: at least 24 are needed"),
        (lambda: dirichlet_split(torch.arange(24) % 2, 3, 0.01, 0), "fewer clients or a larger alpha"),
        (lambda: shard_count(20, 100, 32), "20 training samples are too few for a simulation: at least 32 are needed"),
        (lambda: split_held_out(np.arange(19) % 2), "19 training samples are too few .*: at least 20 are needed"),
        (lambda: split_held_out(np.array([0] * 30 + [1])), "one sample of class 1: at least 2 are needed"),
        (lambda: split_held_out(np.arange(40) % 2, 1), "1 validation samples are too few .*at least 2 are needed"),
    ],
)
def test_too_few_samples_say_how_many_are_needed(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()


def test_as_many_samples_as_are_needed():
    assert len(iid_split(4, 4, 0)) == 4
    assert [len(part) for part in dirichlet_split(torch.arange(24) % 2, 1, 1.0, 0)] == [24]
    assert [shard_count(64, 100, 32), shard_count(32, 100, 32), shard_count(1000, 3, 32)] == [2, 1, 3]
    assert [len(part) for part in split_held_out(np.arange(20) % 2)] == [18, 2]
    rows = labelled(*(n % 2 for n in range(40)))
    train, validation, test = label_published_parts(rows, rows[:3], [])
    assert [len(train), len(validation), len(test)] == [37, 3, 3]


# --- digests ------------------------------------------------------------------------------------------------------


def windows(**changes):
    inputs = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    found = Windows(
        inputs,
        torch.tensor([[1, 2], [0, 0]]),
        torch.zeros(2, 3, 2, dtype=torch.int32),
        torch.tensor([0, 1]),
        [Question("0", "Ann saw", "Who?", ["Ann"], 0), Question("1", "Bob saw", "Who?", ["Bob"], 0)],
    )
    return replace(found, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": {"ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}},
        {"inputs": {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.zeros(2, 3).long()}},
        {"inputs": {"input_ids": torch.arange(6).reshape(2, 3, 1), "attention_mask": torch.ones(2, 3).long()}},
        {"inputs": {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 6).int()}},
        {"labels": torch.tensor([[1, 2], [0, 1]])},
        {"spans": torch.ones(2, 3, 2, dtype=torch.int32)},
        {"question": torch.tensor([0, 0])},
        {"questions": [*windows().questions[:1], windows().questions[1]._replace(context="Bob sees")]},
        {"questions": [*windows().questions[:1], windows().questions[1]._replace(answers=["Bob", "he"])]},
    ],
)
def test_a_digest_changes_with_everything_that_a_part_holds(changes):
    assert windows().digest() == windows().digest()
    assert windows(**changes).digest() != windows().digest()
    whole = Splits(windows(), windows(), windows())
    found = {Splits(*parts).digest() for parts in (
        (windows(), windows(), windows(**changes)),
        (windows(), windows(**changes), windows()),
        (windows(**changes), windows(), windows()),
    )}  # fmt: skip
    assert len(found | {whole.digest()}) == 4


def test_a_task_s_digest_has_what_clients_differ_by():
    task = make_task(Config())
    assert task.digest() == make_task(Config()).digest()
    assert replace(task, groups=task.train.labels).digest() != task.digest()


def test_a_digest_is_of_content():
    one = Dataset(torch.arange(12.0).reshape(3, 4), torch.tensor([0, 1, 0]))
    other = Dataset(torch.arange(12.0).reshape(4, 3).T.contiguous().T.reshape(3, 4), torch.tensor([0, 1, 0]))
    assert one.digest() == other.digest()
    strided = Dataset(torch.arange(12.0).reshape(3, 4).T.contiguous().T, torch.tensor([0, 1, 0]))
    assert not strided.inputs.is_contiguous()
    assert one.digest() == strided.digest()
    assert Dataset(one.inputs.view(torch.int32), one.labels).digest() != one.digest()
    assert one.to("cpu", torch.bfloat16).digest() != one.digest()
    assert Dataset(one.inputs * -0.0, one.labels).digest() != Dataset(one.inputs * 0.0, one.labels).digest()
    assert len(one.digest()) == 64
    assert Dataset(torch.tensor(3.0).expand(1), torch.tensor([0])).digest()


# --- any bytes ----------------------------------------------------------------------------------------------------

PICTURE_KINDS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "GIF", "WEBP")
ANY = READERS | {
    kind: ("picture", saved(NOISE, kind), lambda path: picture_file(path, SIZE).tolist()) for kind in PICTURE_KINDS
}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def bytes_like(draw, valid):
    """Any bytes; or those of a valid file, some of them changed, lost, doubled or new."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=100))
    found = valid
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(found)))
        end = min(len(found), begin + draw(st.integers(0, 20)))
        new = draw(st.one_of(st.just(b""), st.binary(max_size=8), st.just(found[begin:end] * 2)))
        found = found[:begin] + new + found[end:]
    return found


def places(value, place=()):
    yield place
    if isinstance(value, dict | list):
        for step in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[step], (*place, step))


@st.composite
def documents_like(draw, valid):
    """A valid document with any value at any place."""
    value = draw(JSON_VALUES)
    place = draw(st.sampled_from(list(places(valid))))
    return json.dumps(changed(valid, place, value) if place else value).encode()


def ends_well(raw, kind, read, folder):
    """Rows, or an error of a known type that names the file; nothing else changes."""
    path = folder / f"some.{kind}"
    path.write_bytes(raw)
    told = f"{path} was read"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
        except DataError as error:
            told = str(error)
    assert str(path) in told
    assert told.encode()
    assert [found.name for found in folder.iterdir()] == [path.name]
    assert path.read_bytes() == raw


@pytest.mark.parametrize("name", ANY)
def test_any_bytes_end_in_rows_or_an_error_that_names_the_file(name, tmp_path):
    kind, valid, read = ANY[name]

    @settings(max_examples=60 if kind == "weights" else 200, deadline=None, derandomize=True, database=None)
    @given(bytes_like(valid))
    def check(raw):
        ends_well(raw, kind, read, tmp_path)

    check()


@pytest.mark.parametrize("name", ["rte", "wsc", "squad"])
def test_any_document_ends_in_rows_or_an_error_that_names_the_file(name, tmp_path):
    kind, valid, read = READERS[name]
    document = json.loads(valid.splitlines()[0])

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(documents_like(document))
    def check(raw):
        ends_well(raw, kind, read, tmp_path)

    check()

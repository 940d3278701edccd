"""Classification of texts: how published data sets are read, and told to an encoder or a decoder.

An encoder sees one or two texts, under a classifier that starts random. A decoder sees a prompt and is asked which of
the classes' words comes next, in the manner of MeZO (Malladi et al., 2023), whose words for the classes these are.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]  # the columns of a sample, texts without blanks at their ends, and "label", its class


@dataclass(frozen=True)
class TextTask:
    """A data set, and how a model is told what to do.

    hub: name, and configuration, of the data set on the Hugging Face hub. files: its parts as published, for training,
    validation and test: .tsv as GLUE has them, or .jsonl as SuperGLUE has. columns: the texts of a sample. labels: what
    files call the classes 0, 1, ...; the hub numbers them alike.
    texts: what an encoder sees; prompt: what a decoder sees; both are templates over the columns. words: a decoder's
    answers, class by class, just as they follow the prompt. longest: tokens of a sample; of an encoder's texts the
    longer loses its end, a prompt its beginning.
    """

    hub: tuple[str, ...]
    files: tuple[str, str, str]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    prompt: str
    words: tuple[str, ...]
    longest: int

    @property
    def end(self) -> str:
        """What of the prompt is behind the last column."""
        return self.prompt.rpartition("}")[2]


TEXTS = {
    "sst2": TextTask(
        hub=("stanfordnlp/sst2",),
        files=("train.tsv", "dev.tsv", "test.tsv"),
        columns=("sentence",),
        labels=("0", "1"),
        texts=("{sentence}",),
        prompt="{sentence} It was",
        words=(" terrible", " great"),
        longest=64,
    ),
    "rte": TextTask(
        hub=("aps/super_glue", "rte"),
        files=("train.jsonl", "val.jsonl", "test.jsonl"),
        columns=("premise", "hypothesis"),
        labels=("entailment", "not_entailment"),
        texts=("{premise}", "{hypothesis}"),
        prompt='{premise}\nDoes it follow that "{hypothesis}"? Yes or No?\n',
        words=("Yes", "No"),
        longest=256,
    ),
    "wsc": TextTask(
        hub=("aps/super_glue", "wsc.fixed"),  # as the files, but for a few spans whose spelling is not the text's
        files=("train.jsonl", "val.jsonl", "test.jsonl"),
        columns=("text", "span1_text", "span2_text"),
        labels=("False", "True"),
        texts=("{text}", '"{span2_text}" is {span1_text}'),
        prompt='{text}\nDoes the pronoun "{span2_text}" here refer to {span1_text}? Yes or No?\n',
        words=("No", "Yes"),
        longest=128,
    ),
}


def parts(task: TextTask, data: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and test rows of a data set: from a folder, or by name from the hub where data is empty.

    The test labels of GLUE and SuperGLUE are not public. Where they are not there, the published validation part is the
    test part, and the validation part, for choosing rates, is held out of the training part: as many rows, but no more
    than a tenth, with the training part's shares of the classes, the same in every run.

    Raises: FileNotFoundError; ValueError naming file and line, or the hub's data set; without `datasets` ImportError.
    """
    if data:
        train, validation, test = (
            read_rows(Path(data) / name, task, hidden=name == task.files[2]) for name in task.files
        )
    else:
        found = hub(*task.hub)
        train, validation, test = (
            [_row(row, task, f"{task.hub[0]}, {part}") for row in found[part] if row["label"] >= 0]
            for part in ("train", "validation", "test")
        )
    if not test:
        classes = np.array([row["label"] for row in train])
        kept, held = held_out(classes, min(len(validation), len(train) // 10))
        train, validation, test = [train[i] for i in kept], [train[i] for i in held], validation
    return train, validation, test


def held_out(classes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are kept and which `count` of them held out: stratified, and the same in every run."""
    from sklearn.model_selection import train_test_split

    if count < len(np.unique(classes)):
        raise ValueError(f"{len(classes)} training samples are too few to hold a tenth of them out for validation")
    kept, held = train_test_split(np.arange(len(classes)), test_size=count, stratify=classes, random_state=0)
    return np.sort(kept), np.sort(held)


def hub(*name: str) -> Any:
    """A data set of the Hugging Face hub, part -> rows. Raises ImportError without `datasets`, OSError otherwise."""
    try:
        load: Callable[..., Any] = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise ImportError(
            f"without data, a folder, {name[0]} comes from the Hugging Face hub, which needs datasets:"
            " pip install 'hosfl[hf]'"
        ) from error
    try:
        return load(*name)
    except RuntimeError as error:  # such as of data sets that come as a program
        raise OSError(f"cannot load {' '.join(name)} from the Hugging Face hub: {error}") from error


def read_rows(path: Path, task: TextTask, hidden: bool = False) -> list[Row]:
    """The rows of a published file. hidden: its labels may be missing, or the file itself; then there are no rows."""
    if hidden and not path.exists():
        return []
    lines = lines_of(path)
    if path.suffix == ".tsv":
        if hidden and lines[:1] == ["\t".join(("index", *task.columns))]:
            return []
        return tsv_rows(path, lines, task)
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            row |= row.get("target", {})  # where WSC has its spans
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not an object in JSON: {error}") from None
        if not hidden or "label" in row:
            rows.append(_row(row, task, where))
    return _some(path, rows, hidden)


def lines_of(path: Path) -> list[str]:
    """A text file's lines. Not splitlines: texts may hold what it takes for the end of one."""
    with path.open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def tsv_rows(path: Path, lines: Sequence[str], task: TextTask | None = None) -> list[Row]:
    """Sentences and classes: "sentence<TAB>label", and so on every line. Without a task any class from 0 on will do."""
    if not lines or lines[0] != "sentence\tlabel":
        raise ValueError(f"{path} does not begin with the line sentence<TAB>label")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        text, _, label = line.rpartition("\t")
        if not text or not label.isdecimal() or int(label) > 999 or (task and label not in task.labels):
            known = " or ".join(task.labels) if task else "from 0 on"
            raise ValueError(f"{path}, line {number}: expected a sentence, a tab and a class {known}")
        rows.append({"sentence": text.strip(), "label": int(label)})
    return _some(path, rows)


def _row(row: Row, task: TextTask, where: str) -> Row:
    """What the task needs of a published row."""
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int):
        label = task.labels.index(str(label)) if str(label) in task.labels else -1
    texts = {name: row.get(name) for name in task.columns}
    if not 0 <= label < len(task.labels) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{where}: expected {', '.join(task.columns)}, and a label of {', '.join(task.labels)}")
    return {name: str(text).strip() for name, text in texts.items()} | {"label": label}


def _some(path: Path, rows: list[Row], hidden: bool = False) -> list[Row]:
    if not rows and not hidden:
        raise ValueError(f"{path} has no samples")
    return rows

"""Classification of texts: how published data sets are read, and told to an encoder or a decoder.

An encoder sees one or two texts, under a classifier that starts random. A decoder sees a prompt and is asked which of
the classes' words comes next, in the manner of MeZO (Malladi et al., 2023), whose words for the classes these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hosfl.halves.hub import is_decoder, packaged_minilm, pretrained_model
from hosfl.halves.split import SplitModel
from hosfl.settings import Settings
from hosfl.tasks.data import (
    Dataset,
    public_tokens,
    tokenized_rows,
    tokenized_splits,
    with_classes,
    with_published_parts,
)
from hosfl.tasks.pretrained import pretrained_task, split_pretrained
from hosfl.tasks.reading import Found, Row, class_numbers, field, hub_rows, read_json_lines, read_table, text_field
from hosfl.tasks.task import Task
from hosfl.tasks.verbalizer import first_tokens, split_with_words


@dataclass(frozen=True)
class TextTask:
    """A data set, and how a model is told what to do.

    hub: name, and configuration, of the data set on the Hugging Face hub. files: its parts as published, for training,
    validation and test: .tsv as GLUE has them, or .jsonl as SuperGLUE has. columns: the texts of a sample. inside: the
    field of a .jsonl row that is an object with some of them. labels: what files call the classes 0, 1, ...; the hub
    numbers them alike.
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
    inside: str = ""

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
        inside="target",
    ),
}


def parts(task: TextTask, data: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and test rows of a data set: from a folder, or by name from the hub where data is empty.

    A row has the task's columns, texts without blanks at their ends, and "label", its class. The test labels of GLUE
    and SuperGLUE are not public; what is done without them: see `hosfl.tasks.data.with_published_parts`.

    Raises: OSError; DataError naming file and line, or the hub's data set; without `datasets` ImportError.
    """
    if data:
        train, validation, test = (read(Path(data) / name, task, may_hide=name == task.files[2]) for name in task.files)
    else:
        published = hub_rows(*task.hub, parts=("train", "validation", "test"))
        train, validation, test = ([_of_task(row, task, where) for where, row in part] for part in published)
    return with_published_parts(train, validation, test, task.labels)


def read(path: Path, task: TextTask, may_hide: bool) -> Sequence[Found]:
    """The rows of a published file. may_hide: its labels may be missing, or the file itself; then there are no rows."""
    if may_hide and not path.exists() and not path.is_symlink():
        return []
    if path.suffix == ".tsv":
        rows = read_table(path, task.columns if may_hide else (*task.columns, "label"))
    else:
        rows = read_json_lines(path)
    return [_of_task(row, task, where) for where, row in rows]


def _of_task(row: Row, task: TextTask, where: str) -> Found:
    """What the task needs of a row, whose label is still to be read."""
    if task.inside and task.inside in row:
        row = {**row, **field(row, task.inside, dict, where)}
    texts = {name: text_field(row, name, where) for name in task.columns}
    return where, texts | ({"label": row["label"]} if "label" in row else {})


class TextInputs(NamedTuple):
    """What a model sees of a task's rows."""

    task: TextTask
    model: str
    decoder: bool

    @classmethod
    def of(cls, config: Settings) -> TextInputs:
        name = config.model or packaged_minilm()
        return cls(TEXTS[config.task], name, is_decoder(name))

    @property
    def cut(self) -> str:
        """The side on which what is too long loses tokens."""
        return "left" if self.decoder else "right"

    def texts(self, row: Row) -> tuple[str, ...]:
        """What the model sees of a row."""
        templates = (self.task.prompt,) if self.decoder else self.task.texts
        return tuple(template.format_map(row) for template in templates)


def text_task(config: Settings, own: Dataset | None = None) -> Task:
    """A published classification task of this file: sst2, rte, wsc. data, parts: see `hosfl.tasks.text.parts`.

    An encoder gets a random classifier, as in `sentences_task`. A decoder gets a prompt; its output is what it gives
    the classes' words to come next, by the first token of each. own: a client's samples, in place of all parts.
    """
    it, name, decoder = inputs = TextInputs.of(config)
    answers = first_tokens(name, it.end, it.words) if decoder else []

    def model(at: int | str) -> SplitModel:
        if decoder:
            return split_with_words(pretrained_model(name, "CausalLM"), answers, at)
        return split_pretrained(name, "SequenceClassification", at, len(it.words))

    data = tokenized_splits(parts(it, config.data), inputs.texts, name, it.longest, inputs.cut) if own is None else own
    return pretrained_task(data, len(it.words), model, config, public=public_tokens(name))


def own_texts(config: Settings, path: Path, longest: int) -> Dataset:
    """One client's samples: a file as the training part is published, or a folder with one."""
    inputs = TextInputs.of(config)
    found = read(path / inputs.task.files[0] if path.is_dir() else path, inputs.task, may_hide=False)
    rows = with_classes(found, class_numbers(found, inputs.task.labels, all_there=False))
    return tokenized_rows(rows, inputs.texts, inputs.model, min(longest, inputs.task.longest), inputs.cut)

"""Classification of texts by an encoder or a decoder, on the published data sets SST-2, RTE and WSC.

An encoder reads one or two texts, and a classifier with random initial weights is put on it. A decoder reads a prompt,
and its logits of the classes' words as the next token are the outputs. Prompts and words are those of MeZO (Malladi et
al., 2023).
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
    Splits,
    label_published_parts,
    public_tokens,
    set_labels,
    tokenized_rows,
    tokenized_splits,
)
from hosfl.tasks.pretrained import pretrained_task, split_pretrained
from hosfl.tasks.reading import LocatedRow, Row, class_numbers, field, hub_rows, read_json_lines, read_table, text_field
from hosfl.tasks.task import Task
from hosfl.tasks.verbalizer import first_tokens, split_with_selected_tokens


@dataclass(frozen=True)
class TextTask:
    """A data set, and the inputs that a model gets of its rows.

    hub: its name, and configuration, on the Hugging Face hub. files: the published files of the training, validation
    and test part: .tsv as in GLUE, or .jsonl as in SuperGLUE. columns: the texts of a sample. nested_in: the field of a
    .jsonl row that is an object with some of the columns. labels: names of the classes 0, 1, ... in files; the hub
    numbers them alike.

    texts: an encoder's inputs; prompt: a decoder's input; both are templates over the columns. words: a decoder's
    answer for each class, exactly as it follows the prompt. longest: the most tokens of a sample; if it is longer, the
    longer of an encoder's texts loses its end, and a prompt its beginning.
    """

    hub: tuple[str, ...]
    files: tuple[str, str, str]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    prompt: str
    words: tuple[str, ...]
    longest: int
    nested_in: str = ""

    @property
    def prompt_end(self) -> str:
        """The part of the prompt after the last column."""
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
        hub=("aps/super_glue", "wsc.fixed"),  # differs from the files in a few spans that are not spelt as in the text
        files=("train.jsonl", "val.jsonl", "test.jsonl"),
        columns=("text", "span1_text", "span2_text"),
        labels=("False", "True"),
        texts=("{text}", '"{span2_text}" is {span1_text}'),
        prompt='{text}\nDoes the pronoun "{span2_text}" here refer to {span1_text}? Yes or No?\n',
        words=("No", "Yes"),
        longest=128,
        nested_in="target",
    ),
}


def load_parts(task: TextTask, data: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Load the training, validation and test rows of a data set. data: a folder; "": from the Hugging Face hub.

    A row has the task's columns, without blanks at their ends, and "label", its class. The test labels of GLUE and
    SuperGLUE are not public: `hosfl.tasks.data.label_published_parts` says which rows take their place.

    Raises OSError; DataError naming file and line, or the hub's data set; ImportError without `datasets`.
    """
    if data:
        train, validation, test = (read(Path(data) / name, task, may_hide=name == task.files[2]) for name in task.files)
    else:
        published = hub_rows(*task.hub, parts=("train", "validation", "test"))
        train, validation, test = ([_select_fields(row, task, where) for where, row in part] for part in published)
    return label_published_parts(train, validation, test, task.labels)


def read(path: Path, task: TextTask, may_hide: bool) -> Sequence[LocatedRow]:
    """Read a published file's rows. may_hide: whether its labels may be missing, or the file: then it has no rows."""
    if may_hide and not path.exists() and not path.is_symlink():
        return []
    if path.suffix == ".tsv":
        rows = read_table(path, task.columns if may_hide else (*task.columns, "label"))
    else:
        rows = read_json_lines(path)
    return [_select_fields(row, task, where) for where, row in rows]


def _select_fields(row: Row, task: TextTask, where: str) -> LocatedRow:
    """Select the task's columns, and the label as it is in the file, if there is one."""
    if task.nested_in and task.nested_in in row:
        row = {**row, **field(row, task.nested_in, dict, where)}
    texts = {name: text_field(row, name, where) for name in task.columns}
    return where, texts | ({"label": row["label"]} if "label" in row else {})


class TextInputs(NamedTuple):
    """The conversion of a task's rows to a model's input texts."""

    task: TextTask
    model: str
    decoder: bool

    @classmethod
    def of(cls, config: Settings) -> TextInputs:
        name = config.model or packaged_minilm()
        return cls(TEXTS[config.task], name, is_decoder(name))

    @property
    def truncation_side(self) -> str:
        """The side on which a text that is too long loses tokens: "left" or "right"."""
        return "left" if self.decoder else "right"

    def texts(self, row: Row) -> tuple[str, ...]:
        """Return the texts that the model reads for a row."""
        templates = (self.task.prompt,) if self.decoder else self.task.texts
        return tuple(template.format_map(row) for template in templates)


def text_task(config: Settings, samples: Dataset | None = None) -> Task:
    """Make the task "sst2", "rte" or "wsc". config.data: see `load_parts`.

    An encoder gets a random classifier, as in `sentences_task`. A decoder reads a prompt; its outputs are its logits of
    the first token of each class's word as the next token. samples: one client's samples, instead of all parts.
    """
    text, name, decoder = inputs = TextInputs.of(config)
    answers = first_tokens(name, text.prompt_end, text.words) if decoder else []

    def model(at: int | str) -> SplitModel:
        if decoder:
            return split_with_selected_tokens(pretrained_model(name, "CausalLM"), answers, at)
        return split_pretrained(name, "SequenceClassification", at, len(text.words))

    data: Splits | Dataset
    if samples is None:
        parts = load_parts(text, config.data)
        data = tokenized_splits(parts, inputs.texts, name, text.longest, inputs.truncation_side)
    else:
        data = samples
    return pretrained_task(data, len(text.words), model, config, public=public_tokens(name))


def read_client_texts(config: Settings, path: Path, longest: int) -> Dataset:
    """Read one client's samples: a file in the format of the published training part, or a folder with it."""
    inputs = TextInputs.of(config)
    located = read(path / inputs.task.files[0] if path.is_dir() else path, inputs.task, may_hide=False)
    rows = set_labels(located, class_numbers(located, inputs.task.labels, require_all=False))
    return tokenized_rows(rows, inputs.texts, inputs.model, min(longest, inputs.task.longest), inputs.truncation_side)

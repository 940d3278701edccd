"""A decoder for a made-up package: no text in two parts, the same files again, and the task `lm` takes them."""

import json
import math

import pytest
import torch
import transformers

from benchmarks import decoder
from hosfl import Config, train

VERBS, THINGS = ("Add", "Count", "Draw", "Find", "Hash", "Join"), ("apples", "books", "cats", "dogs", "eggs", "fish")
PARTS = {"train": 12, "validation": 4, "test": 4, "held out": 4}
SIZES = decoder.Sizes(vocabulary=300, width=16, layers=2, heads=2, length=16, batch=4, steps=6)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Its name, and the folder that it lies in. It has 36 functions that are not alike."""
    folder = tmp_path / "made_up_functions"
    (folder / "tests").mkdir(parents=True)
    both = [(verb, thing) for verb in VERBS for thing in THINGS]
    source = [f'def {v.lower()}_{t}():\n    """{v} the {t} of it.\n\n    More."""\n' for v, t in both]
    (folder / "__init__.py").write_text('__version__ = "1.5"\n' + "\n".join(source))
    (folder / "again.py").write_text('def addition():\n    """ADD the\n    apples of it!"""\n')
    (folder / "broken.py").write_text("def (")
    (folder / "tests" / "some.py").write_text('def unseen():\n    """This is only a test."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    return "made_up_functions"


def test_texts_are_first_paragraphs_and_names_become_words(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        'class HTTPServerOf2:\n    """Serve  what\n    one asks for.\n\n    Port 80."""\n\n'
        '    def __len__(self):\n        """How many there are now."""\n\n'
        '    def close_all(self):\n        """Close all that is open."""\n\n'
        '    def short(self):\n        """Only three words."""\n\n'
        '    def accents(self):\n        """A naïve way of it."""\n'
    )
    found = [("http server of 2", "Serve what one asks for."), ("close all", "Close all that is open.")]
    assert list(decoder.functions_of(file)) == found


def test_no_text_occurs_twice(package):
    found = decoder.functions([package])
    assert len(found) == len(VERBS) * len(THINGS)  # again.py says the same in other letters; tests are left out
    chosen = decoder.divide(found, PARTS)
    assert [len(some) for some in chosen.values()] == [*PARTS.values(), 12]
    assert sorted(function for some in chosen.values() for function in some) == sorted(set(found))
    assert decoder.functions([package]) == found
    with pytest.raises(ValueError, match="36 functions are too few"):
        decoder.divide(found, {"train": 36})


def test_perplexity_of_a_model_that_knows_nothing():
    end = decoder.train_tokenizer(["some words"], 300)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = decoder.pack_rows(["some words", "words"], end, 2)
    assert end.decode(rows[0]).startswith("<end>")
    assert math.isclose(decoder.perplexity(model, rows, 2), 300, rel_tol=1e-4)


def test_the_task_takes_what_is_made_and_the_same_is_made_again(package, tmp_path):
    for name in ("a", "b"):
        decoder.make(tmp_path / name, [package], PARTS, SIZES)
    files = ("model/model.safetensors", "model/tokenizer.json", *(f"data/{part}.jsonl" for part in list(PARTS)[:3]))
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    about = json.loads((tmp_path / "a" / "about.json").read_text())
    assert about["packages"]["made_up_functions"] == "1.5"
    assert about["texts"] == {**PARTS, "pretraining": 12}
    assert 1 < about["held-out perplexity"] < 1000

    prompts = {}
    for part in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (tmp_path / "a" / "data" / f"{part}.jsonl").read_text().splitlines()]
        prompts[part] = {row["prompt"] for row in rows}
        assert len(prompts[part]) == PARTS[part]
        assert all(row["prompt"].endswith(" =>") and row["completion"].startswith(" ") for row in rows)
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["test"] & (prompts["train"] | prompts["validation"])

    folder = {"data": str(tmp_path / "a" / "data"), "model": str(tmp_path / "a" / "model")}
    settings = {"task": "lm", "at": "2", "partition": "iid", "trains": "act:2:*.layers.1.*", "public": 4}
    summary = train(Config(**settings, **folder, clients=3, batch=2, rounds=2, server_rate=1e-3, client_rate=1e-2))
    assert math.isfinite(summary.scores["perplexity"])

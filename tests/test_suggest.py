"""hosfl suggest: settings that fit a budget, and run."""

import shlex

import pytest
import torch
from torch import nn

from hosfl import Config, Task, train
from hosfl.cli import main
from hosfl.protocol.header import LARGEST_DIRECTIONS
from hosfl.runs.suggest import suggest

BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 2}


def texts(public=None):
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    tokens = torch.randint(1, 40, (40, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    labels = (tokens[:, 0] > 20).long()
    data = (inputs, labels)
    return Task(model, data, data, nn.functional.cross_entropy, at=4, classes=2, public=public and inputs)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        one, two, three = (nn.Sequential(nn.Conv2d(n, 4, 3), nn.BatchNorm2d(4), nn.Tanh()) for n in (3, 4, 4))
        self.one, self.two, self.three = one, two, three
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(x))).mean((2, 3)))


def pictures():
    torch.manual_seed(0)
    x = torch.randn(40, 3, 10, 10)
    data = (x, (x.mean((1, 2, 3)) > 0).long())
    return Task(Pictures(), data, data, nn.functional.cross_entropy, at="head", classes=2)


SHORT = {"rounds": 2, "clients": 2, "sampled": 2, "batch": 4, "server_rate": 0.01, "client_rate": 0.01}


@pytest.mark.parametrize("passes", [1.0, 2.5, 5.0, 12.0])
def test_what_is_suggested_fits_the_budget_and_runs(passes):
    found = suggest(Config(task="", partition="iid"), 300, passes, texts())
    assert found.work <= 1.01 * passes
    summary = train(texts(), partition="iid", **found.settings, **SHORT)
    counted = summary.passes_per_client_round["client forward"] / 4 - 1
    assert counted == pytest.approx(found.work)
    assert summary.replicas.equal


def test_of_texts_the_last_layers_and_a_rank_for_the_rounds():
    found = suggest(Config(task=""), 300, 5.0, texts())
    assert found.trains == "xs:5:*encoder.layer.2.*,*encoder.layer.3.*"
    assert (found.blocks, found.weights) == (2, 12 * 25)
    assert suggest(Config(task=""), 60, 5.0, texts()).trains.startswith("xs:2:")
    assert suggest(Config(task=""), 1, 5.0, texts()).trains.startswith("xs:1:")
    assert suggest(Config(task=""), 10**6, 5.0, texts()).trains.startswith("xs:8:")
    assert suggest(Config(task=""), 300, 5.0, texts(public=True)).trains.startswith("act:5:")
    assert suggest(Config(task=""), 300, 1.0, texts()).trains == "xs:3:*encoder.layer.3.*"


def test_of_pictures_scales_and_shifts():
    found = suggest(Config(task=""), 300, 5.0, pictures())
    assert (found.trains, found.blocks, found.weights) == ("norms", 3, 24)
    assert any("calibrate" in reason for reason in found.reasons)
    assert train(pictures(), partition="iid", **found.settings, **SHORT).replicas.equal


def test_budgets_that_nothing_fits_are_refused():
    with pytest.raises(ValueError, match=r"0\.01 passes a round are too few"):
        suggest(Config(task=""), 300, 0.01, texts())
    for rounds, passes in ((0, 5.0), (10, 0.0), (10, float("nan")), (10, float("inf"))):
        with pytest.raises(ValueError, match="must be positive"):
            suggest(Config(task=""), rounds, passes, texts())


def test_a_budget_without_end_is_no_work_without_end():
    assert suggest(Config(task=""), 300, 1e9, texts()).directions == LARGEST_DIRECTIONS


def test_the_command_prints_a_command_that_runs(capsys, tmp_path):
    assert main(["suggest", "--rounds", "2", "--passes", "3", "--batch", "16"]) == 0
    *reasons, line = capsys.readouterr().out.splitlines()
    assert len(reasons) >= 2
    words = shlex.split(line)
    assert words[:2] == ["hosfl", "train"]
    assert main([*words[1:], "--server-rate", "0.05", "--client-rate", "0.01", "--out", str(tmp_path / "run")]) == 0
    with pytest.raises(SystemExit) as refused:
        main(["suggest", "--passes", "0"])
    assert refused.value.code == 2
    assert "must be positive" in capsys.readouterr().err

"""Settings: what is refused, what becomes what, what a run's bits depend on."""

import json
from dataclasses import asdict, fields

import numpy as np
import pytest

from hosfl.cli import main
from hosfl.methods import METHODS
from hosfl.protocol.replica import digest
from hosfl.runs.assemble import assemble
from hosfl.runs.checkpoint import load_config, save_config
from hosfl.runs.config import Config, all_with_shared, ignored, with_shared
from hosfl.settings import KINDS, LATER, NEUTRAL, PRESETS, differences

WRONG = {
    "str": [None, 1, True, b"a", ["a"], {}],
    "int": [None, 20.0, 1.5, "5", True, np.True_, np.float64(3), [1], float("nan")],
    "float": [None, "1e-3", True, [0.1], 1j, 10**400],
    "float | None": ["1e-3", False, {}, 10**400],
    "dict[str, Any]": [None, 1, "a=1", ["a"]],
}


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_a_value_of_another_type_is_refused_by_name(field):
    for wrong in WRONG[field.type]:
        with pytest.raises(ValueError, match=rf"^{field.name}: {KINDS[field.type][2]} is needed, got "):
            Config(**{field.name: wrong})


def test_a_large_value_is_refused_in_a_few_words():
    with pytest.raises(ValueError, match=r"^task: text is needed, got \[0, 1, 2, .*\.\.\.$") as caught:
        Config(task=list(range(10_000)))
    assert len(str(caught.value)) < 250


def test_numbers_become_pythons():
    config = Config(
        rounds=np.int64(3), seed=np.uint64(2**63), mu=np.float32(0.5), server_rate=1, task=np.str_("digits")
    )
    assert config == Config(rounds=3, seed=2**63, mu=0.5, server_rate=1.0)
    assert [type(v) for v in (config.rounds, config.seed, config.mu, config.server_rate)] == [int, int, float, float]
    assert json.loads(json.dumps(asdict(config))) == asdict(config)


@pytest.mark.parametrize("device", ["", "no such", "meta", "hpu", "privateuseone", "cuda:-1"])
def test_devices_that_compute_nothing(device):
    with pytest.raises(ValueError, match="cannot compute on device"):
        Config(device=device)


@pytest.mark.parametrize(("name", "value"), [("rounds", 20.0), ("seed", "5"), ("alpha", None), ("task", ["digits"])])
def test_an_edited_config_is_refused(tmp_path, name, value):
    save_config(Config(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"{name}: .* is needed"):
        load_config(tmp_path)


def test_what_the_bits_depend_on():
    neutral = {*NEUTRAL, *LATER}  # which are there where they are not the defaults
    assert Config().decisive() == {name: value for name, value in asdict(Config()).items() if name not in neutral}
    of_a_task = Config(task="", options={"n": 1}).decisive()
    assert of_a_task == {**Config(task="").decisive(), "options": {"n": 1}}
    neutral = Config(data="/a", model="/b", keep=9, evaluate_every=9, snapshot_every=9)
    assert neutral.decisive() == Config().decisive()
    assert differences(Config().decisive(), Config(seed=1, method="frozen").decisive()) == [
        "method was 'ho', is 'frozen'",
        "seed was 0, is 1",
    ]
    assert differences({"a": 1, "b": None}, {"a": 1, "c": 2}) == ["b was None, is not there", "c was not there, is 2"]
    assert differences({"a": 1}, {"a": 1.0}) == []


# --- settings that a run does not look at ---------------------------------------------------------------------------

SMALL = {"rounds": 2, "clients": 4, "sampled": 3, "batch": 16, "directions": 2, "local_steps": 2, "pool_size": 8}
RATES = {"server_rate": 0.03, "client_rate": 0.05}
OTHER = {  # of every setting that can be seen in a few rounds of digits; most are far from what is usual
    "trains": "biases",
    "frozen": "int2",
    "rounds": 3,
    "clients": 5,
    "sampled": 2,
    "local_steps": 3,
    "directions": 3,
    "directions_from": "fresh",
    "pool_size": 2,
    "pool_rounds": 1,
    "direction_scale": "rms",
    "dist": "gaussian",
    "mu": 0.1,
    "estimator": "two-sided",
    "microbatch": 7,
    "probes_at_once": 2,
    "server_batch": 32,
    "multiplier": "centered",
    "server_first": 1,
    "batch": 9,
    "server_rate": 0.1,
    "client_rate": 0.2,
    "server_decay": 0.7,
    "rule": "sgd",
    "schedule": "constant",
    "aggregation": "median",
    "clip": 1e-3,
    "server_clip": 1e-3,
    "dtype": "bfloat16",
    "partition": "iid",
    "alpha": 5.0,
    "public": 700,
    "wire": "int8",
    "seed": 1,
    "digest_every": 1,
}
# Where data and model lie, and what is written when, is seen elsewhere.
UNSEEN = {
    "task",
    "options",
    "data",
    "model",
    "at",
    "method",
    "evaluate_every",
    "evaluate_on",
    "snapshot_every",
    "keep",
    "device",
    "calibrate",  # of a half without BatchNorm there is nothing to: tests/test_calibration.py
    "compile",  # rounding, which a backend that leaves the graph as it is does not show: tests/test_compiled.py
    "blocks",  # of a half with one layer that moves there is one: tests/test_blocks.py
}
# Read, but without a trace here: what does not move is stored narrow, where --frozen says so; gradients are summed in
# another order, probes of one pass too, and the lattice rounds them alike.
TRACELESS = {("frozen", "trains"), ("ho backward", "microbatch")}
TRACELESS |= {(way, "probes_at_once") for way in ("ho", "ho fresh", "ho forward")}
WAYS = {method: {"method": method} for method in METHODS} | {
    "ho fresh": {"directions_from": "fresh"},
    "ho forward": {"estimator": "forward"},
    "ho backward": {"estimator": "backward"},
    "first-order iid": {"method": "first-order", "partition": "iid"},
}


def outcome(settings):
    federation, _ = assemble(Config(**settings))
    losses = [federation.round(round) for round in range(federation.config.rounds)]
    model = federation.model()
    weights = digest([*model.client.parameters(), *model.server.parameters()])
    return losses, federation.messenger.wire.bytes, federation.server.passes, weights


@pytest.mark.parametrize("way", WAYS)
def test_every_setting_is_read_or_refused(way):
    """One that is read changes what comes of a run."""
    assert OTHER.keys() | UNSEEN == set(Config.names())
    usual = with_shared(WAYS[way], SMALL | RATES)
    before = outcome(usual)
    refused = ignored(usual)
    for name, value in OTHER.items():
        if name in WAYS[way] or (way, name) in TRACELESS:
            continue
        if name in refused:
            changed = usual | {name: value}
            with pytest.raises(ValueError, match=f"^{name} = {value!r} would do nothing {refused[name]}: leave it out"):
                Config(**changed)
        else:
            assert outcome(with_shared(WAYS[way] | {name: value}, SMALL | RATES)) != before, name


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_setting_that_is_refused_would_do_nothing(way, monkeypatch):
    usual = with_shared(WAYS[way], SMALL | RATES)
    before, refused = outcome(usual), ignored(usual)
    monkeypatch.setattr("hosfl.runs.config.ignored", lambda settings: {})
    for name in refused.keys() & OTHER.keys() - WAYS[way].keys():
        assert outcome(usual | {name: OTHER[name]}) == before, name


def test_shared_settings_are_for_the_runs_that_read_them():
    runs = [{"method": "frozen"}, {"directions_from": "fresh"}, {}]
    shared = {"rounds": 5, "directions": 3, "pool_size": 64, "alpha": 0.5}
    assert all_with_shared(runs, shared) == [
        {"rounds": 5, "alpha": 0.5, "method": "frozen"},
        {"rounds": 5, "directions": 3, "alpha": 0.5, "directions_from": "fresh"},
        shared,
    ]
    reason = "^pool_size = 64 would do nothing with method 'frozen' or with directions_from 'fresh': leave it out"
    with pytest.raises(ValueError, match=reason):
        all_with_shared(runs[:2], shared)
    assert with_shared({"method": "frozen"}, PRESETS["paper"]) == {
        "aggregation": "uniform",
        "schedule": "constant",
        "method": "frozen",
    }
    assert all_with_shared([{"method": "frozen"}], {"pool_size": 512}) == [{"method": "frozen"}]  # the default


def test_presets_and_shared_options_on_the_command_line(tmp_path, capsys):
    quick = ["--rounds", "1", "--batch", "4", "--server-rate", "0.1"]
    assert main(["train", "--preset", "paper", "--method", "frozen", *quick]) == 0
    for arguments in (
        ["train", "--method", "frozen", "--directions", "3", *quick],
        ["train", "--alpha", "2", "--partition", "iid"],
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "would do nothing with" in capsys.readouterr().err
    out = tmp_path / "c"
    compare = ["compare", "--methods", "frozen", "ho", "--seeds", "0", "--out", str(out), *quick]
    assert main([*compare, "--client-rate", "0.1", "--pool-size", "16"]) == 0
    table = json.loads((out / "table.json").read_text())
    assert table["config"]["pool_size"] == 16
    assert json.loads((out / "ho-0" / "config.json").read_text())["pool_size"] == 16
    assert json.loads((out / "frozen-0" / "config.json").read_text())["pool_size"] == 512
    with pytest.raises(SystemExit):
        main([*compare, "--local-steps", "2"])
    assert "local_steps = 2 would do nothing with method 'frozen' or with method 'ho'" in capsys.readouterr().err

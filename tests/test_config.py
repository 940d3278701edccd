"""Settings: what is refused, what becomes what, what a run's bits depend on."""

import json
from dataclasses import asdict, fields

import numpy as np
import pytest

from hosfl.checkpoint import load_config, save_config
from hosfl.config import KINDS, NEUTRAL, Config, differences

WRONG = {
    "str": [None, 1, True, b"a", ["a"], {}],
    "int": [None, 20.0, 1.5, "5", True, np.True_, np.float64(3), [1], float("nan")],
    "float": [None, "1e-3", True, [0.1], 1j, 10**400],
    "float | None": ["1e-3", False, {}, 10**400],
}


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_a_value_of_another_type_is_refused_by_name(field):
    for wrong in WRONG[field.type]:
        with pytest.raises(ValueError, match=rf"^{field.name}: {KINDS[field.type][2]} is needed, got "):
            Config(**{field.name: wrong})


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
    assert Config().settings() == {name: value for name, value in asdict(Config()).items() if name not in NEUTRAL}
    neutral = Config(data="/a", model="/b", keep=9, evaluate_every=9, snapshot_every=9)
    assert neutral.settings() == Config().settings()
    assert differences(Config().settings(), Config(seed=1, method="frozen").settings()) == [
        "method was 'ho', is 'frozen'",
        "seed was 0, is 1",
    ]
    assert differences({"a": 1, "b": None}, {"a": 1, "c": 2}) == ["b was None, is not there", "c was not there, is 2"]
    assert differences({"a": 1}, {"a": 1.0}) == []

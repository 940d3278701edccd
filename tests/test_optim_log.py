"""Logs of hosfl.optim that no run has written: each is a LogError that leaves the model, or the right weights."""

import base64
import copy
import json
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from test_fuzz import NUMBERS, extend, flip, grown, remove, truncate
from torch import nn

from hosfl.optim import ZOSGD, log_file, rebuild, replay, terms
from hosfl.protocol.header import LogError
from hosfl.protocol.replica import digest

# As they were written, in base64: "momenta" in format 2, the others in format 1. What a reader of today makes of them
# is what it must make of them for ever.
WRITTEN = {
    name: base64.b64decode(text)
    for name, text in json.loads((Path(__file__).parent / "optim_logs.json").read_text()).items()
}
LIMIT = 10.0  # seconds of the thread that reads, which takes milliseconds; a fault would take minutes


def base(case):
    """What the run of that log began with."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(case, torch.float32)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.copy_(((torch.arange(p.numel()) * 5 + n) % 7 - 3).reshape(p.shape) / 8)
            if case == "coarser" and n >= 2:
                p.mul_(2.0**-20)
    return model


class Parts:
    """A log's header, as JSON, and its tables."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.header = json.loads(file.metadata()["hosfl.optim"])
            self.tables = {name: file.get_tensor(name) for name in sorted(file.keys())}

    def write(self, path, text=None):
        text = json.dumps(self.header) if text is None else text
        sha256 = log_file.checksum(text, self.tables)
        path.write_bytes(save(self.tables, {"hosfl.optim": text, "sha256": sha256}))


@pytest.fixture
def parts(tmp_path):
    def of(case):
        (tmp_path / "log").write_bytes(WRITTEN[case])
        return Parts(tmp_path / "log")

    return of


def bits(model):
    return digest(p.contiguous() for p in model.parameters())


def refused(path, case, reason, model=None):
    """It says why, in time, and the model is as it was."""
    model = model or base(case)
    before, begin = bits(model), time.thread_time()
    with pytest.raises(LogError, match=reason):
        rebuild(model, path)
    assert time.thread_time() - begin < LIMIT
    assert bits(model) == before


@pytest.mark.parametrize("case", WRITTEN)
def test_logs_of_earlier_versions_rebuild(case, tmp_path):
    (tmp_path / "log").write_bytes(WRITTEN[case])
    model = base(case)
    rebuild(model, tmp_path / "log")
    order = (
        reversed([*model.parameters()]) if case == "bfloat16" else model[2].parameters() if case == "coarser" else None
    )
    trained = digest(order or model.parameters()).hex()
    assert trained == Parts(tmp_path / "log").header["trained"]
    assert bits(model) != bits(base(case))


def test_a_schedule_of_the_momentum_does_not_repeat_the_parameters(tmp_path):
    """In 100 chapters of 200 parameters: their numbers are there once."""
    torch.manual_seed(0)
    model = nn.ParameterList(torch.rand(2) for _ in range(200))
    before = copy.deepcopy(model)
    optimizer = ZOSGD(model.named_parameters(), 1e-3, momentum=0.5, model=model)
    for step in range(100):
        optimizer.param_groups[0]["momentum"] = 0.5 + step / 1000
        optimizer.step(lambda: sum(p.square().sum() for p in model))
    optimizer.log.save(tmp_path / "log")
    header = Parts(tmp_path / "log").header
    assert [chapter["groups"] is None for chapter in header["chapters"]] == [False] + 99 * [True]
    rebuild(before, tmp_path / "log")
    assert bits(before) == bits(model)


# --- one thing that is wrong --------------------------------------------------------------------------------------


def at(*path):
    """A mutation that puts a value at this place of the header."""

    def put(value):
        def change(parts):
            place = parts.header
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        return change

    return put


def drop(*path):
    def change(parts):
        place = parts.header
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def number(table, where, value):
    def change(parts):
        parts.tables[table][where] = value

    return change


def table(name, change):
    def changed(parts):
        parts.tables[name] = change(parts.tables[name])

    return changed


def both(*changes):
    def change(parts):
        for one in changes:
            one(parts)

    return change


def named_twice(parts):
    """A fifth parameter that is the first once more."""
    parts.header["parameters"].append(parts.header["parameters"][0])
    again = digest([base("lattice")[0].weight]).hex()
    parts.header["bases"].append([5, again])


NAN, INF = float("nan"), float("inf")
PUT, GROUP = ("chapters", 0, "puts", 0), ("chapters", 0, "groups", 0)
WRONG = [
    *(("lattice", at("format")(v), "format") for v in (3, True, 1.0, "1", None)),
    ("lattice", drop("format"), "format"),
    ("lattice", drop("trained"), "must have exactly"),
    ("lattice", at("more")(1), "must have exactly"),
    *(("lattice", at("seed")(v), "seed must be an integer") for v in (-1, 2**64, True, 3.0, "3", None, [])),
    *(("lattice", at("directions")(v), "directions must be") for v in (0, -1, True, 3.0, 2**64, 10**400)),
    *(("lattice", at("directions")(v), "chapter 0: a table of") for v in (2, 4, 2**40)),
    *(("lattice", at("pool")(v), "pool must be") for v in (1, 2, -1, True, 3.0, 2**64, None)),
    *(("lattice", at("pool")(v), "not the weights of the run") for v in (3, 20_000_000, 2**64 - 1)),
    *(("lattice", at("dist")(v), "dist must be") for v in ("normal", 1, None, ["gaussian"])),
    ("lattice", at("dist")("gaussian"), "exact moves are of"),
    ("lattice", at("momentum")(0.5), "exact moves are of"),
    *(
        ("momentum", at("momentum")(v), "momentum must be")
        for v in (1, -0.1, 1 - 2.0**-26, NAN, INF, True, "0", 10**400)
    ),
    ("lattice", drop("momentum"), "must have exactly"),
    *((case, at("format")(v), "must have exactly") for case, v in (("lattice", 2), ("momenta", 1))),
    ("momenta", drop("chapters", 0, "momenta"), "chapter 0 must have exactly"),
    *(("momenta", at("chapters", 0, "momenta")(v), "momenta must") for v in (0.5, [0.5], [0.5, 0, 0], {}, None)),
    *(
        ("momenta", at("chapters", 0, "momenta", 1)(v), "momentum must be")
        for v in (1, -0.1, 1 - 2.0**-26, NAN, INF, True, "0", 10**400)
    ),
    ("momenta", at("chapters", 0, "momenta", 1)(0.75), "not the weights of the run"),
    *((case, at("chapters", 0, "groups")(None), "groups must be a list") for case in ("lattice", "momenta")),
    ("lattice", at("chapters", 1, "groups")(None), "groups must be a list"),  # of format 1
    ("momenta", both(at("chapters", 1, "groups")(None), at("chapters", 1, "exact")(True)), "groups must be a list"),
    ("momenta", both(at("chapters", 1, "groups")(None), at("chapters", 1, "momenta")([0.5])), "momenta must have 2"),
    *(("lattice", at("first")(v), "first must be") for v in (-1, 2**64, True, 0.0)),
    *(("lattice", at("first")(v), "its steps go beyond") for v in (2**64 - 1, 2**64 - 7)),
    *(("lattice", at("parameters")(v), "parameters must be a list") for v in ({}, "abcd", None)),
    *(("lattice", at("parameters", 1)(v), "parameter 1 must") for v in (7, {}, [], ["a", "torch.float32"])),
    *(("lattice", at("parameters", 1, k)(v), "must be strings") for k in (0, 1) for v in (7, [], True)),
    ("lattice", at("parameters", 1, 1)(None), "must be strings"),
    ("lattice", at("parameters", 1, 2)(4), "shape must be a list"),
    *(("lattice", at("parameters", 1, 2, 0)(v), "a size must be") for v in (-1, 4.0, True, 2**63)),
    *(("lattice", at("parameters", 1, 2, 0)(v), "in the model") for v in (5, 2**62)),
    ("lattice", at("parameters", 1, 1)("torch.float16"), "a put: the dtype of parameter 1"),
    ("lattice", at("parameters", 1, 0)("bias"), "no parameter 'bias'"),
    ("lattice", at("parameters", 1, 0)(7), "must be strings"),
    ("lattice", named_twice, "are one in the model"),
    ("lattice", both(at("parameters", 0, 0)(None), at("parameters", 1, 2)([5])), "'0.bias' is"),
    ("lattice", at("bases")({}), "bases must be a list"),
    *(("lattice", at("bases", 0)(v), "a base must") for v in (4, [4], [4, "", 1], {})),
    *(("lattice", at("bases", 0, 0)(v), "the end of a base must") for v in (0, -1, 5, True, 4.0)),
    ("lattice", at("bases", 0, 0)(3), "bases must end at the 4 parameters"),
    ("lattice", at("bases")([]), "bases must end at the 4 parameters"),
    *(("lattice", at("bases", 0, 1)(v), "the digest of a base must") for v in ("", "0" * 63, "A" * 64, 5)),
    ("lattice", at("bases", 0, 1)("0" * 64), "not the model that the run began with"),
    *(("lattice", at("trained")(v), "trained must be 64 hex") for v in ("", "A" * 64, None)),
    ("lattice", at("trained")("0" * 64), "not the weights of the run"),
    ("lattice", at("chapters")({}), "chapters must be a list"),
    ("lattice", at("chapters", 1)([]), "chapter 1 must have exactly"),
    ("lattice", drop("chapters", 1, "puts"), "chapter 1 must have exactly"),
    ("lattice", at("chapters", 1, "more")(1), "chapter 1 must have exactly"),
    ("lattice", drop("chapters", 2), "3 tables, which are not those of its 2 chapters"),
    ("lattice", lambda parts: parts.tables.pop("000001"), "2 tables, which are not those of its 3 chapters"),
    ("lattice", lambda parts: parts.tables.update(more=torch.zeros(1, 1, 5)), "4 tables, which are not"),
    *(("lattice", at("chapters", 0, "exact")(v), "exact must be true or false") for v in (1, None, "true")),
    ("lattice", at("chapters", 0, "puts")({}), "puts must be a list"),
    *(("lattice", at(*PUT)(v), "a put must") for v in (0.5, [0.5], [0.5, [0], 1])),
    *(("lattice", at(*PUT, 0)(v), "quantum must be a") for v in (3.0, 0.0, -0.5, NAN, INF, True, "1", None, 10**400)),
    ("lattice", at(*PUT, 0)(2**64), "no multiples of the lattice's"),
    *(("lattice", at(*PUT, 0)(v), "the quantum's exponent") for v in (2.0**-150, 2.0**104, 2.0**1023)),
    *(("lattice", at(*PUT, 1)(v), "a number of a parameter must") for v in ([4], [-1], [True], [0.0], ["0"])),
    *(("lattice", at(*PUT, 1)(v), "must name parameters, each once") for v in ([], [0, 0])),
    *(("lattice", at(*PUT, 1)(v), "a put must be a list") for v in (0, "0", None)),
    ("lattice", at("chapters", 0, "groups")({}), "groups must be a list"),
    *(("lattice", at(*GROUP)(v), "a number of a parameter must") for v in ([4], [-1], [True], [0.0], ["0"])),
    *(("lattice", at(*GROUP)(v), "must name parameters, each once") for v in ([], [0, 0])),
    ("pool", at("chapters", 0, "groups")([[0, 1], [2, 1]]), "a parameter is in two groups"),
    ("lattice", at("chapters", 0, "puts")([]), "were not put on one lattice"),
    ("lattice", at(*PUT, 1)([0, 1, 2]), "were not put on one lattice"),
    ("lattice", at("chapters", 0, "puts")([[2.0**-21, [0, 1]], [2.0**-20, [2, 3]]]), "were not put on one lattice"),
    ("decay", at("chapters", 1, "puts")([]), "were not put on one lattice"),
    # What was on a lattice is on none after moves that round.
    ("lattice", both(at("chapters", 1, "exact")(False), at("chapters", 2, "puts")([])), "were not put on one lattice"),
    ("bfloat16", at("chapters", 0, "puts")([[2.0**-10, [0]]]), "a put: the dtype of parameter 0"),
    ("float16", at("chapters", 0, "exact")(True), "a group: the dtype of parameter 0"),
    ("momentum", at("parameters", 0, 1)("torch.int64"), "a group: the dtype of parameter 0"),
    *(("lattice", number("000000", (0, 0, k), v), "infinite or NaN") for k in range(5) for v in (NAN, INF, -INF)),
    *((case, number("000000", (0, 0, -2), -1.0), "a rate below 0") for case in ("lattice", "bfloat16")),
    *((case, number("000000", (0, 0, -1), 1.5), "a keep above 1") for case in ("lattice", "bfloat16")),
    ("lattice", number("000000", (0, 0, 4), 0.5), "weights that shrink"),
    *(("lattice", number("000000", (0, 0, 0), v), "no multiples of the lattice's") for v in (2.0**-22, 0.1, 1e-45)),
    *(("lattice", number("000000", (0, 0, 0), v), "a move beyond") for v in (8.000001, 3e38)),
    ("lattice", number("000000", (0, 0, slice(0, 2)), 6.0), "a move beyond"),
    (
        "lattice",
        number("000000", (0, 0, slice(3)), torch.tensor([8.0, 0, 0])),
        "step 0 carries weights beyond the lattice's limit 8",
    ),
    ("lattice", number("000000", (slice(2), 0, 0), 5.0), "step 1 carries weights beyond"),
    (
        "lattice",
        both(table("000000", torch.zeros_like), number("000000", (..., 4), 1.0), at(*PUT, 0)(2.0**-30)),
        "step 0",
    ),
    ("lattice", table("000000", lambda t: t[:0]), "chapter 0: a table of"),
    ("lattice", table("000000", lambda t: torch.cat([t, t], 1)), "chapter 0: a table of"),
    ("lattice", table("000001", lambda t: t[:, :, :4].contiguous()), "chapter 1: a table of"),
    ("pool", table("000002", lambda t: torch.zeros(0, 0, 4)), "chapter 2: a table of"),
    ("lattice", table("000000", torch.Tensor.double), "table '000000' is F64"),
    ("lattice", table("000000", torch.Tensor.int), "table '000000' is I32"),
    ("lattice", table("000000", torch.Tensor.half), "table '000000' is F16"),
    ("lattice", table("000000", torch.Tensor.flatten), "table '000000' is F32"),
    ("lattice", lambda parts: parts.tables.update(more=torch.zeros(1)), "table 'more' is F32"),
]


@pytest.mark.parametrize(("case", "change", "reason"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said_and_nothing_written(case, change, reason, parts, tmp_path):
    found = parts(case)
    change(found)
    found.write(tmp_path / "log")
    refused(tmp_path / "log", case, reason)


DEEP = "[" * 100_000 + "]" * 100_000
TEXTS = [
    ("", "no JSON"),
    ("\ufeff{}", "no JSON"),
    ("[]", "format None"),
    ("1", "format None"),
    ('{"format": 1}', "must have exactly"),
    (DEEP, "no JSON"),
    ('{"format": ' + DEEP + "}", "no JSON"),
    ('{"format": ' + "9" * 5000 + "}", "no JSON"),
    ('{"format": 1, "format": 1}', "there twice"),
    (" " * (log_file.LARGEST_HEADER + 1), "is the most"),
]


@pytest.mark.parametrize(("text", "reason"), TEXTS, ids=range(len(TEXTS)))
def test_headers_that_are_none(text, reason, parts, tmp_path):
    parts("lattice").write(tmp_path / "log", text)
    refused(tmp_path / "log", "lattice", reason)


def test_another_checksum(parts, tmp_path):
    found = parts("lattice")
    found.header["seed"] = 4
    save_file(found.tables, tmp_path / "log", {"hosfl.optim": json.dumps(found.header), "sha256": "0" * 64})
    refused(tmp_path / "log", "lattice", "checksum is wrong")
    save_file(found.tables, tmp_path / "log")
    refused(tmp_path / "log", "lattice", "checksum is wrong")


def test_a_key_that_is_there_twice(parts, tmp_path):
    found = parts("lattice")
    text = json.dumps(found.header)
    found.write(tmp_path / "log", text.replace('"exact": true', '"exact": true, "exact": true', 1))
    refused(tmp_path / "log", "lattice", "'exact'|there twice")


@pytest.mark.parametrize("shape", [[2**60, 0, 4], [2**63, 0, 4], [2**31, 0, 4], [1, 0, 2**62]])
def test_tables_of_no_numbers_and_huge_sizes(shape, tmp_path):
    data = WRITTEN["pool"]
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + size])
    head["000002"]["shape"] = shape
    text = json.dumps(head).encode()
    (tmp_path / "log").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    refused(tmp_path / "log", "pool", "table '000002' is F32")


def test_what_is_no_file(tmp_path):
    refused(tmp_path, "lattice", "no regular file")
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty", "lattice", "no log of an optimizer")
    with pytest.raises(FileNotFoundError):
        rebuild(base("lattice"), tmp_path / "none")


def test_a_parameter_that_the_kernels_refuse(tmp_path):
    (tmp_path / "log").write_bytes(WRITTEN["lattice"])
    model = base("lattice")
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    refused(tmp_path / "log", "lattice", "cannot move in this model", model)


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_weights_that_no_lattice_holds(value, parts, tmp_path):
    model = base("lattice")
    with torch.no_grad():
        model[0].bias[0] = value
    found = parts("lattice")
    found.header["bases"][0][1] = digest(model.parameters()).hex()
    found.write(tmp_path / "log")
    refused(tmp_path / "log", "lattice", "step 0 carries weights beyond", model)


@pytest.mark.parametrize("case", ["lattice", "momentum"])
@pytest.mark.parametrize("call", [2, 3])
def test_an_interrupt_leaves_the_model(case, call, tmp_path, monkeypatch):
    (tmp_path / "log").write_bytes(WRITTEN[case])
    (module, name), calls = {"lattice": (replay, "replay_"), "momentum": (terms, "update_")}[case], []
    kernel = getattr(module, name)

    def interrupted(tensors, *args, **kwargs):
        calls.append(len(tensors))
        kernel(tensors, *args, **kwargs)
        if len(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupted)
    model = base(case)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        rebuild(model, tmp_path / "log")
    assert bits(model) == before
    assert len(calls) == call


def test_moves_that_together_leave_the_lattice_take_more_passes(parts, tmp_path, monkeypatch):
    """Nearly half the lattice, there and back: no step leaves it, all of them might."""
    found = parts("lattice")
    header = found.header
    header.update(directions=1, pool=1, chapters=header["chapters"][:1])
    moves = torch.tensor([3.5, -3.5] * 4)
    found.tables = {"000000": torch.stack([moves, torch.ones(8), torch.ones(8)], 1)[:, None].contiguous()}
    header["trained"] = digest(base("lattice").parameters()).hex()  # eighths: on the lattice already
    found.write(tmp_path / "log")
    lengths, kernel = [], replay.replay_

    def counted(tensors, seeds, *args, **kwargs):
        lengths.append(len(seeds))
        kernel(tensors, seeds, *args, **kwargs)

    monkeypatch.setattr(replay, "replay_", counted)
    model = base("lattice")
    rebuild(model, tmp_path / "log")
    assert bits(model) == bits(base("lattice"))
    assert lengths[0] == 0
    assert sum(lengths) == 8
    assert len(lengths) > 4


# --- many things --------------------------------------------------------------------------------------------------

VALUES = (None, True, False, 0, 1, -1, 2, 3, 7, 0.0, 0.5, 1.0, -1.5, 1e300, NAN, INF, 2**31, 2**63, 2**64 - 1, 2**64)
VALUES += (
    10**400,
    20_000_000,
    "",
    "a",
    "0.weight",
    "gaussian",
    "rademacher",
    "torch.bfloat16",
    "0" * 64,
    [],
    {},
    [0],
    [[0]],
)
VALUES += ([0, 0], [0.5, [0]], 2.0**-149, 2.0**-30, 2.0**-20, 2.0**103, 2.0**104)


def places(value):
    """Every container in the header, and what leads to something in it."""
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from places(value[key])


def value(parts, chance):
    place, key = chance.choice([*places(parts.header)])
    place[key] = copy.deepcopy(chance.choice(VALUES))


def exchanged(parts, chance):
    """Two places of the header, each with the other's value."""
    (a, i), (b, j) = chance.sample([*places(parts.header)], 2)
    a[i], b[j] = copy.deepcopy(b[j]), copy.deepcopy(a[i])


def removed(parts, chance):
    place, key = chance.choice([*places(parts.header)])
    del place[key]


def repeated(parts, chance):
    place, key = chance.choice([pair for pair in places(parts.header) if isinstance(pair[0], list)])
    place.insert(chance.randrange(len(place) + 1), copy.deepcopy(place[key]))


def nearby(parts, chance):
    """A number that is a little off."""
    pairs = [(p, k) for p, k in places(parts.header) if type(p[k]) in (int, float)]
    place, key = chance.choice(pairs)
    place[key] = chance.choice((place[key] + 1, place[key] - 1, place[key] * 2, place[key] / 2, -place[key]))


def elements(parts, chance):
    found = parts.tables[chance.choice([*parts.tables])].view(-1)
    for _ in range(chance.choice((1, 1, 3)) if len(found) and found.is_floating_point() else 0):
        at = chance.randrange(len(found))
        found[at] = chance.choice((*NUMBERS, 0, 1, 8)) if chance.random() < 0.5 else -found[at]


def resized(parts, chance):
    name = chance.choice([*parts.tables])
    shape = [chance.choice((n, n, n + 1, max(0, n - 1), 0, 2 * n)) for n in parts.tables[name].shape]
    dtype = chance.choice((torch.float32, torch.float32, torch.float32, torch.float64, torch.int32))
    parts.tables[name] = torch.zeros(shape[: chance.choice((3, 3, 3, 2))], dtype=dtype)


def shuffled(parts, chance):
    """Tables that are gone, more, or in another order."""
    names = [*parts.tables]
    name, other = chance.choice(names), chance.choice((*names, "more", f"{len(names):06}", "0"))
    parts.tables[other] = parts.tables[name].clone()
    if chance.random() < 0.5:
        del parts.tables[name]


MUTATIONS = (value, value, exchanged, removed, repeated, nearby, nearby, elements, elements, resized, shuffled)
BYTES = (flip, truncate, extend, remove)


def fuzz(cases, count, seed, folder):
    """Returns why logs were refused, shortened, and how many made the right weights."""
    chance, path = random.Random(seed), folder / "log"
    right, reasons = 0, set()
    trained = {}
    for case in cases:
        path.write_bytes(WRITTEN[case])
        model = base(case)
        rebuild(model, path)
        trained[case] = bits(model)
    models = {case: (base(case), bits(base(case))) for case in cases}
    for _ in range(count):
        case = chance.choice(cases)
        path.write_bytes(WRITTEN[case])
        if chance.random() < 0.2:
            path.write_bytes(bytes(chance.choice(BYTES)(bytearray(WRITTEN[case]), chance)))
        else:
            found = Parts(path)
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                mutation = chance.choice(MUTATIONS)
                if found.tables or mutation not in (elements, resized, shuffled):
                    mutation(found, chance)
            found.write(path)
        model, before = models[case]
        begin, why = time.thread_time(), None
        try:
            rebuild(model, path)
        except LogError as error:
            why = str(error).removeprefix(str(path))[:60]
        assert time.thread_time() - begin < LIMIT
        assert bits(model) == (before if why else trained[case]), (case, why)
        if why:
            reasons.add(why)
        else:
            right += 1
            models[case] = base(case), before
    return reasons, right


def test_mutated_logs_are_refused_or_right(tmp_path):
    fuzz(list(WRITTEN), 20, 99, tmp_path)  # what is imported on first use is not the logs'
    before = grown()
    reasons, right = fuzz(list(WRITTEN), 400, 0, tmp_path)
    assert len(reasons) > 60  # the mutations are not all stopped by the same few checks
    assert right > 0
    assert grown() - before < 2**26


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITTEN)
def test_ten_thousand_mutated_logs_are_refused_or_right(case, tmp_path):
    before = grown()
    fuzz([case], 1500, 1, tmp_path)
    assert grown() - before < 2**26
